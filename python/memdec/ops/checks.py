"""Argument checks shared by the ops: each error names the argument, what it got and what it wanted.

Nothing here reads a tensor's values (that would make an accelerator wait): ids out of range are found by the CPU
kernels themselves, by ``SparseDistributions.validate()``, and by every op where ``MEMDEC_DEBUG=1`` is set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from memdec.distributions import SparseDistributions
from memdec.ops.launch import check_device

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
REDUCTIONS = ("mean", "sum", "none")
MAX_VOCABULARY = 2**31 - 1  # token ids are int32 in SparseDistributions and in the kernels

DEBUG = os.environ.get("MEMDEC_DEBUG", "") not in ("", "0")


def tensor(name: str, value: object) -> None:
    """``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, wanted a dense one; convert with .to_dense()")


def kernels(**values: Tensor) -> None:
    """Each tensor, by its name, is on a device that has kernels, in a dtype that they compute there.

    The other checks are shared with ``ops.reference``, which takes float64 on every device.
    """
    for name, value in values.items():
        if not value.is_cpu:
            check_device(name, value)


def floats(name: str, value: Tensor) -> None:
    """``value`` is a tensor of a float dtype that the kernels read."""
    tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, wanted float32, bfloat16, float16 or (on the CPU) float64")


def logits(name: str, value: Tensor) -> None:
    """``value`` is (…, V) logits: a float dtype, V ≥ 1."""
    floats(name, value)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted (…, V) with a vocabulary V of at least 1")
    if value.shape[-1] > MAX_VOCABULARY:
        raise ValueError(f"{name}: got a vocabulary of {value.shape[-1]}, wanted at most {MAX_VOCABULARY}")


def logits_pair(base_logits: Tensor, memory_logits: Tensor) -> None:
    """Two logit tensors of one shape, on one device."""
    logits("base_logits", base_logits)
    logits("memory_logits", memory_logits)
    if base_logits.shape != memory_logits.shape:
        padded = base_logits.shape[-1] != memory_logits.shape[-1]
        hint = "; slice padded vocabularies to the tokenizer's size first" if padded else ""
        raise ValueError(
            f"memory_logits: got shape {tuple(memory_logits.shape)}, wanted {tuple(base_logits.shape)}, "
            f"that of base_logits{hint}"
        )
    same_device("memory_logits", memory_logits, "base_logits", base_logits)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both lie on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, wanted {other.device}, that of {other_name}")


def tokens(name: str, value: Tensor, shape: Sequence[int], logits: Tensor) -> None:
    """``value`` is an integer tensor of ``shape``, on the logits' device. Its values are checked by the kernel."""
    tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, wanted int64 (or a smaller integer dtype)")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {tuple(shape)}, one token a row of logits")
    same_device(name, value, "the logits", logits)


def in_range(name: str, value: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Every index is in [0, ``vocab_size``), or ``ignore_index``. Waits for the device."""
    wrong = (value < 0) | (value >= vocab_size)
    if ignore_index is not None:
        wrong &= value != ignore_index
    if bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        raise ValueError(
            f"{name} holds {int(value.reshape(-1)[at])} at position {at}, wanted an index from 0 to {vocab_size - 1}"
        )


def teacher(value: SparseDistributions, num_rows: int, vocab_size: int, device: torch.device) -> None:
    """``value`` holds one distribution a row, over the logits' vocabulary, on their device."""
    if not isinstance(value, SparseDistributions):
        raise TypeError(
            f"teacher: got {type(value).__name__}, wanted memdec.SparseDistributions; "
            f"a dense matrix becomes one with SparseDistributions.from_dense(matrix)"
        )
    if value.num_rows != num_rows:
        raise ValueError(f"teacher: got {value.num_rows} rows, wanted {num_rows}, one a row of logits")
    if value.vocab_size != vocab_size:
        raise ValueError(
            f"teacher: got a vocabulary of {value.vocab_size} tokens, wanted {vocab_size}, that of the logits"
        )
    if value.device != device:
        raise ValueError(f"teacher: got device {value.device}, wanted {device}, that of the logits; use teacher.to(…)")
    if DEBUG and not torch.compiler.is_compiling() and device.type != "meta":
        value.validate()


def fraction(name: str, value: float) -> float:
    """``value`` is a number in [0, 1]; returned as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, wanted 0 to 1")
    return float(value)


def fractions(name: str, value: Tensor) -> None:
    """Every number is in [0, 1]. Waits for the device."""
    wrong = ~((value >= 0) & (value <= 1))
    if bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        raise ValueError(f"{name} holds {float(value.reshape(-1)[at])} at position {at}, wanted 0 to 1")


def positive(name: str, value: float) -> float:
    """``value`` is a finite number above 0; returned as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, wanted a finite number above 0")
    return float(value)


def count(name: str, value: int, least: int = 0) -> int:
    """``value`` is an integer of at least ``least``."""
    _integer(name, value)
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")
    return value


def int64(name: str, value: int) -> int:
    """``value`` is an integer of 64 bits."""
    _integer(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {value}, wanted a number of 64 bits")
    return value


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int")


def reduction(value: str) -> None:
    """``value`` is one of "mean", "sum", "none"."""
    if value not in REDUCTIONS:
        raise ValueError(f'reduction: got {value!r}, wanted "mean", "sum" or "none"')


def alpha(value: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """The mixing weight as (number, None), or as (0.0, tensor) where it is a tensor.

    A tensor must broadcast to ``logits.shape[:-1]`` and is given back as it came. Whether its values lie in [0, 1] is
    checked by the CPU kernels, and on CUDA with ``MEMDEC_DEBUG=1``.
    """
    if not isinstance(value, Tensor):
        return fraction("alpha", value), None
    floats("alpha", value)
    rows = logits.shape[:-1]
    if value.dim() > 0 or not (value.is_cpu or value.is_cuda):
        same_device("alpha", value, "the logits", logits)
    backwards = zip(reversed(value.shape), reversed(rows), strict=False)
    if value.dim() > len(rows) or any(mine not in (1, wanted) for mine, wanted in backwards):
        raise ValueError(
            f"alpha: got shape {tuple(value.shape)}, wanted a number or a tensor that broadcasts to {tuple(rows)}, "
            f"the shape of the logits without the vocabulary"
        )
    return 0.0, value


def per_row(name: str, value: int | Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
    """A seed or an offset: (int, None) from an int of 64 bits, (0, tensor) from int64 values, a scalar or one a row."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted an int or an int64 tensor")
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name}: got {value}, wanted a number of 64 bits")
        return value - 2**64 if value >= 2**63 else value, None
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: got {value.dtype}, wanted torch.int64")
    rows = logits.shape[:-1]
    if value.dim() != 0 and value.shape != rows:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, wanted {tuple(rows)}, one a row of logits, or a scalar"
        )
    same_device(name, value, "the logits", logits)
    return 0, value
