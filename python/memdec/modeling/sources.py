"""Where a model is, by folder, hub id or ``.gguf`` file, and what its configuration says; no weights are read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from memdec.errors import MemdecError
from memdec.stores.manifest import MANIFEST_NAME
from memdec.stores.memory import is_memory, read_memory_card


def locate(source: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` wants for `source`: the folder (or hub id) and further options (``gguf_file``).

    Raises:
        MemdecError: `source` looks like a path, and there is nothing.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MemdecError(f"{source} is not a file; give the path of a .gguf file, a model folder or a hub id.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        refuse_artefact(path)
        return str(path), {}
    if path.is_file():
        raise MemdecError(f"{source} is a file; a model is a folder (with config.json), a hub id or a .gguf file.")
    name = str(source)
    # A hub id is NAME or OWNER/NAME; whatever else was written was meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise MemdecError(f"the folder {source} does not exist; check the path, or give a hub id such as OWNER/NAME.")
    return name, {}


def refuse_artefact(folder: Path) -> None:
    """Raise ``MemdecError`` for a folder of memdec's that is no model: a run's, or a stage's."""
    if (folder / "config.json").is_file():
        return
    if is_memory(folder / "memory"):
        read_memory_card(folder)  # whose message says where the memory is
    if (folder / MANIFEST_NAME).is_file():
        raise MemdecError(
            f"{folder} is a stage's folder (it has a {MANIFEST_NAME}) and no model; a run's memory is in its folder "
            "`memory`."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as one sentence: what other libraries raise can fill a page."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


def read_config(model: str | os.PathLike[str], shapes: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """A model's transformers configuration: what lies on this machine, else what `shapes` says, else the hub's.

    Raises:
        MemdecError: there is none, or a key of the shape is unknown to its kind of model.
    """
    name = os.fspath(model)
    if shapes and name in shapes and not Path(name).expanduser().exists():
        return _config_of_shape(name, dict(shapes[name]))
    folder, options = locate(model)
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise MemdecError(
            f"{model} has no configuration that can be read: {first_line(error)} Check the name; without a network, "
            f'write its sizes into a recipe, under [shapes."{model}"].'
        ) from error


def _config_of_shape(name: str, shape: dict[str, Any]) -> Any:
    kind = shape.pop("model_type")
    try:
        plain = AutoConfig.for_model(kind)
    except (ValueError, KeyError) as error:
        raise MemdecError(f'[shapes."{name}"]: transformers knows no model_type {kind!r}.') from error
    for key in shape:
        if not hasattr(plain, key):
            near = difflib.get_close_matches(key, plain.to_dict(), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise MemdecError(f'[shapes."{name}"]: a configuration of {kind} has no {key}.{hint}')
    try:
        return AutoConfig.for_model(kind, **shape)
    except (ValueError, TypeError) as error:
        raise MemdecError(f'[shapes."{name}"] is no configuration of {kind}: {first_line(error)}') from error
