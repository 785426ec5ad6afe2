"""A build with CUDA kernels on a machine without a GPU: it is imported, its CPU ops work, a launch is a clean error."""

from __future__ import annotations

import pytest
import torch

from memdec import _C, build_info, ops
from memdec.ops.rows import rows

pytestmark = pytest.mark.skipif(
    build_info()["cuda"] != "on" or torch.cuda.is_available(), reason="needs a build with CUDA, and no GPU"
)


def test_a_launch_without_a_driver_names_the_op_and_cuda_s_error():
    logits, targets = torch.zeros(1, 7), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"^token_log_prob: CUDA error \d+: .*(driver|device)"):
        _C.token_log_prob(rows(logits)[1], targets.data_ptr(), targets.data_ptr(), 0, 0, (0, 0, 0, 0))
    assert ops.token_log_prob(logits, targets).item() == pytest.approx(-1.945910)


def test_an_op_asks_for_its_workspace_before_anything_is_launched():
    logits = torch.zeros(1, 50257)
    pointers = (logits.data_ptr(), logits.data_ptr(), 0, 0)
    assert _C.token_log_prob(rows(logits)[1], *pointers, (0, 0, 0, 0)) > 0
