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
LINEARS = (  # rows, width, outputs
    (1, 896, 70),  # Qwen2.5 0.5B's width
    (3, 33, 7),
    (8, 1296, 10),  # two steps and a half of the CUDA kernel's
    (5, 4864, 3),
    (1, 80, 515),  # several outputs a program
)
ATTENTIONS = (  # B, n, heads, key heads, dim, room
    (1, 1, 14, 2, 64, 256),  # Qwen2.5 0.5B
    (2, 3, 4, 4, 128, 130),  # the last two slots are looked at by themselves
    (1, 5, 4, 2, 80, 64),
    (3, 2, 3, 1, 12, 16),
    (1, 8, 2, 1, 16, 300),
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
    return torch.randn(*shape[:-1], shape[-1] + 8, generator=generator).to(device, dtype)[..., : shape[-1]]


def settle(device: str | torch.device) -> None:
    """Waits for what is queued."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


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
    check_with_stores(fast, "rotate_and_store", (merged, cos, sin, slots), before, (), weights)


def in_double(*given: Any) -> list[Any]:
    """Of tensors of floating point, copies in float64."""
    return [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in given]


def check_with_stores(
    fast: Any, name: str, given: tuple[Any, ...], before: list[Tensor], further: tuple[Any, ...], weights: list[Tensor]
) -> None:
    """What a kernel says and leaves in copies of the stores, with norms and without; other slots stay as they were."""
    rows, key_heads, room, _ = before[0].shape
    slots = given[3]
    plain = getattr(kernels, f"plain_{name}")
    for norms in (None, (weights[0], weights[1], 1e-6)):
        results = []
        for run, precise in ((getattr(fast, name), False), (plain, False), (plain, True)):
            arguments = [*given, *(store.clone() for store in before), *further]
            wide = norms
            if precise:
                arguments = in_double(*arguments)
                wide = None if norms is None else tuple(in_double(*norms))
            settle(slots.device)  # and so are the stores
            out = run(*arguments, wide)
            assert out.is_contiguous()
            results.append((out, arguments[4], arguments[5]))
        for tensors in zip(*results, strict=True):
            assert_near(*tensors)
        assert torch.equal(results[0][2], results[1][2])  # values
        untouched = torch.ones(rows, room, dtype=torch.bool, device=slots.device).scatter_(1, slots, False)
        kept = untouched[:, None].expand(-1, key_heads, -1)
        assert torch.equal(results[0][1][kept], before[0][kept])


def check_linear(fast: Any, device: str, dtype: torch.dtype, rows: int, width: int, outputs: int) -> None:
    """The three products of few rows, with biases and without; one of the rows is small enough for ε to count."""
    x, residual = numbers(device, dtype, rows, width), numbers(device, dtype, rows, outputs, seed=1)
    x[0] *= 1e-3
    norm_weight, bias = numbers(device, dtype, width, seed=2), numbers(device, dtype, 2 * outputs, seed=3)
    weight = numbers(device, dtype, 2 * outputs, width, seed=4).contiguous()
    half = weight[:outputs]
    for shift, half_shift in ((None, None), (bias, bias[:outputs])):
        for name, given in (
            ("norm_linear", (x, norm_weight, 1e-5, half, half_shift)),
            ("linear_add", (x, half, half_shift, residual)),
            ("norm_gate_up", (x, norm_weight, 1e-5, weight, shift)),
        ):
            plain = getattr(kernels, f"plain_{name}")
            settle(device)  # weights are read before the kernel that was queued before is done
            assert_near(getattr(fast, name)(*given), plain(*given), plain(*in_double(*given)))


def check_cached_attention(
    fast: Any, device: str, dtype: torch.dtype, rows: int, count: int, heads: int, key_heads: int, dim: int, room: int
) -> None:
    """With norms and without; the first slots are hidden as padding is, others at random, and later tokens."""
    generator = torch.Generator().manual_seed(6)
    merged = numbers(device, dtype, rows, count, (heads + 2 * key_heads) * dim)
    angles = 100 * numbers(device, torch.float32, rows, count, dim, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.stack([torch.randperm(room, generator=generator)[:count] for _ in range(rows)])
    hidden = torch.rand(rows, count, room, generator=generator) < 0.2
    hidden[..., :3] = True
    hidden[..., room - room // 8 :] = True
    for token in range(count):
        hidden[:, token].scatter_(1, slots[:, : token + 1], False)
        hidden[:, token].scatter_(1, slots[:, token + 1 :], True)
    slots, hidden = slots.to(device), hidden.to(device)
    weights = [numbers(device, dtype, dim, seed=seed) for seed in (2, 3)]
    before = [numbers(device, dtype, rows, key_heads, room, dim, seed=seed).contiguous() for seed in (4, 5)]
    check_with_stores(fast, "cached_attention", (merged, cos, sin, slots), before, (hidden, dim**-0.5), weights)


def check_a_shared_slot(fast: Any, device: str, dtype: torch.dtype) -> None:
    """What a token says is the same with another one behind it that has no slot of its own."""
    merged = numbers(device, dtype, 1, 2, 4 * 16)
    ones, slots = torch.ones(1, 2, 16, dtype=dtype, device=device), torch.full((1, 2), 6, device=device)
    hidden = torch.zeros(1, 2, 7, dtype=torch.bool, device=device)
    said = []
    for count in (1, 2):
        stores = [numbers(device, dtype, 1, 1, 7, 16, seed=seed).contiguous() for seed in (1, 2)]
        given = [one[:, :count] for one in (merged, ones, 0 * ones, slots)]
        said.append(fast.cached_attention(*given, *stores, hidden[:, :count], 0.25)[0])
    torch.testing.assert_close(*said, rtol=1e-6, atol=1e-6)


def main() -> None:
    """Every check on the CPU."""
    from memdec.decoding import triton_kernels as fast

    checked = 0
    for check, cases in (
        (check_add_norm, NORMS),
        (check_silu_mul, PRODUCTS),
        (check_rotate_and_store, ROTATIONS),
        (check_linear, LINEARS),
        (check_cached_attention, ATTENTIONS),
        (check_a_shared_slot, ((),)),
    ):
        for dtype, case in itertools.product(DTYPES, cases):
            if check is check_linear and dtype is torch.bfloat16 and case[1] > 4096:
                continue  # numbers that are cut off add up to what is too small, the more of them the further
            check(fast, "cpu", dtype, *case)
            checked += 1
    print(checked, "cases")


if __name__ == "__main__":
    main()
