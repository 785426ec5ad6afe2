"""How much of the demo's text this machine can do while one is willing to watch, and how long each part takes.

Without a number of tokens the demo sizes itself: a laptop with bfloat16 instructions does several times as much text as
one without. The choice is remembered in the run's folder: a run that is continued must go on with the same text.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError
from memdec.stores.atomic import make_folder, write_file

MINUTES = 10.0  # what a run is planned to take; with the trial and the set-up before it, under a quarter of an hour
MOST_TOKENS = 90_000
LEAST_TOKENS = 20_000  # with less, the test split is a handful of documents and its figure means little
TOKEN_STEP = 5_000
SIZE_NAME = "demo.json"
# What else a token costs, in forwards of the base. Training: forward, backward twice and the update of the weights:
# 4.8 without bfloat16 instructions, 3.7 with them. Evaluation: overlapping windows through base, memory and both.
TRAINING_FORWARDS = 4.8
EVALUATION_FORWARDS = 11
WRITING = 60.0  # seconds for the texts that base and mixture write, and for the report


@dataclass(frozen=True)
class Speeds:
    """What a quick trial on this machine gave: tokens a second through the model, and search operations a second."""

    forward: float
    search: float


@dataclass(frozen=True)
class Part:
    """A part of the demo, what it does, and about how many seconds it takes."""

    name: str
    what: str
    seconds: float


def measure_speeds(model: str, tokens: int = 512) -> Speeds:
    """Time one forward of the base and one block of search, each after a first that does not count; takes seconds."""
    import torch

    from memdec.modeling.keys import hidden_and_keys
    from memdec.modeling.scoring import load_causal_lm

    loaded = load_causal_lm(model)
    tokens = min(tokens, getattr(loaded.config.get_text_config(), "max_position_embeddings", tokens))
    ids = torch.arange(2 * tokens).remainder(100).reshape(2, tokens)
    hidden_and_keys(loaded, ids[:, :64])
    begun = time.perf_counter()
    hidden_and_keys(loaded, ids)
    forward = ids.numel() / (time.perf_counter() - begun)
    left, right = torch.randn(512, 576), torch.randn(8192, 576)
    (left @ right.T).topk(64)
    begun = time.perf_counter()
    left @ right.T
    search = left.shape[0] * right.shape[0] * left.shape[1] / (time.perf_counter() - begun)
    return Speeds(forward, search)


def parts(speeds: Speeds, max_tokens: int, options: dict[str, Any]) -> list[Part]:
    """What will be done with ``max_tokens`` of text at ``speeds``."""
    train, validation, test = (share * max_tokens for share in options["fractions"])
    epochs = options["epochs"]
    # The matrix product is half of the search; the rest is picking the k nearest and adding up what they say.
    search = 2 * (train + validation) * train * 576 / speeds.search
    return [
        Part("corpus", f"{max_tokens:,} tokens, split by document", 5.0),
        Part(
            "datastore",
            f"the base reads {train:,.0f} tokens and keeps a key of each",
            (train + validation) / speeds.forward,
        ),
        Part("distributions", "for each position the nearest others, and what followed them", search),
        Part(
            "training",
            f"a copy of the model learns to say what the search says ({epochs} epoch{'s' if epochs > 1 else ''})",
            train * epochs * TRAINING_FORWARDS / speeds.forward + 5 * validation / speeds.forward,
        ),
        Part(
            "evaluation",
            f"{test:,.0f} held-out tokens, every way",
            EVALUATION_FORWARDS * test / speeds.forward + WRITING,
        ),
    ]


def plan(speeds: Speeds, max_tokens: int, options: dict[str, Any]) -> list[str]:
    """The parts and about how long each takes, a line each, for the user."""
    todo = parts(speeds, max_tokens, options)
    lines = [f"{part.name:<14}{about(part.seconds):>12}   {part.what}" for part in todo]
    return [*lines, f"{'together':<14}{about(sum(part.seconds for part in todo)):>12}"]


def tokens_within(minutes: float, speeds: Speeds, options: dict[str, Any]) -> int:
    """As many tokens of text as can be done within ``minutes``: 20,000 to 90,000, in steps of 5,000."""
    sizes = range(LEAST_TOKENS, MOST_TOKENS + 1, TOKEN_STEP)
    fitting = [size for size in sizes if sum(part.seconds for part in parts(speeds, size, options)) <= 60 * minutes]
    return max(fitting, default=LEAST_TOKENS)


def remember_size(out: Path, max_tokens: int) -> None:
    """Write to ``out`` how much text its run takes, unless that stands there."""
    if not (out / SIZE_NAME).exists():
        write_file(make_folder(out) / SIZE_NAME, json.dumps({"max_tokens": max_tokens}).encode() + b"\n")


def recall_size(out: Path) -> int | None:
    """How much text the run in ``out`` takes; None where there is no run yet.

    Raises:
        MemdecError: the file is damaged.
    """
    try:
        size = json.loads((out / SIZE_NAME).read_text())["max_tokens"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MemdecError(
            f"{out / SIZE_NAME} cannot be read ({error}). Say the size with --tokens, or use another --out."
        ) from error
    return int(size)


def about(seconds: float) -> str:
    """A duration as one would say it."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    return f"{seconds / 60:.0f} min" if seconds >= 570 else f"{seconds / 60:.1f} min"
