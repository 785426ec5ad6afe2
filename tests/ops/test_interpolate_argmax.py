"""interpolate_argmax against the reference in float64; what the whole family owes is in test_mixture."""

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


def assert_likeliest(tokens, base, memory, alpha):
    """The token's true probability is the largest one, to 4 ulp of float32."""
    truth = reference.interpolate(base.double(), memory.double(), alpha)
    chosen = truth.gather(-1, tokens[:, None])[:, 0]
    assert (chosen >= truth.amax(-1) - 5e-7).all()


@pytest.mark.parametrize("vocab", [1, 7, 4097, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_as_the_reference(simd, device, dtype, vocab):
    base, memory = pair(3, vocab, dtype, device=device)
    for alpha in (0.0, 1e-5, 1.0, torch.tensor([0.3, 0.9, 0.5], device=device)):
        assert_likeliest(ops.interpolate_argmax(base, memory, alpha), base, memory, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_lowest_of_equals(simd, device, alpha):
    """Equal logits in both components, at the borders of vectors and blocks: the first, as torch.argmax."""
    vocab = 3 * 4096 + 5
    for first in (0, 1, 15, 16, 17, 4095, 4096, 8191, 8192, vocab - 2):
        base, memory = torch.zeros(2, 1, vocab, device=device)
        for token in {first, min(first + 1, vocab - 1), vocab - 1}:
            base[0, token] = memory[0, token] = 2.0
        assert int(ops.interpolate_argmax(base, memory, alpha)) == first
    flat = torch.zeros(2, vocab, device=device)
    assert ops.interpolate_argmax(flat, flat, alpha).tolist() == [0, 0]


def test_a_compromise_wins(simd, device):
    """A token that is second in both components and likeliest in the mixture, wherever it stands."""
    vocab = 9000
    for token in (5, 4095, 4096, 8999):
        base, memory = torch.full((2, 1, vocab), -9.0, device=device)
        base[0, 17], memory[0, 4200] = 1.0, 1.0
        base[0, token] = memory[0, token] = 0.9
        assert int(ops.interpolate_argmax(base, memory, 0.5)) == token


@pytest.mark.parametrize("flat", [0, 1, 2, 4], ids="flat span {}".format)
def test_a_span_of_equals_among_others(simd, device, flat):
    """One span, not always the first, has more tokens near its top than a list holds; the winner is not in it."""
    vocab, span = 5 * 4096 + 100, 4096
    base, memory = torch.full((2, 1, vocab), -9.0, device=device)
    base[0, torch.arange(5, device=device) * span + 7] = 0.5  # every span has a list that is in play
    base[0, flat * span : (flat + 1) * span] = 1.0
    memory[0, -1], memory[0, flat * span + 3000] = 0.0, -2.0  # the latter near no top
    assert int(ops.interpolate_argmax(base, memory, 1e-4)) == flat * span + 3000


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
def test_flat_to_peaked(simd, device, scale):
    """From nearly uniform rows, where the second pass must look at every token, to one token that holds everything."""
    base, memory = pair(6, 20000, torch.float32, scale=scale, device=device)
    for alpha in (1e-30, 0.01, 0.5, 0.999999):
        assert_likeliest(ops.interpolate_argmax(base, memory, alpha), base, memory, alpha)
