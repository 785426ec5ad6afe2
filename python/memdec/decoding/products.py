"""Products of few rows by memdec's own CUDA kernel (csrc/cuda/linear_of_rows.cu), in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import launch
from memdec.ops.rows import DTYPE_CODES

MOST_ROWS = 8  # the columns of a tensor core's second factor
SHARED_BYTES = 73_984  # of a block's shared memory, beside the normed rows


def is_possible(x: Tensor, weight: Tensor, norm_weight: Tensor | None = None) -> bool:
    """Whether :func:`linear_of_rows` takes such rows (R, d), weights (m, d) and norm (d,), and this build has it."""
    read_by_vectors = (x, weight) if norm_weight is None else (x, weight, norm_weight)
    return (
        launch.HAS_CUDA
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(one.dtype == x.dtype and one.data_ptr() % 16 == 0 for one in read_by_vectors)
        and 1 <= len(x) <= MOST_ROWS
        and x.shape[1] % 8 == 0
        and x.stride(0) % 8 == 0
        and x.stride(1) == 1
        and weight.is_contiguous()
    )


def norms_as_well(x: Tensor) -> bool:
    """Whether a block of x's GPU has shared memory for the rows (R, d) that it norms."""
    rows, width = x.shape
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

    A row's result has the same bits whatever rows are beside it. On a GPU weights and norm are read while the kernel
    that was queued before may still run, so that it must not be what writes them. See
    :func:`memdec.decoding.kernels.norm_linear`, ``linear_add`` and ``norm_gate_up``, which it computes.
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
