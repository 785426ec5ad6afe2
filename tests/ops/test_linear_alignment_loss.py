"""linear_alignment_loss against the reference in float64, over chunks of every size."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from memdec import SparseDistributions, ops
from memdec.ops import reference

MODULE = sys.modules["memdec.ops.linear_alignment_loss"]  # its name in memdec.ops is the function
ROWS, WIDTH, VOCAB = 7, 5, 50


@pytest.fixture(params=[1, 3, 7, 100], ids=lambda rows: f"{rows}_rows_a_chunk")
def chunk_rows(request, monkeypatch):
    """Chunks of one row, of a size that does not divide the batch, of the whole batch, and of more than there is."""
    monkeypatch.setattr(MODULE, "SMALLEST_WORKSPACE", 0)
    monkeypatch.setattr(MODULE, "WORKSPACE_SHARE", 1)
    original = MODULE._chunks

    def limited(hidden, weight, *rest):
        monkeypatch.setattr(MODULE, "LARGEST_WORKSPACE", request.param * weight.shape[0] * weight.element_size())
        return original(hidden, weight, *rest)

    monkeypatch.setattr(MODULE, "_chunks", limited)


def problem(dtype, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(VOCAB, (ROWS,), generator=generator).to(device)
    labels[2] = -100
    dense = torch.rand(ROWS, VOCAB, generator=generator) * (torch.rand(ROWS, VOCAB, generator=generator) < 0.2)
    dense[4] = 0
    teacher = SparseDistributions.from_dense(dense / dense.sum(1, keepdim=True).clamp(min=1))
    return hidden, weight, bias, labels, teacher.to(device)


def run(function, hidden, weight, bias, labels, teacher, incoming=None, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    loss = function(leaves[0], leaves[1], labels, teacher, bias=leaves[2] if bias is not None else None, **options)
    (loss.total * (1 if incoming is None else incoming)).sum().backward()
    return [*loss], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_agrees_with_the_reference(device, chunk_rows, dtype, reduction):
    """Losses and gradients; half precision to a few roundings of the logits (|z| < 16) and of the gradient."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float64: 1e-11}[dtype]
    for with_bias, beta in itertools.product([False, True], [0.5, 1.0]):
        hidden, weight, bias, labels, teacher = problem(dtype, device=device)
        bias = bias if with_bias else None
        incoming = torch.linspace(0.5, 2, ROWS, dtype=torch.float64, device=device) if reduction == "none" else 3
        wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
        options = {"beta": beta, "reduction": reduction, "incoming": incoming}
        truth, true_grads = run(reference.linear_alignment_loss, *wide, labels, teacher, **options)
        ours, grads = run(ops.linear_alignment_loss, hidden, weight, bias, labels, teacher, **options)
        for mine, true in zip([*ours, *grads], [*truth, *true_grads], strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)
        assert [grad.dtype for grad in grads] == [dtype] * len(grads)


