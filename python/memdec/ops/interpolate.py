"""interpolate: two models' next-token distributions mixed into one, as log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import launch
from memdec.ops.mixture import alpha_rows, checked, components, described_pair, wide_dtype
from memdec.ops.registration import is_traced, register, wants_grad


def interpolate(
    base_logits: Tensor,  # (…, V) any float dtype
    memory_logits: Tensor,  # (…, V) any float dtype
    alpha: float | Tensor,  # broadcasts to (…,)
) -> Tensor:  # (…, V) float32
    """log(α·softmax(memory) + (1−α)·softmax(base)), in log space: ``logaddexp(log α + log p_m, log(1−α) + log p_b)``.

    Args:
        base_logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        memory_logits: the same shape; a different dtype costs a copy of the narrower one.
        alpha: weight of the memory, in [0, 1]: a number, or a float tensor that broadcasts to the logits' leading
            shape.

    Returns:
        (…, V) log-probabilities, float32 (float64 for float64 logits). At α of exactly 0 or 1 the log-softmax of the
        one component used, whatever the other holds. A row is NaN where a used component's row holds a NaN, a +inf, or
        nothing but −inf, and on CUDA where a tensor's α is outside [0, 1]. Differentiable in both logits and in a
        tensor ``alpha``; the backward pass is plain PyTorch.

    Raises:
        TypeError: an argument is not a tensor of a dtype above, or ``alpha`` is no number.
        ValueError: shapes or devices that do not match, or an α outside [0, 1] (a tensor's: on the CPU).

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> ops.interpolate(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, float("-inf")]]), 0.5).exp()
        tensor([[0.7500, 0.2500]])
    """
    value, alphas = checked(base_logits, memory_logits, alpha)
    if is_traced(base_logits, memory_logits, alphas) or wants_grad(base_logits, memory_logits, alphas):
        mixed: Tensor = torch.ops.memdec.interpolate(base_logits, memory_logits, value, alphas)
        return mixed
    return _kernel(base_logits, memory_logits, value, alphas)


def _kernel(base_logits: Tensor, memory_logits: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    base_logits, memory_logits, base, memory = described_pair(base_logits, memory_logits)
    alphas, address = alpha_rows(alphas, base_logits.shape[:-1], base_logits.device)
    out = torch.empty(base_logits.shape, dtype=wide_dtype(base_logits, memory_logits), device=base_logits.device)
    launch.run(_C.interpolate, base_logits.device, base, memory, alpha, address, out.data_ptr())
    return out


def _fake(base_logits: Tensor, memory_logits: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    return base_logits.new_empty(base_logits.shape, dtype=wide_dtype(base_logits, memory_logits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base_logits, memory_logits, ctx.alpha, alphas = inputs
    ctx.save_for_backward(base_logits, memory_logits, alphas, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # With r = a component's share of p_mix(v):  dz = r·g − p·Σ(r·g);  dα = Σ g·(p_m − p_b) / p_mix.
    base_logits, memory_logits, alphas, mixed = ctx.saved_tensors
    log_base, log_memory, a = components(base_logits, memory_logits, ctx.alpha, alphas)
    masked = mixed == -torch.inf
    grad_base = grad_memory = grad_alpha = None

    def through(log_p: Tensor, log_weight: Tensor, logits: Tensor) -> Tensor:
        share = (grad * torch.exp(log_weight + log_p - mixed)).masked_fill(masked, 0)
        dz = share - log_p.exp() * share.sum(-1, keepdim=True)
        return dz.masked_fill(log_weight == -torch.inf, 0).to(logits.dtype)

    if ctx.needs_input_grad[0]:
        grad_base = through(log_base, torch.log1p(-a), base_logits)
    if ctx.needs_input_grad[1]:
        grad_memory = through(log_memory, a.log(), memory_logits)
    if ctx.needs_input_grad[3]:
        ratio = (torch.exp(log_memory - mixed) - torch.exp(log_base - mixed)).masked_fill(masked, 0)
        grad_alpha = (grad * ratio).sum(-1).sum_to_size(alphas.shape).to(alphas)
    return grad_base, grad_memory, None, grad_alpha


register(
    "interpolate(Tensor base_logits, Tensor memory_logits, float alpha, Tensor? alphas) -> Tensor",
    _kernel,
    _fake,
    _backward,
    _setup_context,
)
