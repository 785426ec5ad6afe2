"""Products of few rows by memdec's own CUDA kernel (csrc/cuda/linear_of_rows.cu), in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import launch
from memdec.ops.rows import DTYPE_CODES

MOST_ROWS = 8  # the columns of a tensor core's second factor
SHARED_BYTES = 73_984  # of a block's shared memory, beside the normed rows


def is_possible(x: Tensor, weight: Tensor, normed: bool = False) -> bool:
    """Whether :func:`linear_of_rows` takes such rows (R, d) and weights (m, d), and this build and GPU have it."""
    rows, width = x.shape
    if not (
        launch.HAS_CUDA
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and rows <= MOST_ROWS
        and width % 8 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    ):
        return False
    if not (normed and x.is_cuda):
        return True
    room: int = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0)
    return SHARED_BYTES + rows * (2 * width + 192) <= room


def linear_of_rows(
    x: Tensor,  # (R, d)
    weight: Tensor,  # (m, d), contiguous; gated (2·m, d): gate, up
    bias: Tensor | None,  # (m,) or (2·m,)
    norm_weight: Tensor | None = None,  # (d,)
    epsilon: float = 0.0,
    residual: Tensor | None = None,  # (R, m)
    gated: bool = False,
) -> Tensor:
    """A linear layer (R, m) of rows, normed first where there is a norm's weight, gated, added to the residual.

    A row's result has the same bits whatever rows are beside it. See :func:`memdec.decoding.kernels.norm_linear`,
    ``linear_add`` and ``norm_gate_up``, which it computes.
    """
    rows, (outputs, width) = len(x), weight.shape
    outputs = outputs // 2 if gated else outputs
    result = x.new_empty(rows, outputs)
    launch.run(
        _C.linear_of_rows,
        x.device,
        DTYPE_CODES[x.dtype],
        rows,
        width,
        outputs,
        gated,
        x.data_ptr(),
        x.stride(0),
        0 if norm_weight is None else norm_weight.data_ptr(),
        epsilon,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        result.data_ptr(),
    )
    return result
