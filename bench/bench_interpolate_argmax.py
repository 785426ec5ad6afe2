"""interpolate_argmax, N = 1024, V = 50257: wanted 4 times eager, and not slower than torch.compile of it."""

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


def eager(base, memory):
    log_base, log_memory = base.float().log_softmax(-1), memory.float().log_softmax(-1)
    return torch.logaddexp(math.log(ALPHA) + log_memory, math.log1p(-ALPHA) + log_base).argmax(-1)


def in_probabilities(base, memory):
    """Without logarithms, which an argmax does not need."""
    return (ALPHA * memory.float().softmax(-1) + (1 - ALPHA) * base.float().softmax(-1)).argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_interpolate_argmax(compare, rows, vocab, dtype):
    torch.manual_seed(0)
    base, memory = (torch.randn(rows, vocab).mul_(3).to(dtype) for _ in range(2))
    compiled, compiled_probabilities = torch.compile(eager), torch.compile(in_probabilities)
    contestants = {
        "memdec": lambda: ops.interpolate_argmax(base, memory, ALPHA),
        "eager": lambda: eager(base, memory),
        "eager, in probabilities": lambda: in_probabilities(base, memory),
        "torch.compile": lambda: compiled(base, memory),
        "torch.compile, in probabilities": lambda: compiled_probabilities(base, memory),
    }
    case = {"shape": [rows, vocab], "dtype": str(dtype).removeprefix("torch.")}
    compare("interpolate_argmax", case, contestants, 2 * base.nbytes)


def bench_call(compare):
    """A call with next to no work in it: what crossing into the extension costs, and what the registered path would."""
    base, memory = torch.randn(2, 1, 8)

    def thousand(function):
        def run():
            for _ in range(1000):
                function()

        return run

    contestants = {
        "memdec": thousand(lambda: ops.interpolate_argmax(base, memory, ALPHA)),
        "memdec, registered operator, arguments unchecked": thousand(
            lambda: torch.ops.memdec.interpolate_argmax(base, memory, ALPHA, None)
        ),
        "eager": thousand(lambda: eager(base, memory)),
    }
    if base.is_cuda:
        contestants["a launch alone, torch.cuda._sleep(0)"] = thousand(lambda: torch.cuda._sleep(0))
    compare("interpolate_argmax", {"shape": [1, 8], "dtype": "float32", "calls": 1000}, contestants, 64000)
