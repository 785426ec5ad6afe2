"""Where an op runs: on the CPU's threads, or on the current stream of its tensors' CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memdec import _C

HAS_CUDA: bool = _C.build_info()["cuda"] != "off"

# What an op on CUDA gets to work with unasked, in bytes: enough for a few rows, where a call that only asks would show.
SMALL_WORKSPACE = 1 << 16

# The address of a device's current stream. A private name, in CUDA builds of torch since 1.11, and worth a microsecond
# a call; without it the public way.
_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)


def run(op: Callable[..., int], device: torch.device, *arguments: Any) -> None:
    """Run an op of the extension on the device that its tensors are on.

    On CUDA the op's kernels are queued, and nothing waits for them. What they need beside their outputs comes from
    torch's allocator, so that a call can be captured in a CUDA graph.

    Args:
        op: a function of ``memdec._C``.
        device: "cpu", or a CUDA device with its index, as tensors give it.
        arguments: the op's own, without the last, which says where it runs.

    Raises:
        ValueError: an index that the CPU kernels found out of range.
        NotImplementedError: this build has no CUDA kernels.
        RuntimeError: CUDA's error, with the op's name.
    """
    if device.type == "cpu":
        op(*arguments, torch.get_num_threads())
        return
    index = device.index
    stream = _current_stream(index)
    # Freed as this returns: the allocator gives it to nobody but what is queued on this stream later.
    workspace = torch.empty(SMALL_WORKSPACE, dtype=torch.uint8, device=device)
    wanted = op(*arguments, (index, stream, workspace.data_ptr(), SMALL_WORKSPACE))
    if wanted:  # nothing has run yet
        workspace = torch.empty(wanted, dtype=torch.uint8, device=device)
        op(*arguments, (index, stream, workspace.data_ptr(), wanted))


def check_device(name: str, value: Tensor) -> None:
    """``value`` is on a device that has kernels in this build.

    Raises:
        ValueError: it is not.
        TypeError: it is a float64 tensor on CUDA.
    """
    kind = value.device.type
    if kind == "cuda":
        if not HAS_CUDA:
            raise ValueError(
                f"{name}: got a tensor on {value.device}, but this build of memdec has CPU kernels only (see "
                f"memdec.build_info()); install it from source where nvcc is on the PATH (MEMDEC_CUDA=on makes its "
                f"absence an error: pip install --config-settings=cmake.define.MEMDEC_CUDA=on .), or move the tensor "
                f"with .cpu()"
            )
        if value.dtype == torch.float64:
            raise TypeError(
                f"{name}: got torch.float64 on {value.device}, which is computed on the CPU only; convert with "
                f".float(), or move the tensor with .cpu()"
            )
    elif kind not in ("cpu", "meta"):
        raise ValueError(
            f"{name}: got a tensor on {value.device}, wanted one on the CPU or on a CUDA device: memdec has no other "
            f"kernels; move it with .cpu()"
        )
