"""alignment_loss against the reference in float64 of the same (rounded) logits, and against the edge contract."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import SparseDistributions, ops
from memdec.ops import reference
from memdec.ops.alignment_loss import scale
from memdec.ops.rows import accumulator

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What one rounding to the dtype costs a gradient; float32 and float64: the error of exp, a few units in the last place.
GRAD_RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}


def random_teacher(generator: torch.Generator, num_rows: int, vocab: int, tokens: int = 65) -> SparseDistributions:
    """Rows of about `tokens` tokens; the last row is empty, the one before it has lost a tenth of its mass."""
    dense = torch.zeros(num_rows, vocab)
    for row in range(num_rows - 1):
        ids = torch.randperm(vocab, generator=generator)[:tokens]
        dense[row, ids] = torch.randn(len(ids), generator=generator).softmax(0)
    dense[max(num_rows - 2, 0)] *= 0.9
    return SparseDistributions.from_dense(dense)


def problem(dtype, num_rows, vocab, *, seed=0, offset=0.0, device="cpu"):
    """Logits with a spread of 3, teachers of 65 tokens with an empty row and one with mass cut, one ignored label."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64) * 3 + offset).to(dtype)
    labels = torch.randint(vocab, (num_rows,), generator=generator)
    teacher = random_teacher(generator, num_rows, vocab)
    if num_rows > 2:
        labels[0] = -100
        if teacher.indptr[2] > teacher.indptr[1]:
            labels[1] = int(teacher.token_ids[teacher.indptr[1]])  # a label that the teacher holds, too
    return logits.to(device), labels.to(device), teacher.to(device)


def loss_and_grad(function, logits, labels, teacher, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, labels, teacher, **options)
    loss.total.sum().backward()
    return loss, logits.grad


