"""What our pages share: their templates, and numbers as people read them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def page_template(name: str) -> Any:
    """The jinja template ``name`` beside this file, with the filters that our pages use."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["size"] = size
    environment.filters["log2"] = math.log2
    return environment.get_template(name)


def number(value: float | None, digits: int = 2) -> str:
    """A perplexity for people: three or four digits, or so many after the point."""
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if value < 100 else f"{value:.1f}"


def percent(value: float | None, digits: int = 1, sign: bool = True) -> str:
    """``-0.358`` is ``−35.8%``."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}%}"
    if value < 0:
        return f"−{text}"
    return f"+{text}" if sign and value > 0 else text


def size(value: float | None) -> str:
    """Bytes for people."""
    from memdec.cli.inspect import human_bytes

    return human_bytes(int(value)) if value else "–"
