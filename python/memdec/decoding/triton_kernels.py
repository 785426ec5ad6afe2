"""The kernels of :mod:`memdec.decoding.kernels` in Triton, which this module imports.

They are small on purpose: a program is a row, a head of a token, or a few hundred columns, and each value is read once
and written once. Offsets that grow with the batch or the room are computed in 64 bits. Nothing of them waits for the
host, so that after a first call, which compiles, they can be captured in a CUDA graph.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 512  # of a product that a program of silu_mul takes


# y = s / √(mean(s²) + ε) · w with s = x + r. A program a row, which stays in registers between the sum and the product.
@triton.jit
def _add_norm(
    x,  # (R, width), rows `x_row` apart
    residual,  # (R, width), rows `residual_row` apart
    weight,  # (width,)
    normed,  # (R, width)
    total,  # (R, width)
    x_row,
    residual_row,
    width,
    epsilon,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dtype = normed.dtype.element_ty
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(dtype)
        tl.store(total + row * width + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
    scaled = (values * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + columns, (scaled * factor).to(dtype), mask=inside)


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As :func:`memdec.decoding.kernels.add_norm`."""
    rows, width = x.shape
    normed = x.new_empty(rows, width)
    total = x if residual is None else x.new_empty(rows, width)
    other = x if residual is None else residual
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x,
        other,
        weight,
        normed,
        total,
        x.stride(0),
        other.stride(0),
        width,
        epsilon,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return normed, total


# A program a head of a token. A head's halves (a, b), normed where the model norms them, become (a·cos − b·sin,
# b·cos + a·sin): a query's go to `queries`, a key's into its slot. A value goes into its slot as it is.
@triton.jit(do_not_specialize=["slots_row", "tokens", "room"])  # one compilation for all of them
def _rotate_and_store(
    merged,  # (B, tokens, HEADS + 2·KEY_HEADS, 2·HALF), rows `merged_row` and tokens `merged_token` apart
    cos,  # (B, tokens, 2·HALF), rows `turns_row` and tokens `turns_token` apart
    sin,  # likewise
    slots,  # (B, tokens) int64, rows `slots_row` apart
    query_weight,  # (2·HALF,)
    key_weight,  # (2·HALF,)
    queries,  # (B, HEADS, tokens, 2·HALF)
    keys,  # (B, KEY_HEADS, room, 2·HALF)
    values,  # (B, KEY_HEADS, room, 2·HALF)
    merged_row,
    merged_token,
    turns_row,
    turns_token,
    slots_row,
    tokens,
    room,
    epsilon,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    dtype = queries.dtype.element_ty
    source = merged + row * merged_row + token * merged_token + head * (2 * HALF) + columns
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    slot = tl.load(slots + row * slots_row + token)
    if head >= HEADS + KEY_HEADS:
        place = values + ((row * KEY_HEADS + (head - HEADS - KEY_HEADS)) * room + slot) * (2 * HALF) + columns
        tl.store(place, first, mask=inside)
        tl.store(place + HALF, second, mask=inside)
    else:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(a * a + b * b, axis=0) / (2 * HALF) + epsilon)
            factors = query_weight + columns if head < HEADS else key_weight + columns
            factor_a = tl.load(factors, mask=inside, other=0.0).to(tl.float32)
            factor_b = tl.load(factors + HALF, mask=inside, other=0.0).to(tl.float32)
            a = ((a * scale).to(dtype).to(tl.float32) * factor_a).to(dtype).to(tl.float32)
            b = ((b * scale).to(dtype).to(tl.float32) * factor_b).to(dtype).to(tl.float32)
        turn = row * turns_row + token * turns_token + columns
        cos_a = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + turn + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + turn + HALF, mask=inside, other=0.0).to(tl.float32)
        # Each product is rounded before they are added, as by transformers.
        turned_a = (a * cos_a).to(dtype).to(tl.float32) - (b * sin_a).to(dtype).to(tl.float32)
        turned_b = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
        if head < HEADS:
            place = queries + ((row * HEADS + head) * tokens + token) * (2 * HALF) + columns
        else:
            place = keys + ((row * KEY_HEADS + (head - HEADS)) * room + slot) * (2 * HALF) + columns
        tl.store(place, turned_a.to(dtype), mask=inside)
        tl.store(place + HALF, turned_b.to(dtype), mask=inside)


def rotate_and_store(
    merged: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """As :func:`memdec.decoding.kernels.rotate_and_store`."""
    rows, tokens, width = merged.shape
    key_heads, room, dim = keys.shape[1:]
    heads = width // dim - 2 * key_heads
    queries = merged.new_empty(rows, heads, tokens, dim)
    query_weight, key_weight, epsilon = (merged, merged, 0.0) if norms is None else norms
    _rotate_and_store[(tokens, rows, heads + 2 * key_heads)](
        merged,
        cos,
        sin,
        slots,
        query_weight,
        key_weight,
        queries,
        keys,
        values,
        merged.stride(0),
        merged.stride(1),
        cos.stride(0),
        cos.stride(1),
        slots.stride(0),
        tokens,
        room,
        epsilon,
        HEADS=heads,
        KEY_HEADS=key_heads,
        HALF=dim // 2,
        NORM=norms is not None,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )
    return queries


# g / (1 + exp(−g)) · u. A program a row and COLUMNS columns.
@triton.jit
def _silu_mul(
    merged,  # (R, 2·width), rows `merged_row` apart
    product,  # (R, width)
    merged_row,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dtype = product.dtype.element_ty
    gate = tl.load(merged + row * merged_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + row * merged_row + width + columns, mask=inside, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(product + row * width + columns, (opened * up).to(dtype), mask=inside)


def silu_mul(merged: Tensor) -> Tensor:
    """As :func:`memdec.decoding.kernels.silu_mul`."""
    rows, width = merged.shape[0], merged.shape[1] // 2
    product = torch.empty(rows, width, dtype=merged.dtype, device=merged.device)
    _silu_mul[(rows, triton.cdiv(width, COLUMNS))](merged, product, merged.stride(0), width, BLOCK=COLUMNS, num_warps=4)
    return product
