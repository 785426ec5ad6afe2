"""What the tests of decoding share: batches of prompts, greedy continuations, and when two of them are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memdec import MemoryModel

TOKENS = 24


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded ids and their mask; the padding is a real token, so that only the mask can hide it."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[5] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    }


def greedy(model: MemoryModel, inputs: dict[str, Tensor], tokens: int = TOKENS, **settings: Any) -> list[list[int]]:
    """The likeliest continuation of each prompt."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
    texts: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return texts


def near_tie(model: MemoryModel, text: list[int], one: int, other: int) -> bool:
    """Whether two tokens' probabilities after a text are within rounding of float32."""
    with torch.no_grad():
        log_p = model(torch.tensor([text], device=model.device)).logits[0, -1]
    return abs(float(log_p[one] - log_p[other])) < 1e-4


def assert_same_texts(
    model: MemoryModel, prompts: list[list[int]], got: list[Any], wanted: list[Any], most_ties: float = 0.01
) -> int:
    """Token for token, but for what follows a near-tie; of these there may be so many a text. How many there were."""
    ties = 0
    for prompt, ours, theirs in zip(prompts, got, wanted, strict=True):
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            assert near_tie(model, prompt + ours[:at], ours[at], theirs[at]), (prompt, ours, theirs)
            ties += 1
    assert ties <= len(prompts) * most_ties
    return ties
