"""Artefacts of rows that are written shard by shard: what a datastore and a distribution store have in common.

A shard is ``shard-00000.safetensors`` and so on; it is listed in the manifest once it stands whole under that name, so
what follows a killed run finds in ``rows_done`` where to go on.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from memdec.stores.atomic import folder_lock
from memdec.stores.manifest import Manifest, Shard
from memdec.stores.tensors import Array, write_tensors

PREFIX = "shard-"
Writer = TypeVar("Writer", bound="ShardWriter")


class RowShards:
    """Which shard of an artefact holds which rows.

    Attributes:
        shards: the manifest's entries, in row order.
        first_row: int64 (shards + 1,), the first row of each, and the number of rows.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.shards: list[Shard] = [shard for shard in manifest.shards if shard.name.startswith(PREFIX)]
        self.first_row: Array = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)])

    @property
    def num_rows(self) -> int:
        return int(self.first_row[-1])

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each shard."""
        bounds: list[int] = self.first_row.tolist()
        return list(itertools.pairwise(bounds))


class ShardWriter:
    """Writes an artefact shard by shard, under the folder's lock, and takes up one that a killed run has left.

    Args:
        folder: where; made if it is not there.
        num_rows: rows that the whole artefact will have.
        format: the artefact's format.
        version: the format's version.
        fields: the parameters, JSON; a run with other fields does not continue this one.
    """

    def __init__(self, folder: str | Path, *, num_rows: int, format: str, version: int, fields: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.num_rows = num_rows
        with ExitStack() as stack:  # lets go of the lock if the folder is refused
            stack.enter_context(folder_lock(self.folder))
            fields = {**fields, "num_rows": num_rows}
            self.manifest = Manifest.start(self.folder, format=format, version=version, fields=fields)
            if not self.complete:
                self.manifest.check_sizes(self.folder)
                self.manifest.discard_unlisted(self.folder)
                self.begin()
            self._stack = stack.pop_all()

    def begin(self) -> None:
        """Called once the folder is this run's to write, and not yet complete: for what stands beside the shards."""

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder's lock; rows that wait for their shard to fill are dropped."""
        self._stack.close()

    @property
    def complete(self) -> bool:
        return self.manifest.complete

    @property
    def rows_done(self) -> int:
        """Rows that stand on the disk."""
        return self.manifest.rows

    def has(self, name: str) -> bool:
        """Whether the file ``name`` stands whole."""
        return any(shard.name == name for shard in self.manifest.shards)

    def add_file(self, name: str, arrays: dict[str, Array]) -> None:
        """Write a file that is not cut by rows."""
        self.manifest.add(self.folder, name, write_tensors(self.folder / name, arrays))

    def add_shard(self, arrays: dict[str, Array], rows: int) -> None:
        """Write the next ``rows`` rows."""
        number = sum(shard.name.startswith(PREFIX) for shard in self.manifest.shards)
        name = f"{PREFIX}{number:05d}.safetensors"
        self.manifest.add(self.folder, name, write_tensors(self.folder / name, arrays), rows=rows)

    def mark_complete(self, results: dict[str, Any] | None) -> None:
        """Mark the artefact complete, with ``results`` added to the manifest's."""
        if self.rows_done != self.num_rows:
            raise ValueError(f"{self.rows_done} rows were written instead of {self.num_rows}")
        if not self.complete:
            self.manifest.results.update(results or {})
            self.manifest.finish(self.folder)
