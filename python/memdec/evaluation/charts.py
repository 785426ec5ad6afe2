"""Plots as inline SVG. Colours are CSS variables of the page, so that one drawing serves a light and a dark screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from memdec.evaluation.pages import page_template
from memdec.readable import number


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, its value, a remark behind the value, and its colour's CSS class."""

    label: str
    value: float
    remark: str
    style: str


@dataclass(frozen=True)
class Interval:
    """A value between two bounds (None: it has none), what it stands for and its colour's CSS class."""

    label: str
    value: float
    bounds: tuple[float, float] | None
    style: str


@dataclass(frozen=True)
class Line:
    """One line of a plot: its name, its points in order of x, and its colour's CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def bar_chart(bars: Sequence[Bar], caption: str) -> str:
    """Horizontal bars from 0, each labelled on the left and with its value at its end."""
    left = max(110, 20 + round(7.2 * max(len(bar.label) for bar in bars)))
    right = 70 + 7 * max(len(bar.remark) for bar in bars)
    row, width = 30, max(560, left + 160 + right)
    height = row * len(bars) + 8
    longest = max((bar.value for bar in bars if math.isfinite(bar.value)), default=1.0) or 1.0
    parts = [_open(width, height, caption)]
    for index, bar in enumerate(bars):
        top = index * row + 4
        value = bar.value if math.isfinite(bar.value) else longest
        length = max(1.0, value / longest * (width - left - right))
        middle = top + row / 2
        parts.append(
            f'<text class="label" x="{left - 10}" y="{middle:.1f}" text-anchor="end">{escape(bar.label)}</text>'
        )
        parts.append(
            f'<rect class="{bar.style}" x="{left}" y="{top + 5}" width="{length:.1f}" height="{row - 12}" rx="3"/>'
        )
        parts.append(
            f'<text class="value" x="{left + length + 8:.1f}" y="{middle:.1f}">{number(bar.value)}'
            f'<tspan class="remark" dx="8">{escape(bar.remark)}</tspan></text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def interval_chart(rows: Sequence[Interval], caption: str, x_label: str) -> str:
    """Values as dots and their bounds as lines, one below the other, over a line at 0."""
    left, right, row, bottom, width = 20 + round(7.2 * max(len(one.label) for one in rows)), 24, 24, 44, 760
    ends = [0.0] + [x for one in rows for x in (one.value, *(one.bounds or ()))]
    marks = ticks(min(ends), max(ends), 6)
    height = row * len(rows) + bottom + 8

    def at(x: float) -> float:
        return left + (x - marks[0]) / (marks[-1] - marks[0]) * (width - left - right)

    foot = height - bottom
    parts = [_open(width, height, caption)]
    for mark in marks:
        kind = "axis" if mark == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="4" y2="{foot}"/>')
        parts.append(
            f'<text class="tick" x="{at(mark):.1f}" y="{foot + 14}" text-anchor="middle">{tick_text(mark)}</text>'
        )
    for index, one in enumerate(rows):
        y = index * row + 4 + row / 2
        parts.append(f'<text class="label" x="{left - 10}" y="{y:.1f}" text-anchor="end">{escape(one.label)}</text>')
        if one.bounds is not None:
            low, high = one.bounds
            parts.append(f'<line class="line {one.style}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{one.style}" cx="{at(one.value):.1f}" cy="{y:.1f}" r="4"/>')
    parts.append(
        f'<text class="axis-name" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )
    return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    caption: str,
    x_label: str,
    y_label: str,
    *,
    markers: Sequence[tuple[float, float, str]] = (),  # (x, y, label)
    rules: Sequence[tuple[float, str]] = (),  # (y, label): horizontal lines across the plot
    from_zero: bool = False,
) -> str:
    """Lines over a grid with round tick values; one line needs no legend, more are named in one above the plot."""
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return ""
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [y for y, _ in rules]
    x_ticks = ticks(min(xs), max(xs), 6)
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    width, right, bottom = 560, 16, 44
    left = max(62, 40 + 7 * max(len(tick_text(tick)) for tick in y_ticks))  # the axis's name, then its ticks
    legend = legend_places(lines, left, width - right) if len(lines) > 1 else []
    top = 14 + 20 * len({y for _, y in legend})
    height = 266 + top
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])
    if y_high <= y_low:
        y_high = y_low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        down = height - bottom - (y - y_low) / (y_high - y_low) * (height - bottom - top)
        return across, down

    parts = [_open(width, height, caption)]
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for tick in x_ticks:
        if x_low - 1e-9 <= tick <= x_high + 1e-9:
            x, _ = at(tick, y_low)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">'
                f"{tick_text(tick)}</text>"
            )
    parts.append(
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>'
        f'<text class="axis-name" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis-name" transform="translate(14 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for value, label in rules:
        _, y = at(x_low, value)
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="rule-name" x="{left + 6}" y="{y - 8:.1f}">{escape(label)}</text>')
    for line in lines:
        path = " ".join(
            f"{'M' if index == 0 else 'L'}{x:.1f} {y:.1f}"
            for index, (x, y) in enumerate(at(*p) for p in line.points if math.isfinite(p[1]))
        )
        parts.append(f'<path class="line {line.style}" d="{path}"><title>{escape(line.name)}</title></path>')
        if len(line.points) == 1:
            x, y = at(*line.points[0])
            parts.append(f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    for x_value, y_value, label in markers:
        x, y = at(x_value, y_value)
        anchor = "end" if x > (left + width) / 2 else "start"
        above = y - top > 30
        parts.append(f'<circle class="marker" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(
            f'<text class="marker-name" x="{x + (8 if anchor == "start" else -8):.1f}" '
            f'y="{y + (-14 if above else 18):.1f}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    for line, (across, y) in zip(lines, legend, strict=False):
        parts.append(f'<line class="line {line.style}" x1="{across}" x2="{across + 18}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="legend" x="{across + 24}" y="{y}">{escape(line.name)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def legend_places(lines: Sequence[Line], left: float, right: float) -> list[tuple[float, int]]:
    """Where each line's name begins above the plot, (x, y); a name that would go beyond `right` begins a new row."""
    places: list[tuple[float, int]] = []
    across, y = left, 14
    for line in lines:
        wide = 52 + 7.4 * len(line.name)
        if places and across + wide - 28 > right:
            across, y = left, y + 20
        places.append((across, y))
        across += wide
    return places


def _open(width: int, height: int, caption: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption, quote=True)}" '
        f'style="max-width:{width}px">'
    )


def svg_file(chart: str) -> str:
    """A chart as a file of its own, with the colours that it has in a page."""
    style = page_template("charts.css.jinja").render()
    head, _, rest = chart.partition(">")
    paper = '<rect width="100%" height="100%" style="fill: var(--card)"/>'
    font = "svg { font-family: system-ui, sans-serif; }"
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}{font}</style>{paper}{rest}\n'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``, about so many."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's value without needless digits."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"
