"""token_log_prob: the log-probability that each row of logits gives to one token."""

from __future__ import annotations

import torch

from memdec import _C
from memdec.ops.registration import is_traced, register
from memdec.ops.rows import accumulator, indices, rows


def token_log_prob(
    logits: torch.Tensor,  # (…, V)
    targets: torch.Tensor,  # (…,) int64
) -> torch.Tensor:  # (…,) float32
    """log p(target) under softmax(logits), without writing anything of width V.

    ``log p(v) = (z_v − max) − log Σ exp(z − max)``. Each logit is read once; the backward pass reads it once more.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        targets: (…,) integers in [0, V).

    Returns:
        (…,) float32 (float64 for float64 logits): −inf where the target is masked, NaN where the row holds a NaN or
        nothing but −inf. Differentiable in ``logits``.

    Raises:
        TypeError: a dtype that is not one of the above.
        ValueError: shapes that do not match, or a target outside [0, V).

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> ops.token_log_prob(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 1]))
        tensor([-0.6931,  0.0000])
    """
    if is_traced(logits):
        log_prob: torch.Tensor = torch.ops.memdec.token_log_prob(logits, targets)[0]
        return log_prob
    logits, described = rows(logits)
    targets = indices(targets, logits.shape[:-1], "targets")
    log_prob = torch.empty(targets.shape, dtype=accumulator(logits))
    _C.token_log_prob(described, targets.data_ptr(), log_prob.data_ptr(), 0, 0, torch.get_num_threads())
    return log_prob


def _forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log_prob, max, sum), one of each a row; max and sum are what the gradient needs."""
    logits, described = rows(logits)
    targets = indices(targets, logits.shape[:-1], "targets")
    log_prob, high, total = (torch.empty(targets.shape, dtype=accumulator(logits)) for _ in range(3))
    pointers = (targets.data_ptr(), log_prob.data_ptr(), high.data_ptr(), total.data_ptr())
    _C.token_log_prob(described, *pointers, torch.get_num_threads())
    return log_prob, high, total


def _fake(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = logits.shape[:-1]
    dtype = accumulator(logits)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
    )


register("token_log_prob(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)", _forward, _fake)
