"""interpolate against the reference in float64; what the whole family owes is in test_mixture."""

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


def ulp(x, dtype):
    """Of float64, of which the truth itself is made, 16: the order of a sum over V numbers alone is worth that."""
    return torch.finfo(dtype).eps * x.abs().clamp(min=1) * (16 if dtype == torch.float64 else 1)


# One token, less than a vector, a block and one more, GPT-2 (odd rows of bf16 are 2-byte aligned), Qwen, Gemma.
@pytest.mark.parametrize("vocab", [1, 7, 4097, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_as_the_reference(simd, device, dtype, vocab):
    """err(ours) ≤ 2·err(torch in the accumulation dtype) + 4 ulp, in every element; α of 0 and 1, small, a tensor."""
    base, memory = pair(2, vocab, dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for alpha in (0.0, 1e-5, 1.0, torch.tensor([0.3, 0.9], device=device)):
        truth = reference.interpolate(base.double(), memory.double(), alpha)
        theirs = reference.interpolate(base.to(wide), memory.to(wide), alpha).double()
        ours = ops.interpolate(base, memory, alpha)
        assert ours.dtype == wide
        assert ((ours.double() - truth).abs() <= 2 * (theirs - truth).abs() + 4 * ulp(truth, wide)).all()
        torch.testing.assert_close(
            ours.double().exp().sum(-1), torch.ones(2, dtype=torch.float64, device=device), rtol=0, atol=1e-5
        )


def test_logits_far_apart(simd, device):
    """Where the components differ by more than exp can span, the larger one is left, not −inf or NaN."""
    base, memory = torch.tensor([[[0.0, 200.0, -300.0]], [[0.0, -300.0, 200.0]]], device=device)
    truth = reference.interpolate(base.double(), memory.double(), 0.5)
    torch.testing.assert_close(ops.interpolate(base, memory, 0.5).double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, "tensor"])
def test_gradcheck(alpha):
    """Numerical against our derivative in both logits and in α, and the derivative's own shape under expanded α."""
    base, memory = (x.requires_grad_() for x in pair(3, 5, torch.float64, scale=1.0))
    if alpha == "tensor":
        alpha = torch.tensor([[0.3], [0.8]], dtype=torch.float64, requires_grad=True)
        base, memory = (x.detach().expand(2, 3, 5).clone().requires_grad_() for x in (base, memory))
        assert torch.autograd.gradcheck(ops.interpolate, (base, memory, alpha))
    else:
        assert torch.autograd.gradcheck(lambda b, m: ops.interpolate(b, m, alpha), (base, memory))


def test_gradient_of_masked_and_half_precision(device):
    base, memory = pair(2, 6, torch.float32, device=device)
    base[:, 2], memory[:, 2] = -torch.inf, -torch.inf
    weights = torch.rand(2, 6).index_fill(1, torch.tensor([2]), 0).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (base, memory)]
        out = ops.interpolate(*leaves, 0.4)
        out.backward(weights)
        for leaf in leaves:
            assert leaf.grad.dtype == dtype and torch.isfinite(leaf.grad).all() and not leaf.grad[:, 2].any()


def test_the_component_without_weight_gets_no_gradient():
    base, memory = pair(2, 6, torch.float64)
    memory[0, 0] = torch.nan
    base, memory = base.requires_grad_(), memory.requires_grad_()
    ops.interpolate(base, memory, 0.0).sum().backward()
    assert not memory.grad.any() and torch.isfinite(base.grad).all() and base.grad.any()


def test_compiled_with_inductor_forward_and_backward():
    base, memory = pair(3, 40, torch.float32)

    def loss(b, m, a):
        return (
            ops.interpolate(2 * b, m, a).square().sum() + ops.interpolate_log_prob(b, m, torch.zeros(3).long(), a).sum()
        )

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (base, memory, torch.tensor([0.2, 0.5, 0.7]))]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
