"""The kernels of :mod:`memdec.decoding.kernels` in Triton, which this module imports.

Those between cuBLAS's products are small on purpose: a program is a row, a head of a token, or a few hundred columns,
and each value is read once and written once. Those of few rows are bound by the weights that they read: a program asks
for all of its weights at once, before anything else, so that many bytes are under way. Offsets that grow with a weight,
the batch or the room are computed in 64 bits. Nothing of them waits for the host, so that after a first call, which
compiles, they can be captured in a CUDA graph. In half precision most products of few rows are not Triton's, but those
of :mod:`memdec.decoding.products`.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdec.decoding import products

COLUMNS = 512  # of a product that a program of silu_mul takes
ENOUGH = 256  # programs: about two for each multiprocessor of a large GPU
HELD = 128  # bytes of a weight that a thread holds
NARROW = 1024  # columns or outputs up to which _linear is faster for one row, by a tenth of a step of Qwen2.5 0.5B
SLOTS, WARPS = 128, 8  # of a program of cached_attention: the slots that it looks at at once, and its warps


def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch for a kernel that starts while the one before it ends, where GPU and Triton can do that.

    Before :func:`_wait_for_kernel_before` such a kernel reads weights and what earlier steps left in the cache, nothing
    of this step, and writes nothing: earlier steps are done by then, since a step begins with a kernel of PyTorch's
    own, which waits for all before it.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able and hasattr(tl.extra.cuda, "gdc_wait") else {"EARLY": False}


# The next kernel may start now; what the one before has written can be read from here on.
@triton.jit
def _wait_for_kernel_before():
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


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


# -- few rows --------------------------------------------------------------------------------------------------------


# Rounded where transformers rounds: before it is multiplied by the weight, and after.
@triton.jit
def _scaled(values, scale, weight, dtype: tl.constexpr):
    return ((values * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


# y = x · Wᵀ + b, of x normed first where NORM, and added to the residual where ADD. GATED, y = g / (1 + exp(−g)) · u of
# g = x · Wgᵀ + bg and u = x · Wuᵀ + bu. A program computes OUTPUTS outputs of every row: it holds their weights in
# registers, and reads a row of x while it computes with the one before.
@triton.jit
def _linear(
    x,  # (ROWS, width), rows `x_row` apart
    norm_weight,  # (width,)
    weight,  # (outputs, width); GATED (2·outputs, width): gate, up
    bias,  # (outputs,) or (2·outputs,)
    residual,  # (ROWS, outputs), rows `residual_row` apart
    result,  # (ROWS, outputs)
    x_row,
    residual_row,
    outputs,
    width,
    epsilon,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    dtype = result.dtype.element_ty
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, WIDTH)
    there = output < outputs
    inside = column < width
    places = output.to(tl.int64)[:, None] * width + column[None, :]
    both = there[:, None] & inside[None, :]
    tile = tl.load(weight + places, mask=both, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_weight = weight + tl.cast(outputs, tl.int64) * width
        up_tile = tl.load(up_weight + places, mask=both, other=0.0, eviction_policy="evict_first")
    tl.debug_barrier()  # or the compiler asks for some of the weights later, when x has come
    if EARLY:
        _wait_for_kernel_before()
    ahead = tl.load(x + column, mask=inside, other=0.0)
    if NORM:
        factor = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
        if GATED:
            up_shift = tl.load(bias + outputs + output, mask=there, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        values = ahead.to(tl.float32)
        if row + 1 < ROWS:
            ahead = tl.load(x + (row + 1) * x_row + column, mask=inside, other=0.0)
        if ADD:
            before = tl.load(residual + row * residual_row + output, mask=there, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
            values = _scaled(values, scale, factor, dtype)
        y = tl.sum(tile.to(tl.float32) * values[None, :], axis=1)
        if BIAS:
            y += shift
        y = y.to(dtype).to(tl.float32)
        if GATED:
            up = tl.sum(up_tile.to(tl.float32) * values[None, :], axis=1)
            if BIAS:
                up += up_shift
            y = (y / (1.0 + tl.exp(-y))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        if ADD:
            y += before
        tl.store(result + row * outputs + output, y.to(dtype), mask=there)


def norm_linear(x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`memdec.decoding.kernels.norm_linear`."""
    return _launch_linear(x, weight, bias, norm_weight, epsilon)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As :func:`memdec.decoding.kernels.linear_add`."""
    return _launch_linear(x, weight, bias, residual=residual)


def norm_gate_up(x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`memdec.decoding.kernels.norm_gate_up`."""
    return _launch_linear(x, weight, bias, norm_weight, epsilon, gated=True)


