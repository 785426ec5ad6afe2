"""The comparison as a page, as Markdown and as LaTeX, drawn from the content of comparison.json and nothing else."""

from __future__ import annotations

import math
from typing import Any

from memdec.evaluation.charts import Bar, Line, bar_chart, line_chart
from memdec.evaluation.pages import page_template
from memdec.readable import bounds, count, duration, number, percent, size

STYLES = {
    "base": "c-base",
    "rag": "c-knn",
    "knn-lm": "c-knn",
    "dapt": "c-memory",
    "lora": "c-memory",
    "second-model": "c-memory",
    "lm-memory": "c-memory",
    "adapted-alone": "c-memory",
    "adapted": "c-memory",
    "memory-alone": "c-memory",
    "memory": "c-mixture",
    "dapt+memory": "c-mixture",
}
# The mixtures' curves, each in a colour of its own.
CURVES = {"memory": "c-mixture", "dapt+memory": "c-knn", "lm-memory": "c-memory", "second-model": "c-base"}
QUALITY = ("perplexity", "vs base", "95% interval", "α or λ", "memory vs it", "general ppl", "vs base, general")
COST = ("latency", "kept", "trained", "training", "FLOPs")
COLUMNS = ("method", *QUALITY, *COST)


def cells(entry: dict[str, Any]) -> dict[str, str]:
    """The table's cells of one row, as text, by column."""
    interval, latency = entry["interval"], entry["latency"]
    against = "" if entry["memory_relative"] is None else percent(entry["memory_relative"])
    if entry["memory_interval"] is not None:
        against += f" ({bounds(entry['memory_interval'])})"
    ratio = None if latency is None else latency["ratio"]
    is_base = entry["method"] == "base"
    return {
        "method": entry["label"],
        "perplexity": number(entry["perplexity"]),
        "vs base": "" if is_base else percent(entry["relative"]),
        "95% interval": "" if interval is None else bounds(interval),
        "α or λ": "" if entry["weight"] is None else f"{entry['weight']:.2f}",
        "memory vs it": against,
        "general ppl": number(entry["general_perplexity"]),
        "vs base, general": "" if is_base else percent(entry["general_relative"]),
        "latency": "–" if ratio is None else f"{ratio:.2f}×",
        "kept": size(entry["kept_bytes"]),
        "trained": count(entry["trained_parameters"]),
        "training": duration(entry["training_seconds"]),
        "FLOPs": "–" if not entry["training_flops"] else f"{entry['training_flops']:.1e}",
    }


def markdown_table(comparison: dict[str, Any]) -> str:
    """A GitHub-flavoured table with a line of what it was measured on."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells(entry)[column] for column in COLUMNS) + " |" for entry in comparison["entries"]),
        "",
        caption(comparison),
    ]
    if comparison["bases"]:
        made = [base_cells(entry) for entry in comparison["bases"]]
        lines += [
            "",
            "| " + " | ".join(BASE_COLUMNS) + " |",
            "| --- |" + " ---: |" * (len(BASE_COLUMNS) - 1),
            *("| " + " | ".join(row[column] for column in BASE_COLUMNS) + " |" for row in made),
        ]
    return "\n".join(lines) + "\n"


BASE_COLUMNS = ("base", "parameters", "alone", "+ memory", "vs alone", "95% interval", "α", "at the memory's own α")


def base_cells(entry: dict[str, Any]) -> dict[str, str]:
    """The cells of one row of the table by base, as text, by column."""
    interval = entry["interval"]
    return {
        "base": entry["base"],
        "parameters": count(entry["parameters"]),
        "alone": number(entry["perplexity"]),
        "+ memory": number(entry["with_memory"]),
        "vs alone": percent(entry["relative"]),
        "95% interval": "–" if interval is None else bounds(interval),
        "α": f"{entry['weight']:.2f}",
        "at the memory's own α": f"{number(entry['with_recommended'])} ({entry['recommended_weight']:.2f})",
    }


_LATEX = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "&": r"\&",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "−": r"$-$",
    "×": r"$\times$",
    "…": r"\,\dots\,",
    "–": "--",
}


def latex(text: str) -> str:
    """Text with what LaTeX would read as its own escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(comparison: dict[str, Any]) -> str:
    """A booktabs table of its own; needs ``\\usepackage{booktabs}``."""
    rows = [" & ".join(latex(cells(entry)[column]) for column in COLUMNS) + r" \\" for entry in comparison["entries"]]
    return (
        "\n".join(
            [
                r"\begin{tabular}{l" + "r" * (len(COLUMNS) - 1) + "}",
                r"\toprule",
                " & ".join(latex(column) for column in COLUMNS) + r" \\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                "% " + caption(comparison).replace("\n", " "),
            ]
        )
        + "\n"
    )


