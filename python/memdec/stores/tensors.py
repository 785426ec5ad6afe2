"""Safetensors files, written as a stream with their checksum and read through a memory map.

The format is safetensors' own, so any reader opens these files; what this module adds is that an array goes to the disk
without a second copy in memory, that equal arrays give equal bytes (no metadata, one order), and that a broken file is
refused with a message instead of a crash far from its cause.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from memdec.errors import MemdecError
from memdec.stores.atomic import WrittenFile, write_file

Array = npt.NDArray[Any]

_NAMES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
_CODES = {dtype: name for name, dtype in _NAMES.items()}
_WRITE_BYTES = 1 << 24


def write_tensors(path: str | Path, arrays: Mapping[str, Array]) -> WrittenFile:
    """Write ``arrays`` as one safetensors file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        arrays: name → array of any shape; float16/32/64, or signed or unsigned integers. Memory-mapped arrays are
            streamed.

    Returns:
        The file's size and checksum.

    Raises:
        MemdecError: the disk is full or the folder cannot be written.
    """
    # Widest elements first: then every array starts on a multiple of its element's size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name in names:
        array = arrays[name]
        stop = offset + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            flat = np.ascontiguousarray(arrays[name]).reshape(-1)
            step = max(1, _WRITE_BYTES // max(1, flat.dtype.itemsize))
            for start in range(0, flat.size, step):
                file.write(flat[start : start + step].view(np.uint8).data)

    return write_file(path, write)


def map_tensors(path: str | Path) -> dict[str, Array]:
    """Open a safetensors file without reading it: name → array over a private memory map.

    Raises:
        MemdecError: the file is missing, truncated or not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        begin = 8 + length
        # Mode "c" is copy-on-write: torch wants a writable buffer, and nothing written to it can reach the file.
        buffer = np.memmap(path, np.uint8, mode="c") if size > begin else np.empty(size, np.uint8)
        arrays: dict[str, Array] = {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            dtype = _NAMES[entry["dtype"]]
            shape = tuple(entry["shape"])
            if not 0 <= start <= stop <= size - begin or stop - start != dtype.itemsize * int(
                np.prod(shape, dtype=object)
            ):
                raise ValueError(f"tensor {name!r} does not fit in the file")
            arrays[name] = buffer[begin + start : begin + stop].view(np.ndarray).view(dtype).reshape(shape)
    except FileNotFoundError:
        raise MemdecError(
            f"{path} is missing. Restore it, or delete the folder and run the command that made it again."
        ) from None
    except PermissionError as error:
        raise MemdecError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MemdecError(
            f"{path} is damaged or not a safetensors file ({error}). "
            "Restore it, or delete the folder and run the command that made it again."
        ) from None
    return arrays
