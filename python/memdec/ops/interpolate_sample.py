"""interpolate_sample: a token drawn from the mixture of two models."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import checks, launch
from memdec.ops.mixture import alpha_rows, checked, described_pair, plain_pair
from memdec.ops.registration import is_traced, register
from memdec.ops.rows import Rows, key_rows, plain_indices


def interpolate_sample(
    base_logits: Tensor,  # (…, V) any float dtype
    memory_logits: Tensor,  # (…, V) any float dtype
    alpha: float | Tensor,  # broadcasts to (…,)
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,  # or int64 (…,)
    offset: int | Tensor = 0,  # or int64 (…,)
) -> Tensor:  # (…,) int64
    """Draw from α·softmax(memory) + (1−α)·softmax(base), warped, with noise of seed, offset and token only.

    Gumbel-max: argmax over v of log p(v) + g(v), g(v) from draw v of Philox4x32-10 keyed by the row's seed and offset.
    The warpers apply to the mixture, in transformers' order and with its definitions: temperature, top_k (all ties of
    the k-th), top_p, min_p. Without any of them a coin of probability α, from a stream of its own, picks one of the two
    models, and only that one's logits are read.

    Without cuts (top_k, top_p, min_p) the draw is in two steps: of the vocabulary's blocks of 4096 tokens the s of
    largest log P(s) + g(s), P(s) being the block's probability and g(s) from draw s of one more stream; then the v of
    largest log p(v) + g(v) among its tokens. P(s)·P(v | s) = p(v): the same law, for 4096 random numbers in place of V.

    Args:
        base_logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        memory_logits: the same shape; a different dtype costs a copy of the narrower one.
        alpha: weight of the memory, in [0, 1]: a number, or a float tensor that broadcasts to the logits' leading
            shape.
        temperature: above 0; log-probabilities are divided by it. For temperature 0 use :func:`interpolate_argmax`.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
        seed: 64 bits. One number for all rows is moved by the row's index, so that rows differ; a tensor gives one a
            row, so that a row draws the same token in a batch as alone.
        offset: 64 bits, one for all rows or one a row: count it up from draw to draw.

    Returns:
        (…,) int64. −1 where there is nothing to draw: the row drawn from holds a NaN, a +inf, or nothing but −inf
        (without warpers that is the row the coin picked, with them either of the two in use); on CUDA also where a
        tensor's α is outside [0, 1]. A seed draws the same token on the CPU and on CUDA, but for scores within
        rounding of each other.

    Raises:
        TypeError: an argument is not a tensor of a dtype above, or not a number where one is wanted.
        ValueError: shapes or devices that do not match, an α (a tensor's: on the CPU), top_p or min_p outside
            [0, 1], a temperature not above 0.

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> logits = torch.tensor([[0.0, float("-inf"), float("-inf")]])
        >>> ops.interpolate_sample(logits, logits, 0.5, seed=1)
        tensor([0])
    """
    plain = plain_pair(base_logits, memory_logits, alpha)
    value, alphas = (plain[2], None) if plain else checked(base_logits, memory_logits, alpha)
    temperature = checks.positive("temperature", temperature)
    top_k = min(checks.count("top_k", top_k), checks.MAX_VOCABULARY)
    top_p, min_p = checks.fraction("top_p", top_p), checks.fraction("min_p", min_p)
    seed, seeds = checks.per_row("seed", seed, base_logits)
    offset, offsets = checks.per_row("offset", offset, base_logits)
    if plain is not None and all(keys is None or plain_indices(keys, base_logits) for keys in (seeds, offsets)):
        out = base_logits.new_empty(*base_logits.shape[:-1], dtype=torch.int64)
        return _drawn(out, *plain, 0, temperature, top_k, top_p, min_p, seed, seeds, offset, offsets)
    arguments = (value, alphas, temperature, top_k, top_p, min_p, seed, seeds, offset, offsets)
    if is_traced(base_logits, memory_logits, alphas, seeds, offsets):
        tokens: Tensor = torch.ops.memdec.interpolate_sample(base_logits, memory_logits, *arguments)
        return tokens
    return _kernel(base_logits, memory_logits, *arguments)


def _kernel(
    base_logits: Tensor,
    memory_logits: Tensor,
    alpha: float,
    alphas: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> Tensor:
    base_logits, memory_logits, base, memory = described_pair(base_logits, memory_logits)
    shape = base_logits.shape[:-1]
    alphas, alpha_address = alpha_rows(alphas, shape, base_logits.device)
    out = torch.empty(shape, dtype=torch.int64, device=base_logits.device)
    warpers = (temperature, top_k, top_p, min_p)
    return _drawn(out, base, memory, alpha, alpha_address, *warpers, seed, seeds, offset, offsets)


def _drawn(
    out: Tensor,
    base: Rows,
    memory: Rows,
    alpha: float,
    alpha_address: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> Tensor:
    seeds, *seed_rows = key_rows("seed", seeds)
    offsets, *offset_rows = key_rows("offset", offsets)
    launch.run(
        _C.interpolate_sample,
        out.device,
        base,
        memory,
        alpha,
        alpha_address,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        *seed_rows,
        offset,
        *offset_rows,
        out.data_ptr(),
    )
    return out


def _fake(base_logits: Tensor, *_: object) -> Tensor:
    return base_logits.new_empty(base_logits.shape[:-1], dtype=torch.int64)


register(
    "interpolate_sample(Tensor base_logits, Tensor memory_logits, float alpha, Tensor? alphas, float temperature, "
    "int top_k, float top_p, float min_p, int seed, Tensor? seeds, int offset, Tensor? offsets) -> Tensor",
    _kernel,
    _fake,
)
