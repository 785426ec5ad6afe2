"""The demo's run on a tiny model and tiny text: every part happens, the user is told, a second run continues."""

from __future__ import annotations

import json

import pytest

from memdec import MemdecError
from memdec.demo import plan as demo_plan
from memdec.demo import run as demo_run

TOKENS = 4000
FIT = {
    "context": 48,
    "k": 32,
    "fractions": (0.7, 0.15, 0.15),
    "learning_rate": 3e-3,
    "dtype": "float32",
    "device": "cpu",
    "tensorboard": False,
    "max_steps": 8,
}
EVALUATE = {"context": 48, "stride": 24, "new_tokens": 4, "held_out_prompts": 1, "dtype": "float32", "device": "cpu"}


def test_the_demo_makes_measures_and_tells(tiny_model_dir, tiny_corpus_dir, tmp_path):
    said: list[str] = []
    out = tmp_path / "run"

    def run():
        return demo_run.run_demo(
            out,
            max_tokens=TOKENS,
            model=str(tiny_model_dir),
            text=tiny_corpus_dir,
            say=said.append,
            fit_options=FIT,
            evaluate_options=EVALUATE,
        )

    result, paths = run()
    told = "\n".join(said)
    for word in ("1. The base model", "2. The text", "3. Making the memory", "4. Measuring", "together", "Done in"):
        assert word in told
    assert [entry.method for entry in result.measures] == ["base", "knn-lm", "memory", "base+memory"]
    assert result.measure("base+memory").perplexity < result.measure("base").perplexity
    assert f"{result.measure('base').perplexity:.1f}" in told and f"{result.measure('knn-lm').perplexity:.1f}" in told
    content = json.loads(paths["json"].read_text())
    assert content["training"] and content["generations"] and content["copied_share"] is not None
    assert content["settings"]["knn"]["source"].startswith("from the distributions")
    assert all(path.is_file() for path in paths.values()) and (out / "memory" / "memory_config.json").is_file()

    said.clear()
    again, _ = run()
    assert "there already" in "\n".join(said) and "plan" not in "\n".join(said)
    assert [m.perplexity for m in again.measures] == [m.perplexity for m in result.measures]


def test_the_plan_adds_up_and_scales():
    """At 1000 tokens a second, embedding 83k + 7k tokens takes 90 s; twice the speed, half the time."""
    options = {"fractions": (0.83, 0.07, 0.10), "epochs": 1}
    slow = demo_plan.plan(demo_plan.Speeds(1000.0, 1e12), 100_000, options)
    fast = demo_plan.plan(demo_plan.Speeds(2000.0, 1e12), 100_000, options)
    assert "1.5 min" in slow[1] and "datastore" in slow[1]
    assert "45 s" in fast[1]
    assert slow[-1].startswith("together")


def test_the_size_fits_the_machine_and_is_kept(tmp_path):
    """The plan stays within its minutes wherever that is possible; a second run of a folder keeps its size."""
    options = {"fractions": (0.83, 0.07, 0.10), "epochs": 1}
    sizes = []
    for speed in (50.0, 300.0, 500.0, 5000.0):
        speeds = demo_plan.Speeds(speed, 5e10)
        size = demo_plan.tokens_within(11, speeds, options)
        sizes.append(size)
        planned = [sum(part.seconds for part in demo_plan.parts(speeds, s, options)) for s in (size, size + 5000)]
        assert planned[0] <= 660 or size == demo_plan.LEAST_TOKENS
        assert planned[1] > 660 or size == demo_plan.MOST_TOKENS
    assert sizes == sorted(sizes) and sizes[0] == 20_000 and 20_000 < sizes[2] < 90_000 and sizes[3] == 90_000
    assert demo_plan.recall_size(tmp_path / "run") is None
    demo_plan.remember_size(tmp_path / "run", sizes[2])
    demo_plan.remember_size(tmp_path / "run", 90_000)
    assert demo_plan.recall_size(tmp_path / "run") == sizes[2]
    (tmp_path / "run" / demo_plan.SIZE_NAME).write_text("{")
    with pytest.raises(MemdecError, match=r"demo\.json cannot be read .* --tokens"):
        demo_plan.recall_size(tmp_path / "run")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "5 s"), (44, "45 s"), (89, "90 s"), (200, "3.3 min"), (700, "12 min")]
)
def test_durations_as_one_says_them(seconds, text):
    assert demo_plan.about(seconds) == text
