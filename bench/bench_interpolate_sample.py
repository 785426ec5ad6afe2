"""interpolate_sample: a batch of rows and a decoding step, without warpers and with each of them."""

from __future__ import annotations

import math

import pytest
import torch

from measuring import importable
from memdec import ops

ALPHA = 0.4
SIZES = {
    "cpu": {"rows, vocab": [(64, 50257), (1, 151936)]},
    "cuda": {"rows, vocab": [(1024, 151936), (8, 151936), (1, 151936)]},
}
WARPERS = {
    "coin": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def eager(base, memory, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The mixture, transformers' warpers, multinomial."""
    log_base, log_memory = base.float().log_softmax(-1), memory.float().log_softmax(-1)
    scores = torch.logaddexp(math.log(ALPHA) + log_memory, math.log1p(-ALPHA) + log_base) / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if min_p:
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return scores.softmax(-1).multinomial(1)[:, 0]


@pytest.mark.parametrize("settings", WARPERS.values(), ids=WARPERS.keys())
def bench_interpolate_sample(compare, rows, vocab, settings):
    torch.manual_seed(0)
    base, memory = (torch.randn(rows, vocab).mul_(3).bfloat16() for _ in range(2))
    contestants = {
        "memdec": lambda: ops.interpolate_sample(base, memory, ALPHA, seed=1, **settings),
        "eager": lambda: eager(base, memory, **settings),
    }
    if base.is_cuda and not settings and (flashinfer := importable("flashinfer.sampling")):
        draws = torch.Generator("cuda")
        contestants["eager mixture, FlashInfer's sampling"] = lambda: flashinfer.sampling_from_probs(
            ALPHA * memory.float().softmax(-1) + (1 - ALPHA) * base.float().softmax(-1), generator=draws
        )
    case = {"shape": [rows, vocab], "dtype": "bfloat16", "warpers": settings}
    compare("interpolate_sample", case, contestants, base.nbytes * (2 if settings else 1))
