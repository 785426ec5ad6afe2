"""The command line called in this process, and one `memdec fit` of a tiny model that several tests look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Small enough to take seconds: windows of 48 tokens, 32 neighbours, 6 steps.
FIT_OPTIONS = ["--teacher", "knn", "--context", "48", "--k", "32", "--max-steps", "6", "--learning-rate", "0.003",
               "--dtype", "float32"]  # fmt: skip
SPLIT = ["--fractions", "0.7,0.15,0.15"]


def call(*arguments: str) -> int:
    """Run ``memdec`` with ``arguments`` here; its exit status."""
    from memdec.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


@pytest.fixture
def memdec() -> Callable[..., int]:
    """memdec("info", "run"): the exit status; what it prints is in capsys."""
    return call


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets environment variables for the libraries below it; a test must not hand them on."""
    for name in ("MEMDEC_QUIET", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short documents. Shared: do not write."""
    import random

    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(1)
    words = [
        "the",
        "court",
        "a",
        "tenant",
        "judge",
        "clerk",
        "granted",
        "denied",
        "recorded",
        "lease",
        "motion",
        "noon",
    ]
    for index in range(30):
        lines = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(6 + index % 7)]
        (folder / f"doc{index:02d}.txt").write_text(" ".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_dir: Path) -> Any:
    """The folder that `memdec fit` made. Shared: do not write."""
    out = tmp_path_factory.mktemp("fit") / "run"
    assert call("fit", str(tiny_model_dir), str(text_dir), "--out", str(out), *SPLIT, *FIT_OPTIONS) == 0
    return out
