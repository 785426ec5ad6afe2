"""The templates that our pages are made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from memdec import readable


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
    for figure in (readable.number, readable.percent, readable.size):
        environment.filters[figure.__name__] = figure
    environment.filters["log2"] = math.log2
    return environment.get_template(name)
