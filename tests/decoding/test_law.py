"""The law of the first tokens through the whole engine, on a vocabulary small enough to enumerate.

The truth is computed without cache, engine or op: softmaxes of both models over whole texts, mixed, and warped by
transformers' own warpers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from memdec import MemoryModel
from memdec.decoding import engine

VOCAB, TOKENS, ROWS = 5, 3, 6000
PROMPT = [3, 1, 4, 1]
WARPED = {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.05}


@functools.cache
def pair_of(make: Callable[..., MemoryModel]) -> MemoryModel:
    return make(vocab=VOCAB)


@torch.no_grad()
def true_law(model: MemoryModel, alpha: float, warped: bool) -> Tensor:
    """p of each sequence of TOKENS tokens after PROMPT, (V^TOKENS,)."""
    warpers = LogitsProcessorList()
    if warped:
        warpers += [
            TemperatureLogitsWarper(WARPED["temperature"]),
            TopKLogitsWarper(int(WARPED["top_k"])),
            TopPLogitsWarper(WARPED["top_p"]),
            MinPLogitsWarper(WARPED["min_p"]),
        ]
    law = torch.ones(1, dtype=torch.float64)
    for i in range(TOKENS):
        texts = torch.tensor([[*PROMPT, *more] for more in itertools.product(range(VOCAB), repeat=i)])
        read = texts.to(model.device)
        of = [m(read, use_cache=False).logits[:, -1].double().softmax(-1) for m in (model.base, model.memory)]
        mixed = (alpha * of[1] + (1 - alpha) * of[0]).cpu()
        probs = warpers(texts, mixed.log()).softmax(-1)
        law = (law[:, None] * probs).reshape(-1)
    return law


def statistic(model: MemoryModel, alpha: float, warped: bool, seed: int, **how: Any) -> tuple[float, float]:
    """χ² of ROWS continuations against the truth, and what it exceeds once in 10⁶ runs (Wilson–Hilferty)."""
    model.alpha = alpha
    torch.manual_seed(seed)
    settings = WARPED if warped else {"top_k": 0}
    output = model.generate(
        torch.tensor([PROMPT], device=model.device),
        max_new_tokens=TOKENS,
        do_sample=True,
        num_return_sequences=ROWS,
        eos_token_id=None,
        **settings,
        **how,
    )
    assert model.last_decode is not None and model.last_decode.reason is None
    index = (output[:, len(PROMPT) :].cpu() * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    counts = torch.bincount(index, minlength=VOCAB**TOKENS).double()
    expected = true_law(model, alpha, warped) * ROWS
    assert not counts[expected == 0].any(), "a sequence of probability 0 was made"
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(observed.numel() - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


@pytest.mark.parametrize("warped", [False, True], ids=["plain", "warped"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 3])
def test_law(make_pair: Callable[..., MemoryModel], draft_tokens: int, alpha: float, warped: bool) -> None:
    """Every γ, α and kind of draw; false alarm 10⁻⁶ a case, 4·10⁻⁵ in all."""
    how = {"decoding": "speculative", "draft_tokens": draft_tokens} if draft_tokens else {"decoding": "parallel"}
    found, limit = statistic(pair_of(make_pair), alpha, warped, seed=draft_tokens, **how)
    assert found < limit


def test_a_bonus_token_from_the_base_is_caught(
    make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an engine that takes the token after the last draft from the base alone."""
    verify = engine.verify_draft

    def biased(base: Tensor, memory: Tensor, drafts: Tensor, alpha: float, **how: Any) -> Any:
        verified = verify(base, memory, drafts, alpha, **how)
        bonus = torch.multinomial(base[:, -1].softmax(-1), 1)[:, 0]
        return verified._replace(
            next_token=torch.where(verified.num_accepted == drafts.shape[1], bonus, verified.next_token)
        )

    monkeypatch.setattr(engine, "verify_draft", biased)
    found, limit = statistic(pair_of(make_pair), 0.5, False, seed=1, decoding="speculative", draft_tokens=2)
    assert found > 2 * limit
