"""Folders that are there whole or not at all: checkpoints of a training, candidate memories.

A folder is filled under a hidden name beside its place, flushed to the disk and renamed. What a killed run left under
a hidden name is deleted by the next.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.stores.atomic import sync_folder, writing
from memdec.stores.manifest import read_checked_text, to_checked_text
from memdec.stores.tensors import map_tensors, write_tensors

FORMAT = "memdec.checkpoint"
VERSION = 2  # 2: the best evaluation by judge
STATE_NAME = "state.json"
WEIGHTS_NAME = "weights.safetensors"


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` with what `fill` writes into the folder it is given, whole or not at all.

    Raises:
        MemdecError: the disk is full or cannot be written; what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    file.chmod(0o644)  # some writers leave files that only their owner may read
                    sync_file(file)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except SafetensorError as error:
        raise MemdecError(
            f"Cannot write {path}: {error}. What was there before is untouched; free some space on the disk and run "
            "the same command again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, of: str = "*") -> None:
    """Delete what a killed :func:`write_folder` left in `folder` of the folders named `of`, by default of all."""
    for path in folder.glob(f".{of}.*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """The folders `name`-NUMBER in `folder`, by rising number."""
    found = [(path.name.removeprefix(f"{name}-"), path) for path in folder.glob(f"{name}-*")]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint of `step` into `folder`; those before it are the caller's to delete."""

    def fill(path: Path) -> None:
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
        write_tensors(path / WEIGHTS_NAME, arrays)
        text = to_checked_text({"format": FORMAT, "version": VERSION, "step": step, "state": state})
        (path / STATE_NAME).write_bytes(text.encode())

    write_folder(folder / f"checkpoint-{step:08d}", fill)


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint in `folder`: its step, tensors (memory-mapped) and state; None where there is none."""
    found = numbered(folder, "checkpoint")
    if not found:
        return None
    _, path = found[-1]
    content = read_checked_text(path / STATE_NAME, format=FORMAT, version=VERSION)
    tensors = {name: torch.from_numpy(array) for name, array in map_tensors(path / WEIGHTS_NAME).items()}
    return int(content["step"]), tensors, content["state"]


def keep_only(folder: Path, names: set[str]) -> None:
    """Delete the checkpoints and candidates in `folder` that are not among `names`."""
    for kind in ("checkpoint", "best"):
        for _, path in numbered(folder, kind):
            if path.name not in names:
                # Renamed first: a run killed while it deletes leaves no half folder under a good name.
                doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                os.replace(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def save_model(model: Any, path: Path, tensors_of: list[tuple[str, Tensor]] | None = None) -> None:
    """Write a transformers model into the folder `path`, whole or not at all, as safetensors; `tensors_of` gives what
    to write by name, None the model's own parameters and buffers."""
    copies: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    if tensors_of is None:
        tensors_of = [*model.named_parameters(remove_duplicate=False), *saved_buffers(model)]
    for name, tensor in tensors_of:
        # The parameters may be views of one big buffer, and tied ones are the same tensor: one copy each, so that the
        # writer sees tensors of their own, tied where they are.
        tensors[name] = copies.setdefault(id(tensor), tensor.detach().to("cpu", copy=True))
    write_folder(path, lambda folder: model.save_pretrained(folder, state_dict=tensors))


def saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the model's state."""
    wanted = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in wanted]
