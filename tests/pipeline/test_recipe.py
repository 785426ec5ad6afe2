"""Recipes: what they say comes out as options, and what they say wrongly is told, with the nearest right key."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_type_hints

import pytest

from memdec.errors import MemdecError
from memdec.pipeline.fit import fit
from memdec.pipeline.recipe import EVALUATE_KEYS, fit_keys, read_recipe

WHOLE = """
title = "Manuals"
tokens = 1_000
[fit]
model = "base"
source = "manuals"
out = "run"
init = "small"
fractions = [0.8, 0.1, 0.1]
learning_rate = 1e-3
temperature = 16
exclude_same_document = true
memory_limit = "2GiB"
adapt_epochs = 3
warmup = 0.0
[evaluate]
base = "other"
context = 128
prompt = ["One", "Two"]
[shapes."base"]
model_type = "gpt2"
n_layer = 3
"""


@pytest.fixture
def write(tmp_path: Path):
    """write(text): the path of a recipe of that text."""

    def make(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, "utf-8")
        return path

    return make


def test_a_recipe_as_options(write):
    recipe = read_recipe(write(WHOLE))
    assert (recipe.title, recipe.tokens) == ("Manuals", 1000)
    assert recipe.fit["fractions"] == (0.8, 0.1, 0.1) and recipe.fit["learning_rate"] == 1e-3
    assert recipe.fit["adapt_epochs"] == 3
    assert recipe.command_line("fit") == {**recipe.fit, "fractions": "0.8,0.1,0.1"}
    # What [evaluate] says goes before what follows from [fit].
    follows = {"memory": "run/memory", "text": "run/corpus", "out": "run/evaluation", "init": "small"}
    assert recipe.evaluate == {**follows, "base": "other", "context": 128, "prompt": ["One", "Two"]}
    assert recipe.shapes == {"base": {"model_type": "gpt2", "n_layer": 3}}


def test_evaluate_takes_its_models_from_fit(write):
    recipe = read_recipe(write('title = "t"\n[fit]\nmodel = "base"\nout = "run"\n'))
    follows = {"base": "base", "memory": "run/memory", "text": "run/corpus", "out": "run/evaluation"}
    assert recipe.evaluate == follows and recipe.tokens is None and recipe.shapes == {}


def test_the_keys_are_the_arguments_of_fit():
    arguments = set(inspect.signature(fit).parameters) - {"corpus"} | {"source"}
    keys = fit_keys()
    assert set(keys) == arguments and all(kinds for kinds in keys.values())
    expected = {"epochs": (int,), "beta": (float,), "fractions": (tuple,), "model": (str,), "k": (int,)}
    assert {name: keys[name] for name in expected} == expected
    assert keys["gradient_checkpointing"] == (bool,) and set(keys["memory_limit"]) == {str, int}


def test_the_keys_of_evaluate_are_the_options_of_the_command():
    """Two lists that must say the same: that of the recipe, which cannot import the command, and the command's own."""
    from memdec.cli.use import evaluate

    hints = {name: hint for name, hint in get_type_hints(evaluate).items() if name not in ("recipe", "return")}
    assert set(hints) == set(EVALUATE_KEYS)
    for name, kinds in EVALUATE_KEYS.items():
        (kind,) = kinds
        wanted = {str: {str, str | None, Path}, list: {list[str] | None}}.get(kind, {kind, kind | None})
        assert hints[name] in wanted, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("warmup", "warm_up"), "[fit]: unknown key warm_up. Did you mean warmup?"),
        (("learning_rate", "learning-rate"), "[fit]: unknown key learning-rate. Did you mean learning_rate?"),
        (('base = "other"', "bse = 1"), "[evaluate]: unknown key bse. Did you mean base?"),
        (('init = "small"', "zzz = 1"), "[fit]: unknown key zzz. Known are adapt_epochs, backend"),
        (("title", "titel"), "unknown key titel. Did you mean title?"),
        (('title = "Manuals"\n', ""), "has no title"),
        (("1_000", '"many"'), "tokens is 'many'; wanted a whole number"),
        (("adapt_epochs = 3", "adapt_epochs = true"), "[fit]: adapt_epochs is True; wanted a whole number"),
        (("adapt_epochs", "adapt_epoch"), "[fit]: unknown key adapt_epoch. Did you mean adapt_epochs?"),
        (("1_000", "1"), "tokens is 1; wanted the length of the text"),
        (("1e-3", '"fast"'), "[fit]: learning_rate is 'fast'; wanted a number"),
        (("1e-3", "true"), "[fit]: learning_rate is True; wanted a number"),
        (("= true", "= 1"), "[fit]: exclude_same_document is 1; wanted true or false"),
        (("context = 128", "context = 128.5"), "[evaluate]: context is 128.5; wanted a whole number"),
        (("[0.8, 0.1, 0.1]", "[0.8, 0.2]"), "fractions is [0.8, 0.2]; wanted three numbers such as"),
        (("[0.8, 0.1, 0.1]", '["a", "b", "c"]'), "wanted three numbers such as"),
        (('["One", "Two"]', '"One"'), "[evaluate]: prompt is 'One'; wanted a list of texts"),
        (('"2GiB"', "[2]"), "memory_limit is [2]; wanted a text in quotes or a whole number"),
        (('model_type = "gpt2"', "n_embd = 4"), '[shapes."base"]: model_type is missing'),
        (("[fit]", "fit = 3\n[other]"), "fit is 3; wanted a table"),
        (('"base"\nsource', "base\nsource"), "is no TOML"),
    ],
)
def test_what_is_wrong_is_said(write, change, said):
    assert change[0] in WHOLE
    with pytest.raises(MemdecError) as raised:
        read_recipe(write(WHOLE.replace(*change, 1)))
    assert said in str(raised.value) and "recipe.toml" in str(raised.value)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(MemdecError, match="There is no recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(MemdecError, match="Cannot read"):
        read_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'title = "na\xefve"')
    with pytest.raises(MemdecError, match="is no TOML"):
        read_recipe(tmp_path / "latin.toml")
