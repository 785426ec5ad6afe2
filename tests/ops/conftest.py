"""What the tests of the ops share: where they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# memdec is imported late: tests/conftest.py may put another build of its extension in place first.
SIMD_LEVELS = ["portable", "avx2", "avx512"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is every device that has kernels here, `simd` every SIMD level of the CPU's.

    Run on the host (--cuda=host), CUDA kernels take CPU tensors, and the CPU's SIMD levels have no part in it.
    """
    from memdec import build_info

    host = build_info()["cuda"] == "host"
    levels = ["portable"] if host else SIMD_LEVELS
    devices = ["cuda"] if torch.cuda.is_available() and build_info()["cuda"] == "on" else []
    wanted = [name for name in ("simd", "device") if name in metafunc.fixturenames]
    if wanted == ["simd", "device"]:
        cases = [(level, "cpu") for level in levels] + [("portable", device) for device in devices]
        metafunc.parametrize("simd, device", cases, indirect=["simd"], ids="-".join)
    elif wanted == ["simd"]:
        metafunc.parametrize("simd", levels, indirect=True)
    elif wanted == ["device"]:
        metafunc.parametrize("device", ["cpu", *devices])


@pytest.fixture
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level in turn; skipped where it was not built or the machine has not got it."""
    from memdec import _C, build_info

    before = build_info()["simd"]
    try:
        _C.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    _C.set_simd_level(before)


@pytest.fixture
def on_cuda(device: str) -> bool:
    """Whether the CUDA kernels run, be it on the host. They cannot raise for indices: nobody waits for their values."""
    from memdec import build_info

    return device == "cuda" or build_info()["cuda"] == "host"
