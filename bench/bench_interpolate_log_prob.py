"""interpolate_log_prob, N = 1024, V = 50257: wanted 4 times eager, and not slower than torch.compile of it."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import ops

ALPHA = 0.4
SIZES = {
    "cpu": {"rows, vocab": [(1024, 50257), (4, 151936)]},
    "cuda": {"rows, vocab": [(1024, 50257), (1024, 151936), (8, 151936), (1, 151936)]},
}


def eager(base, memory, targets):
    """What one writes first: both log-softmaxes, mixed, one token taken."""
    log_base, log_memory = base.float().log_softmax(-1), memory.float().log_softmax(-1)
    mixed = torch.logaddexp(math.log(ALPHA) + log_memory, math.log1p(-ALPHA) + log_base)
    return mixed.gather(-1, targets[:, None])[:, 0]


def careful(base, memory, targets):
    """The token first, the mixture after: two logsumexps are all that has width V."""
    index = targets[:, None]
    log_base = base.gather(-1, index)[:, 0].float() - base.float().logsumexp(-1)
    log_memory = memory.gather(-1, index)[:, 0].float() - memory.float().logsumexp(-1)
    return torch.logaddexp(math.log(ALPHA) + log_memory, math.log1p(-ALPHA) + log_base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_interpolate_log_prob(compare, rows, vocab, dtype):
    torch.manual_seed(0)
    base, memory = (torch.randn(rows, vocab).mul_(3).to(dtype) for _ in range(2))
    targets = torch.randint(vocab, (rows,))
    compiled, compiled_careful = torch.compile(eager), torch.compile(careful)
    contestants = {
        "memdec": lambda: ops.interpolate_log_prob(base, memory, targets, ALPHA),
        "eager": lambda: eager(base, memory, targets),
        "eager, careful": lambda: careful(base, memory, targets),
        "torch.compile": lambda: compiled(base, memory, targets),
        "torch.compile of the careful one": lambda: compiled_careful(base, memory, targets),
    }
    case = {"shape": [rows, vocab], "dtype": str(dtype).removeprefix("torch.")}
    compare("interpolate_log_prob", case, contestants, 2 * base.nbytes)
