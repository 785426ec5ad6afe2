"""Long runs: what decoding keeps in memory is its caches and nothing that grows with the tokens made."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from memdec import MemoryModel

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

TOKENS = 10_000
MEGABYTE = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


class Watch(BaseStreamer):  # type: ignore[misc]
    """Notes the memory in use after every thousand tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seen: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.numel()
        if self.tokens % 1000 == 0:
            self.seen.append(resident())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("how", [{"decoding": "speculative", "draft_tokens": 4}, {"decoding": "auto"}], ids=str)
def test_one_long_text(tiny_llama: Callable[..., Any], how: dict[str, Any]) -> None:
    """10,000 tokens in one go: beyond the first thousand, memory grows by the caches' own bytes, and little else.

    With 4096 tokens in the vocabulary, a row of logits kept for each token would be 147 MB, four times the limit.
    """
    shape = {"vocab": 4096, "max_position_embeddings": 16384, "eos_token_id": None}
    base, memory = (tiny_llama(seed=seed, **shape) for seed in (0, 1))
    model = MemoryModel.from_pretrained(base, memory, alpha=0.5)
    watch = Watch()
    prompt = torch.tensor([[1, 2, 3]])
    model.generate(prompt, max_new_tokens=TOKENS, do_sample=True, streamer=watch, **how)
    assert model.last_decode.tokens == TOKENS and model.last_decode.reason is None
    config = base.config
    head_dim = config.hidden_size // config.num_attention_heads
    # Keys and values of two models in float32. A cache doubles when it is full, and its old half is freed only then.
    cache = 2 * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * TOKENS
    assert watch.seen[-1] - watch.seen[0] < 2 * cache + 16 * MEGABYTE


def test_many_short_texts(make_pair: Callable[..., MemoryModel]) -> None:
    """A hundred texts of a hundred tokens: after the first twenty the process does not grow."""
    model = make_pair(close=0.35)
    sizes = []
    for number in range(100):
        prompt = torch.tensor([[1 + number % 7, 2, 3]])
        model.generate(prompt, max_new_tokens=100, do_sample=number % 2 == 0, decoding="auto")
        sizes.append(resident())
    assert sizes[-1] - sizes[19] < 4 * MEGABYTE
