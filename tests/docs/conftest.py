"""The folder in which the pages' examples run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def snippet_folder(tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any, tiny_llama: Callable[..., Any]) -> Path:
    """A working folder with `my-model` (tiny llama and its tokenizer) and `my-docs` (40 text files)."""
    room = tmp_path / "room"
    room.mkdir()
    tiny_llama().save_pretrained(room / "my-model")
    tiny_tokenizer.save_pretrained(room / "my-model")
    tiny_corpus_dir.rename(room / "my-docs")
    return room
