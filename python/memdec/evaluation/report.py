"""The report: one HTML file without outside resources, drawn from the content of evaluation.json and nothing else."""

from __future__ import annotations

import math
from typing import Any

from memdec.evaluation.charts import Bar, Line, bar_chart, line_chart
from memdec.evaluation.pages import page_template
from memdec.readable import number, percent

STYLES = {"base": "c-base", "knn-lm": "c-knn", "memory": "c-memory", "base+memory": "c-mixture"}
# Nats of gain or loss at which a token's colour is full.
FULL_COLOUR = 3.0
COLOUR_STEPS = 8


def render_report(evaluation: dict[str, Any]) -> str:
    """The page for ``evaluation``, the parsed content of an evaluation.json."""
    measures = {entry["method"]: entry for entry in evaluation["measures"]}
    training = training_charts(evaluation["training"])
    page: str = page_template("report.html.jinja").render(
        e=evaluation,
        measures=evaluation["measures"],
        by_method=measures,
        best=min(evaluation["measures"], key=lambda m: math.inf if m["perplexity"] is None else m["perplexity"]),
        styles=STYLES,
        bars=perplexity_bars(evaluation["measures"]),
        curve=alpha_chart(evaluation, measures),
        training=training,
        shown=coloured(evaluation["shown"]),
        legend=[step_class(value) for value in range(-COLOUR_STEPS, COLOUR_STEPS + 1, 2)],
        full_colour=FULL_COLOUR,
    )
    return page


def perplexity_bars(measures: list[dict[str, Any]]) -> str:
    """The sliding-window perplexities as bars."""
    bars = [
        Bar(
            entry["label"],
            math.inf if entry["perplexity"] is None else entry["perplexity"],
            "" if entry["method"] == "base" else percent(entry["relative"]),
            STYLES[entry["method"]],
        )
        for entry in measures
    ]
    return bar_chart(bars, "Perplexity by method, lower is better")


def alpha_chart(evaluation: dict[str, Any], measures: dict[str, Any]) -> str:
    """The mixture's perplexity over α, with the recommended α marked and the kNN-LM as a rule."""
    curve = [(alpha, value) for alpha, value in evaluation["alpha_curve"] if value is not None]
    if not curve:
        return ""
    alpha = evaluation["settings"]["alpha"]
    at = min(curve, key=lambda point: abs(point[0] - alpha))
    rules = []
    if "knn-lm" in measures and measures["knn-lm"]["perplexity"] is not None:
        rules.append((float(measures["knn-lm"]["perplexity"]), f"kNN-LM {number(measures['knn-lm']['perplexity'])}"))
    return line_chart(
        [Line("base + memory", curve, "c-mixture")],
        "Perplexity of the mixture over alpha",
        "α: 0 is the base alone, 1 the memory alone",
        "perplexity",
        markers=[(at[0], at[1], f"α = {alpha:g}: {number(at[1])}")],
        rules=rules,
    )


# What training logs, and how the plots name it: (keys that may hold it, name, CSS class).
_LOSSES = (
    (("loss", "total"), "loss", "c-mixture"),
    (("kl",), "KL to the kNN teacher", "c-knn"),
    (("ce",), "cross-entropy", "c-memory"),
)
_HELD_OUT = (
    (("validation_mixture_perplexity", "mixture_perplexity"), "base + memory", "c-mixture"),
    (("validation_memory_perplexity", "memory_perplexity"), "memory alone", "c-memory"),
    (("validation_base_perplexity", "base_perplexity"), "base", "c-base"),
)


def training_charts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Loss and validation perplexity over steps, as far as training logged them; [{title, svg}]."""
    charts = []
    for title, y_label, series in (
        ("Training loss", "nats a token", _LOSSES),
        ("Perplexity on validation text", "perplexity", _HELD_OUT),
    ):
        lines = [line for keys, name, style in series if (line := _series(rows, keys, name, style)).points]
        if lines:
            charts.append({"title": title, "svg": line_chart(lines, title, "step", y_label)})
    return charts


def _series(rows: list[dict[str, Any]], keys: tuple[str, ...], name: str, style: str) -> Line:
    for key in keys:
        points = [
            (float(row["step"]), float(row[key]))
            for row in rows
            if isinstance(row.get("step"), int | float) and isinstance(row.get(key), int | float)
        ]
        if points:
            return Line(name, sorted(points), style)
    return Line(name, [], style)


def coloured(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shown documents with a CSS class and a tooltip a token; the class says how much the mixture gained."""
    documents = []
    for document in shown:
        tokens = []
        for token in document["tokens"]:
            base, mixture = token.get("base"), token.get("base+memory")
            gain = None if base is None or mixture is None else mixture - base
            tokens.append({"text": token["text"], "style": gain_class(gain), "tip": _tip(token, gain)})
        documents.append({"name": document["name"], "tokens": tokens})
    return documents


def gain_class(gain: float | None) -> str:
    """The CSS class of a gain in nats: g1 … g8 for gains, l1 … l8 for losses, "" for less than half a step."""
    if gain is None:
        return ""
    return step_class(round(max(-1.0, min(1.0, gain / FULL_COLOUR)) * COLOUR_STEPS))


def step_class(step: int) -> str:
    """The CSS class of a step from −8 (loss) to 8 (gain)."""
    return "" if step == 0 else f"{'g' if step > 0 else 'l'}{abs(step)}"


def _tip(token: dict[str, Any], gain: float | None) -> str:
    names = (("base", "base"), ("memory", "memory"), ("base+memory", "mixture"), ("knn-lm", "kNN-LM"))
    parts = [f"{name} {_probability(token[key])}" for key, name in names if token.get(key) is not None]
    if gain is not None:
        parts.append(f"gain {gain:+.2f} nats")
    return "   ".join(parts)


def _probability(log_prob: float) -> str:
    value = math.exp(log_prob)
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"
