"""linear_alignment_loss: alignment_loss with the lm_head in front of it, so that the logits of a batch never exist at
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memdec.distributions import SparseDistributions
from memdec.ops import checks
from memdec.ops.alignment_loss import NO_GRADIENT, Teacher, gradient, loss, scale
from memdec.ops.reference import AlignmentLoss
from memdec.ops.registration import is_traced, register, wants_grad
from memdec.ops.rows import accumulator, rows

# The logits of one chunk of tokens take at most this, and at most a tenth of what logits and gradient of the whole
# batch would; but not less than the third, below which a chunk is too thin for a matrix product to be fast.
LARGEST_WORKSPACE = 256 * 2**20
WORKSPACE_SHARE = 10
SMALLEST_WORKSPACE = 8 * 2**20
# Columns of the weight gradient that are added up at a time where the product is in half precision.
GRADIENT_COLUMNS = 4096
# On CUDA, torch since 2.8 adds a product of half precision to a float32 matrix as it makes it.
HAS_WIDE_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()  # type: ignore[no-untyped-call]


class Gradients(NamedTuple):
    """Those of hidden, weight and bias; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def linear_alignment_loss(
    hidden: Tensor,  # (…, d)
    weight: Tensor,  # (V, d)
    labels: Tensor,  # (…,) int64
    teacher: SparseDistributions,  # one row for each row of hidden
    *,
    bias: Tensor | None = None,  # (V,)
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> AlignmentLoss:
    """:func:`memdec.ops.alignment_loss` of ``hidden @ weight.T + bias``, in a fraction of its memory.

    Tokens are taken in chunks: a matrix product into a workspace, the loss with its gradient written over the chunk's
    logits, and from that the chunk's share of the gradients of hidden, weight and bias, all in the forward pass. The
    workspace holds at most 256 MiB, and a tenth of the whole batch's logits and their gradient. Only the gradients
    that are needed are computed, and none under ``torch.no_grad()``. The gradients of weight and bias are added up in
    float32 (float64 for float64), so with half-precision weights one float32 matrix of the weight's shape is taken
    beside.

    Under autocast the products run in autocast's dtype, as those of ``torch.nn.functional.linear`` would, and the
    weight's gradient is never rounded to it. With ``reduction="none"`` the gradients wait for the backward pass,
    which computes the logits a second time.

    Args:
        hidden: (…, d) float32, bfloat16, float16 or float64.
        weight: (V, d), of hidden's dtype (of any under autocast). May be the embedding that it is tied to.
        labels: (…,) integers in [0, V), or ``ignore_index``.
        teacher: as many rows as hidden has, over V tokens.
        bias: (V,) or None.
        beta: β in [0, 1], the weight of the KL.
        ignore_index: the label of rows to leave out.
        reduction: "mean" over the rows not ignored, "sum", or "none".

    Returns:
        ``AlignmentLoss(total, kl, ce)`` as of :func:`memdec.ops.alignment_loss`; ``total`` is differentiable in hidden,
        weight and bias; it cannot be differentiated twice.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape or device, β outside [0, 1], a label or teacher id outside the vocabulary.
        RuntimeError: a second backward pass where the first one did not retain the graph.

    Example:
        >>> import torch
        >>> from memdec import SparseDistributions, ops
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> hidden = torch.randn(2, 8, requires_grad=True)
        >>> q = SparseDistributions.from_dense(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]]))
        >>> loss = ops.linear_alignment_loss(hidden, head.weight, torch.tensor([0, 3]), q)
        >>> loss.total.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 8]), torch.Size([4, 8]))
    """
    beta, compute = _check(hidden, weight, labels, teacher, bias, beta, reduction)
    checks.int64("ignore_index", ignore_index)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    needed = [wants_grad(hidden), wants_grad(weight), wants_grad(bias)]
    if is_traced(hidden, weight, bias, labels, *arrays):
        parts = torch.ops.memdec.linear_alignment_loss(
            hidden, weight, bias, labels.long(), *arrays, beta, ignore_index, reduction, compute, needed
        )
        return AlignmentLoss(*parts[:3])
    options = (beta, ignore_index, reduction, compute)
    if not any(needed):
        return _forward(hidden, weight, bias, labels, arrays, *options, needed)[0]
    parts = _Function.apply(hidden, weight, bias, labels, *arrays, *options)  # type: ignore[no-untyped-call]
    return AlignmentLoss(*parts)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: SparseDistributions,
    bias: Tensor | None,
    beta: float,
    reduction: str,
) -> tuple[float, torch.dtype]:
    """β as a float and the dtype that the products run in, or an error."""
    checks.logits("hidden", hidden)
    checks.logits("weight", weight)
    checks.kernels(hidden=hidden, weight=weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, wanted (V, {hidden.shape[-1]}): a row a token, as wide as hidden"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.floats("bias", bias)
        checks.kernels(bias=bias)
        checks.same_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},), one value a token")
    checks.tokens("labels", labels, hidden.shape[:-1], hidden)
    checks.teacher(teacher, labels.numel(), weight.shape[0], hidden.device)
    checks.reduction(reduction)
    compute = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        compute = torch.get_autocast_dtype(hidden.device.type)
    else:
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != hidden.dtype:
                raise TypeError(
                    f"{name}: got {value.dtype}, wanted {hidden.dtype}, as hidden; convert one, or use torch.autocast"
                )
    return checks.fraction("beta", beta), compute


