"""Grids of memories: each run is what `fit` alone would make, and a grid that was stopped goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memdec.errors import MemdecError
from memdec.evaluation import ablation
from memdec.evaluation.ablation import ablate, parse_grid
from memdec.pipeline.fit import fit
from memdec.stores.corpus import Corpus
from memdec.stores.memory import read_memory_card

OPTIONS = {"fractions": (0.6, 0.2, 0.2), "context": 48, "k": 16, "epochs": 1, "learning_rate": 3e-3, "dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory, make_text) -> Path:
    folder = tmp_path_factory.mktemp("ablation-text")
    for index in range(16):
        (folder / f"d{index:02d}.txt").write_text(make_text(8, index))
    return folder


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory, text, tiny_model_dir):
    """Two values of two settings."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    return out, ablate(tiny_model_dir, text, out, {"beta": [0.0, 1.0], "teacher": ["knn", "lm"]}, **OPTIONS)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "ablation.jsonl").read_text().splitlines()]


def test_every_combination_in_order(grid_run):
    out, runs = grid_run
    settings = [{"beta": beta, "teacher": teacher} for beta in (0.0, 1.0) for teacher in ("knn", "lm")]
    assert [run.settings for run in runs] == settings
    assert [line["settings"] for line in lines_of(out)] == settings


def test_a_run_is_what_fit_alone_makes(grid_run, text, tiny_model_dir, tmp_path):
    out, _ = grid_run
    alone = fit(tiny_model_dir, text, tmp_path / "alone", **OPTIONS, beta=1.0, teacher="knn")
    weights = "model.safetensors"
    assert (out / "runs" / "beta=1.0_teacher=knn" / "memory" / weights).read_bytes() == (alone / weights).read_bytes()


def test_the_teacher_matters_only_with_beta(grid_run):
    """β = 0 never looks at the teacher, so that its two runs are one; at β = 1 they differ."""
    _, runs = grid_run
    found = {(run.settings["beta"], run.settings["teacher"]): run.memory_perplexity for run in runs}
    assert found[0.0, "knn"] == found[0.0, "lm"]
    assert found[1.0, "knn"] != found[1.0, "lm"]


