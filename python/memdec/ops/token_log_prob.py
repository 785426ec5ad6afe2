"""token_log_prob: the log-probability that each row of logits gives to one token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memdec import _C
from memdec.ops import checks, launch
from memdec.ops.alignment_loss import gradient
from memdec.ops.registration import is_traced, is_watched, register, wants_grad
from memdec.ops.rows import accumulator, indices, plain_indices, plain_rows, rows


def token_log_prob(
    logits: Tensor,  # (…, V)
    targets: Tensor,  # (…,) int64
) -> Tensor:  # (…,) float32
    """log p(target) under softmax(logits), without writing anything of width V.

    ``log p(v) = (z_v − max) − log Σ exp(z − max)``. Each logit is read once; the backward pass reads it once more.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        targets: (…,) integers in [0, V).

    Returns:
        (…,) float32 (float64 for float64 logits): −inf where the target is masked, NaN where the row holds a NaN or
        nothing but −inf, and on CUDA where the target is outside [0, V). Differentiable in ``logits``.

    Raises:
        TypeError: a dtype that is not one of the above.
        ValueError: shapes that do not match, or (on the CPU) a target outside [0, V).

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> ops.token_log_prob(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 1]))
        tensor([-0.6931,  0.0000])
    """
    if not is_watched():
        plain = plain_rows(logits)
        if plain is not None and plain_indices(targets, logits) and not wants_grad(logits):
            log_prob = torch.empty_like(targets, dtype=accumulator(logits))
            launch.run(_C.token_log_prob, logits.device, plain, targets.data_ptr(), log_prob.data_ptr(), 0, 0)
            return log_prob
    checks.logits("logits", logits)
    checks.kernels(logits=logits)
    checks.tokens("targets", targets, logits.shape[:-1], logits)
    if is_traced(logits, targets):
        return cast(Tensor, torch.ops.memdec.token_log_prob(logits, targets.long())[0])
    if wants_grad(logits):
        return cast(Tensor, _TokenLogProb.apply(logits, targets))  # type: ignore[no-untyped-call]
    logits, described = rows(logits)
    targets = indices(targets, logits, "targets")
    log_prob = torch.empty(targets.shape, dtype=accumulator(logits), device=logits.device)
    launch.run(_C.token_log_prob, logits.device, described, targets.data_ptr(), log_prob.data_ptr(), 0, 0)
    return log_prob


def _forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, max, sum), one of each a row; max and sum are what the gradient needs."""
    logits, described = rows(logits)
    targets = indices(targets, logits, "targets")
    log_prob, high, total = (
        torch.empty(targets.shape, dtype=accumulator(logits), device=logits.device) for _ in range(3)
    )
    pointers = (targets.data_ptr(), log_prob.data_ptr(), high.data_ptr(), total.data_ptr())
    launch.run(_C.token_log_prob, logits.device, described, *pointers)
    return log_prob, high, total


def _fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    dtype = accumulator(logits)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
    )


def _gradient(grad: Tensor, logits: Tensor, targets: Tensor, row_max: Tensor, row_sum: Tensor) -> Tensor:
    # d log p(y) / dz = onehot(y) − p: the cross-entropy's gradient with its sign turned. No label equals −1.
    return gradient(-grad, logits, targets, None, None, None, row_max, row_sum, 0.0, -1, "none")


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_prob, row_max, row_sum = _forward(logits, targets)
        ctx.save_for_backward(logits, targets, row_max, row_sum)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gradient(grad, *ctx.saved_tensors), None


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _log_prob, row_max, row_sum = output
    ctx.save_for_backward(*inputs, row_max, row_sum)
    ctx.mark_non_differentiable(row_max, row_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return torch.ops.memdec.token_log_prob_gradient(grad, *ctx.saved_tensors), None


register(
    "token_log_prob_gradient(Tensor grad, Tensor logits, Tensor targets, Tensor row_max, Tensor row_sum) -> Tensor",
    _gradient,
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)
register(
    "token_log_prob(Tensor logits, Tensor targets) -> (Tensor log_prob, Tensor row_max, Tensor row_sum)",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
