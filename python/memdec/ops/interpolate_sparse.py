"""interpolate_sparse: a model's next-token distribution mixed with a retriever's sparse one, the kNN-LM."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.distributions import SparseDistributions
from memdec.ops import checks, launch
from memdec.ops.mixture import alpha_rows
from memdec.ops.registration import is_traced, refuse_grad, register
from memdec.ops.rows import accumulator, rows, sparse_rows


def interpolate_sparse(
    base_logits: Tensor,  # (…, V) any float dtype
    teacher: SparseDistributions,  # one row for each row of logits
    alpha: float | Tensor,  # broadcasts to (…,)
) -> Tensor:  # (…, V) float32
    """log(α·(q + (1−m)·p) + (1−α)·p), p = softmax(base), q the teacher's row, m = Σq (Khandelwal et al., ICLR 2020).

    Mass that was cut from q goes to the base, so that a row always sums to 1; an empty row is the base alone.

    Args:
        base_logits: (…, V) float32, bfloat16, float16 or float64. −inf is a masked token.
        teacher: as many rows as the logits have, over V tokens.
        alpha: weight of the teacher (λ in the kNN-LM), in [0, 1]: a number, or a float tensor that broadcasts to the
            logits' leading shape.

    Returns:
        (…, V) log-probabilities, float32 (float64 for float64 logits). At α = 0 the base's log-softmax. At α = 1 a
        teacher row that is whole (m ≥ 1 − 1e-6) leaves −inf for every other token, whatever the base holds. A row is
        NaN where the base has a part in it and holds a NaN, a +inf, or nothing but −inf, and on CUDA where a tensor's α
        is outside [0, 1]; CUDA drops teacher ids outside [0, V).

    Raises:
        TypeError: an argument is not of a type or dtype above.
        ValueError: shapes, rows or devices that do not match, (on the CPU) a teacher id outside [0, V), an α outside
            [0, 1] (a tensor's: on the CPU), or an argument that wants a gradient (this op has none; see
            ops.reference.interpolate_sparse).

    Example:
        >>> import torch
        >>> from memdec import SparseDistributions, ops
        >>> q = SparseDistributions.from_dense(torch.tensor([[0.0, 1.0]]))
        >>> ops.interpolate_sparse(torch.zeros(1, 2), q, 0.5).exp()
        tensor([[0.2500, 0.7500]])
    """
    checks.logits("base_logits", base_logits)
    checks.kernels(base_logits=base_logits)
    shape = base_logits.shape
    checks.teacher(teacher, shape[:-1].numel(), shape[-1], base_logits.device)
    value, alphas = checks.alpha(alpha, base_logits)
    refuse_grad("interpolate_sparse", "ops.reference.interpolate_sparse", base_logits=base_logits, alpha=alphas)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    if is_traced(base_logits, *arrays, alphas):
        mixed: Tensor = torch.ops.memdec.interpolate_sparse(base_logits, *arrays, value, alphas)
        return mixed
    return _kernel(base_logits, *arrays, value, alphas)


def _kernel(
    base_logits: Tensor, indptr: Tensor, token_ids: Tensor, probs: Tensor, alpha: float, alphas: Tensor | None
) -> Tensor:
    base_logits, base = rows(base_logits, "base_logits")
    sparse, _alive = sparse_rows(indptr, token_ids, probs)
    alphas, address = alpha_rows(alphas, base_logits.shape[:-1], base_logits.device)
    out = torch.empty(base_logits.shape, dtype=accumulator(base_logits), device=base_logits.device)
    launch.run(_C.interpolate_sparse, base_logits.device, base, sparse, alpha, address, out.data_ptr())
    return out


def _fake(base_logits: Tensor, *_: object) -> Tensor:
    return base_logits.new_empty(base_logits.shape, dtype=accumulator(base_logits))


register(
    "interpolate_sparse(Tensor base_logits, Tensor indptr, Tensor token_ids, Tensor probs, float alpha, "
    "Tensor? alphas) -> Tensor",
    _kernel,
    _fake,
)
