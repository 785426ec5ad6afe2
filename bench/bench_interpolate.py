"""interpolate and interpolate_sparse, which write all V log-probs: N = 1024, V = 50257, and a decoding step."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import SparseDistributions, ops

ALPHA = 0.4
SIZES = {
    "cpu": {"rows, vocab": [(1024, 50257), (4, 151936)]},
    "cuda": {"rows, vocab": [(1024, 50257), (1024, 151936), (8, 151936), (1, 151936)]},
}


def eager(base, memory):
    log_base, log_memory = base.float().log_softmax(-1), memory.float().log_softmax(-1)
    return torch.logaddexp(math.log(ALPHA) + log_memory, math.log1p(-ALPHA) + log_base)


def eager_sparse(base, dense):
    return torch.log(ALPHA * dense + (1 - ALPHA) * base.float().softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_interpolate(compare, rows, vocab, dtype):
    torch.manual_seed(0)
    base, memory = (torch.randn(rows, vocab).mul_(3).to(dtype) for _ in range(2))
    compiled = torch.compile(eager)
    contestants = {
        "memdec": lambda: ops.interpolate(base, memory, ALPHA),
        "eager": lambda: eager(base, memory),
        "torch.compile": lambda: compiled(base, memory),
    }
    case = {"shape": [rows, vocab], "dtype": str(dtype).removeprefix("torch.")}
    compare("interpolate", case, contestants, 2 * base.nbytes + 4 * base.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_interpolate_sparse(compare, dtype):
    """The rival is given its teacher as a dense matrix for nothing."""
    torch.manual_seed(0)
    base = torch.randn(1024, 50257).mul_(3).to(dtype)
    dense = torch.rand(1024, 50257).mul_(torch.rand(1024, 50257) < 65 / 50257)
    teacher = SparseDistributions.from_dense(dense / dense.sum(1, keepdim=True))
    dense = teacher.to_dense()
    contestants = {
        "memdec": lambda: ops.interpolate_sparse(base, teacher, ALPHA),
        "eager, dense teacher": lambda: eager_sparse(base, dense),
    }
    case = {"shape": [1024, 50257], "teacher_tokens": 65, "dtype": str(dtype).removeprefix("torch.")}
    compare("interpolate_sparse", case, contestants, base.nbytes + 4 * base.numel())
