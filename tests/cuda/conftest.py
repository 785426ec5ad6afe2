"""What the tests of the CUDA backend itself share."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    """CPU tensors, which --cuda=host gives to the CUDA kernels."""
    return "cpu"
