"""`--recipe` and `--dry-run`: every recipe of the repository parses, dry-runs without a network, and runs to its end
with tiny models, a tiny text and few steps in the places of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))
NAMES = [path.stem for path in RECIPES]
# What the models' makers and papers count: base, teacher, memory.
PUBLISHED = {
    "asylex-qwen": (1_543_714_304, 1_543_714_304, 494_032_768),
    "finance-qwen": (1_543_714_304, 1_543_714_304, 494_032_768),
    "mimic3-qwen": (1_543_714_304, 1_543_714_304, 494_032_768),
    "postgresql-pythia": (1_414_647_808, 1_414_647_808, 162_322_944),
    "wikitext103-gpt2": (124_439_808, 1_557_611_200, 124_439_808),
}
# Small numbers for the large ones; what a recipe does not set stays unset.
TINY = {"context": 48, "stride": 24, "k": 16, "batch_size": 2, "gradient_accumulation": 2, "max_tokens": 4000}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to run in, with a hub that nobody may ask."""
    from huggingface_hub import constants
    from transformers import AutoConfig

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the hub was asked for {arguments}")

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    return folder


def tiny_model(kind: str, width: int, tokenizer: Any, folder: Path) -> None:
    """A model of that kind with random weights, two blocks, padded as Qwen's, with the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    for name, value in {**sizes, "vocab_size": len(tokenizer) + 16, "bos_token_id": None, "eos_token_id": 0}.items():
        setattr(config, name, value)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 2 * width
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(width)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def as_toml(content: dict[str, Any], head: str = "") -> str:
    """What of a recipe is not a table, then its tables; JSON's scalars and lists are TOML's."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in content.items() if not isinstance(value, dict)]
    for name, table in content.items():
        if isinstance(table, dict):
            full = f"{head}.{json.dumps(name)}" if head else name
            lines.append(f"[{full}]\n{as_toml(table, full)}")
    return "\n".join(lines) + "\n"


def shrunk(recipe: Path, tokenizer: Any, text: Path, folder: Path) -> Path:
    """The recipe with a tiny model for each of its models, `text` for its texts and `TINY` for its numbers."""
    content = tomllib.loads(recipe.read_text("utf-8"))
    fit, evaluate = content["fit"], content["evaluate"]
    kind = next(iter(content["shapes"].values()))["model_type"]
    places: dict[str, str] = {}
    for model in [fit["model"], fit.get("teacher_model"), fit.get("init"), *evaluate.get("other_base", [])]:
        if model is not None and model not in places:
            path = folder / f"model{len(places)}"
            tiny_model(kind, 32 + 16 * (len(places) % 2), tokenizer, path)
            places[model] = str(path)
    for section in (fit, evaluate):
        section |= {name: value for name, value in TINY.items() if name in section}
    fit |= {name: places[fit[name]] for name in ("model", "teacher_model", "init") if name in fit}
    fit |= {name: str(text) for name in ("source",) if name in fit}
    for name in ("validation", "test"):
        if name in fit:
            # Texts of their own, or they would be taken out of the training text as copies.
            fit[name] = str(folder / f"{name}.txt")
            Path(fit[name]).write_text((text / f"doc0{len(name) % 5}.txt").read_text() + f" The {name} is over.\n")
    fit |= {"out": str(folder / "run"), "max_steps": 3, "dtype": "float32", "device": "cpu"}
    evaluate |= {"other_base": [places[model] for model in evaluate.get("other_base", [])]}
    evaluate |= {"timed_tokens": 0, "dtype": "float32", "device": "cpu"}
    if "datastore" in evaluate:
        evaluate["datastore"] = str(folder / "run" / "datastore")
    path = folder / "tiny.toml"
    path.write_text(as_toml(content), "utf-8")
    return path


