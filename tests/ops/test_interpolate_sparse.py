"""interpolate_sparse against the reference in float64; what the whole family owes is in test_mixture."""

from __future__ import annotations

import pytest
import torch

from memdec import SparseDistributions, ops
from memdec.ops import reference


def case(rows, vocab, dtype, seed=0, device="cpu"):
    """Logits, and teachers of some 20 tokens: whole rows, one cut to 0.7, one empty."""
    generator = torch.Generator().manual_seed(seed)
    base = (4 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    dense = torch.rand(rows, vocab, generator=generator)
    dense *= torch.rand(rows, vocab, generator=generator) < 20 / vocab
    dense[:, vocab - 1] += 0.1
    dense /= dense.sum(1, keepdim=True)
    dense[0] *= 0.7
    dense[1] = 0
    return base.to(device), SparseDistributions.from_dense(dense).to(device)


@pytest.mark.parametrize("vocab", [1, 7, 4097, 50257, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_as_the_reference(simd, device, dtype, vocab):
    """err(ours) ≤ 2·err(torch in the accumulation dtype) + 4 ulp; −inf in the same places."""
    base, q = case(3, vocab, dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for alpha in (0.0, 0.3, 1.0, torch.tensor([0.3, 0.9, 0.5], device=device)):
        truth = reference.interpolate_sparse(base.double(), q, alpha)
        theirs = reference.interpolate_sparse(base.to(wide), q, alpha).double()
        ours = ops.interpolate_sparse(base, q, alpha)
        assert ours.dtype == wide and torch.equal(ours == -torch.inf, truth == -torch.inf)
        error, bound = (torch.nan_to_num(x - truth).abs() for x in (ours.double(), theirs))
        # In float64, of which the truth itself is made, the order of a sum over V numbers is worth more.
        ulps = 64 if dtype == torch.float64 else 4
        assert (error <= 2 * bound + ulps * torch.finfo(wide).eps * torch.nan_to_num(truth).abs().clamp(min=1)).all()


def test_broken_base_rows(simd, device):
    """NaN where the base has a part, also a row of −inf; a whole teacher at α = 1 does not look at the base."""
    _, q = case(3, 5000, torch.float32, device=device)
    base = torch.zeros(3, 5000, device=device)
    base[:, 4500] = torch.nan
    assert ops.interpolate_sparse(base, q, 0.5).isnan().all()
    got = ops.interpolate_sparse(base, q, 1.0)
    assert got[:2].isnan().all()
    torch.testing.assert_close(got[2].exp(), q.to_dense()[2])
    assert ops.interpolate_sparse(torch.full((3, 5000), -torch.inf, device=device), q, 0.5).isnan().all()


def test_teachers_that_cannot_be(simd):
    base, q = case(3, 50, torch.float32)
    far = SparseDistributions(q.indptr, q.token_ids + 1, q.probs, 50)
    with pytest.raises(ValueError, match=r"teacher\.token_ids holds 50 at position"):
        ops.interpolate_sparse(base, far, 0.5)
    bent = SparseDistributions(torch.tensor([0, 9, 2, q.nnz]), q.token_ids, q.probs, 50)
    with pytest.raises(ValueError, match=r"teacher\.indptr holds 2 at position 2"):
        ops.interpolate_sparse(base, bent, 0.5)
    with pytest.raises(ValueError, match="teacher: got 3 rows, wanted 2"):
        ops.interpolate_sparse(base[:2], q, 0.5)
    with pytest.raises(ValueError, match="teacher: got a vocabulary of 50 tokens, wanted 49"):
        ops.interpolate_sparse(base[:, :49], q, 0.5)
    with pytest.raises(TypeError, match=r"teacher: got Tensor, wanted memdec\.SparseDistributions"):
        ops.interpolate_sparse(base, base, 0.5)


def test_wild_teachers_on_cuda(device, on_cuda):
    """Nothing may wait for the device to check: ids outside [0, V) are dropped, wild row pointers are taken as ends."""
    if not on_cuda:
        pytest.skip("the CPU raises: see test_teachers_that_cannot_be")
    base, q = case(3, 50, torch.float32, device=device)
    ids = q.token_ids.clone()
    ids[-1], ids[0] = 50, -(2**31)
    got = ops.interpolate_sparse(base, SparseDistributions(q.indptr, ids, q.probs, 50), 0.5)
    torch.testing.assert_close(got[2, :-1], ops.interpolate_sparse(base, q, 0.5)[2, :-1], rtol=0, atol=0)
    bent = torch.tensor([-5, 2**40, -(2**62), q.nnz + 7], device=device)
    ops.interpolate_sparse(base, SparseDistributions(bent, q.token_ids, q.probs, 50), 0.5)  # the sanitizers watch


def test_a_gradient_is_refused_not_cut():
    base, q = case(3, 50, torch.float32)
    with pytest.raises(ValueError, match="base_logits: got a tensor that requires grad, but interpolate_sparse has no"):
        ops.interpolate_sparse(base.requires_grad_(), q, 0.5)
    with torch.no_grad():
        assert not ops.interpolate_sparse(base, q, 0.5).requires_grad
