"""What a fused step is made of, each in one kernel: see :mod:`memdec.decoding.fusing`.

Between the products of cuBLAS:

    add_norm            s = x + r;  y = s / √(mean(s²) + ε) · w
    rotate_and_store    q, k normed where the model norms them, then (a, b) → (a·cos − b·sin, b·cos + a·sin);
                        k and v go into their slots of the cache
    silu_mul            g / (1 + exp(−g)) · u

For few rows, whose products are bound by the weights that they read, with the products:

    norm_linear         y = norm(x) · Wᵀ + b
    cached_attention    rotate_and_store, and the attention over what is stored
    linear_add          s = x · Wᵀ + b + r
    norm_gate_up        silu_mul(norm(x) · (Wg, Wu)ᵀ + b)

Each is a Triton kernel on a GPU (the products in half precision: :mod:`memdec.decoding.products`) and plain PyTorch on
the CPU and where Triton does not work (it needs a C compiler). A step of a few rows moves kilobytes between its
products: what is done there costs by the number of kernels. They compute in float32 and round where transformers rounds
in half precision, so that the two differ by the order of sums and by how exp and the square root are computed; in
float32, where a compiler may contract a product and a sum, by that as well.
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
            ones = torch.ones(2, 16, dtype=dtype, device=device)
            for few in (ones[:1], ones):
                found.linear_add(found.silu_mul(few), ones[:, :8].contiguous(), None, few[:, :2])
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


def norm_linear(
    x: Tensor,  # (R, d)
    norm_weight: Tensor,  # (d,)
    epsilon: float,
    weight: Tensor,  # (m, d), contiguous
    bias: Tensor | None,  # (m,)
) -> Tensor:
    """A linear layer (R, m) of the RMS norm of few rows."""
    fast = fast_kernels(x.device, x.dtype)
    run = plain_norm_linear if fast is None else fast.norm_linear
    return run(x, norm_weight, epsilon, weight, bias)


def cached_attention(
    merged: Tensor,  # (B, n, (heads + 2·key heads)·dim): queries, keys, values of each token
    cos: Tensor,  # (B, n, dim)
    sin: Tensor,  # (B, n, dim)
    slots: Tensor,  # (B, n) int64, in [0, room)
    keys: Tensor,  # (B, key heads, room, dim), contiguous
    values: Tensor,  # likewise
    hidden: Tensor,  # (B, n, room) bool, True where a token does not look; its own slot it sees
    factor: float,  # of the scores
    norms: tuple[Tensor, Tensor, float] | None = None,  # weights (dim,) of the queries' and keys' norms, and their ε
) -> Tensor:
    """The attention (B·n, heads·dim) of few tokens; their keys, rotated, and values are written into their slots."""
    fast = fast_kernels(merged.device, merged.dtype)
    run = plain_cached_attention if fast is None else fast.cached_attention
    return run(merged, cos, sin, slots, keys, values, hidden, factor, norms)


def linear_add(
    x: Tensor,  # (R, d)
    weight: Tensor,  # (m, d), contiguous
    bias: Tensor | None,  # (m,)
    residual: Tensor,  # (R, m)
) -> Tensor:
    """A linear layer of few rows, added to the residual: (R, m)."""
    fast = fast_kernels(x.device, x.dtype)
    run = plain_linear_add if fast is None else fast.linear_add
    return run(x, weight, bias, residual)


def norm_gate_up(
    x: Tensor,  # (R, d)
    norm_weight: Tensor,  # (d,)
    epsilon: float,
    weight: Tensor,  # (2·m, d), contiguous: gate, up
    bias: Tensor | None,  # (2·m,)
) -> Tensor:
    """silu(g)·u, (R, m), of the gate g and up u of the RMS norm of few rows."""
    fast = fast_kernels(x.device, x.dtype)
    run = plain_norm_gate_up if fast is None else fast.norm_gate_up
    return run(x, norm_weight, epsilon, weight, bias)


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


def plain_norm_linear(x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`norm_linear`."""
    return functional.linear(_norm(x, norm_weight, epsilon), weight, bias)


def plain_cached_attention(
    merged: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    factor: float,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """As :func:`cached_attention`."""
    queries = plain_rotate_and_store(merged, cos, sin, slots, keys, values, norms)
    out = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=~hidden[:, None], scale=factor, enable_gqa=queries.shape[1] > keys.shape[1]
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def plain_linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As :func:`linear_add`."""
    return residual + functional.linear(x, weight, bias)


def plain_norm_gate_up(x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`norm_gate_up`."""
    return plain_silu_mul(plain_norm_linear(x, norm_weight, epsilon, weight, bias))


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    # The weight not in the same call: transformers rounds before it multiplies by it.
    normed: Tensor = functional.rms_norm(x, x.shape[-1:], None, epsilon)
    return normed * weight
