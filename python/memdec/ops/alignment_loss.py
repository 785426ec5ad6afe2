"""alignment_loss: β·KL(teacher ‖ student) + (1−β)·cross-entropy, against teachers that are sparse over the
vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memdec import _C
from memdec.distributions import SparseDistributions
from memdec.ops import checks, launch
from memdec.ops.reference import AlignmentLoss
from memdec.ops.registration import is_traced, register, wants_grad
from memdec.ops.rows import Rows, accumulator, indices, rows, sparse_rows

REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}
NO_GRADIENT: Rows = (0, 0, 0, 1, 0, 0, 0)
Teacher = tuple[Tensor, Tensor, Tensor]  # indptr, token_ids, probs


def alignment_loss(
    logits: Tensor,  # (…, V)
    labels: Tensor,  # (…,) int64
    teacher: SparseDistributions,  # one row for each row of logits
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_in_place: bool = False,
) -> AlignmentLoss:
    """The loss of a Memory Decoder: imitate the retriever's distribution q, and predict the token that came.

    With p = softmax(z), m = Σq and log p(v) = (z_v − max) − log Σ exp(z − max)::

        L     = β·Σ q·(log q − log p) − (1−β)·log p(y)
        dL/dz = (β·m + 1 − β)·p − β·q − (1−β)·onehot(y)

    (Cao et al., "Memory Decoder", NeurIPS 2025, eq. 4 to 6, with q kept sparse.) The teacher costs its stored tokens
    only; nothing of width V is made for it. The forward pass reads the logits once.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64; rows may be strided. −inf is a masked token.
        labels: (…,) integers in [0, V), or ``ignore_index``: that row's KL and CE are dropped and its gradient is 0.
        teacher: as many rows as logits has, over V tokens. An empty row adds KL 0 and keeps its cross-entropy.
        beta: β in [0, 1], the weight of the KL; at 0 or 1 the other part does not enter ``total``.
        ignore_index: the label of rows to leave out.
        reduction: "mean" over the rows not ignored (0 if there are none), "sum", or "none": one value a row, (…,).
        grad_in_place: let the gradient overwrite the logits' storage, in this very call: the memory of one (…, V)
            tensor and one pass over it are saved. Afterwards ``logits`` holds the gradient and must not be read as
            logits; one backward pass is possible. Without effect where no gradient is asked for, and under
            torch.compile, which plans memory itself.

    Returns:
        ``AlignmentLoss(total, kl, ce)``, float32 (float64 for float64 logits). Only ``total`` carries a gradient, of
        the logits' dtype; it cannot be differentiated twice. A row with a NaN, or nothing but −inf, gives NaN. A
        token that the teacher gives mass and the student has masked makes ``kl`` +inf, a masked label makes ``ce``
        +inf.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape or device, β outside [0, 1], a label or teacher id outside the vocabulary, or
            ``grad_in_place`` on rows that share memory.
        RuntimeError: in backward, when the in-place gradient was used up by an earlier backward, or written over.

    Example:
        >>> import torch
        >>> from memdec import SparseDistributions, ops
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> q = SparseDistributions.from_dense(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]]))
        >>> loss = ops.alignment_loss(logits, torch.tensor([0, 3]), q)
        >>> loss.total.backward()
        >>> [round(part.item(), 3) for part in loss]
        [1.213, 1.04, 1.386]
        >>> logits.grad
        tensor([[-0.2500,  0.0000,  0.1250,  0.1250],
                [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """
    checks.logits("logits", logits)
    checks.kernels(logits=logits)
    checks.teacher(teacher, logits.shape[:-1].numel(), logits.shape[-1], logits.device)
    beta = checks.fraction("beta", beta)
    checks.reduction(reduction)
    checks.int64("ignore_index", ignore_index)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    if is_traced(logits, labels, *arrays):
        checks.tokens("labels", labels, logits.shape[:-1], logits)
        parts = torch.ops.memdec.alignment_loss(logits, labels.long(), *arrays, beta, ignore_index, reduction)
        return AlignmentLoss(*parts[:3])
    if not wants_grad(logits):
        return AlignmentLoss(*loss(logits, labels, arrays, beta, ignore_index, reduction))
    function = _InPlace if grad_in_place else _Separate
    parts = function.apply(logits, labels, *arrays, beta, ignore_index, reduction)  # type: ignore[no-untyped-call]
    return AlignmentLoss(*parts)


def loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    beta: float,
    ignore_index: int,
    reduction: str,
    *,
    row_max: Tensor | None = None,  # (…,) out
    row_sum: Tensor | None = None,  # (…,) out
    grad: Rows = NO_GRADIENT,
    grad_weight: Tensor | None = None,  # (), of the losses' dtype: a factor of the gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, kl and ce; on the way whatever else is asked for."""
    logits, described = rows(logits)
    labels = indices(labels, logits, "labels", ignore_index)
    sparse, _alive = sparse_rows(*teacher)
    dtype = accumulator(logits)
    shape = labels.shape if reduction == "none" else ()
    total, kl, ce = (torch.empty(shape, dtype=dtype, device=logits.device) for _ in range(3))
    launch.run(
        _C.alignment_loss,
        logits.device,
        described,
        labels.data_ptr(),
        ignore_index,
        sparse,
        beta,
        REDUCTION_CODES[reduction],
        total.data_ptr(),
        kl.data_ptr(),
        ce.data_ptr(),
        0 if row_max is None else row_max.data_ptr(),
        0 if row_sum is None else row_sum.data_ptr(),
        grad,
        0 if grad_weight is None else grad_weight.data_ptr(),
    )
    return total, kl, ce


def _loss_and_rows(
    logits: Tensor,
    labels: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total, kl, ce, and each row's max and Σ exp(z − max), which the gradient needs."""
    row_max = torch.empty(logits.shape[:-1], dtype=accumulator(logits), device=logits.device)
    row_sum = torch.empty_like(row_max)
    teacher = (indptr, token_ids, probs)
    parts = loss(logits, labels, teacher, beta, ignore_index, reduction, row_max=row_max, row_sum=row_sum)
    return (*parts, row_max, row_sum)


def gradient(
    grad_total: Tensor,  # () or, for reduction "none", (…,)
    logits: Tensor,
    labels: Tensor,
    indptr: Tensor | None,  # None: no teacher at all, every row is empty
    token_ids: Tensor | None,
    probs: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
    out: Tensor | None = None,  # may be logits
) -> Tensor:
    """d total / d logits · grad_total, in the logits' dtype."""
    logits, described = rows(logits)
    labels = indices(labels, logits, "labels", ignore_index)
    sparse: tuple[int, int, int, int] = (0, 0, 0, 0)
    if indptr is not None and token_ids is not None and probs is not None:
        sparse, _alive = sparse_rows(indptr, token_ids, probs)
    grad_total = grad_total.to(row_max.dtype).contiguous()
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    launch.run(
        _C.alignment_gradient,
        logits.device,
        described,
        labels.data_ptr(),
        ignore_index,
        sparse,
        beta,
        REDUCTION_CODES[reduction],
        row_max.data_ptr(),
        row_sum.data_ptr(),
        grad_total.data_ptr(),
        rows(grad)[1],
    )
    return grad


def scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply a gradient (…, n) by the incoming one, () or (…,), in place: next to nothing is done where that is 1,
    and nobody waits to know."""
    factor = factor.to(accumulator(grad)).contiguous()
    torch.autograd.graph.increment_version(grad)
    launch.run(_C.scale_rows, grad.device, rows(grad)[1], factor.data_ptr(), 1 if factor.dim() else 0)


class _Separate(torch.autograd.Function):
    """The gradient in memory of its own, made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        indptr: Tensor,
        token_ids: Tensor,
        probs: Tensor,
        beta: float,
        ignore_index: int,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, kl, ce, row_max, row_sum = _loss_and_rows(
            logits, labels, indptr, token_ids, probs, beta, ignore_index, reduction
        )
        ctx.save_for_backward(logits, labels, indptr, token_ids, probs, row_max, row_sum)
        ctx.options = (beta, ignore_index, reduction)
        ctx.mark_non_differentiable(kl, ce)
        ctx.set_materialize_grads(False)
        return total, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 8
        return (gradient(grad_total, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


class _InPlace(torch.autograd.Function):
    """The gradient over the logits, made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        indptr: Tensor,
        token_ids: Tensor,
        probs: Tensor,
        beta: float,
        ignore_index: int,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        refuse_shared_memory(logits)
        copy, described = rows(logits)
        if copy is not logits:
            raise ValueError(
                f"logits: got strides {logits.stride()} for shape {tuple(logits.shape)}, which grad_in_place cannot "
                f"write to; pass logits.contiguous(), or grad_in_place=False"
            )
        total, kl, ce = loss(logits, labels, (indptr, token_ids, probs), beta, ignore_index, reduction, grad=described)
        # Whoever saved these logits for a backward pass of its own is told by autograd that they are gone.
        torch.autograd.graph.increment_version(logits)
        ctx.gradient = logits.detach()
        ctx.version = logits._version
        ctx.mark_non_differentiable(kl, ce)
        ctx.set_materialize_grads(False)
        return total, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 8
        grad: Tensor | None = ctx.gradient
        if grad is None:
            raise RuntimeError(
                "alignment_loss: a second backward through grad_in_place=True: the first one gave the gradient away; "
                "use grad_in_place=False to go backward more than once"
            )
        if grad._version != ctx.version:
            raise RuntimeError(
                "alignment_loss: the logits were written to between the forward and the backward pass, but with "
                "grad_in_place=True they hold the gradient; use grad_in_place=False to go on using them"
            )
        ctx.gradient = None
        scale(grad, grad_total)
        return (grad, *(None,) * 7)


def refuse_shared_memory(logits: Tensor) -> None:
    """Raise unless every element of (…, V) logits has memory of its own: rows are written by several threads.

    Raises:
        ValueError: some rows overlap, as those of an expanded tensor do.
    """
    reach = 1  # elements spanned by the dimensions so far, from the innermost stride outwards
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"logits: got strides {logits.stride()} for shape {tuple(logits.shape)}: rows share memory, so "
                f"grad_in_place cannot write them; pass logits.contiguous(), or grad_in_place=False"
            )
        reach = stride * (size - 1) + reach if size > 0 else reach


def _fake_loss(
    logits: Tensor,
    labels: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, ...]:
    dtype, row_shape = accumulator(logits), logits.shape[:-1]
    shapes = [row_shape if reduction == "none" else ()] * 3 + [row_shape] * 2
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_gradient(
    grad_total: Tensor,
    logits: Tensor,
    labels: Tensor,
    indptr: Tensor | None,
    token_ids: Tensor | None,
    probs: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, indptr, token_ids, probs, *options = inputs
    _total, kl, ce, row_max, row_sum = output
    ctx.save_for_backward(logits, labels, indptr, token_ids, probs, row_max, row_sum)
    ctx.options = options
    ctx.mark_non_differentiable(kl, ce, row_max, row_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_total is None:
        return (None,) * 8
    grad = torch.ops.memdec.alignment_gradient(grad_total, *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * 7)


register(
    "alignment_gradient(Tensor grad_total, Tensor logits, Tensor labels, Tensor? indptr, Tensor? token_ids, "
    "Tensor? probs, Tensor row_max, Tensor row_sum, float beta, int ignore_index, str reduction) -> Tensor",
    gradient,
    _fake_gradient,
)
register(
    "alignment_loss(Tensor logits, Tensor labels, Tensor indptr, Tensor token_ids, Tensor probs, float beta, "
    "int ignore_index, str reduction) -> (Tensor total, Tensor kl, Tensor ce, Tensor row_max, Tensor row_sum)",
    _loss_and_rows,
    _fake_loss,
    _backward,
    _setup_context,
)
