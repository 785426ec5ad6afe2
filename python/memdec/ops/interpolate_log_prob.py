"""interpolate_log_prob: the log-probability that the mixture of two models gives to one token a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import checks, launch
from memdec.ops.mixture import alpha_rows, checked, components, described_pair, plain_pair, wide_dtype
from memdec.ops.registration import is_traced, register, wants_grad
from memdec.ops.rows import accumulator, indices, plain_indices


def interpolate_log_prob(
    base_logits: Tensor,  # (…, V) any float dtype
    memory_logits: Tensor,  # (…, V) any float dtype
    targets: Tensor,  # (…,) int64
    alpha: float | Tensor,  # broadcasts to (…,)
) -> Tensor:  # (…,) float32
    """log(α·p_memory(target) + (1−α)·p_base(target)); each logit is read once and nothing of width V is written.

    Args:
        base_logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        memory_logits: the same shape; a different dtype costs a copy of the narrower one.
        targets: (…,) integers in [0, V).
        alpha: weight of the memory, in [0, 1]: a number, or a float tensor that broadcasts to the logits' leading
            shape.

    Returns:
        (…,) float32 (float64 for float64 logits). At α of exactly 0 or 1 what the one component used gives. NaN where a
        used component's row holds a NaN, a +inf, or nothing but −inf, and on CUDA where the target or a tensor's α is
        out of range. Differentiable in both logits and in a tensor ``alpha``; the backward pass is plain PyTorch.

    Raises:
        TypeError: an argument is not a tensor of a dtype above, or ``alpha`` is no number.
        ValueError: shapes or devices that do not match, or out of range: an α that is a number, or (on the CPU) a
            target or a tensor's α.

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> base, memory = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 9e3, 0.0]])
        >>> ops.interpolate_log_prob(base, memory, torch.tensor([2]), 0.5).exp()
        tensor([0.6250])
    """
    plain = plain_pair(base_logits, memory_logits, alpha)
    if plain is not None and plain_indices(targets, base_logits) and not wants_grad(base_logits, memory_logits):
        out = torch.empty_like(targets, dtype=accumulator(base_logits))
        launch.run(_C.interpolate_log_prob, base_logits.device, *plain, 0, targets.data_ptr(), out.data_ptr())
        return out
    value, alphas = checked(base_logits, memory_logits, alpha)
    checks.tokens("targets", targets, base_logits.shape[:-1], base_logits)
    if is_traced(base_logits, memory_logits, targets, alphas) or wants_grad(base_logits, memory_logits, alphas):
        mixed: Tensor = torch.ops.memdec.interpolate_log_prob(base_logits, memory_logits, targets, value, alphas)
        return mixed
    return _kernel(base_logits, memory_logits, targets, value, alphas)


def _kernel(base_logits: Tensor, memory_logits: Tensor, targets: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    base_logits, memory_logits, base, memory = described_pair(base_logits, memory_logits)
    targets = indices(targets, base_logits, "targets")
    alphas, address = alpha_rows(alphas, targets.shape, base_logits.device)
    out = torch.empty(targets.shape, dtype=wide_dtype(base_logits, memory_logits), device=base_logits.device)
    launch.run(
        _C.interpolate_log_prob, base_logits.device, base, memory, alpha, address, targets.data_ptr(), out.data_ptr()
    )
    return out


def _fake(base_logits: Tensor, memory_logits: Tensor, targets: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    return base_logits.new_empty(targets.shape, dtype=wide_dtype(base_logits, memory_logits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base_logits, memory_logits, targets, ctx.alpha, alphas = inputs
    ctx.save_for_backward(base_logits, memory_logits, targets, alphas, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # With r = a component's share of p_mix(y):  dz = g·r·(onehot(y) − p);  dα = g·(p_m(y) − p_b(y)) / p_mix(y).
    base_logits, memory_logits, targets, alphas, mixed = ctx.saved_tensors
    log_base, log_memory, a = components(base_logits, memory_logits, ctx.alpha, alphas)
    targets = targets.long()[..., None]
    mixed, grad = mixed[..., None], grad[..., None]
    grad_base = grad_memory = grad_alpha = None

    def through(log_p: Tensor, log_weight: Tensor, logits: Tensor) -> Tensor:
        share = grad * torch.exp(log_weight + log_p.gather(-1, targets) - mixed)
        dz = (-share * log_p.exp()).scatter_add(-1, targets, share)
        return dz.masked_fill(log_weight == -torch.inf, 0).to(logits.dtype)

    if ctx.needs_input_grad[0]:
        grad_base = through(log_base, torch.log1p(-a), base_logits)
    if ctx.needs_input_grad[1]:
        grad_memory = through(log_memory, a.log(), memory_logits)
    if ctx.needs_input_grad[4]:
        ratio = torch.exp(log_memory.gather(-1, targets) - mixed) - torch.exp(log_base.gather(-1, targets) - mixed)
        grad_alpha = (grad * ratio)[..., 0].sum_to_size(alphas.shape).to(alphas)
    return grad_base, grad_memory, None, None, grad_alpha


register(
    "interpolate_log_prob(Tensor base_logits, Tensor memory_logits, Tensor targets, float alpha, Tensor? alphas) "
    "-> Tensor",
    _kernel,
    _fake,
    _backward,
    _setup_context,
)
