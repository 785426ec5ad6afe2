"""A fused step's Triton kernels against their twins in plain PyTorch: on a GPU, and on the CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python tests/decoding/kernel_checks.py

A kernel may be wrong by twice what its twin is, both against the twin in float64, and by a unit in the last place of
the largest value. The interpreter cuts off where a GPU rounds to bfloat16, up to six times for a key: there, six times.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from memdec.decoding import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ((1, 33), (3, 77), (5, 896), (2, 2560))  # rows, width
PRODUCTS = ((1, 80), (3, 33), (5, 1100))  # rows, width
ROTATIONS = (  # B, n, heads, key heads, dim
    (1, 1, 14, 2, 64),  # Qwen2.5 0.5B
    (3, 2, 4, 4, 128),
    (1, 5, 4, 2, 128),
    (3, 1, 7, 1, 64),
    (3, 5, 2, 1, 80),  # a half is no power of two
)


def assert_near(got: Tensor, twin: Tensor, truth: Tensor) -> None:
    """The head of this file."""
    assert got.shape == twin.shape and got.dtype == twin.dtype
    error, twin_error = ((one.double() - truth).abs().max().item() for one in (got, twin))
    factor = 6 if got.dtype is torch.bfloat16 and got.device.type == "cpu" else 2
    allowed = factor * twin_error + torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= allowed, (error, twin_error)


def numbers(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers whose last dimension is a slice of something wider."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(device, dtype)[..., : shape[-1]]


def check_add_norm(fast: Any, device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """With a residual and without; rows of several sizes, one of them small enough for ε to count."""
    x, residual = (numbers(device, dtype, rows, width, seed=seed) for seed in range(2))
    weight = numbers(device, dtype, width, seed=2)
    x[0] *= 1e-3
    for other in (None, residual):
        got = fast.add_norm(x, other, weight, 1e-5)
        twin = kernels.plain_add_norm(x, other, weight, 1e-5)
        truth = kernels.plain_add_norm(x.double(), None if other is None else other.double(), weight.double(), 1e-5)
        for results in zip(got, twin, truth, strict=True):
            assert_near(*results)
        assert other is not None or got[1] is x


def check_silu_mul(fast: Any, device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """Gates far below zero and far above are among them."""
    merged = numbers(device, dtype, rows, 2 * width)
    merged[:, :4] = torch.tensor([-200.0, -20.0, 20.0, 200.0], device=device)
    assert_near(fast.silu_mul(merged), kernels.plain_silu_mul(merged), kernels.plain_silu_mul(merged.double()))


def check_rotate_and_store(
    fast: Any, device: str, dtype: torch.dtype, rows: int, count: int, heads: int, key_heads: int, dim: int
) -> None:
    """With norms and without; values go into their slots as they are, and other slots stay as they were."""
    merged = numbers(device, dtype, rows, count, (heads + 2 * key_heads) * dim)
    angles = 100 * numbers(device, torch.float32, rows, count, dim, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    room = 11
    slots = torch.stack([torch.randperm(room)[:count] for _ in range(rows)]).to(device)
    weights = [numbers(device, dtype, dim, seed=seed) for seed in (2, 3)]
    before = [numbers(device, dtype, rows, key_heads, room, dim, seed=seed).contiguous() for seed in (4, 5)]
    for norms in (None, (weights[0], weights[1], 1e-6)):
        results = []
        for run, precise in ((fast.rotate_and_store, False), (kernels.plain_rotate_and_store, False), (None, True)):
            given = [merged, cos, sin, *(store.clone() for store in before)]
            wide = norms
            if precise:
                given = [tensor.double() for tensor in given]
                wide = None if norms is None else (norms[0].double(), norms[1].double(), norms[2])
            run = run or kernels.plain_rotate_and_store
            queries = run(*given[:3], slots, *given[3:], wide)
            assert queries.is_contiguous()
            results.append((queries, given[3], given[4]))
        for tensors in zip(*results, strict=True):
            assert_near(*tensors)
        assert torch.equal(results[0][2], results[1][2])  # values
        untouched = torch.ones(rows, room, dtype=torch.bool, device=device).scatter_(1, slots, False)
        kept = untouched[:, None].expand(-1, key_heads, -1)
        assert torch.equal(results[0][1][kept], before[0][kept])


def main() -> None:
    """Every check on the CPU."""
    from memdec.decoding import triton_kernels as fast

    checked = 0
    for check, cases in ((check_add_norm, NORMS), (check_silu_mul, PRODUCTS), (check_rotate_and_store, ROTATIONS)):
        for dtype, case in itertools.product(DTYPES, cases):
            check(fast, "cpu", dtype, *case)
            checked += 1
    print(checked, "cases")


if __name__ == "__main__":
    main()
