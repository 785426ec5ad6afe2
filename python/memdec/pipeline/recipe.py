"""Recipes: a whole run, its models, text and settings, in one small file.

    memdec fit --recipe recipes/wikitext103-gpt2.toml              all options come from the file
    memdec fit --recipe FILE --dry-run --on h100                   what the run would cost, see memdec.pipeline.estimate
    memdec fit --recipe FILE --max-tokens 1000000 --out trial      an option that is given overrules the file
    memdec evaluate --recipe FILE --context 512

A recipe is TOML. Its keys are the names of the options, with ``_`` for ``-``:

======================= ============================================================================================
``title``               one line: what is trained on what
``tokens``              how long the text is, for ``--dry-run`` where the text is not at hand (optional)
``[fit]``               the arguments of :func:`memdec.pipeline.fit.fit`; its corpus is called ``source``, as in the
                        command's help
``[evaluate]``          the options of ``memdec evaluate``; base, memory, text and out follow from ``[fit]`` where they
                        are not given
``[shapes."MODEL"]``    the configuration of a model of the hub, as far as its size depends on it, so that ``--dry-run``
                        needs no network (optional)
======================= ============================================================================================

Paths mean what they mean on the command line: they start from the folder in which the command is run.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from memdec.errors import MemdecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The options of `memdec evaluate`. Evaluation is a layer above this one, so they stand here; a test compares the two.
EVALUATE_KEYS: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "text": (str,),
    "memory": (str,),
    "datastore": (str,),
    "distributions": (str,),
    "compare": (str,),
    "other_base": (list,),
    "init": (str,),
    "general": (str,),
    "general_tokens": (int,),
    "rates": (str,),
    "timed_tokens": (int,),
    "alpha": (float,),
    "context": (int,),
    "stride": (int,),
    "per_document": (bool,),
    "max_tokens": (int,),
    "prompt": (list,),
    "samples": (int,),
    "new_tokens": (int,),
    "batch_size": (int,),
    "dtype": (str,),
    "device": (str,),
    "out": (str,),
}
NAMES = {
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "three numbers such as [0.9, 0.05, 0.05]",
    list: "a list of texts",
    dict: "a table",
}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, checked.

    Attributes:
        path: the file.
        title: what is trained on what.
        tokens: of the source; None where the file does not say.
        fit: options of ``memdec fit``, by name.
        evaluate: options of ``memdec evaluate``, by name, those that follow from `fit` among them.
        shapes: by model, what its configuration says of its size.
    """

    path: Path
    title: str
    tokens: int | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def command_line(self, section: str) -> dict[str, Any]:
        """The options of a section as a command line would give them: three shares are written with commas."""
        options: dict[str, Any] = getattr(self, section)
        return {
            name: ",".join(f"{share:g}" for share in value) if isinstance(value, tuple) else value
            for name, value in options.items()
        }


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe and check its keys and types.

    Args:
        path: the file.

    Returns:
        The recipe. Whether its values can be (a schedule of that name, a share above 1) is checked by the stages.

    Raises:
        MemdecError: there is no such file, it is no TOML, a key is unknown (the nearest one is named) or missing, or a
            value is of the wrong type.
    """
    path = Path(path)
    content = _parse(path)
    _check_table(path, "", content, {"title": (str,), "tokens": (int,), "fit": (dict,), "evaluate": (dict,),
                                     "shapes": (dict,)})  # fmt: skip
    if "title" not in content:
        raise MemdecError(f'{path} has no title. Begin it with a line such as title = "Our manuals, GPT-2".')
    if content.get("tokens", 2) < 2:
        raise MemdecError(f"{path}: tokens is {content['tokens']}; wanted the length of the text, at least 2.")
    fit = content.get("fit", {})
    keys = fit_keys()
    _check_table(path, "fit", fit, keys)
    # What is checked is three numbers; the stages want a tuple.
    fit = {name: tuple(map(float, value)) if isinstance(value, list) else value for name, value in fit.items()}
    evaluate = content.get("evaluate", {})
    _check_table(path, "evaluate", evaluate, EVALUATE_KEYS)
    shapes = content.get("shapes", {})
    for model, shape in shapes.items():
        where = f'shapes."{model}"'
        if not isinstance(shape, dict):
            raise MemdecError(f"{path}: {where} is {shape!r}; wanted a table, headed [{where}].")
        if not isinstance(shape.get("model_type"), str):
            raise MemdecError(
                f'{path}, [{where}]: model_type is missing; it is in the model\'s config.json, as "gpt2".'
            )
    return Recipe(path, content["title"], content.get("tokens"), fit, {**_following(fit), **evaluate}, shapes)


def fit_keys() -> dict[str, tuple[type, ...]]:
    """The keys of ``[fit]`` with the types that each may have: the arguments of :func:`memdec.pipeline.fit.fit`."""
    from memdec.pipeline.fit import fit

    hints = get_type_hints(fit)
    found = {name: _plain_types(hints[name]) for name in inspect.signature(fit).parameters}
    # As the command's help calls it, and everybody who writes one.
    found["source"] = found.pop("corpus")
    return found


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The types of TOML that stand for a type hint: paths are texts, None and devices that are loaded have none."""
    if hint in (str, int, float, bool):
        return (hint,)
    if get_origin(hint) is tuple:
        return (tuple,)
    parts = [part for part in get_args(hint) if part is not NoneType]
    return tuple(dict.fromkeys(kind for part in parts if get_origin(part) is None for kind in _plain_types(part)))


def _following(fit: Mapping[str, Any]) -> dict[str, Any]:
    """The options of evaluate that follow from those of fit."""
    found: dict[str, Any] = {}
    if "model" in fit:
        found["base"] = fit["model"]
    if "init" in fit:
        found["init"] = fit["init"]
    if "out" in fit:
        out = Path(fit["out"])
        found |= {"memory": str(out / "memory"), "text": str(out / "corpus"), "out": str(out / "evaluation")}
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content: dict[str, Any] = tomllib.load(file)
            return content
    except FileNotFoundError:
        raise MemdecError(
            f"There is no recipe {path}. memdec's own are in the folder recipes of its repository."
        ) from None
    except OSError as error:
        raise MemdecError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MemdecError(f"{path} is no TOML: {error}. A line of a recipe is a name, = and a value.") from None


def _check_table(path: Path, section: str, table: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]]) -> None:
    """Raise where a key is none of `keys`, or its value of none of the key's types."""
    where = f"{path}, [{section}]" if section else f"{path}"
    for name, value in table.items():
        if name not in keys:
            near = difflib.get_close_matches(name.replace("-", "_").lower(), keys, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(keys))}."
            raise MemdecError(f"{where}: unknown key {name}. {hint}")
        if not any(_is(value, kind) for kind in keys[name]):
            wanted = " or ".join(NAMES[kind] for kind in keys[name])
            raise MemdecError(f"{where}: {name} is {value!r}; wanted {wanted}.")


def _is(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, list) and len(value) == 3 and all(_is(part, float) for part in value)
    if kind is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
