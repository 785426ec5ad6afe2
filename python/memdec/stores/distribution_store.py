"""Teacher distributions on disk: for every row of the corpus the next-token distribution that the retriever gave.

A folder with ``manifest.json`` (format ``memdec.distributions``) and ``shard-00000.safetensors`` …, each with

- ``lengths`` uint16 (n,), or uint32 where a row has more than 65535 pairs: the pairs of each row;
- ``residual`` float32 (n,): the mass that is in no pair; a row's probabilities sum to 1 − residual;
- ``token_ids`` uint16 (nnz,), ascending in a row; where the vocabulary is larger than 65536 these are the low 16
  bits, and ``token_ids_high`` uint8 (nnz,) the bits above;
- ``codes`` uint8 (nnz,) with codec ``log8``, or ``probs`` float16 (nnz,) with codec ``float16``.

``log8`` covers [1e-6, 1] in 255 equal steps of the logarithm: code c stands for 10^(−6·(1 − c/255)), so the worst
relative error is 2.7%, and the decoded row is rescaled so that it sums to 1 − residual. The KL divergence this costs
is the variance of a rounded logarithm over two, about (ln(10)·6/255)²/24 = 1.2e-4. A probability too small for the
codec (below 0.97e-6 for ``log8``, 2⁻²⁵ for ``float16``) is cut, and its mass goes to the residual. So a pair takes 3
bytes, 4 with a larger vocabulary, and a row 6 more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdec.distributions import SparseDistributions
from memdec.errors import MemdecError
from memdec.stores.manifest import REMEDY, Manifest
from memdec.stores.shards import RowShards, ShardWriter
from memdec.stores.tensors import Array, map_tensors

FORMAT = "memdec.distributions"
VERSION = 1
CODECS = ("log8", "float16")

LOG8_FLOOR = 1e-6
_LOG8_TABLE = np.exp(math.log(LOG8_FLOOR) * (1 - np.arange(256) / 255)).astype(np.float32)
_MASS_TOLERANCE = 1e-3
_CACHED_SHARDS = 64
_MANY_RUNS = 64  # from here on, indexing costs less than slicing


class DistributionStore:
    """A folder of teacher distributions, opened for reading through memory maps. Use ``DistributionStore.open``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = RowShards(manifest)
        # A shard's row pointers are the running sum of its lengths: 8 bytes a row, kept for the shards in use only.
        self._open_shard: Callable[[int], dict[str, Array]] = functools.lru_cache(_CACHED_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, folder: str | Path) -> DistributionStore:
        """Open a distribution store.

        Raises:
            MemdecError: none there, of another version, not finished, or a file missing or truncated.
        """
        folder = Path(folder)
        manifest = Manifest.load_whole(folder, format=FORMAT, version=VERSION)
        if manifest.fields.get("codec") not in CODECS:
            raise MemdecError(f"{folder} has the unknown codec {manifest.fields.get('codec')!r}. {REMEDY}")
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return DistributionStore.open, (self.folder,)  # a worker process maps the files itself

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    @property
    def vocab_size(self) -> int:
        return int(self.manifest.fields["vocab_size"])

    @property
    def codec(self) -> str:
        return str(self.manifest.fields["codec"])

    @property
    def nnz(self) -> int:
        """Pairs (token, probability) in all rows."""
        return int(self.manifest.results["nnz"])

    def slice(self, start: int, stop: int) -> SparseDistributions:
        """The distributions of rows [start, stop)."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) are not within the store's {self.num_rows} rows")
        return self._read([(start, stop)])

    def rows(self, row_ids: Tensor) -> SparseDistributions:
        """The distributions of ``row_ids``, int64 (n,), in that order; runs of consecutive rows are read at once."""
        ids = row_ids.detach().cpu().to(torch.int64).reshape(-1).numpy()
        if ids.size == 0:
            return self._read([])
        if int(ids.min()) < 0 or int(ids.max()) >= self.num_rows:
            raise IndexError(f"row ids from {ids.min()} to {ids.max()} are not within the store's {self.num_rows} rows")
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        if len(breaks) > _MANY_RUNS and len(breaks) > ids.size // 16:
            return self._gather(ids)
        starts = ids[np.concatenate([[0], breaks])]
        stops = ids[np.concatenate([breaks, [ids.size]]) - 1] + 1
        return self._read(list(zip(starts.tolist(), stops.tolist(), strict=True)))

    def _map_shard(self, index: int) -> dict[str, Array]:
        shard = self._rows.shards[index]
        arrays = map_tensors(self.folder / shard.name)
        wanted = {"lengths", "residual", "token_ids", "codes" if self.codec == "log8" else "probs"}
        if self.vocab_size > 65536:
            wanted.add("token_ids_high")
        indptr = np.zeros(shard.rows + 1, np.int64)
        if arrays.keys() == wanted and len(arrays["lengths"]) == len(arrays["residual"]) == shard.rows:
            np.cumsum(arrays["lengths"], dtype=np.int64, out=indptr[1:])
        flat = wanted - {"lengths", "residual"}
        if arrays.keys() != wanted or any(len(arrays[name]) != indptr[-1] for name in flat):
            raise MemdecError(
                f"{self.folder / shard.name} does not hold the {shard.rows} rows of its manifest. {REMEDY}"
            )
        arrays["indptr"] = indptr
        return arrays

    def _read(self, runs: list[tuple[int, int]]) -> SparseDistributions:
        parts: dict[str, list[Array]] = {
            "lengths": [],
            "residual": [],
            "token_ids": [],
            "token_ids_high": [],
            "codes": [],
        }
        wide = self.vocab_size > 65536
        coded = self.codec == "log8"
        for start, stop in runs:
            index = int(np.searchsorted(self._rows.first_row, start, side="right")) - 1
            while start < stop:
                offset, end = int(self._rows.first_row[index]), min(stop, int(self._rows.first_row[index + 1]))
                arrays = self._open_shard(index)
                rows = slice(start - offset, end - offset)
                pairs = slice(arrays["indptr"][rows.start], arrays["indptr"][rows.stop])
                parts["lengths"].append(arrays["lengths"][rows])
                parts["residual"].append(arrays["residual"][rows])
                parts["token_ids"].append(arrays["token_ids"][pairs])
                parts["codes"].append(arrays["codes" if coded else "probs"][pairs])
                if wide:
                    parts["token_ids_high"].append(arrays["token_ids_high"][pairs])
                start = end
                index += 1
        return _decode({name: _join(part) for name, part in parts.items()}, wide=wide, vocab_size=self.vocab_size)

    def _gather(self, ids: Array) -> SparseDistributions:
        """Rows from all over the store, a shard at a time: each pair is copied from its place to its place."""
        wide = self.vocab_size > 65536
        codes = "codes" if self.codec == "log8" else "probs"
        shard_of = np.searchsorted(self._rows.first_row, ids, side="right") - 1
        groups = [(int(index), np.flatnonzero(shard_of == index)) for index in np.unique(shard_of)]
        lengths, residual = np.zeros(ids.size, np.int64), np.zeros(ids.size, np.float32)
        for index, places in groups:
            arrays, local = self._open_shard(index), ids[places] - self._rows.first_row[index]
            lengths[places], residual[places] = arrays["lengths"][local], arrays["residual"][local]
        starts = np.cumsum(lengths) - lengths
        packed: dict[str, Array] = {"lengths": lengths, "residual": residual}
        for index, places in groups:
            arrays, local, count = self._open_shard(index), ids[places] - self._rows.first_row[index], lengths[places]
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            source = np.repeat(arrays["indptr"][local], count) + within
            target = np.repeat(starts[places], count) + within
            for name in ("token_ids", "token_ids_high", "codes") if wide else ("token_ids", "codes"):
                column = arrays[codes if name == "codes" else name]
                if name not in packed:
                    packed[name] = np.empty(int(lengths.sum()), column.dtype)
                packed[name][target] = column[source]
        return _decode(packed, wide=wide, vocab_size=self.vocab_size)


def _join(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _decode(packed: dict[str, Array], *, wide: bool, vocab_size: int) -> SparseDistributions:
    lengths = packed["lengths"].astype(np.int64)
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    token_ids = packed["token_ids"].astype(np.int32)
    if wide:
        token_ids |= packed["token_ids_high"].astype(np.int32) << 16
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        raise MemdecError(f"A shard of distributions holds ids beyond the vocabulary of {vocab_size}. {REMEDY}")
    codes = packed["codes"]
    probs = _LOG8_TABLE[codes] if codes.dtype == np.uint8 else codes.astype(np.float32)
    residual = packed["residual"].astype(np.float32)
    filled = np.flatnonzero(lengths)
    if filled.size:
        # reduceat would give an empty row its neighbour's value: leave those rows out
        sums = np.add.reduceat(probs, indptr[:-1][filled])
        probs *= np.repeat((1 - residual[filled]) / sums, lengths[filled])
    return SparseDistributions(
        torch.from_numpy(indptr),
        torch.from_numpy(token_ids),
        torch.from_numpy(probs),
        vocab_size,
        torch.from_numpy(residual),
    )


def encode(teacher: SparseDistributions, codec: str) -> dict[str, Array]:
    """Pack distributions into the arrays of one shard, as the module's head describes them.

    Raises:
        ValueError: ids out of order or range, negative or non-finite probabilities, or a row above 1.
    """
    teacher.validate()
    lengths = np.diff(teacher.indptr.cpu().numpy())
    token_ids, probs = teacher.token_ids.cpu().numpy(), teacher.probs.cpu().numpy()
    num_rows = len(lengths)
    row_of = np.repeat(np.arange(num_rows), lengths)
    if codec == "log8":
        with np.errstate(divide="ignore"):
            codes = np.rint(255 * (1 - np.log(probs.astype(np.float64)) / math.log(LOG8_FLOOR)))
        kept = codes >= 0
        packed: Array = np.minimum(codes[kept], 255).astype(np.uint8)
    else:
        half = probs.astype(np.float16)
        kept = half > 0
        packed = half[kept]
    mass = np.bincount(row_of, probs, minlength=num_rows)
    if teacher.residual is None:
        residual = np.clip(1 - mass, 0, 1)
        residual[residual < 1e-6] = 0  # a sum of float32s that missed 1
    else:
        residual = teacher.residual.cpu().numpy().astype(np.float64)
        off = np.abs(mass + residual - 1) > _MASS_TOLERANCE
        off &= lengths > 0
        if off.any():
            row = int(np.flatnonzero(off)[0])
            raise ValueError(
                f"row {row} has mass {mass[row]:.6g} and residual {residual[row]:.6g}, which do not sum to 1"
            )
    if not kept.all():
        cut = ~kept
        residual = np.minimum(1, residual + np.bincount(row_of[cut], probs[cut], minlength=num_rows))
        token_ids, lengths = token_ids[kept], np.bincount(row_of[kept], minlength=num_rows)
    arrays: dict[str, Array] = {
        "lengths": lengths.astype(np.uint16 if lengths.max(initial=0) <= 65535 else np.uint32),
        "residual": residual.astype(np.float32),
        "token_ids": (token_ids & 0xFFFF).astype(np.uint16),
        "codes" if codec == "log8" else "probs": packed,
    }
    if teacher.vocab_size > 65536:
        arrays["token_ids_high"] = (token_ids >> 16).astype(np.uint8)
    return arrays


class DistributionWriter(ShardWriter):
    """Writes teacher distributions in row order, under the folder's lock, and takes up what a killed run has left.

    Args:
        folder: where; made if it is not there.
        num_rows: rows the whole store will have.
        vocab_size: V, up to 2²⁴.
        codec: ``"log8"`` or ``"float16"``.
        fields: the other parameters, JSON; a run with other fields does not continue this one.
        rows_per_shard: None is a sixteenth of the rows, at least 4096 and at most 65536.

    Rows are buffered and written a shard at a time, so that the bytes do not depend on how they were appended.
    Append from ``rows_done`` on, then ``finish``::

        with DistributionWriter(folder, num_rows=n, vocab_size=v, fields=fields) as writer:
            while writer.next_row < n:
                writer.append(part)
            writer.finish({"recall": 0.99})
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_rows: int,
        vocab_size: int,
        codec: str = "log8",
        fields: dict[str, Any],
        rows_per_shard: int | None = None,
    ) -> None:
        if codec not in CODECS:
            raise MemdecError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
        if not 1 <= vocab_size <= 1 << 24:
            raise ValueError(f"vocab_size must be from 1 to 2**24, got {vocab_size}")
        self.vocab_size = vocab_size
        self.codec = codec
        self.rows_per_shard = rows_per_shard or min(65536, max(4096, -(-num_rows // 16)))
        self._waiting: list[SparseDistributions] = []
        own = {"vocab_size": vocab_size, "codec": codec, "rows_per_shard": self.rows_per_shard}
        super().__init__(folder, num_rows=num_rows, format=FORMAT, version=VERSION, fields={**fields, **own})

    def begin(self) -> None:
        self.manifest.results.setdefault("nnz", 0)

    @property
    def next_row(self) -> int:
        """The row that the next ``append`` begins with: those on disk and those that wait for their shard to fill."""
        waiting: int = sum(part.num_rows for part in self._waiting)
        return self.rows_done + waiting

    def append(self, teacher: SparseDistributions) -> None:
        """Add the next rows.

        Raises:
            ValueError: another vocabulary, too many rows, or rows that are no distributions.
            MemdecError: the disk refuses.
        """
        if teacher.vocab_size != self.vocab_size:
            raise ValueError(f"the rows have vocab_size {teacher.vocab_size}, the store {self.vocab_size}")
        if self.next_row + teacher.num_rows > self.num_rows:
            raise ValueError(f"{self.next_row} + {teacher.num_rows} rows are more than the {self.num_rows} announced")
        self._waiting.append(teacher.to("cpu"))
        while self.next_row - self.rows_done >= self.rows_per_shard:
            self._write_shard(self.rows_per_shard)
        if self.next_row == self.num_rows and self._waiting:
            self._write_shard(self.next_row - self.rows_done)

    def _write_shard(self, rows: int) -> None:
        waiting = SparseDistributions.cat(self._waiting)
        shard = waiting if waiting.num_rows == rows else waiting.select(torch.arange(rows))
        arrays = encode(shard, self.codec)
        self._waiting = [waiting.select(torch.arange(rows, waiting.num_rows))] if waiting.num_rows > rows else []
        self.manifest.results["nnz"] += len(arrays["token_ids"])
        self.add_shard(arrays, rows)

    def finish(self, results: dict[str, Any] | None = None) -> DistributionStore:
        """Mark the store complete, with ``results`` added to the manifest's, and open it."""
        self.mark_complete(results)
        return DistributionStore.open(self.folder)