def caption(comparison: dict[str, Any]) -> str:
    """What the table was measured on and with, in a few lines."""
    texts, settings, facts = comparison["texts"], comparison["settings"], comparison["environment"]
    budget = comparison["budget"]
    parts = ", ".join(
        f"{name} {budget[name]:.1e}" for name in ("adaptation", "datastore", "search", "training") if budget.get(name)
    )
    commit = f", commit {facts['commit']}" if facts.get("commit") else ""
    machine = facts.get("device_name") or f"{facts.get('threads')} threads"
    return (
        f"{texts['test']['scored']:,} tokens of {texts['test']['documents']:,} held-out documents of "
        f"{texts['test']['source']}; sliding window {settings['context']}/{settings['stride']}; tuned on "
        f"{texts['validation']['scored']:,} tokens of validation text; general text: {texts['general']['source']}, "
        f"{texts['general']['scored']:,} tokens. Base {comparison['models']['base']}, {facts.get('dtype')}, "
        f"{machine}, torch {facts.get('torch')}, transformers {facts.get('transformers')}, memdec "
        f"{facts.get('memdec')}{commit}. Greatest budget {budget['total']:.2e} operations (the "
        f"memory's: {parts}). Latency: {settings['latency']['new_tokens']} tokens, over the base of this run."
    )


def bars(comparison: dict[str, Any], key: str, remark: str, caption: str) -> str:
    """A bar a row, of the figure `key`, with the change `remark` against the base."""
    return bar_chart(
        [
            Bar(
                entry["label"],
                math.inf if entry[key] is None else entry[key],
                "" if entry["method"] == "base" else percent(entry[remark]),
                STYLES[entry["method"]],
            )
            for entry in comparison["entries"]
        ],
        caption,
    )


def perplexity_chart(comparison: dict[str, Any]) -> str:
    """The table's first column as bars."""
    return bars(comparison, "perplexity", "relative", "Perplexity of the held-out text by method")


def render_comparison(comparison: dict[str, Any]) -> str:
    """The self-contained page for ``comparison``, the parsed content of a comparison.json."""
    entries = comparison["entries"]
    by_method = {entry["method"]: entry for entry in entries}

    timed = [entry for entry in entries if entry["latency"] is not None and entry["latency"]["ratio"] is not None]
    latency = [Bar(e["label"], e["latency"]["ratio"], "× the base", STYLES[e["method"]]) for e in timed]
    curves = [
        Line(by_method[method]["label"], [(a, p) for a, p in comparison["curves"][method] if p is not None], style)
        for method, style in CURVES.items()
        if method in comparison["curves"]
    ]
    return str(
        page_template("comparison.html.jinja").render(
            c=comparison,
            tables=[("How well it predicts", QUALITY), ("What it costs", COST)],
            rows=[(entry, cells(entry)) for entry in entries],
            base_columns=BASE_COLUMNS,
            base_rows=[base_cells(entry) for entry in comparison["bases"]],
            by_method=by_method,
            best=min(entries, key=lambda e: math.inf if e["perplexity"] is None else e["perplexity"])["method"],
            styles=STYLES,
            perplexities=perplexity_chart(comparison),
            general=bars(
                comparison, "general_perplexity", "general_relative", "Perplexity of text outside the domain by method"
            ),
            latency=bar_chart(latency, "Decode latency over the base's") if latency else "",
            curves=line_chart(
                curves,
                "Perplexity of the mixtures over α, on the test text",
                "α: 0 is the first model alone, 1 the second",
                "perplexity",
            )
            if curves
            else "",
            caption=caption(comparison),
        )
    )