def test_every_recipe_is_here():
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_says_what_it_must(recipe):
    text = recipe.read_text("utf-8")
    command = f"memdec fit --recipe recipes/{recipe.name} --dry-run"
    for said in ("NOT RUN BY US", "# TEXT.", "# Open stand-in:", command):
        assert said in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_dry_runs_without_a_network(recipe, memdec, offline, capsys):
    assert memdec("fit", "--recipe", str(recipe), "--dry-run", "--on", "h100", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["parameters"][name] for name in ("base", "teacher", "memory")) == PUBLISHED[recipe.stem]
    fit = tomllib.loads(recipe.read_text("utf-8"))["fit"]
    trained = found["tokens"]["train"] - 1
    assert found["tokens_trained"] == fit["epochs"] * trained
    per_step = fit["batch_size"] * fit.get("gradient_accumulation", 1)
    windows = trained / (fit.get("stride") or fit["context"] - 1)
    assert found["steps"] == pytest.approx(fit["epochs"] * windows / per_step, rel=0.01)
    # The search is a product of every row with every other, which is told by hand here.
    width = {"wikitext103-gpt2": 1600, "postgresql-pythia": 2048}.get(recipe.stem, 1536)
    (search,) = (part["flops"] for part in found["parts"] if part["name"] == "distributions")
    assert search == pytest.approx(2 * trained**2 * width, rel=0.01)
    assert list(offline.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_runs_to_its_end(recipe, memdec, tiny_tokenizer, tiny_corpus_dir, tmp_path, capsys):
    path = shrunk(recipe, tiny_tokenizer, tiny_corpus_dir, tmp_path)
    assert memdec("--quiet", "fit", "--recipe", str(path)) == 0, capsys.readouterr().err
    fit = tomllib.loads(path.read_text("utf-8"))["fit"]
    trained = json.loads((tmp_path / "run" / "training" / "training.json").read_text())
    for name in ("learning_rate", "schedule", "beta", "epochs", "context", "warmup", "weight_decay", "seed"):
        if name in fit:
            assert trained["fields"][name] == fit[name], name
    assert trained["fields"]["base"] == Path(fit["model"]).name
    assert trained["fields"]["init"] == Path(fit.get("init", fit["model"])).name
    made = json.loads((tmp_path / "run" / "datastore" / "manifest.json").read_text())["fields"]
    assert made["model"] == Path(fit.get("teacher_model", fit["model"])).name
    assert memdec("--quiet", "evaluate", "--recipe", str(path)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "The same memory on each base" in printed
    bases = tomllib.loads(path.read_text("utf-8"))["evaluate"]["other_base"]
    (report,) = (tmp_path / "run" / "evaluation").glob("*.json")
    assert len(json.loads(report.read_text())["bases"]) == 1 + len(bases)


# -- the options -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path) -> Path:
    """A recipe of the tiny model and text, with a setting that the command line has no option for."""
    path = tmp_path / "own.toml"
    fit = {"model": str(tiny_model_dir), "source": str(tiny_corpus_dir), "out": str(tmp_path / "run"), "context": 48}
    fit |= {"k": 16, "max_steps": 2, "batch_size": 3, "warmup": 0.25, "fractions": [0.7, 0.15, 0.15], "device": "cpu"}
    path.write_text(as_toml({"title": "Own", "fit": fit, "evaluate": {"context": 32, "samples": 0}}), "utf-8")
    return path


def test_an_option_that_is_given_overrules_the_recipe(memdec, own, tmp_path):
    out = tmp_path / "other"
    options = ["--max-steps", "1", "--out", str(out), "--beta", "0.25", "--fractions", "0.6,0.2,0.2"]
    assert memdec("--quiet", "fit", "--recipe", str(own), *options) == 0
    fields = json.loads((out / "training" / "training.json").read_text())["fields"]
    assert (fields["max_steps"], fields["beta"]) == (1, 0.25)  # of the command line
    assert (fields["batch_size"], fields["context"], fields["warmup"]) == (3, 48, 0.25)  # of the recipe
    assert fields["epochs"] == 8  # of neither
    assert json.loads((out / "corpus" / "manifest.json").read_text())["fields"]["fractions"] == [0.6, 0.2, 0.2]
    assert not (tmp_path / "run").exists()
    # The default of the command, said aloud, overrules as well.
    assert memdec("--quiet", "fit", "--recipe", str(own), "--batch-size", "4") == 0
    assert json.loads((tmp_path / "run" / "training" / "training.json").read_text())["fields"]["batch_size"] == 4
    report = tmp_path / "report"
    assert memdec("--quiet", "evaluate", "--recipe", str(own), "--stride", "16", "--out", str(report)) == 0
    settings = json.loads((report / "evaluation.json").read_text())["settings"]
    assert (settings["context"], settings["stride"]) == (32, 16)


def test_what_neither_gives_is_asked_for(memdec, own, tmp_path, capsys):
    text = own.read_text("utf-8")
    for line, said in (("model", "MODEL"), ("source", "SOURCE"), ("out", "--out")):
        lines = [part for part in text.splitlines() if not part.startswith(f"{line} =")]
        own.write_text("\n".join(lines), "utf-8")
        assert memdec("fit", "--recipe", str(own)) == 2
        assert said.lower() in capsys.readouterr().err.lower()
    own.write_text(text, "utf-8")
    assert memdec("evaluate", "--recipe", str(own)) == 1
    assert str(tmp_path / "run" / "memory") in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_recipe_that_is_wrong(memdec, own, capsys, command):
    own.write_text(own.read_text("utf-8").replace("max_steps", "max_step"), "utf-8")
    assert memdec(command, "--recipe", str(own)) == 1
    text = capsys.readouterr().err
    assert "unknown key max_step. Did you mean max_steps?" in text and "Traceback" not in text
    assert memdec(command, "--recipe", str(own.with_name("none.toml"))) == 1
    assert "There is no recipe" in capsys.readouterr().err


def test_a_dry_run_prints_a_table_and_writes_nothing(memdec, own, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert memdec("fit", "--recipe", str(own), "--dry-run", "--on", "rtx4090") == 0
    table = capsys.readouterr().out
    for said in ("Own", "datastore", "distributions", "training", "together", "RTX 4090", "40% of", "were counted"):
        assert said in " ".join(table.split())
    assert memdec("fit", "--recipe", str(own), "--dry-run", "--tokens", "1000000", "--utilisation", "0.5") == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "1,000,000 tokens" in table and "50% of" in table and "--tokens says" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dry_run_without_a_recipe(memdec, tiny_model_dir, tiny_corpus_dir, tmp_path, capsys):
    arguments = ["fit", str(tiny_model_dir), str(tiny_corpus_dir), "--out", str(tmp_path / "run")]
    assert memdec(*arguments, "--context", "48", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["base"] == found["parameters"]["memory"] and found["device"]["name"] == "cpu"
    assert memdec(*arguments, "--dry-run", "--ablate", "beta=0,1") == 1
    assert "Leave one of them out" in capsys.readouterr().err
    assert memdec(*arguments, "--dry-run", "--on", "abacus") == 1
    assert "h100" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