class _Chunk(NamedTuple):
    start: int
    stop: int
    hidden: Tensor  # (n, d) in the compute dtype
    logits: Tensor  # (n, V), in the workspace
    labels: Tensor  # (n,)
    teacher: Teacher


def _chunks(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d), in the compute dtype
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    teacher: Teacher,
) -> Iterator[_Chunk]:
    """The batch a chunk of tokens at a time, each with its logits in one workspace that the next chunk takes over."""
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    row_bytes = vocab * weight.element_size()
    room = min(LARGEST_WORKSPACE, max(SMALLEST_WORKSPACE, 2 * num_rows * row_bytes // WORKSPACE_SHARE))
    size = max(1, min(num_rows, room // row_bytes))
    workspace = torch.empty(size, vocab, dtype=weight.dtype, device=weight.device)
    indptr, token_ids, probs = teacher
    if weight.is_cpu and (indptr[0] != 0 or indptr[-1] != token_ids.numel()):  # a chunk cannot see that
        ends = f"{int(indptr[0])} to {int(indptr[-1])}"
        raise ValueError(f"teacher.indptr goes from {ends}, wanted 0 to the number of ids, {token_ids.numel()}")
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        part = hidden[start:stop].to(weight.dtype)
        logits = workspace[: stop - start]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        if weight.is_cpu:
            first, last = indptr[start].item(), indptr[stop].item()
            rows_of_chunk = (indptr[start : stop + 1] - first, token_ids[first:last], probs[first:last])
        else:
            # The CUDA kernels take row pointers into the whole teacher; the host would have to wait for these two.
            rows_of_chunk = (indptr[start : stop + 1], token_ids, probs)
        yield _Chunk(start, stop, part, logits, labels[start:stop], rows_of_chunk)


class _Sums:
    """The gradients of hidden, weight and bias, as they add up over the chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype, needed: list[bool]):
        wide = torch.float64 if compute == torch.float64 else torch.float32
        self.hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needed[0] else None
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
        wants_bias = needed[2] and bias is not None
        self.bias = torch.zeros(weight.shape[:1], dtype=wide, device=weight.device) if wants_bias else None

    def add(self, chunk: _Chunk, weight: Tensor) -> None:
        """Take in a chunk whose logits have become their gradient."""
        if self.hidden is not None:
            out = self.hidden[chunk.start : chunk.stop]
            if out.dtype == weight.dtype:
                torch.mm(chunk.logits, weight, out=out)
            else:
                out.copy_(torch.mm(chunk.logits, weight))
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(chunk.logits.t(), chunk.hidden)
            elif weight.is_cuda and HAS_WIDE_SUMS:
                factors = (chunk.logits.t(), chunk.hidden)
                torch.addmm(self.weight, *factors, out_dtype=self.weight.dtype, out=self.weight)
            else:
                for begin in range(0, weight.shape[0], GRADIENT_COLUMNS):
                    columns = slice(begin, begin + GRADIENT_COLUMNS)
                    self.weight[columns].add_(torch.mm(chunk.logits[:, columns].t(), chunk.hidden))
        if self.bias is not None:
            self.bias.add_(chunk.logits.sum(0, dtype=self.bias.dtype))

    def result(self, weight: Tensor, bias: Tensor | None) -> Gradients:
        """In the parameters' own dtypes."""
        return Gradients(
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, teacher: Teacher, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Teacher]:
    """The arguments of _chunks: leading dimensions folded, parameters in the compute dtype."""
    indptr, token_ids, probs = teacher
    return (
        hidden.detach().reshape(-1, hidden.shape[-1]),
        weight.detach().to(compute),
        None if bias is None else bias.detach().to(compute),
        labels.reshape(-1),
        (indptr, token_ids, probs),
    )


@torch.no_grad()
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Teacher,
    beta: float,
    ignore_index: int,
    reduction: str,
    compute: torch.dtype,
    needed: list[bool],
) -> tuple[AlignmentLoss, Gradients]:
    """The losses, and the gradients of `total` that are needed (none for reduction "none": see _gradients)."""
    flat, w, b, y, q = _prepare(hidden, weight, bias, labels, teacher, compute)
    dtype = torch.float64 if compute == torch.float64 else torch.float32
    share = torch.ones((), dtype=torch.float64, device=flat.device)
    if reduction == "mean":
        share /= (y != ignore_index).sum().clamp(min=1)
    in_place = any(needed) and reduction != "none"
    grad_weight = share.to(dtype)
    parts = [torch.empty(flat.shape[0], dtype=dtype, device=flat.device) for _ in AlignmentLoss._fields]  # of each row
    sums = _Sums(flat, weight, bias, compute, needed if in_place else [False] * 3)
    for chunk in _chunks(flat, w, b, y, q):
        grad = rows(chunk.logits)[1] if in_place else NO_GRADIENT
        of_chunk = loss(
            chunk.logits, chunk.labels, chunk.teacher, beta, ignore_index, "none", grad=grad, grad_weight=grad_weight
        )
        for part, values in zip(parts, of_chunk, strict=True):
            part[chunk.start : chunk.stop] = values
        if in_place:
            sums.add(chunk, w)
    if reduction == "none":
        return AlignmentLoss(*(part.view(labels.shape) for part in parts)), Gradients(None, None, None)
    reduced = AlignmentLoss(*((part.sum(dtype=torch.float64) * share).to(dtype) for part in parts))
    grads = sums.result(weight, bias)
    return reduced, grads._replace(hidden=None if grads.hidden is None else grads.hidden.view(hidden.shape))


@torch.no_grad()
def _gradients(
    grad_total: Tensor,  # (…,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Teacher,
    beta: float,
    ignore_index: int,
    compute: torch.dtype,
    needed: list[bool],
) -> Gradients:
    """The gradients for reduction "none": every row's loss has an incoming gradient of its own."""
    flat, w, b, y, q = _prepare(hidden, weight, bias, labels, teacher, compute)
    sums = _Sums(flat, weight, bias, compute, needed)
    for chunk in _chunks(flat, w, b, y, q):
        row_max = torch.empty(chunk.labels.shape, dtype=accumulator(chunk.logits), device=flat.device)
        row_sum = torch.empty_like(row_max)
        options = (beta, ignore_index, "none")
        loss(chunk.logits, chunk.labels, chunk.teacher, *options, row_max=row_max, row_sum=row_sum)
        incoming = grad_total.reshape(-1)[chunk.start : chunk.stop]
        gradient(incoming, chunk.logits, chunk.labels, *chunk.teacher, row_max, row_sum, *options, out=chunk.logits)
        sums.add(chunk, w)
    grads = sums.result(weight, bias)
    return grads._replace(hidden=None if grads.hidden is None else grads.hidden.view(hidden.shape))


# Whether the backward pass that is running was asked to retain the graph. A private name, in torch since 2.1; without
# it the gradients are copied, which is always right.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        indptr: Tensor,
        token_ids: Tensor,
        probs: Tensor,
        beta: float,
        ignore_index: int,
        reduction: str,
        compute: torch.dtype,
    ) -> AlignmentLoss:
        needed = list(ctx.needs_input_grad[:3])
        teacher = (indptr, token_ids, probs)
        parts, grads = _forward(hidden, weight, bias, labels, teacher, beta, ignore_index, reduction, compute, needed)
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, bias, labels, indptr, token_ids, probs)
            ctx.options = (beta, ignore_index, compute, needed)
        else:
            ctx.gradients = grads
        ctx.mark_non_differentiable(parts.kl, parts.ce)
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 11
        if hasattr(ctx, "options"):
            hidden, weight, bias, labels, *teacher = ctx.saved_tensors
            late = _gradients(grad_total, hidden, weight, bias, labels, tuple(teacher), *ctx.options)
            return (*late, *(None,) * 8)
        grads = cast(Gradients | None, ctx.gradients)
        if grads is None:
            raise RuntimeError(
                "linear_alignment_loss: a second backward pass: the first one gave the gradients away; "
                "pass retain_graph=True to the first one"
            )
        if _graph_is_kept():
            return (*(None if grad is None else grad * grad_total for grad in grads), *(None,) * 8)
        # Given away rather than kept, so that autograd can take the tensors over without a copy.
        ctx.gradients = None
        for grad in grads:
            if grad is not None:
                scale(grad, grad_total)
        return (*grads, *(None,) * 8)


# The registered operator: what was not asked for comes back empty, because an operator cannot return None.


def _or_empty(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(0) if grad is None else grad for grad in grads)
    return hidden, weight, bias


def _kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
    compute: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    teacher = (indptr, token_ids, probs)
    parts, grads = _forward(hidden, weight, bias, labels, teacher, beta, ignore_index, reduction, compute, needed)
    return (*parts, *_or_empty(grads, hidden))


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    beta: float,
    ignore_index: int,
    reduction: str,
    compute: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    shape = labels.shape if reduction == "none" else ()
    dtype = torch.float64 if compute == torch.float64 else torch.float32
    parts = [hidden.new_empty(shape, dtype=dtype) for _ in range(3)]
    wanted = needed if reduction != "none" else [False] * 3
    return (*parts, *_fake_gradients(hidden, weight, bias, wanted))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        value.new_empty(value.shape) if want and value is not None else hidden.new_empty(0)
        for value, want in zip((hidden, weight, bias), needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, beta, ignore_index, reduction, compute, needed = inputs
    _total, kl, ce, *grads = output
    ctx.none = reduction == "none"
    ctx.save_for_backward(*(tensors if ctx.none else grads))
    ctx.options = (beta, ignore_index, compute, needed)
    ctx.mark_non_differentiable(kl, ce, *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_total is None:
        return (None,) * 12
    if ctx.none:
        grads = torch.ops.memdec.linear_alignment_gradient(grad_total, *ctx.saved_tensors, *ctx.options)
    else:
        grads = [grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
    wanted = ctx.options[-1]
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 9)


register(
    "linear_alignment_gradient(Tensor grad_total, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor indptr, Tensor token_ids, Tensor probs, float beta, int ignore_index, ScalarType compute, bool[] needed) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    lambda grad_total, hidden, weight, bias, labels, indptr, token_ids, probs, *options: _or_empty(
        _gradients(grad_total, hidden, weight, bias, labels, (indptr, token_ids, probs), *options), hidden
    ),
    lambda grad_total, hidden, weight, bias, *rest: _fake_gradients(hidden, weight, bias, rest[-1]),
)
register(
    "linear_alignment_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor indptr, "
    "Tensor token_ids, Tensor probs, float beta, int ignore_index, str reduction, ScalarType compute, bool[] needed) "
    "-> (Tensor total, Tensor kl, Tensor ce, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _kernel,
    _fake,
    _backward,
    _setup_context,
)
