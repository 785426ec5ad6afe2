"""interpolate_log_prob against the reference in float64; what the whole family owes is in test_mixture."""

from __future__ import annotations

import pytest
import torch

from memdec import ops
from memdec.ops import reference


def pair(rows, vocab, dtype, seed=0, scale=4.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(device, dtype) for _ in range(2)
    )


@pytest.mark.parametrize("vocab", [1, 7, 4097, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_as_the_reference(simd, device, dtype, vocab):
    """err(ours) ≤ 2·err(torch in the accumulation dtype) + 4 ulp, at the first, the last and the likeliest token."""
    base, memory = pair(3, vocab, dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = torch.tensor([0, vocab - 1, int(memory[2].argmax())], device=device)
    for alpha in (0.0, 1e-5, 1.0, torch.tensor([0.3, 0.9, 0.0], device=device)):
        truth = reference.interpolate_log_prob(base.double(), memory.double(), targets, alpha)
        theirs = reference.interpolate_log_prob(base.to(wide), memory.to(wide), targets, alpha).double()
        ours = ops.interpolate_log_prob(base, memory, targets, alpha)
        assert ours.dtype == wide
        # In float64, of which the truth itself is made, the order of a sum over V numbers is worth more.
        ulps = 64 if dtype == torch.float64 else 4
        bound = 2 * (theirs - truth).abs() + ulps * torch.finfo(wide).eps * truth.abs().clamp(min=1)
        assert ((ours.double() - truth).abs() <= bound).all()


def test_targets_of_any_integer_dtype_and_out_of_range(device, on_cuda):
    base, memory = pair(2, 9, torch.float32, device=device)
    targets = torch.tensor([3, 8], device=device)
    wanted = ops.interpolate_log_prob(base, memory, targets, 0.5)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(ops.interpolate_log_prob(base, memory, targets.to(dtype), 0.5), wanted)
    for bad in (9, -1, -100, 2**40):  # on CUDA, where an error would mean to wait for the device, NaN in that row only
        targets[1] = bad
        if on_cuda:
            got = ops.interpolate_log_prob(base, memory, targets, 0.5)
            assert got[0] == wanted[0] and got[1].isnan()
            continue
        with pytest.raises(ValueError, match=f"targets holds {bad} at position 1, wanted an index from 0 to 8"):
            ops.interpolate_log_prob(base, memory, targets, 0.5)
    with pytest.raises(ValueError, match=r"targets: got shape \(3,\), wanted \(2,\)"):
        ops.interpolate_log_prob(base, memory, torch.tensor([3, 8, 1], device=device), 0.5)
    with pytest.raises(TypeError, match=r"targets: got torch\.float32"):
        ops.interpolate_log_prob(base, memory, torch.tensor([3.0, 8.0], device=device), 0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, "tensor"])
def test_gradcheck(alpha):
    base, memory = (x.requires_grad_() for x in pair(3, 5, torch.float64, scale=1.0))
    targets = torch.tensor([0, 4, 2])
    if alpha == "tensor":
        alpha = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64, requires_grad=True)
        function = lambda b, m, a: ops.interpolate_log_prob(b, m, targets, a)  # noqa: E731
        assert torch.autograd.gradcheck(function, (base, memory, alpha))
    else:
        assert torch.autograd.gradcheck(lambda b, m: ops.interpolate_log_prob(b, m, targets, alpha), (base, memory))


def test_nothing_of_width_v_is_written():
    """The C allocator's peak is not visible from here, but torch's is: the op may allocate one number a row."""
    base, memory = pair(64, 5000, torch.float32)
    targets = torch.zeros(64, dtype=torch.int64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        ops.interpolate_log_prob(base, memory, targets, 0.5)
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated <= 64 * 16
