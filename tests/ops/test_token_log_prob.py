"""token_log_prob against log_softmax in float64 of the same (rounded) logits."""

import pytest
import torch

from memdec import _C, build_info, ops


@pytest.fixture(params=build_info()["simd_levels"])
def simd(request):
    """Every SIMD level that was built and that this machine has."""
    before = build_info()["simd"]
    try:
        _C.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.set_simd_level(before)


@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_log_softmax(simd, dtype, vocab):
    """err(ours) ≤ 2 · err(torch in the accumulation dtype) + 4 ulp of the log-prob, at a common offset of 1e3."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator, dtype=torch.float64) * 4 + 1000).to(dtype)
    targets = torch.randint(vocab, (5,), generator=generator)
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = logits.to(accumulate).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ours = ops.token_log_prob(logits, targets)
    assert ours.dtype == accumulate
    bound = 2 * (theirs - truth).abs() + 4 * torch.finfo(accumulate).eps * truth.abs().clamp(min=1)
    assert ((ours - truth).abs() <= bound).all()
