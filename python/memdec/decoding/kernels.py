"""What a fused step does between its products, each in one kernel: see :mod:`memdec.decoding.fusing`.

    add_norm            s = x + r;  y = s / √(mean(s²) + ε) · w
    rotate_and_store    q, k normed where the model norms them, then (a, b) → (a·cos − b·sin, b·cos + a·sin);
                        k and v go into their slots of the cache
    silu_mul            g / (1 + exp(−g)) · u

Each is a Triton kernel on a GPU and plain PyTorch on the CPU and where Triton does not work (it needs a C compiler). A
step of a few rows moves kilobytes through them: what they cost is their number. They compute in float32 and round where
transformers rounds in half precision, so that the two differ by the order of the norm's sum and by how exp and the
square root are computed; in float32, where a compiler may contract a product and a sum, by that as well.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOGGER = logging.getLogger(__name__)


@cache
def fast_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module of Triton kernels where they work, tried once for a device and dtype; None elsewhere.

    The first call compiles and must not be in a capture.
    """
    if device.type != "cuda":
        return None
    try:
        found = import_module("memdec.decoding.triton_kernels")
        with torch.cuda.device(device):
            found.silu_mul(torch.ones(1, 16, dtype=dtype, device=device))
    except Exception as problem:  # no Triton, no C compiler, a GPU that it does not know: whatever, it goes without
        said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        LOGGER.warning("a model's step takes more kernels than it must, since Triton does not work here: %s", said)
        return None
    return found


def add_norm(
    x: Tensor,  # (R, d)
    residual: Tensor | None,  # (R, d)
    weight: Tensor,  # (d,)
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The RMS norm of a sum, and the sum, (R, d) each; without a residual the sum is `x` itself."""
    fast = fast_kernels(x.device, x.dtype)
    run = plain_add_norm if fast is None else fast.add_norm
    return run(x, residual, weight, epsilon)


def rotate_and_store(
    merged: Tensor,  # (B, n, (heads + 2·key heads)·dim): queries, keys, values of each token
    cos: Tensor,  # (B, n, dim)
    sin: Tensor,  # (B, n, dim)
    slots: Tensor,  # (B, n) int64, in [0, room)
    keys: Tensor,  # (B, key heads, room, dim), contiguous
    values: Tensor,  # likewise
    norms: tuple[Tensor, Tensor, float] | None = None,  # weights (dim,) of the queries' and keys' norms, and their ε
) -> Tensor:
    """The queries (B, heads, n, dim), rotated; keys, rotated, and values are written into `keys` and `values`."""
    fast = fast_kernels(merged.device, merged.dtype)
    run = plain_rotate_and_store if fast is None else fast.rotate_and_store
    return run(merged, cos, sin, slots, keys, values, norms)


def silu_mul(merged: Tensor) -> Tensor:
    """silu(g)·u, (R, m), of rows (g, u) (R, 2·m)."""
    fast = fast_kernels(merged.device, merged.dtype)
    run = plain_silu_mul if fast is None else fast.silu_mul
    return run(merged)


# -- the same in plain PyTorch ---------------------------------------------------------------------------------------


def plain_add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As :func:`add_norm`."""
    total = x if residual is None else x + residual
    return _norm(total, weight, epsilon), total


def plain_rotate_and_store(
    merged: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """As :func:`rotate_and_store`."""
    key_heads, dim = keys.shape[1], keys.shape[3]
    heads = merged.view(*merged.shape[:2], -1, dim).transpose(1, 2)
    both, value = heads[:, :-key_heads], heads[:, -key_heads:]
    if norms is not None:
        query, key = both[:, :-key_heads], both[:, -key_heads:]
        both = torch.cat((_norm(query, norms[0], norms[2]), _norm(key, norms[1], norms[2])), 1)
    turned = torch.cat((-both[..., dim // 2 :], both[..., : dim // 2]), -1)
    both = both * cos[:, None] + turned * sin[:, None]
    for store, states in ((keys, both[:, -key_heads:]), (values, value)):
        store.scatter_(2, slots[:, None, :, None].expand_as(states), states)
    return both[:, :-key_heads].contiguous()


def plain_silu_mul(merged: Tensor) -> Tensor:
    """As :func:`silu_mul`."""
    gate, up = merged.chunk(2, -1)
    return functional.silu(gate) * up


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    # The weight not in the same call: transformers rounds before it multiplies by it.
    normed: Tensor = functional.rms_norm(x, x.shape[-1:], None, epsilon)
    return normed * weight
