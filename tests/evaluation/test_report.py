"""The report says what the JSON says, needs nothing from outside, and survives odd text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from memdec import readable
from memdec.evaluation import charts, report


def measure(method: str, label: str, perplexity: float, base: float = 20.0) -> dict:
    return {
        "method": method,
        "label": label,
        "perplexity": perplexity,
        "relative": perplexity / base - 1,
        "interval": None if method == "base" else [perplexity / base - 1.05, perplexity / base - 0.95],
        "per_document": {
            "word_perplexity": perplexity * 3,
            "byte_perplexity": 1.9,
            "bits_per_byte": 0.93,
            "token_perplexity": perplexity,
        },
        "copied_perplexity": perplexity / 2,
        "novel_perplexity": perplexity * 1.2,
        "seconds": 2.0,
        "parameters": 135_000_000,
        "extra_bytes": 0 if method == "base" else 270_000_000,
    }


@pytest.fixture
def evaluation() -> dict:
    token = {
        "text": "</span><script>alert(1)</script>",
        "base": -3.0,
        "memory": -0.5,
        "base+memory": -0.75,
        "knn-lm": -1.0,
    }
    worse = {"text": "worse", "base": -0.1, "memory": -9.0, "base+memory": -3.5, "knn-lm": -0.2}
    first = {"text": "first", "base": None, "memory": None, "base+memory": None, "knn-lm": None}
    return {
        "format": "memdec.evaluation",
        "version": 1,
        "environment": {"memdec": "0.1.0", "commit": None, "threads": 2, "device": "cpu"},
        "models": {"base": "some/base", "memory": "run/memory", "datastore": "run/datastore", "provenance": {}},
        "text": {
            "source": "run/corpus",
            "tokens": 1001,
            "tokens_found": 1001,
            "documents": 7,
            "unseen": True,
            "scored": {"sliding window": 1000, "per document": 994},
            "words": 500,
            "bytes": 4000,
        },
        "settings": {
            "context": 1024,
            "stride": 512,
            "alpha": 0.62,
            "alpha_source": "given",
            "knn": {"k": 64, "temperature": 2.5, "weight": 0.35, "source": "chosen on validation text"},
            "batch_size": 4,
            "copied_run": 16,
            "bootstrap_seed": 0,
        },
        "measures": [
            measure("base", "base", 20.0),
            measure("knn-lm", "kNN-LM", 11.11),
            measure("memory", "memory alone", 13.13),
            measure("base+memory", "base + memory", 12.12),
        ],
        "alpha_curve": [[0.0, 20.0], [0.5, 12.5], [0.62, 12.12], [1.0, 13.13]],
        "copied_share": 0.21,
        "shown": [{"name": "a & b.txt", "tokens": [first, token, worse]}],
        "generations": [{"prompt": "<b>prompt</b>", "base": "one", "base+memory": "two", "truth": "three"}],
        "training": [{"step": s, "loss": 3 - s / 5, "kl": 1.0, "ce": 2.0} for s in range(1, 6)]
        + [{"step": 5, "mixture_perplexity": 12.0, "memory_perplexity": 13.0, "base_perplexity": 20.0}],
        "notes": ["The base is quantised."],
    }


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_is_one_page_without_outside_resources(evaluation):
    page = report.render_report(evaluation)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    for tag, attributes in tags.found:
        assert tag not in {"link", "img", "iframe", "object", "embed"}, tag
        assert not {"src", "href", "srcset"} & set(attributes), (tag, attributes)
    assert "url(" not in page and "@import" not in page and "http" not in page


def test_every_figure_of_the_table_is_the_jsons(evaluation):
    page = report.render_report(evaluation)
    text = re.sub(r"<[^>]+>", " ", page)
    for entry in evaluation["measures"]:
        for key in ("perplexity", "copied_perplexity", "novel_perplexity"):
            assert readable.number(entry[key]) in text, (entry["method"], key)
        assert readable.number(entry["per_document"]["word_perplexity"]) in text
        if entry["method"] != "base":
            assert readable.percent(entry["relative"]) in text
    assert "0.62" in text and "k" in text and "2.5" in text and "1,001" in text
    assert "The base is quantised." in text


def test_text_is_escaped(evaluation):
    page = report.render_report(evaluation)
    assert "<script>alert" not in page and "<b>prompt" not in page
    assert page.count("<script>") == 1
    assert "a &amp; b.txt" in page


def test_tokens_are_coloured_by_what_the_mixture_gained(evaluation):
    (document,) = report.coloured(evaluation["shown"])
    first, gained, lost = document["tokens"]
    assert first["style"] == "" and first["tip"] == ""
    assert gained["style"] == report.step_class(round(2.25 / report.FULL_COLOUR * report.COLOUR_STEPS)) == "g6"
    assert lost["style"] == "l8"  # −3.4 nats: beyond the scale's end
    assert f"base {math.exp(-3.0):.1%}" in gained["tip"] and f"memory {math.exp(-0.5):.1%}" in gained["tip"]
    assert f"mixture {math.exp(-0.75):.1%}" in gained["tip"] and "gain +2.25 nats" in gained["tip"]
    page = report.render_report(evaluation)
    for style in ("g6", "l8"):
        assert f'class="{style}"' in page and f".{style} {{" in page


@pytest.mark.parametrize(
    "missing", ["infinite", "knn-lm", "memory", "training", "per_document", "copied", "generations", "shown"]
)
def test_parts_that_were_not_measured_are_left_out(evaluation, missing):
    if missing == "knn-lm":
        evaluation["measures"] = [m for m in evaluation["measures"] if m["method"] != "knn-lm"]
        evaluation["settings"]["knn"] = None
    elif missing == "infinite":  # a kNN-LM with all the weight, and a token that no neighbour held
        evaluation["measures"][1].update(perplexity=None, relative=None, interval=[None, None], novel_perplexity=None)
        evaluation["measures"][1]["per_document"]["byte_perplexity"] = None
    elif missing == "memory":
        evaluation["measures"] = [m for m in evaluation["measures"] if "memory" not in m["method"]]
        evaluation["alpha_curve"] = []
        evaluation["settings"]["alpha"] = evaluation["settings"]["alpha_source"] = None
    elif missing == "per_document":
        for entry in evaluation["measures"]:
            entry["per_document"] = None
    elif missing == "copied":
        evaluation["copied_share"] = None
    else:
        evaluation[missing] = []
    page = report.render_report(json.loads(json.dumps(evaluation)))
    assert page.rstrip().endswith("</html>") and "None" not in re.sub(r"<[^>]+>", " ", page)


def svg_numbers(svg: str, tag: str, attribute: str) -> list[float]:
    root = ElementTree.fromstring(svg)
    return [float(e.attrib[attribute]) for e in root.iter(tag)]


def test_bars_are_as_long_as_their_values():
    svg = charts.bar_chart([charts.Bar("a", 20.0, "", "c-base"), charts.Bar("b", 5.0, "−75%", "c-knn")], "caption")
    lengths = svg_numbers(svg, "rect", "width")
    assert lengths[1] / lengths[0] == pytest.approx(0.25, abs=0.01)


def test_a_line_passes_through_its_points():
    """Read back from the path with the scale of the axis ticks."""
    points = [(0.0, 20.0), (0.5, 12.5), (1.0, 14.0)]
    svg = charts.line_chart([charts.Line("x", points, "c-base")], "caption", "α", "perplexity")
    root = ElementTree.fromstring(svg)
    tick_y = {e.text: float(e.attrib["y"]) for e in root.iter("text") if e.get("text-anchor") == "end"}
    tick_x = {
        e.text: float(e.attrib["x"])
        for e in root.iter("text")
        if e.get("class") == "tick" and e.get("text-anchor") == "middle"
    }
    (path,) = [e.attrib["d"] for e in root.iter("path")]
    drawn = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]
    (low, high) = sorted(tick_y, key=float)[0], sorted(tick_y, key=float)[-1]
    for (x, y), (px, py) in zip(points, drawn, strict=True):
        found_y = float(low) + (py - tick_y[low]) / (tick_y[high] - tick_y[low]) * (float(high) - float(low))
        found_x = (px - tick_x["0"]) / (tick_x["1"] - tick_x["0"])
        assert found_y == pytest.approx(y, abs=0.05) and found_x == pytest.approx(x, abs=0.005)


def test_intervals_stand_where_the_axis_says():
    rows = [charts.Interval("a", -0.05, (-0.075, -0.02), "c-knn"), charts.Interval("b & c", 0.02, None, "c-base")]
    svg = charts.interval_chart(rows, "caption", "difference")
    root = ElementTree.fromstring(svg)
    marks = {float(e.text or "nan"): float(e.attrib["x"]) for e in root.iter("text") if e.get("class") == "tick"}
    low, high = min(marks), max(marks)

    def read(x: str | float) -> float:
        return low + (float(x) - marks[low]) / (marks[high] - marks[low]) * (high - low)

    assert [read(x) for x in svg_numbers(svg, "circle", "cx")] == pytest.approx([-0.05, 0.02], abs=1e-3)
    (line,) = [e for e in root.iter("line") if e.get("class") == "line c-knn"]
    assert [read(line.attrib[end]) for end in ("x1", "x2")] == pytest.approx([-0.075, -0.02], abs=1e-3)
    (axis,) = [e for e in root.iter("line") if e.get("class") == "axis"]
    assert read(axis.attrib["x1"]) == pytest.approx(0, abs=1e-3)


def test_a_chart_as_a_file_has_its_colours():
    drawn = charts.svg_file(charts.bar_chart([charts.Bar("<a>", 20.0, "", "c-base")], "caption"))
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (style,) = [e.text or "" for e in root if e.tag.endswith("style")]
    assert "rect.c-base" in style and "--base:" in style


@pytest.mark.parametrize(("low", "high"), [(0, 1), (7.4, 14.8), (6.261, 6.267), (0, 123456), (5, 5)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = charts.ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 13
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize("top", [3.0, 9000.0, 0.00012])
def test_the_axis_name_stands_beside_its_ticks(top):
    """A digit takes about 7 units; the name, turned upright, reaches to 22."""
    svg = charts.line_chart(
        [charts.Line("x", [(0.0, 0.99995 * top), (1.0, top)], "c-base")], "c", "x", "test perplexity"
    )
    ticks = re.findall(r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', svg)
    assert len(ticks) > 2 and all(float(x) - 7 * len(text) > 22 for x, text in ticks)
