"""The datastore on disk: what the model holds at every position of the training text, and the token that came next.

A folder with ``manifest.json`` (format ``memdec.datastore``) and

- ``shard-00000.safetensors`` …: ``keys`` float16 (n, dim) and ``values`` int32 (n,), in row order;
- ``documents.safetensors``: ``document_starts`` int64 (D+1,), where the documents of the training text begin;
- ``validation.safetensors``, if validation rows were made: ``keys`` float16 (m, dim), ``values`` int32 (m,),
  ``base_log_prob`` float32 (m,) of the value under the model that made the keys, and ``rows`` int64 (m,).

A row's id is the position in the training text of the token that the model had read last: key = φ(tokens[0 … row]),
value = tokens[row + 1]. T tokens make T − 1 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.stores.manifest import REMEDY, Manifest
from memdec.stores.shards import RowShards, ShardWriter
from memdec.stores.tensors import Array, map_tensors

FORMAT = "memdec.datastore"
VERSION = 1
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ValidationRows:
    """Rows of the validation text, to choose settings on.

    Attributes:
        keys: float16 (m, dim).
        values: int32 (m,), the tokens that came.
        base_log_prob: float32 (m,), what the model that made the keys gave to those tokens.
        rows: int64 (m,), the rows' ids within the validation text.
    """

    keys: Tensor
    values: Tensor
    base_log_prob: Tensor
    rows: Tensor


class Datastore:
    """A datastore folder, opened for reading through memory maps. Use ``Datastore.open``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = RowShards(manifest)
        self._arrays: dict[int, dict[str, Array]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Datastore:
        """Open a datastore.

        Raises:
            MemdecError: no datastore there, of another version, not finished, or a file missing or truncated.
        """
        folder = Path(folder)
        manifest = Manifest.load_whole(folder, format=FORMAT, version=VERSION)
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Datastore.open, (self.folder,)  # a worker process maps the files itself

    @property
    def num_rows(self) -> int:
        """Rows: the tokens of the training text less one."""
        return self._rows.num_rows

    @property
    def dim(self) -> int:
        """Width of a key."""
        return int(self.manifest.fields["dim"])

    @property
    def context(self) -> int:
        """Tokens in a window, as in ``windows``."""
        return int(self.manifest.fields["context"])

    @property
    def stride(self) -> int | None:
        """How far windows are apart, as in ``windows``."""
        stride = self.manifest.fields["stride"]
        return None if stride is None else int(stride)

    @property
    def model(self) -> str:
        """The name of the model that made the keys."""
        return str(self.manifest.fields["model"])

    @property
    def layer(self) -> str:
        """The module whose input the keys are."""
        return str(self.manifest.fields["layer"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest.fields["vocab_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.manifest.fields["tokenizer_fingerprint"])

    def keys(self, start: int, stop: int) -> Tensor:
        """Keys of rows [start, stop): float16 (stop − start, dim); a view of the file where one shard holds them
        all."""
        return self._read("keys", start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """Values of rows [start, stop): int32 (stop − start,)."""
        return self._read("values", start, stop)

    def documents(self, start: int, stop: int) -> Tensor:
        """The document of each of the rows [start, stop), that is of its value: int64 (stop − start,)."""
        self._check_range(start, stop)
        starts = map_tensors(self.folder / "documents.safetensors")["document_starts"]
        tokens = np.arange(start + 1, stop + 1, dtype=np.int64)
        # side="right" passes over documents without tokens
        return torch.from_numpy(np.searchsorted(starts, tokens, side="right") - 1)

    def document_bounds(self, rows: Tensor) -> Tensor:
        """For each of ``rows``, int64 (n,), its document's first row and the row after its last: int64 (n, 2)."""
        starts = map_tensors(self.folder / "documents.safetensors")["document_starts"]
        document = np.searchsorted(starts, rows.numpy() + 1, side="right") - 1
        # a document of tokens [s, e) is predicted by rows [s − 1, e − 1); nothing predicts the first token of all
        bounds = np.stack([np.maximum(starts[document] - 1, 0), starts[document + 1] - 1], axis=1)
        return torch.from_numpy(bounds)

    @property
    def shard_bounds(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each shard: ``keys`` of such a range, or of a part of it, are a view of the file."""
        return self._rows.bounds

    @property
    def validation(self) -> ValidationRows | None:
        """The validation rows, or None where none were made."""
        name = "validation.safetensors"
        if not any(shard.name == name for shard in self.manifest.shards):
            return None
        arrays = map_tensors(self.folder / name)
        names = ("keys", "values", "base_log_prob", "rows")
        return ValidationRows(*(torch.from_numpy(arrays[name]) for name in names))

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) are not within the datastore's {self.num_rows} rows")

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        self._check_range(start, stop)
        first_row = self._rows.first_row
        first = max(0, int(np.searchsorted(first_row, start, side="right")) - 1)
        parts = []
        for index in range(first, len(self._rows.shards)):
            offset = int(first_row[index])
            if offset >= stop:
                break
            parts.append(self._shard(index)[name][max(0, start - offset) : stop - offset])
        if len(parts) == 1:
            return torch.from_numpy(parts[0])
        if not parts:
            return torch.empty(
                (0, self.dim) if name == "keys" else 0, dtype=torch.float16 if name == "keys" else torch.int32
            )
        return torch.from_numpy(np.concatenate(parts))

    def _shard(self, index: int) -> dict[str, Array]:
        if index not in self._arrays:
            shard = self._rows.shards[index]
            arrays = map_tensors(self.folder / shard.name)
            if arrays["keys"].shape != (shard.rows, self.dim) or arrays["values"].shape != (shard.rows,):
                raise MemdecError(
                    f"{self.folder / shard.name} does not hold the {shard.rows} rows of its manifest. {REMEDY}"
                )
            self._arrays[index] = arrays
        return self._arrays[index]


class DatastoreWriter(ShardWriter):
    """Writes a datastore shard by shard, under the folder's lock, and takes up one that a killed run has left.

    Args:
        folder: where; made if it is not there.
        num_rows: rows the whole datastore will have.
        dim: width of a key.
        document_starts: int64 (D+1,), of the training text.
        fields: the parameters, JSON; at least ``model``, ``layer``, ``context``, ``stride``, ``vocab_size`` and
            ``tokenizer_fingerprint``. A run with other fields does not continue this one.

    Use it as a context manager, append from ``rows_done`` on, and ``finish``::

        with DatastoreWriter(folder, num_rows=n, dim=d, document_starts=starts, fields=fields) as writer:
            while writer.rows_done < n:
                writer.append(keys, values)      # one shard
            writer.finish()
    """

    def __init__(
        self, folder: str | Path, *, num_rows: int, dim: int, document_starts: Tensor, fields: dict[str, Any]
    ) -> None:
        self.dim = dim
        self._document_starts = document_starts
        super().__init__(folder, num_rows=num_rows, format=FORMAT, version=VERSION, fields={**fields, "dim": dim})

    def begin(self) -> None:
        if not self.has("documents.safetensors"):
            self.add_file("documents.safetensors", {"document_starts": self._document_starts.numpy()})

    @property
    def validation_done(self) -> bool:
        return self.has("validation.safetensors")

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write the next shard: ``keys`` (n, dim) of any float type, ``values`` int32 (n,).

        Raises:
            MemdecError: a key is not finite or too large for float16, or the disk refuses.
        """
        if keys.ndim != 2 or keys.shape[1] != self.dim or values.shape != keys.shape[:1]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not (n, {self.dim}) and (n,)"
            )
        if self.rows_done + len(keys) > self.num_rows:
            raise ValueError(f"{self.rows_done} + {len(keys)} rows are more than the {self.num_rows} announced")
        half = to_float16(keys, first_row=self.rows_done)
        self.add_shard({"keys": half.numpy(), "values": values.to(torch.int32).numpy()}, rows=len(keys))

    def write_validation(self, validation: ValidationRows) -> None:
        """Write the validation rows, all at once."""
        arrays: dict[str, Array] = {
            "keys": to_float16(validation.keys, first_row=None).numpy(),
            "values": validation.values.to(torch.int32).numpy(),
            "base_log_prob": validation.base_log_prob.to(torch.float32).numpy(),
            "rows": validation.rows.to(torch.int64).numpy(),
        }
        self.add_file("validation.safetensors", arrays)

    def finish(self, results: dict[str, Any] | None = None) -> Datastore:
        """Mark the datastore complete, with ``results`` added to the manifest's, and open it."""
        self.mark_complete(results)
        return Datastore.open(self.folder)


def to_float16(
    keys: Tensor,  # (n, dim) any float type
    *,
    first_row: int | None,  # id of the first row, for the message; None: validation rows
) -> Tensor:
    """The keys as float16 on the CPU.

    Raises:
        MemdecError: a key is NaN, infinite, or beyond float16's 65504.
    """
    keys = keys.detach().cpu()
    # amax and amin hand a NaN on; abs() would need a second shard of memory
    largest = torch.maximum(keys.amax(dim=1), -keys.amin(dim=1)) if keys.numel() else torch.zeros(len(keys))
    bad = ~(largest <= FLOAT16_MAX)  # true for NaN as well
    if bad.any():
        index = int(bad.nonzero()[0])
        row = f"row {first_row + index}" if first_row is not None else f"validation row {index}"
        if torch.isfinite(largest[index]):
            raise MemdecError(
                f"The key of {row} has the value {float(largest[index]):.4g}, beyond float16's {FLOAT16_MAX:.0f}. "
                "Take the keys from another module with --layer, one whose output is normalised."
            )
        raise MemdecError(
            f"The model gives NaN or infinite hidden states at {row} ({int(bad.sum())} such rows in this part). "
            "Its weights are damaged or its number type overflows: check the model, or try --dtype float32."
        )
    return keys.to(torch.float16).contiguous()
