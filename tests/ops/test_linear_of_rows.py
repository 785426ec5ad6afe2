"""linear_of_rows: CUDA only, so that on the CPU it is `make test-cuda-host` that runs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_checks import check_linear, numbers

from memdec.decoding.products import MOST_ROWS, is_possible, linear_of_rows

SHAPES = (  # rows, width, outputs
    (1, 8, 1),
    (2, 256, 16),
    (3, 40, 7),
    (1, 896, 70),  # Qwen2.5 0.5B's width: two warps have nothing to do in the last step
    (8, 2056, 10),  # a step more than can be on the way of a gated tile, of eight columns
    (5, 4864, 3),
    (4, 328, 130),  # more tiles than blocks on the host, whose four processors make them of sixteen outputs
)
PRODUCTS = SimpleNamespace(
    norm_linear=lambda x, norm, epsilon, weight, bias: linear_of_rows(x, weight, bias, norm, epsilon),
    linear_add=lambda x, weight, bias, residual: linear_of_rows(x, weight, bias, residual=residual),
    norm_gate_up=lambda x, norm, epsilon, weight, bias: linear_of_rows(x, weight, bias, norm, epsilon, gated=True),
)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def has_kernel(on_cuda: bool) -> None:
    if not on_cuda:
        pytest.skip("there is no kernel for the CPU")


@half
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges_of_tiles_and_steps(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_linear(PRODUCTS, device, dtype, *shape)


@half
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_the_same_bits_whatever_is_beside_it(device: str, dtype: torch.dtype, gated: bool) -> None:
    """NaN and infinity among it."""
    x = numbers(device, dtype, MOST_ROWS, 2064)
    weight, norm = numbers(device, dtype, 20, 2064, seed=1).contiguous(), numbers(device, dtype, 2064, seed=2)
    x[1] = torch.nan
    x[6] = torch.inf
    whole = linear_of_rows(x, weight, None, norm, 1e-6, gated=gated)
    assert whole[[0, *range(2, 6), 7]].isfinite().all() and whole[1].isnan().all()
    for rows in ([0], [3], [7, 0], [2, 3, 4], [5, 1, 6, 0]):
        assert torch.equal(linear_of_rows(x[rows], weight, None, norm, 1e-6, gated=gated)[-1], whole[rows[-1]])


@half
def test_agrees_with_float64_to_rounding(device: str, dtype: torch.dtype) -> None:
    """A product is rounded once: to half a unit of the result, and what float32 sums lose."""
    x, weight = numbers(device, dtype, 4, 4096), numbers(device, dtype, 24, 4096, seed=1).contiguous()
    truth = x.double() @ weight.double().T
    got = linear_of_rows(x, weight, None).double()
    lost = 4096**0.5 * 2**-23 * (x.double().abs() @ weight.double().abs().T)
    assert ((got - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + lost).all()


def test_what_it_does_not_take(device: str) -> None:
    """Odd addresses, strides and widths, float32, and more rows than a tile has."""
    x, weight = (torch.zeros(n, 64, dtype=torch.bfloat16, device=device) for n in (MOST_ROWS + 1, 3))
    assert is_possible(x[:8], weight)
    assert not is_possible(x, weight) and not is_possible(x[:0], weight)
    norm = torch.zeros(72, dtype=torch.bfloat16, device=device)
    assert is_possible(x[:8], weight, norm[:64]) and not is_possible(x[:8], weight, norm[1:65])
    assert not is_possible(x[:8], x[:, :64].T[:3, :8]) and not is_possible(x[:8].T[:8, :8], weight[:, :8].contiguous())
    assert not is_possible(x[:8].float(), weight.float())
    assert not is_possible(x[:8], weight.half())
    assert not is_possible(x[:2, 4:], weight[:, 4:].contiguous())
    assert not is_possible(x[:2, 4:12], weight[:, :8].contiguous())
    assert not is_possible(torch.zeros(2, 68, dtype=torch.bfloat16, device=device)[:, :64], weight)
    assert not is_possible(x[:2], torch.zeros(200, dtype=torch.bfloat16, device=device)[4:196].view(3, 64))