def agree(dtype, logits, labels, teacher, **options):
    """Ours, both ways, lie no further from the truth than twice the float32 reference does, and a few units beside."""
    truth, true_grad = loss_and_grad(reference.alignment_loss, logits.double(), labels, teacher, **options)
    theirs, _ = loss_and_grad(reference.alignment_loss, logits, labels, teacher, **options)
    ours, grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher, **options)
    in_place, grad_in_place = loss_and_grad(ops.alignment_loss, logits, labels, teacher, grad_in_place=True, **options)
    eps = torch.finfo(ours.total.dtype).eps
    for mine, same, their, true in zip(ours, in_place, theirs, truth, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(mine, same)
        assert ((mine - true).abs() <= 2 * (their - true).abs() + 16 * eps * true.abs().clamp(min=1)).all()
    assert grad.dtype == dtype
    assert torch.equal(grad, grad_in_place)
    torch.testing.assert_close(grad.double(), true_grad, rtol=GRAD_RTOL[dtype], atol=1e-7 if eps > 1e-10 else 1e-14)


# One token, less than a vector, more than a block on the CPU, more than a span of a CUDA block.
@pytest.mark.parametrize("vocab", [1, 7, 4096 + 3, 8192 + 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(simd, device, dtype, vocab):
    """Vocabularies around vectors and blocks; 1 and 2 rows are split over threads on the CPU, all three on CUDA."""
    for num_rows, beta in itertools.product([1, 2, 9], [0.0, 0.3, 1.0]):
        agree(dtype, *problem(dtype, num_rows, vocab, seed=num_rows, device=device), beta=beta)


def test_without_a_weight_no_teacher_changes_a_bit(simd):
    """β = 0: labels are among the entries of some teachers, where their gradient must be rounded as it is elsewhere."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(188, 8, generator=g) * 3
        labels = torch.randint(8, (188,), generator=g)
        found = []
        for most in (1, 5, 8):
            entries = (torch.randn(188, 8, generator=g) * 4).softmax(-1).topk(most, -1)
            teacher = SparseDistributions.from_dense(torch.zeros(188, 8).scatter(1, entries.indices, entries.values))
            leaf = logits.clone().requires_grad_()
            ops.alignment_loss(leaf, labels, teacher, beta=0.0).total.backward()
            found.append(leaf.grad)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_on_many_rows(device, dtype):
    """More rows than CUDA splits: a block a row, from the loss to the gradient, at every alignment."""
    agree(dtype, *problem(dtype, 260, 8192 + 9, device=device))


# Rows that a block of the emulated device keeps in shared memory whole, and in part: half precision in blocks of 256
# threads and of 512, single precision, less than a vector.
@pytest.mark.parametrize(
    ("dtype", "vocab", "shared"),
    [
        (torch.bfloat16, 301, 227),
        (torch.bfloat16, 2 * 8192 + 1, 227),
        (torch.bfloat16, 2 * 8192 + 9, 60),
        (torch.float16, 2 * 16384 + 13, 60),
        (torch.float32, 16384 + 3627, 100),
        (torch.float32, 3, 227),
    ],
)
def test_many_rows_have_the_bits_of_few(device, monkeypatch, dtype, vocab, shared):
    """Rows that follow each other in a block at every alignment, some of them ignored, NaN or infinite, against two
    halves of them, which CUDA splits: in place, apart at the same alignments, and apart at others."""
    monkeypatch.setenv("MEMDEC_EXECUTOR_SHARED", str(shared))
    logits, labels, teacher = problem(dtype, 260, vocab, device=device)
    logits[9], logits[20, 2], logits[100] = torch.nan, torch.inf, -torch.inf
    labels[::7] = -100
    labels[60:85] = -100
    halves = [
        loss_and_grad(ops.alignment_loss, logits[rows], labels[rows], teacher.select(rows), reduction="none")
        for rows in (torch.arange(130, device=device), torch.arange(130, 260, device=device))
    ]
    wanted = [torch.cat(pair) for pair in zip(*([*loss, grad] for loss, grad in halves), strict=True)]
    padded = torch.full((260, vocab + 21), 7.0, dtype=dtype, device=device)
    padded[:, 3 : 3 + vocab] = logits
    for rows in (logits, padded[:, 3 : 3 + vocab]):
        for in_place in (False, True):
            leaf = rows.detach().requires_grad_()
            loss = ops.alignment_loss(leaf, labels, teacher, reduction="none", grad_in_place=in_place)
            loss.total.sum().backward()
            for mine, one in zip([*loss, leaf.grad], wanted, strict=True):
                torch.testing.assert_close(mine, one, rtol=0, atol=0, equal_nan=True)
    assert (padded[:, :3] == 7).all() and (padded[:, 3 + vocab :] == 7).all()


@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_on_real_vocabularies(device, dtype, vocab):
    agree(dtype, *problem(dtype, 3, vocab, offset=50, device=device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_over_leading_dimensions(device, reduction):
    logits, labels, teacher = problem(torch.float32, 6, 300, device=device)
    agree(torch.float32, logits.view(2, 3, 300), labels.view(2, 3), teacher, reduction=reduction)
    loss = ops.alignment_loss(logits.view(2, 3, 300), labels.view(2, 3), teacher, reduction=reduction)
    assert loss.total.shape == ((2, 3) if reduction == "none" else ())


def test_thread_count_and_splitting_do_not_change_a_bit():
    for num_rows in (1, 3, 40):
        logits, labels, teacher = problem(torch.float32, num_rows, 50257)
        results = []
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(ops.alignment_loss, logits, labels, teacher, reduction="none"))
        torch.set_num_threads(2)
        for loss, grad in results[1:]:
            assert torch.equal(grad, results[0][1])
            assert all(torch.equal(a, b) for a, b in zip(loss, results[0][0], strict=True))


def test_strided_rows_are_read_and_written_where_they_are(device):
    """A slice of a padded vocabulary, a shifted sequence, an expanded row: the same numbers as of a copy."""
    logits, labels, teacher = problem(torch.bfloat16, 6, 301, device=device)
    padded = torch.full((2, 4, 320), 7.0, dtype=torch.bfloat16, device=device)
    padded[:, :3, :301] = logits.view(2, 3, 301)
    view = padded[:, :3, :301]
    wanted, wanted_grad = loss_and_grad(ops.alignment_loss, logits.view(2, 3, 301), labels.view(2, 3), teacher)
    loss = ops.alignment_loss(view, labels.view(2, 3), teacher)
    assert torch.equal(loss.total, wanted.total)
    leaf = view.requires_grad_()
    ops.alignment_loss(leaf, labels.view(2, 3), teacher, grad_in_place=True).total.backward()
    assert torch.equal(padded[:, :3, :301], wanted_grad)
    assert (padded[:, 3] == 7).all() and (padded[:, :, 301:] == 7).all()

    row = logits[3:4].expand(6, 301)
    assert torch.equal(
        ops.alignment_loss(row, labels, teacher).total, ops.alignment_loss(row.contiguous(), labels, teacher).total
    )
    with pytest.raises(ValueError, match="rows share memory"):
        ops.alignment_loss(row.requires_grad_(), labels, teacher, grad_in_place=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_rows_at_odd_addresses(device, dtype, shift):
    """Logits and gradient at different alignments: the same bits as from a copy, nothing written beside the rows."""
    logits, labels, teacher = problem(dtype, 5, 8192 + 9, device=device)
    wanted, wanted_grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher)
    wide = torch.full((5, 8192 + 24), 7.0, dtype=dtype, device=device)
    view = wide[:, shift : shift + 8192 + 9]
    view.copy_(logits)
    leaf = view.detach().requires_grad_()
    loss = ops.alignment_loss(leaf, labels, teacher)
    (grad,) = torch.autograd.grad(loss.total, leaf)
    assert torch.equal(loss.total, wanted.total) and torch.equal(grad, wanted_grad)
    ops.alignment_loss(leaf, labels, teacher, grad_in_place=True).total.backward()
    assert torch.equal(view, wanted_grad)
    assert (wide[:, :shift] == 7).all() and (wide[:, shift + 8192 + 9 :] == 7).all()


def test_a_common_offset_changes_nothing(device):
    """At 1e4 a float32 logit has steps of 1/1024, so the row is rounded first and the offset taken off exactly."""
    logits, labels, teacher = problem(torch.float32, 5, 1000, device=device)
    shifted = logits + 1e4
    back = shifted - 1e4
    for mine, wanted in zip(
        loss_and_grad(ops.alignment_loss, shifted, labels, teacher)[0],
        loss_and_grad(ops.alignment_loss, back, labels, teacher)[0],
        strict=True,
    ):
        assert torch.equal(mine, wanted)


def test_edges(device):
    teacher = SparseDistributions.from_dense(torch.tensor([[0.5, 0.5, 0.0]] * 5, device=device))
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 5, device=device)
    logits[0, 2] = -math.inf  # a masked token that neither label nor teacher wants
    logits[1, 1] = math.nan
    logits[2] = -math.inf
    logits[3, 1] = -math.inf  # the teacher wants a masked token
    labels = torch.tensor([0, 0, 0, 0, -100], device=device)
    logits[4, 0] = math.nan  # in an ignored row
    loss, grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher, reduction="none")
    truth, true_grad = loss_and_grad(reference.alignment_loss, logits.double(), labels, teacher, reduction="none")
    for mine, true in zip(loss, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert loss.total[1].isnan() and loss.total[2].isnan() and loss.kl[3] == math.inf and loss.total[4] == 0
    for row in (0, 3, 4):
        torch.testing.assert_close(grad[row].double(), true_grad[row], rtol=1e-6, atol=1e-6)
    assert grad[1].isnan().all() and grad[2].isnan().all() and (grad[4] == 0).all()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_part_without_weight_brings_in_no_infinity(device, beta):
    dense = torch.tensor([[0.5, 0.5, 0.0] if beta == 0 else [0.0, 1.0, 0.0]], device=device)
    logits = torch.tensor([[0.0, -math.inf, 1.0] if beta == 0 else [-math.inf, 0.0, 1.0]], device=device)
    labels = torch.tensor([0], device=device)
    loss = ops.alignment_loss(logits, labels, SparseDistributions.from_dense(dense), beta=beta)
    assert torch.isfinite(loss.total)
    assert (loss.kl if beta == 0 else loss.ce) == math.inf


def test_nothing_to_learn_from(device):
    """All labels ignored, no rows at all: 0 and a gradient of 0."""
    logits, labels, teacher = problem(torch.float32, 3, 11, device=device)
    loss, grad = loss_and_grad(ops.alignment_loss, logits, torch.full_like(labels, -100), teacher)
    assert [part.item() for part in loss] == [0, 0, 0] and (grad == 0).all()
    none = SparseDistributions.from_dense(torch.zeros(0, 11, device=device))
    loss, grad = loss_and_grad(ops.alignment_loss, logits[:0], labels[:0], none)
    assert [part.item() for part in loss] == [0, 0, 0] and grad.shape == (0, 11)


def test_rows_beyond_two_to_the_31_elements(device):
    """Three rows 2³⁰ elements apart, in a buffer whose other pages are never touched."""
    buffer = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device)
    view = buffer.as_strided((3, 7), (2**30, 1))
    logits, labels, teacher = problem(torch.bfloat16, 3, 7, device=device)
    view.copy_(logits)
    assert torch.equal(
        ops.alignment_loss(view, labels, teacher).total, ops.alignment_loss(logits, labels, teacher).total
    )


def test_gradcheck():
    logits, labels, teacher = problem(torch.float64, 4, 9)
    logits.requires_grad_()
    for beta, reduction in itertools.product([0.0, 0.5], ["mean", "none"]):
        torch.autograd.gradcheck(
            lambda z, b=beta, r=reduction: ops.alignment_loss(z, labels, teacher, beta=b, reduction=r).total, logits
        )


def test_registered_operator(device):
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    arrays = (teacher.indptr, teacher.token_ids, teacher.probs)
    torch.library.opcheck(
        torch.ops.memdec.alignment_loss.default, (logits.requires_grad_(), labels, *arrays, 0.5, -100, "mean")
    )


def test_compiled_without_a_graph_break(device):
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)

    def step(z, labels, teacher):
        return ops.alignment_loss(z * 2, labels, teacher).total

    eager = logits.clone().requires_grad_()
    step(eager, labels, teacher).backward()
    compiled = logits.clone().requires_grad_()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, labels, teacher).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_in_place_gradient_is_scaled_and_used_once(device):
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    _, wanted = loss_and_grad(ops.alignment_loss, logits, labels, teacher)
    leaf = logits.clone().requires_grad_()
    total = ops.alignment_loss(leaf, labels, teacher, grad_in_place=True).total
    (total * 3).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, wanted * 3)
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_1_leaves_a_row_as_it_is(device, dtype):
    """Bit for bit, whatever the row holds; other rows are multiplied in the accumulator and rounded once."""
    rows = torch.randn(4, 9001, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 3:8500].to(device)
    rows[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    factors = torch.tensor([1.0, -2.5, 1.0, 1 / 3], dtype=accumulator(rows), device=device)
    scaled = rows.clone(memory_format=torch.preserve_format)
    scale(scaled, factors)
    wanted = (rows.to(factors.dtype) * factors[:, None]).to(dtype)
    torch.testing.assert_close(scaled, wanted, rtol=0, atol=0, equal_nan=True)
    whole = rows.clone(memory_format=torch.preserve_format)
    scale(whole, torch.tensor(1.0, device=device))
    assert torch.equal(whole.view(torch.uint8), rows.contiguous().view(torch.uint8))


def test_in_place_gradient_that_was_written_over(device):
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    hidden = logits.clone().requires_grad_()
    scores = hidden * 1
    total = ops.alignment_loss(scores, labels, teacher, grad_in_place=True).total
    with torch.no_grad():
        scores.add_(1)
    with pytest.raises(RuntimeError, match="written to between"):
        total.backward()


def test_in_place_gradient_tells_whoever_saved_the_logits(device):
    """tanh saves its result for backward; that result is now a gradient, and autograd must not go on with it."""
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    scores = logits.clone().requires_grad_().tanh()
    total = ops.alignment_loss(scores, labels, teacher, grad_in_place=True).total
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_place_leaves_logits_alone_where_no_gradient_is_asked_for(device):
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    before = logits.clone()
    ops.alignment_loss(logits, labels, teacher, grad_in_place=True)
    with torch.no_grad():
        ops.alignment_loss(logits.requires_grad_(), labels, teacher, grad_in_place=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.tensor([0, 9, 0, 0])},
            ValueError,
            "labels holds 9 at position 1, wanted an index from 0 to 8",
        ),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels: got shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got"),
        ({"labels": None}, TypeError, "labels: got NoneType, wanted a torch.Tensor"),
        ({"ignore_index": None}, TypeError, "ignore_index: got NoneType, wanted an int"),
        ({"ignore_index": True}, TypeError, "ignore_index: got bool, wanted an int"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: got 9223372036854775808, wanted a number of 64 bits"),
        ({"beta": 1.5}, ValueError, "beta: got 1.5"),
        ({"reduction": "average"}, ValueError, "reduction: got 'average'"),
        ({"logits": torch.zeros(4, 9, dtype=torch.int32)}, TypeError, "logits: got"),
        ({"logits": torch.zeros(4, 8)}, ValueError, "teacher: got a vocabulary of 9"),
        ({"teacher": torch.zeros(4, 9)}, TypeError, "teacher: got Tensor"),
    ],
)
def test_wrong_arguments(change, error, message):
    logits, labels, teacher = problem(torch.float32, 4, 9)
    arguments = {"logits": logits, "labels": labels.clamp(min=0), "teacher": teacher} | change
    with pytest.raises(error, match=message):
        ops.alignment_loss(**arguments)


@pytest.mark.parametrize("wild", [-1, 9, 2**40])
def test_labels_out_of_range_on_cuda(device, on_cuda, wild):
    """NaN in that row's cross-entropy and gradient, the other rows as ever; no trace of it where it is ignored."""
    if not on_cuda:
        pytest.skip("the CPU kernels raise: see test_wrong_arguments")
    logits, labels, teacher = problem(torch.float32, 4, 9, device=device)
    labels[0] = 1
    _, wanted = loss_and_grad(ops.alignment_loss, logits, labels, teacher, reduction="none")
    labels[2] = wild
    loss, grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher, reduction="none")
    assert loss.ce.isnan().tolist() == loss.total.isnan().tolist() == [False, False, True, False]
    assert grad[2].isnan().all() and torch.equal(grad[[0, 1, 3]], wanted[[0, 1, 3]])
    ignored, grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher, ignore_index=wild)
    assert ignored.total.isfinite() and (grad[2] == 0).all() and grad.isfinite().all()


# Any CSR structure: rows that are empty, full, or hold zero probabilities.
rows_of_tokens = st.lists(st.sets(st.integers(0, 12), max_size=13), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_tokens, seed=st.integers(0, 2**31), beta=st.sampled_from([0.0, 0.25, 1.0]))
def test_any_structure(device, rows, seed, beta):
    generator = torch.Generator().manual_seed(seed)
    indptr = torch.tensor([0, *itertools.accumulate(len(row) for row in rows)])
    ids = torch.tensor([token for row in rows for token in sorted(row)], dtype=torch.int32)
    probs = torch.rand(len(ids), generator=generator) / 13
    probs[torch.rand(len(ids), generator=generator) < 0.2] = 0
    teacher = SparseDistributions(indptr, ids, probs, 13).to(device)
    logits = torch.randn(len(rows), 13, generator=generator)
    labels = torch.randint(13, (len(rows),), generator=generator)
    agree(torch.float32, logits.to(device), labels.to(device), teacher, beta=beta)


@settings(max_examples=40, deadline=None)
@given(
    indptr=st.lists(st.integers(-3, 9), min_size=5, max_size=5),
    ids=st.lists(st.integers(-4, 12), min_size=6, max_size=6),
)
def test_a_broken_structure_is_refused_or_harmless(device, on_cuda, indptr, ids):
    """Whatever the row pointers and ids: an error that names the teacher, or a structure that was sound.

    On CUDA nothing is raised and nothing is read or written out of bounds (the sanitizers watch), an id out of range
    makes its row's loss NaN.
    """
    teacher = SparseDistributions(torch.tensor(indptr), torch.tensor(ids, dtype=torch.int32), torch.full((6,), 0.1), 9)
    if on_cuda:
        logits, labels = torch.zeros(4, 9, device=device), torch.zeros(4, dtype=torch.long, device=device)
        loss, grad = loss_and_grad(ops.alignment_loss, logits, labels, teacher.to(device), reduction="none")
        for row in range(4):
            begin, end = (min(max(pointer, 0), 6) for pointer in indptr[row : row + 2])
            outside = any(not 0 <= i < 9 for i in ids[begin:end])
            assert bool(loss.kl[row].isnan()) == outside and grad[row].isfinite().all()
        return
    sound = indptr[0] == 0 and indptr[-1] == 6 and indptr == sorted(indptr) and all(0 <= i < 9 for i in ids)
    try:
        ops.alignment_loss(torch.zeros(4, 9), torch.zeros(4, dtype=torch.long), teacher)
    except ValueError as error:
        assert "teacher." in str(error) and not sound
    else:
        assert sound
