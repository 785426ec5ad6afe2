"""token_log_prob against log_softmax in float64 of the same (rounded) logits, on every device."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from memdec import SparseDistributions, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def log_softmax_at(logits, targets):
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


# One token, less than a vector, less than a span of a CUDA block (8192 columns), one more, spans and a rest.
@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097, 8193, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_log_softmax(simd, device, dtype, vocab):
    """err(ours) ≤ 2 · err(torch in the accumulation dtype) + 4 units in the last place, at a common offset of 1e3."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator, dtype=torch.float64) * 4 + 1000).to(dtype)
    targets = torch.randint(vocab, (5,), generator=generator)
    check(logits.to(device), targets.to(device))


@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
def test_matches_on_real_vocabularies(device, vocab):
    generator = torch.Generator().manual_seed(vocab)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(2, vocab, generator=generator) * 4).to(dtype)
        check(logits.to(device), torch.randint(vocab, (2,), generator=generator).to(device))


def check(logits, targets):
    truth = log_softmax_at(logits.double(), targets)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    theirs = log_softmax_at(logits.to(wide), targets)
    ours = ops.token_log_prob(logits, targets)
    assert ours.dtype == wide
    bound = 2 * (theirs - truth).abs() + 4 * torch.finfo(wide).eps * truth.abs().clamp(min=1)
    assert ((ours - truth).abs() <= bound).all()


def test_edges(device):
    logits = torch.tensor([[0.0, -math.inf, 1.0]] * 4, device=device)
    logits[1, 0] = math.nan
    logits[2] = -math.inf
    targets = torch.tensor([1, 2, 0, 2], device=device)
    got = ops.token_log_prob(logits, targets)
    assert got[0] == -math.inf and got[1].isnan() and got[2].isnan()
    torch.testing.assert_close(got[3].item(), -math.log1p(math.exp(-1)))
    assert torch.equal(ops.token_log_prob(logits[:0], targets[:0]), torch.empty(0, device=device))


@pytest.mark.parametrize("wild", [-1, 3, 2**40])
def test_targets_out_of_range(device, on_cuda, wild):
    """An error on the CPU; on CUDA, where that would mean to wait for the device, NaN in that row and no other."""
    logits, targets = torch.zeros(4, 3, device=device), torch.tensor([0, 0, wild, 0], device=device)
    if on_cuda:
        assert ops.token_log_prob(logits, targets).isnan().tolist() == [False, False, True, False]
    else:
        with pytest.raises(ValueError, match=f"targets holds {wild} at position 2"):
            ops.token_log_prob(logits, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_three_dimensions(device, dtype):
    """Leading dimensions that fold into one stride, into two, and into none (copied), rows at odd addresses: the same
    bits."""
    logits = torch.randn(3, 4, 5, 30, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    targets = torch.randint(20, (3, 4, 5), generator=torch.Generator().manual_seed(1)).to(device)
    wanted = ops.token_log_prob(logits[..., :20].contiguous(), targets)
    assert torch.equal(ops.token_log_prob(logits[..., :20], targets), wanted)
    assert torch.equal(ops.token_log_prob(logits[:, 1:3, :, :20], targets[:, 1:3]), wanted[:, 1:3])
    assert torch.equal(ops.token_log_prob(logits[1:, 1:3, :3, :20], targets[1:, 1:3, :3]), wanted[1:, 1:3, :3])
    assert torch.equal(
        ops.token_log_prob(logits.transpose(0, 2)[..., :20], targets.transpose(0, 2)), wanted.transpose(0, 2)
    )
    for shift in range(1, 9):
        assert torch.equal(
            ops.token_log_prob(logits[..., shift : shift + 20], targets),
            ops.token_log_prob(logits[..., shift : shift + 20].contiguous(), targets),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_the_same_in_a_batch_as_alone_and_at_any_address(device, dtype):
    """300 rows are a block each on CUDA, one row is split over several; odd rows lie at every alignment."""
    logits = torch.randn(300, 16385, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    targets = torch.arange(300, device=device)
    batch = ops.token_log_prob(logits, targets)
    for r in (0, 1, 2, 3, 150, 299):
        assert torch.equal(ops.token_log_prob(logits[r : r + 1], targets[r : r + 1])[0], batch[r])
        assert torch.equal(ops.token_log_prob(logits[r].clone(), targets[r]), batch[r])


def test_rows_beyond_two_to_the_31_elements(device):
    """Three rows 2³⁰ elements apart, in a buffer whose other pages are never touched."""
    buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    view = buffer.as_strided((3, 50), (2**30, 1))
    view.copy_(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)))
    targets = torch.tensor([0, 49, 7], device=device)
    assert torch.equal(ops.token_log_prob(view, targets), ops.token_log_prob(view.contiguous(), targets))


def test_gradcheck():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ops.token_log_prob, (logits, torch.randint(7, (2, 3))))


def test_opcheck_and_compile(device):
    logits = torch.randn(2, 3, 7, device=device, requires_grad=True)
    targets = torch.randint(7, (2, 3), device=device)
    torch.library.opcheck(torch.ops.memdec.token_log_prob.default, (logits, targets))
    compiled = torch.compile(lambda z: ops.token_log_prob(z, targets) * 2, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(logits).sum(), logits)
    (wanted,) = torch.autograd.grad((ops.token_log_prob(logits, targets) * 2).sum(), logits)
    torch.testing.assert_close(grad, wanted)


def test_a_tensor_whose_memory_was_freed_is_refused():
    """Shards and offloaded weights lose their storage; reading them would end the process."""
    freed = torch.randn(4, 100)
    freed.untyped_storage().resize_(0)
    labels = torch.zeros(4, dtype=torch.long)
    teacher = SparseDistributions(torch.arange(5), torch.zeros(4, dtype=torch.int32), torch.ones(4), 100)
    calls = [
        lambda: ops.token_log_prob(freed, labels),
        lambda: ops.interpolate(torch.randn(4, 100), freed, 0.5),
        lambda: ops.alignment_loss(freed, labels, teacher),
        lambda: ops.aggregate_neighbors(freed, labels[:, None].expand(4, 100), temperature=1.0, vocab_size=10),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="memory was freed"):
            call()
    teacher.probs.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"teacher.probs: the tensor's memory was freed"):
        ops.alignment_loss(torch.randn(4, 100), labels, teacher)


def test_a_tangent_is_refused_and_not_dropped():
    """The kernels have no forward-mode derivative; without a word the answer would be zero."""
    logits, tangent, labels = torch.randn(4, 100), torch.randn(4, 100), torch.zeros(4, dtype=torch.long)
    teacher = SparseDistributions(torch.arange(5), torch.zeros(4, dtype=torch.int32), torch.ones(4), 100)
    calls = [
        lambda z: ops.token_log_prob(z, labels),
        lambda z: ops.interpolate(z, tangent, 0.5),
        lambda z: ops.interpolate_log_prob(z, tangent, labels, 0.5),
        lambda z: ops.interpolate_sparse(z, teacher, 0.5),
        lambda z: ops.alignment_loss(z, labels, teacher).total,
        lambda z: ops.linear_alignment_loss(z, tangent, labels, teacher_of_four()).total,
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (logits,), (tangent,))
        with forward_ad.dual_level():
            call(logits)  # a plain tensor is fine there
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call(forward_ad.make_dual(logits, tangent))


def teacher_of_four() -> SparseDistributions:
    """Over a vocabulary of 4, for a head (4, 100)."""
    return SparseDistributions(torch.arange(5), torch.zeros(4, dtype=torch.int32), torch.ones(4), 4)
