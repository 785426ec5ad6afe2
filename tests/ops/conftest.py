"""What the tests of the ops share: where they run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

# memdec is imported late: tests/conftest.py may put another build of its extension in place first.
SIMD_LEVELS = ["portable", "avx2", "avx512"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is every device that has kernels here, `simd` every SIMD level of the CPU's, `on_cuda` whether the CUDA
    kernels run.

    With --cuda=host these take CPU tensors, and the CPU's SIMD levels have no part in it. On CUDA an index out of range
    raises nothing: nobody waits for the values.
    """
    from memdec import build_info

    host = build_info()["cuda"] == "host"
    cases = [{"simd": level, "device": "cpu", "on_cuda": host} for level in (["portable"] if host else SIMD_LEVELS)]
    if torch.cuda.is_available() and build_info()["cuda"] == "on":
        cases.append({"simd": "portable", "device": "cuda", "on_cuda": True})
    names = [name for name in ("simd", "device", "on_cuda") if name in metafunc.fixturenames]
    if "simd" not in names:
        cases = [case for case in cases if case["simd"] == "portable"]
    elif "device" not in names:
        cases = [case for case in cases if case["device"] == "cpu"]
    if names:
        metafunc.parametrize(
            names,
            [[case[name] for name in names] for case in cases],
            indirect=[name for name in names if name == "simd"],
            ids=["-".join(str(case[name]) for name in names if name != "on_cuda") for case in cases],
        )


def _hard_rows(vocab: int) -> torch.Tensor:
    """(9, vocab). Rows whose borders are hard to find, a kind each, NaN in the last; few values, exact in float32."""
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.zeros(9, vocab)  # row 0: all equal
    rows[1] = (2 * torch.randn(vocab, generator=generator)).round()  # ties everywhere
    rows[2] = torch.randint(5, (vocab,), generator=generator) * 2.0**-12  # one token apart, the rest within a hair
    rows[2, vocab // 2] = 8
    rows[3] = rows[1].where(torch.rand(vocab, generator=generator) < 0.1, -math.inf)  # most masked
    rows[4] = rows[1].where(torch.rand(vocab, generator=generator) < 0.1, -1e4)  # as some mask
    rows[5] = -math.inf  # one token
    rows[6] = (8 * torch.rand(vocab, generator=generator) ** 9 - 9).round()  # a few candidates
    rows[7] = (3 * torch.randn(vocab, generator=generator) * 64).round() / 64  # as a model's
    rows[3:6, vocab // 3] = 1
    rows[8] = rows[7]
    rows[8, -1] = math.nan
    return rows


@pytest.fixture
def hard_rows() -> Callable[[int], torch.Tensor]:
    """Logits for the cuts of the samplers, of so many columns."""
    return _hard_rows
