"""Figures as people read them, in tables, pages and messages."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 2) -> str:
    """A perplexity: three or four digits, or so many after the point.

    >>> number(12.345), number(123.45), number(54321.0), number(None)
    ('12.35', '123.5', '54,321', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if value < 100 else f"{value:.1f}"


def percent(value: float | None, digits: int = 1, sign: bool = True) -> str:
    """A share or a change.

    >>> percent(-0.358), percent(0.02), percent(0.02, 0, sign=False)
    ('−35.8%', '+2.0%', '2%')
    """
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}%}"
    if value < 0:
        return f"−{text}"
    return f"+{text}" if sign and value > 0 else text


def bounds(interval: Sequence[float | None]) -> str:
    """Both ends of an interval of changes.

    >>> bounds((-0.045, 0.012))
    '−4.5% … +1.2%'
    """
    return " … ".join(percent(end) for end in interval)


def _three(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def count(value: float) -> str:
    """How many, in thousands and millions.

    >>> count(0), count(1234), count(134_515_008)
    ('–', '1.23k', '135M')
    """
    if not value:
        return "–"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_three(value / limit)}{suffix}"
    return _three(value)


def size(value: float | None) -> str:
    """Bytes, in steps of 1000.

    >>> size(0), size(999), size(123_456), size(999_999), size(3.2e12)
    ('–', '999 B', '123 kB', '1000 kB', '3.2 TB')
    """
    if not value:
        return "–"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{_three(value / limit)} {unit}"
    return f"{_three(value)} B"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0), duration(40), duration(600), duration(7200), duration(3e6)
    ('–', '40 s', '10 min', '2 h', '833 h')
    """
    if not seconds:
        return "–"
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{_three(seconds / 3600)} h"
