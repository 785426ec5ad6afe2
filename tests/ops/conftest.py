"""What the tests of the ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memdec import _C, build_info


@pytest.fixture(params=["portable", "avx2", "avx512"])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level in turn; skipped where it was not built or the machine has not got it."""
    before = build_info()["simd"]
    try:
        _C.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    _C.set_simd_level(before)