def _launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    few = len(x) == 1 and min(weight.shape) <= NARROW
    if x.is_cuda and not few and products.is_possible(x, weight, norm_weight):
        if norm_weight is not None and not products.norms_as_well(x):
            x, _ = add_norm(x, None, norm_weight, epsilon)
            norm_weight = None
        return products.linear_of_rows(x, weight, bias, norm_weight, epsilon, residual, gated)
    rows, (outputs, width) = len(x), weight.shape
    outputs = outputs // 2 if gated else outputs
    result = x.new_empty(rows, outputs)
    given = [
        x,
        x if norm_weight is None else norm_weight,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        result,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        outputs,
    ]
    kinds = {"NORM": norm_weight is not None, "BIAS": bias is not None, "ADD": residual is not None, "GATED": gated}
    each, warps = tile(outputs, width, weight.element_size())
    sizes = {"ROWS": rows, "OUTPUTS": each, "WIDTH": triton.next_power_of_2(width)}
    _linear[(triton.cdiv(outputs, each),)](*given, width, epsilon, **sizes, **kinds, **early(x.device), num_warps=warps)
    return result


def tile(outputs: int, width: int, size: int) -> tuple[int, int]:
    """Outputs a program, and its warps, for a weight (outputs, width) whose numbers have `size` bytes.

    A warp takes a kilobyte of an output's weights, and more where that would be more than eight warps. A thread holds
    HELD bytes, or less where there would not be ENOUGH programs.
    """
    padded = triton.next_power_of_2(width) * size
    warps = min(max(padded // 1024, 1), 8)
    each = max(HELD * 32 * warps // padded, 1)
    while each > 1 and outputs < ENOUGH * each:
        each //= 2
    return each, warps


# x·cos + y·sin, rounded where transformers rounds; y is what x is turned with, of the head's other half.
@triton.jit
def _turned(x, y, cos, sin, dtype: tl.constexpr):
    return ((x * cos).to(dtype).to(tl.float32) + (y * sin).to(dtype).to(tl.float32)).to(dtype)


# A program a query head of a token. It rotates its query and, so that no program waits for another, the keys of all
# tokens of the row; softmax goes over these first and then over the slots, SLOTS at a time up to the last one seen,
# while the next ones are read. Of a token's key and value, the first query head of each key head writes them; the
# slots that are written meanwhile are left out of what is read.
@triton.jit(do_not_specialize=["slots_row", "hidden_row", "hidden_token", "tokens", "room"])
def _cached_attention(
    merged,  # (B, tokens, HEADS + 2·KEY_HEADS, DIM), rows `merged_row` and tokens `merged_token` apart
    cos,  # (B, tokens, DIM), rows `turns_row` and tokens `turns_token` apart
    sin,  # likewise
    slots,  # (B, tokens) int64, rows `slots_row` apart
    hidden,  # (B, tokens, room) uint8, rows `hidden_row` and tokens `hidden_token` apart
    query_weight,  # (DIM,)
    key_weight,  # (DIM,)
    keys,  # (B, KEY_HEADS, room, DIM)
    values,  # (B, KEY_HEADS, room, DIM)
    result,  # (B, tokens, HEADS, DIM)
    merged_row,
    merged_token,
    turns_row,
    turns_token,
    slots_row,
    hidden_row,
    hidden_token,
    tokens,
    room,
    epsilon,
    factor,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROOM: tl.constexpr,
    EARLY: tl.constexpr,
):
    head = tl.program_id(0)
    token = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    dtype = result.dtype.element_ty
    group: tl.constexpr = HEADS // KEY_HEADS
    half: tl.constexpr = DIM // 2
    key_head = head // group
    column = tl.arange(0, COLUMNS)
    inside = column < DIM
    partner = tl.where(column < half, column + half, column - half)
    sign = tl.where(column < half, -1.0, 1.0)
    own_hidden = hidden + row * hidden_row + token * hidden_token
    own_keys = keys + (row * KEY_HEADS + key_head) * room * DIM
    own_values = values + (row * KEY_HEADS + key_head) * room * DIM

    # What is asked for at once: the first slots, what is hidden, and the tokens.
    slot = tl.arange(0, SLOTS)
    first = slot[:, None] * DIM + column[None, :]
    stored = (slot < room)[:, None] & inside[None, :]
    stored_keys = tl.load(own_keys + first, mask=stored, other=0.0)
    stored_values = tl.load(own_values + first, mask=stored, other=0.0)
    if EARLY:
        _wait_for_kernel_before()
    concealed = tl.load(own_hidden + slot, mask=slot < room, other=1)
    everywhere = tl.arange(0, ROOM)
    anything = tl.load(own_hidden + everywhere, mask=everywhere < room, other=1)
    other = tl.arange(0, TOKENS)
    given = other < tokens
    taken = tl.load(slots + row * slots_row + other, mask=given, other=-1)
    own_slot = tl.load(slots + row * slots_row + token)
    source = merged + row * merged_row + token * merged_token + head * DIM
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    turn = row * turns_row + token * turns_token + column
    own_cos = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    own_sin = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    both = given[:, None] & inside[None, :]
    source = merged + row * merged_row + other[:, None] * merged_token + (HEADS + key_head) * DIM
    new_x = tl.load(source + column[None, :], mask=both, other=0.0).to(tl.float32)
    new_y = tl.load(source + partner[None, :], mask=both, other=0.0).to(tl.float32)
    new_values = tl.load(source + KEY_HEADS * DIM + column[None, :], mask=both, other=0.0)
    turn = row * turns_row + other[:, None] * turns_token + column[None, :]
    new_cos = tl.load(cos + turn, mask=both, other=0.0).to(tl.float32)
    new_sin = tl.load(sin + turn, mask=both, other=0.0).to(tl.float32)
    new_concealed = tl.load(own_hidden + taken, mask=given, other=1)

    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + epsilon)
        x = _scaled(x, scale, tl.load(query_weight + column, mask=inside, other=0.0).to(tl.float32), dtype)
        y = _scaled(y, scale, tl.load(query_weight + partner, mask=inside, other=0.0).to(tl.float32), dtype)
        scales = tl.rsqrt(tl.sum(new_x * new_x, axis=1) / DIM + epsilon)[:, None]
        weight = tl.load(key_weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        turned_weight = tl.load(key_weight + partner, mask=inside, other=0.0).to(tl.float32)[None, :]
        new_x = _scaled(new_x, scales, weight, dtype)
        new_y = _scaled(new_y, scales, turned_weight, dtype)
    query = _turned(x, sign * y, own_cos, own_sin, dtype).to(tl.float32)
    new_keys = _turned(new_x, sign[None, :] * new_y, new_cos, new_sin, dtype)
    if head % group == 0:
        target = taken[:, None] * DIM + column[None, :]
        mine = (other == token)[:, None] & inside[None, :]
        tl.store(own_keys + target, new_keys, mask=mine)
        tl.store(own_values + target, new_values, mask=mine)

    # A token beyond its row's end, which nothing is heard of, may share its slot with the last one that counts.
    seen = (new_concealed == 0) & ((taken != own_slot) | (other == token))
    new_scores = tl.sum(new_keys.to(tl.float32) * query[None, :], axis=1) * factor
    new_scores = tl.where(seen, new_scores, float("-inf"))
    highest = tl.max(new_scores, axis=0)
    new_weights = tl.exp(new_scores - highest)
    total = tl.sum(new_weights, axis=0)
    mean = tl.sum(new_weights[:, None] * new_values.to(tl.float32), axis=0)

    last = tl.max(tl.where(anything == 0, everywhere + 1, 0), axis=0)
    start = 0
    while start < last:
        ahead = start + SLOTS + slot
        further = first + (start + SLOTS) * DIM
        stored = (ahead < last)[:, None] & inside[None, :]
        next_keys = tl.load(own_keys + further, mask=stored, other=0.0)
        next_values = tl.load(own_values + further, mask=stored, other=0.0)
        next_concealed = tl.load(own_hidden + ahead, mask=ahead < last, other=1)
        replaced = tl.max((taken[:, None] == (start + slot)[None, :]).to(tl.int32), axis=0)
        scores = tl.sum(stored_keys.to(tl.float32) * query[None, :], axis=1) * factor
        scores = tl.where((concealed == 0) & (replaced == 0), scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        fading = tl.exp(highest - higher)
        total = total * fading + tl.sum(weights, axis=0)
        mean = mean * fading + tl.sum(weights[:, None] * stored_values.to(tl.float32), axis=0)
        highest = higher
        stored_keys = next_keys
        stored_values = next_values
        concealed = next_concealed
        start += SLOTS

    output = ((row * tokens + token) * HEADS + head) * DIM + column
    tl.store(result + output, (mean / total).to(dtype), mask=inside)


def cached_attention(
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
    """As :func:`memdec.decoding.kernels.cached_attention`."""
    rows, tokens, width = merged.shape
    key_heads, room, dim = keys.shape[1:]
    heads = width // dim - 2 * key_heads
    result = merged.new_empty(rows * tokens, heads * dim)
    query_weight, key_weight, epsilon = (merged, merged, 0.0) if norms is None else norms
    columns = triton.next_power_of_2(dim)
    _cached_attention[(heads, tokens, rows)](
        merged,
        cos,
        sin,
        slots,
        hidden.view(torch.uint8),
        query_weight,
        key_weight,
        keys,
        values,
        result,
        merged.stride(0),
        merged.stride(1),
        cos.stride(0),
        cos.stride(1),
        slots.stride(0),
        hidden.stride(0),
        hidden.stride(1),
        tokens,
        room,
        epsilon,
        factor,
        HEADS=heads,
        KEY_HEADS=key_heads,
        DIM=dim,
        NORM=norms is not None,
        TOKENS=triton.next_power_of_2(tokens),
        COLUMNS=columns,
        SLOTS=SLOTS,
        ROOM=triton.next_power_of_2(room),
        num_warps=WARPS,
        **early(merged.device),
    )
    return result