def test_the_weight_gradient_adds_up_in_float32(device, monkeypatch):
    """512 chunks of one row: three roundings to bfloat16 (of dL/dz, of each product, of the result) are allowed, but a
    sum kept in bfloat16 would stop growing at 256 times the size of a term."""
    monkeypatch.setattr(MODULE, "LARGEST_WORKSPACE", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(512, 4, generator=generator).bfloat16().to(device)
    weight = torch.zeros(6, 4, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(512, dtype=torch.long, device=device)
    empty = SparseDistributions.from_dense(torch.zeros(512, 6, device=device))
    _, grads = run(ops.linear_alignment_loss, hidden, weight, None, labels, empty, reduction="sum")
    wide = (hidden.double(), weight.double())
    _, truth = run(reference.linear_alignment_loss, *wide, None, labels, empty, reduction="sum")
    torch.testing.assert_close(grads[1].double(), truth[1], rtol=3 * 2**-9, atol=0)


def test_only_what_is_needed_is_computed(device):
    hidden, weight, bias, labels, teacher = problem(torch.float32, device=device)
    frozen = weight.detach()
    ops.linear_alignment_loss(hidden, frozen, labels, teacher, bias=bias.detach()).total.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        loss = ops.linear_alignment_loss(hidden, weight, labels, teacher)
    assert not loss.total.requires_grad
    separate = ops.alignment_loss(hidden.detach() @ frozen.T, labels, teacher)
    for mine, other in zip(loss, separate, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_weight_tied_to_the_embedding():
    """The embedding's gradient and the head's add up in one tensor."""
    _, weight, _, labels, teacher = problem(torch.float64)
    tokens = torch.arange(ROWS)
    ops.linear_alignment_loss(torch.nn.functional.embedding(tokens, weight), weight, labels, teacher).total.backward()
    other = weight.detach().clone().requires_grad_()
    logits = torch.nn.functional.embedding(tokens, other) @ other.T
    ops.alignment_loss(logits, labels, teacher).total.backward()
    torch.testing.assert_close(weight.grad, other.grad)


def test_autocast(device):
    """Products in bfloat16, loss in float32, and float32 parameters get gradients of float32."""
    hidden, weight, bias, labels, teacher = problem(torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.linear_alignment_loss(hidden, weight, labels, teacher, bias=bias)
        wanted = ops.alignment_loss(torch.nn.functional.linear(hidden, weight, bias), labels, teacher)
    torch.testing.assert_close(loss.total, wanted.total)
    loss.total.backward()
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"weight: got torch.float32, wanted torch.bfloat16"):
        ops.linear_alignment_loss(hidden.bfloat16(), weight, labels, teacher)


def test_leading_dimensions_and_no_rows(device):
    hidden, weight, _, labels, teacher = problem(torch.float32, device=device)
    flat = ops.linear_alignment_loss(hidden, weight, labels, teacher, reduction="none")
    folded = ops.linear_alignment_loss(hidden[None], weight, labels[None], teacher, reduction="none")
    assert torch.equal(folded.total, flat.total[None])
    nothing = SparseDistributions.from_dense(torch.zeros(0, VOCAB, device=device))
    loss, grads = run(ops.linear_alignment_loss, hidden[:0], weight, None, labels[:0], nothing)
    assert loss[0] == 0 and (grads[1] == 0).all()


def test_gradcheck_opcheck_and_compile():
    hidden, weight, bias, labels, teacher = problem(torch.float64)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    for reduction in ("mean", "none"):

        def total(h, w, b, reduction=reduction):
            return ops.linear_alignment_loss(h, w, labels, teacher, bias=b, reduction=reduction).total

        torch.autograd.gradcheck(total, (hidden, weight, bias))
        wanted = torch.autograd.grad(total(hidden, weight, bias).sum() * 2, (hidden, weight, bias))
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(hidden, weight, bias).sum() * 2, (hidden, weight, bias))
        torch.testing.assert_close(got, wanted)
        torch.library.opcheck(
            torch.ops.memdec.linear_alignment_loss.default,
            (hidden, weight, bias, labels, *arrays, 0.5, -100, reduction, torch.float64, [True, True, True]),
        )


def test_a_second_backward_needs_a_retained_graph(device):
    hidden, weight, _, labels, teacher = problem(torch.float32, device=device)
    total = ops.linear_alignment_loss(hidden, weight, labels, teacher).total
    total.backward(retain_graph=True)
    once = weight.grad.clone()
    total.backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_and_compile(device, reduction):
    hidden, weight, bias, labels, teacher = problem(torch.float32, device=device)

    def total(h, w, b):
        return ops.linear_alignment_loss(h, w, labels, teacher, bias=b, reduction=reduction).total

    wanted = torch.autograd.grad(total(hidden, weight, bias).sum() * 2, (hidden, weight, bias))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight, bias).sum() * 2, (hidden, weight, bias))
    torch.testing.assert_close(got, wanted)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    torch.library.opcheck(
        torch.ops.memdec.linear_alignment_loss.default,
        (hidden, weight, bias, labels, *arrays, 0.5, -100, reduction, torch.float32, [True, True, True]),
    )


def test_wrong_shapes():
    hidden, weight, bias, labels, teacher = problem(torch.float32)
    with pytest.raises(ValueError, match=r"weight: got shape \(5, 50\), wanted \(V, 5\)"):
        ops.linear_alignment_loss(hidden, weight.T, labels, teacher)
    with pytest.raises(ValueError, match=r"bias: got shape \(3,\), wanted \(50,\)"):
        ops.linear_alignment_loss(hidden, weight, labels, teacher, bias=bias[:3])
    with pytest.raises(ValueError, match="labels holds 50"):
        ops.linear_alignment_loss(hidden, weight, torch.full_like(labels, 50), teacher)


@pytest.mark.parametrize("indptr", [[1, 2, 3], [0, 1, 2], [0, 2, 4]])
def test_row_pointers_that_do_not_span_the_ids_are_refused(indptr):
    """A chunk sees only its own rows: what is before the first or after the last would pass unseen."""
    ids, probs = torch.tensor([0, 1, 2], dtype=torch.int32), torch.full((3,), 0.2)
    teacher = SparseDistributions(torch.tensor(indptr), ids, probs, VOCAB)
    with pytest.raises(ValueError, match=r"teacher\.indptr goes from"):
        ops.linear_alignment_loss(torch.zeros(2, 4), torch.zeros(VOCAB, 4), torch.zeros(2, dtype=torch.long), teacher)
