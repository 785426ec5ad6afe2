"""interpolate_argmax: the likeliest token of the mixture of two models, for greedy decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import launch
from memdec.ops.mixture import alpha_rows, checked, described_pair, plain_pair
from memdec.ops.registration import is_traced, register


def interpolate_argmax(
    base_logits: Tensor,  # (…, V) any float dtype
    memory_logits: Tensor,  # (…, V) any float dtype
    alpha: float | Tensor,  # broadcasts to (…,)
) -> Tensor:  # (…,) int64
    """argmax of α·softmax(memory) + (1−α)·softmax(base); nothing of width V is written.

    Args:
        base_logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        memory_logits: the same shape; a different dtype costs a copy of the narrower one.
        alpha: weight of the memory, in [0, 1]: a number, or a float tensor that broadcasts to the logits' leading
            shape.

    Returns:
        (…,) int64: the lowest id of equals, as torch.argmax; −1 where a used component's row holds a NaN, a +inf, or
        nothing but −inf, and on CUDA where a tensor's α is outside [0, 1]. Probabilities are compared in float32
        (float64 for float64 logits).

    Raises:
        TypeError: an argument is not a tensor of a dtype above, or ``alpha`` is no number.
        ValueError: shapes or devices that do not match, or an α outside [0, 1] (a tensor's: on the CPU).

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> ops.interpolate_argmax(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, 0.0, 0.0]]), 0.6)
        tensor([0])
    """
    plain = plain_pair(base_logits, memory_logits, alpha)
    if plain is not None:
        out = base_logits.new_empty(*base_logits.shape[:-1], dtype=torch.int64)
        launch.run(_C.interpolate_argmax, base_logits.device, *plain, 0, out.data_ptr())
        return out
    value, alphas = checked(base_logits, memory_logits, alpha)
    if is_traced(base_logits, memory_logits, alphas):
        tokens: Tensor = torch.ops.memdec.interpolate_argmax(base_logits, memory_logits, value, alphas)
        return tokens
    return _kernel(base_logits, memory_logits, value, alphas)


def _kernel(base_logits: Tensor, memory_logits: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    base_logits, memory_logits, base, memory = described_pair(base_logits, memory_logits)
    shape = base_logits.shape[:-1]
    alphas, address = alpha_rows(alphas, shape, base_logits.device)
    out = torch.empty(shape, dtype=torch.int64, device=base_logits.device)
    launch.run(_C.interpolate_argmax, base_logits.device, base, memory, alpha, address, out.data_ptr())
    return out


def _fake(base_logits: Tensor, memory_logits: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    return base_logits.new_empty(base_logits.shape[:-1], dtype=torch.int64)


register(
    "interpolate_argmax(Tensor base_logits, Tensor memory_logits, float alpha, Tensor? alphas) -> Tensor",
    _kernel,
    _fake,
)
