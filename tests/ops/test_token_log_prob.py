"""token_log_prob against log_softmax in float64 of the same (rounded) logits."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def log_softmax_at(logits, targets):
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_log_softmax(simd, dtype, vocab):
    """err(ours) ≤ 2 · err(torch in the accumulation dtype) + 4 units in the last place, at a common offset of 1e3."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator, dtype=torch.float64) * 4 + 1000).to(dtype)
    targets = torch.randint(vocab, (5,), generator=generator)
    check(logits, targets)


@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
def test_matches_on_real_vocabularies(vocab):
    generator = torch.Generator().manual_seed(vocab)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(2, vocab, generator=generator) * 4).to(dtype)
        check(logits, torch.randint(vocab, (2,), generator=generator))


def check(logits, targets):
    truth = log_softmax_at(logits.double(), targets)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    theirs = log_softmax_at(logits.to(wide), targets)
    ours = ops.token_log_prob(logits, targets)
    assert ours.dtype == wide
    bound = 2 * (theirs - truth).abs() + 4 * torch.finfo(wide).eps * truth.abs().clamp(min=1)
    assert ((ours - truth).abs() <= bound).all()


def test_edges():
    logits = torch.tensor([[0.0, -math.inf, 1.0]] * 4)
    logits[1, 0] = math.nan
    logits[2] = -math.inf
    targets = torch.tensor([1, 2, 0, 2])
    got = ops.token_log_prob(logits, targets)
    assert got[0] == -math.inf and got[1].isnan() and got[2].isnan()
    torch.testing.assert_close(got[3].item(), -math.log1p(math.exp(-1)))
    assert torch.equal(ops.token_log_prob(logits[:0], targets[:0]), torch.empty(0))
    for wild in (-1, 3, 2**40):
        with pytest.raises(ValueError, match=f"targets holds {wild} at position 2"):
            ops.token_log_prob(logits, torch.tensor([0, 0, wild, 0]))


def test_views_of_three_dimensions():
    """Leading dimensions that fold into one stride, into two, and into none (copied): the same bits."""
    logits = torch.randn(3, 4, 5, 30, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(20, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    wanted = ops.token_log_prob(logits[..., :20].contiguous(), targets)
    assert torch.equal(ops.token_log_prob(logits[..., :20], targets), wanted)
    assert torch.equal(ops.token_log_prob(logits[:, 1:3, :, :20], targets[:, 1:3]), wanted[:, 1:3])
    assert torch.equal(ops.token_log_prob(logits[1:, 1:3, :3, :20], targets[1:, 1:3, :3]), wanted[1:, 1:3, :3])
    assert torch.equal(
        ops.token_log_prob(logits.transpose(0, 2)[..., :20], targets.transpose(0, 2)), wanted.transpose(0, 2)
    )


def test_gradcheck_opcheck_and_compile():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (2, 3))
    torch.autograd.gradcheck(ops.token_log_prob, (logits, targets))
    torch.library.opcheck(torch.ops.memdec.token_log_prob.default, (logits, targets))
    compiled = torch.compile(lambda z: ops.token_log_prob(z, targets) * 2, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(logits).sum(), logits)
    (wanted,) = torch.autograd.grad((ops.token_log_prob(logits, targets) * 2).sum(), logits)
    torch.testing.assert_close(grad, wanted)
