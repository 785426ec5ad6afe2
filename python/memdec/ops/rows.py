"""How tensors cross into the extension: as plain pointers, sizes and strides (csrc/memdec.h says what each means)."""

from __future__ import annotations

import math

import torch

from memdec.ops import checks
from memdec.ops.launch import HAS_CUDA, check_device

# data_ptr, dtype code, count, inner, outer_stride, inner_stride, columns; strides in elements.
Rows = tuple[int, int, int, int, int, int, int]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Looked up once: an attribute of a module costs as much as one of a tensor.
_TENSOR, _STRIDED, _INT64 = torch.Tensor, torch.strided, torch.int64
_FLOAT64, _WIDEST = DTYPE_CODES[torch.float64], checks.MAX_VOCABULARY


def address(name: str, tensor: torch.Tensor) -> int:
    """Where the tensor's memory begins.

    Raises:
        ValueError: it has elements but no memory: a shard or an offloaded weight whose storage was freed.
    """
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise ValueError(f"{name}: the tensor's memory was freed (its storage has size 0); gather or reload it first")
    return found


def rows(tensor: torch.Tensor, name: str = "logits") -> tuple[torch.Tensor, Rows]:
    """Describe a tensor of rows (…, V) to the extension.

    Row r starts at element ``(r // inner) * outer_stride + (r % inner) * inner_stride``. Slices, padded rows,
    expanded rows and other views whose leading dimensions fold into two strides are taken as they are; anything else
    is copied once.

    Args:
        tensor: (…, V), at least one dimension, float32, bfloat16, float16 or float64, on the CPU or (but
            float64) on a CUDA device.
        name: what to call the argument in an error.

    Returns:
        The tensor whose memory is described (keep it alive while the pointer is used; it is ``tensor`` itself unless
        a copy was needed), and its description.

    Raises:
        TypeError: not a tensor of one of these dtypes.
        ValueError: no dimensions, no columns, or on a device without kernels.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, wanted float32, bfloat16, float16 or float64; convert with .float()"
        )
    if not tensor.is_cpu:
        check_device(name, tensor)
    shape = tensor.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(shape)}, wanted (…, V) with V ≥ 1")
    columns = shape[-1]
    if len(shape) == 2 and (columns == 1 or tensor.stride(1) == 1):
        return tensor, (address(name, tensor), code, shape[0], max(shape[0], 1), 0, tensor.stride(0), columns)
    strides = tensor.stride()
    if columns > 1 and strides[-1] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    leading: list[
        tuple[int, int]
    ] = []  # (size, stride), outermost first, neighbours merged where one stride serves both
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if leading and leading[-1][1] == stride * size:
            leading[-1] = (leading[-1][0] * size, stride)
        else:
            leading.append((size, stride))
    count = math.prod(shape[:-1])
    if len(leading) > 2 and count > 0:
        tensor = tensor.contiguous()
        leading = [(count, columns)]
    inner, inner_stride = leading[-1] if leading else (1, 0)
    outer_stride = leading[0][1] if len(leading) == 2 else 0
    return tensor, (address(name, tensor), code, count, max(inner, 1), outer_stride, inner_stride, columns)


def plain_rows(tensor: torch.Tensor) -> Rows | None:
    """What :func:`rows` says of a tensor of the common kind, at a third of the cost; None for any other.

    The common kind is a contiguous torch.Tensor (…, N, V) on a device that has kernels: there is nothing about it to
    refuse. (Where the sizes of a new tensor are given one by one and not as a torch.Size, it costs half: 1 µs.)
    """
    if type(tensor) is not _TENSOR or tensor.layout is not _STRIDED or not tensor.is_contiguous():
        return None
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None or not (tensor.is_cpu or (tensor.is_cuda and HAS_CUDA and code != _FLOAT64)):
        return None
    shape = tensor.shape
    data = tensor.data_ptr()
    if len(shape) < 2 or not data:
        return None
    columns = shape[-1]
    if columns > _WIDEST:
        return None
    count = shape[0] if len(shape) == 2 else tensor.numel() // columns
    return data, code, count, count, 0, columns, columns


def plain_indices(tensor: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether these are indices of the common kind for such logits: :func:`indices` would give them back."""
    return (
        type(tensor) is _TENSOR
        and tensor.dtype is _INT64
        and tensor.layout is _STRIDED
        and tensor.shape == logits.shape[:-1]
        and tensor.is_contiguous()
        and ((tensor.is_cpu and logits.is_cpu) or (tensor.device == logits.device and not checks.DEBUG))
        and tensor.data_ptr() != 0
    )


def sparse_rows(
    indptr: torch.Tensor, token_ids: torch.Tensor, probs: torch.Tensor
) -> tuple[tuple[int, int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A teacher's arrays as the extension takes them, and the tensors that must outlive the call."""
    arrays = indptr.contiguous(), token_ids.contiguous(), probs.contiguous()
    names = ("teacher.indptr", "teacher.token_ids", "teacher.probs")
    first, second, third = (address(name, array) for name, array in zip(names, arrays, strict=True))
    return (first, second, third, token_ids.numel()), arrays


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of losses and log-probs of these logits: float64 for float64, float32 for the rest."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def indices(tensor: torch.Tensor, logits: torch.Tensor, name: str, ignore_index: int | None = None) -> torch.Tensor:
    """One index a row of logits, as a contiguous int64 tensor on their device.

    The CPU kernels check the values. On CUDA that is done here, where ``MEMDEC_DEBUG=1`` is set: the host waits for it.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not of the rows' shape, on another device, or (with ``MEMDEC_DEBUG=1`` on CUDA) out of range.
    """
    shape = logits.shape[:-1]
    checks.tensor(name, tensor)
    if tensor.dtype != torch.int64:
        if tensor.dtype not in (torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted int64; convert with .long()")
        tensor = tensor.long()
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(shape)}: one index for every row of logits"
        )
    if tensor.device != logits.device:
        raise ValueError(f"{name}: got device {tensor.device}, wanted {logits.device}, where the logits are")
    address(name, tensor)
    if checks.DEBUG and tensor.is_cuda:
        checks.in_range(name, tensor, logits.shape[-1], ignore_index)
    return tensor.contiguous()


def key_rows(name: str, keys: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """Seeds or offsets as the extension takes them: a tensor to keep alive, its address and its stride.

    The stride is 1 for one a row, and 0 for one of all rows: a tensor of no dimensions, or None for a number that
    travels by itself.
    """
    if keys is None:
        return None, 0, 0
    keys = keys.contiguous()
    return keys, address(name, keys), int(keys.dim() > 0)