def test_the_figures_against_a_forward_of_every_window(grid_run, tiny_model_dir):
    out, runs = grid_run
    tokens = torch.as_tensor(Corpus.open(out / "corpus").split("test").tokens).long()
    run = runs[2]
    scores = []
    for folder in (tiny_model_dir, out / "runs" / "beta=1.0_teacher=knn" / "memory"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = torch.full((tokens.numel() - 1,), math.nan, dtype=torch.float64)
        for start in range(0, tokens.numel() - 1, 128):  # the tiny model has 256 positions
            stop = min(start + 256, tokens.numel())
            with torch.no_grad():
                logits = model(input_ids=tokens[None, start : stop - 1]).logits[0].double().log_softmax(1)
            rows = torch.arange(start, stop - 1)
            fresh = found[rows].isnan()
            found[rows[fresh]] = logits[rows[fresh] - start, tokens[rows[fresh] + 1]]
        scores.append(found)
    base, memory = scores
    mixed = (run.alpha * memory.exp() + (1 - run.alpha) * base.exp()).log()
    assert run.base_perplexity == pytest.approx(math.exp(-float(base.mean())), rel=1e-4)
    assert run.memory_perplexity == pytest.approx(math.exp(-float(memory.mean())), rel=1e-4)
    assert run.perplexity == pytest.approx(math.exp(-float(mixed.mean())), rel=1e-4)


def test_a_grid_that_was_stopped_goes_on_and_a_larger_one_keeps_its_lines(text, tiny_model_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = ablation.train_memory
    calls = []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(ablation, "train_memory", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate(tiny_model_dir, text, out, {"beta": [0.25, 0.75]}, **OPTIONS)
    monkeypatch.setattr(ablation, "train_memory", real)
    assert [line["settings"] for line in lines_of(out)] == [{"beta": 0.25}]
    first = (out / "runs" / "beta=0.25" / "memory" / "model.safetensors").stat().st_mtime_ns
    ablate(tiny_model_dir, text, out, {"beta": [0.25, 0.75]}, **OPTIONS)
    ablate(tiny_model_dir, text, out, {"beta": [0.5]}, **OPTIONS)
    assert [line["settings"]["beta"] for line in lines_of(out)] == [0.25, 0.75, 0.5]
    assert (out / "runs" / "beta=0.25" / "memory" / "model.safetensors").stat().st_mtime_ns == first


def test_adapted_teachers_are_made_once_and_kept_apart(text, tiny_model_dir, tmp_path):
    """Plain and adapted keys are two datastores; what teaches is what `fit` alone would have."""
    out = tmp_path / "out"
    grid = {"teacher": ["knn", "knn-lm"], "adapt_epochs": [0, 1, 2]}
    runs = ablate(tiny_model_dir, text, out, grid, **OPTIONS)
    assert len(list(out.glob("adapted-*"))) == 2 and len(list(out.glob("datastore-*"))) == 3
    assert len(list(out.glob("distributions-*"))) == 3 and len(list(out.glob("teacher-*"))) == 3
    assert len({run.memory_perplexity for run in runs}) == 6
    alone = fit(tiny_model_dir, text, tmp_path / "alone", **OPTIONS, teacher="knn-lm", adapt_epochs=1)
    made = out / "runs" / "adapt_epochs=1_teacher=knn-lm" / "memory"
    assert (made / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_what_is_adapted_does_not_follow_the_memory_s_settings(text, tiny_model_dir, tmp_path):
    out = tmp_path / "out"
    short = {**OPTIONS, "max_steps": 2, "adapt_epochs": 1}
    ablate(tiny_model_dir, text, out, {"learning_rate": [1e-4, 1e-2], "beta": [1.0]}, **short)
    assert len(list(out.glob("adapted-*"))) == len(list(out.glob("datastore-*"))) == 1
    (adapted,) = out.glob("adapted-*/memory")
    assert read_memory_card(adapted).provenance["learning_rate"] == OPTIONS["learning_rate"]


def test_several_grids_are_made_in_their_order_and_each_run_once(text, tiny_model_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    grids = [
        {"beta": [0.5], "layers": [None]},
        {"layers": [1], "beta": [0.0, 0.5]},
        {"beta": [0.5, 0.0], "layers": [1]},
    ]
    short = {**OPTIONS, "max_steps": 2, "validation_tokens": 512}
    runs = ablate(tiny_model_dir, text, out, grids, **short)
    expected = [(0.5, None), (0.0, 1), (0.5, 1)]
    assert [(run.settings["beta"], run.settings["layers"]) for run in runs] == expected
    assert (out / "ablation.html").read_text().count("<svg") == 2
    # Made once, a run is read again: no model is loaded to score it.
    monkeypatch.setattr(ablation, "load_causal_lm", None)
    again = ablate(tiny_model_dir, text, out, grids, **short)
    assert again == runs
    with pytest.raises(MemdecError, match="vary the same settings"):
        ablate(tiny_model_dir, text, tmp_path / "no", [{"beta": [0.5]}, {"layers": [1]}], **short)
    assert not (tmp_path / "no").exists()


def test_search_settings_share_the_datastore(text, tiny_model_dir, tmp_path):
    out = tmp_path / "out"
    ablate(tiny_model_dir, text, out, {"k": [4, 16], "temperature": [1.0, 100.0]}, **{**OPTIONS, "max_steps": 1})
    assert len(list(out.glob("datastore-*"))) == 1
    assert len(list(out.glob("distributions-*"))) == 4


def test_the_page(grid_run):
    out, runs = grid_run
    page = (out / "ablation.html").read_text()
    assert page.count("<svg") == 2, "one plot for each setting"
    for run in runs:
        assert f"{run.perplexity:.3f}" in page or f"{run.perplexity:.1f}" in page or f"{run.perplexity:,.0f}" in page
    assert not any(mark in page for mark in ("http://", "https://", "src="))


def test_parse_grid():
    assert parse_grid(["beta=0, 0.5,1", "learning-rate=1e-4", "teacher=knn,lm", "layers=2,2"]) == {
        "beta": [0.0, 0.5, 1.0],
        "learning_rate": [1e-4],
        "teacher": ["knn", "lm"],
        "layers": [2],
    }


@pytest.mark.parametrize("part", ["beta", "beta=", "context=4", "beta=x", "k=1.5"])
def test_a_grid_that_is_none(part):
    with pytest.raises(MemdecError, match="--ablate"):
        parse_grid([part])


def test_a_value_that_cannot_be_is_refused_at_once(text, tiny_model_dir, tmp_path):
    nothing_asks = {"teacher": ["one-hot"], "adapt_epochs": [1]}
    for grid in ({"beta": [0.5, 2.0]}, {"teacher": ["nonsense"]}, {"context": [4]}, nothing_asks):
        with pytest.raises(MemdecError):
            ablate(tiny_model_dir, text, tmp_path / "out", grid)
        assert not (tmp_path / "out").exists()


def test_many_settings_still_make_a_folder_s_name(text, tiny_model_dir, tmp_path):
    """All that an adapted teacher is trained with stands in its folder's name, and 255 bytes are the most of one."""
    training = {"batch_size": 2, "gradient_accumulation": 1, "stride": 24, "schedule": "linear", "warmup": 0.1,
                "seed": 0, "weight_decay": 0.01, "eval_every": 4, "patience": 2, "validation_tokens": 512,
                "max_steps": 4, "gradient_checkpointing": False}  # fmt: skip
    grid = {"teacher": ["lm"], "adapt_epochs": [1]}
    runs = ablate(tiny_model_dir, text, tmp_path / "out", grid, **OPTIONS | training)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(runs) == 1 and max(map(len, names)) > ablation.LONGEST_NAME
    assert ablation.name_of({"a": "x" * 300, "b": 1}) != ablation.name_of({"a": "x" * 300, "b": 2})
