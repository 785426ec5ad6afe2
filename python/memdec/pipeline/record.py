"""What a run was asked for, kept beside what it makes, so that a second run with other parameters is refused.

A manifest lists the shards of an artefact; a record is for folders that are no artefact themselves: the one that a
training works in, and the one that ``fit`` fills.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError
from memdec.stores.atomic import write_file
from memdec.stores.manifest import difference, read_checked_text, to_checked_text

VERSION = 1


def _others(path: Path) -> list[Path]:
    """What stands beside the record but hidden files: what its run has made."""
    return [other for other in path.parent.iterdir() if other != path and not other.name.startswith(".")]


@dataclass
class Record:
    """A small checked JSON file.

    Attributes:
        path: the file.
        format: what it tells of, such as ``"memdec.training"``.
        fields: the parameters; a re-run continues only where these are the same.
        results: what the run found out.
        complete: whether the run ended.
        fresh: whether this process made it; False where an earlier run did.
    """

    path: Path
    format: str
    fields: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    fresh: bool = True

    @classmethod
    def start(cls, path: Path, format: str, fields: dict[str, Any]) -> Record:
        """The record at `path`, made if there is none; its folder must exist and be locked.

        Raises:
            MemdecError: a run with other parameters made it (the message says which), or it is damaged.
        """
        fields = json.loads(json.dumps(fields, allow_nan=False))
        if not path.exists():
            record = cls(path, format, fields)
            record.save()
            return record
        record = cls.read(path, format)
        changed = difference(record.fields, fields)
        if changed and not record.complete and not _others(path):
            # A first try that came to nothing must not stand in the way of the corrected one.
            record = cls(path, format, fields)
            record.save()
            return record
        if changed:
            raise MemdecError(
                f"{path.parent} was made with other parameters: {changed}. Use the same parameters to continue it, "
                "choose another folder, or delete this one."
            )
        return record

    @classmethod
    def read(cls, path: Path, format: str) -> Record:
        """The record at `path`.

        Raises:
            MemdecError: there is none, it is damaged, or it is of another format or version.
        """
        content = read_checked_text(path, format=format, version=VERSION)
        return cls(path, format, content["fields"], content["results"], bool(content["complete"]), fresh=False)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "format": self.format,
            "version": VERSION,
            "fields": self.fields,
            "results": self.results,
            "complete": self.complete,
        }
        write_file(self.path, to_checked_text(content).encode())

    def finish(self, results: dict[str, Any]) -> None:
        """Mark the run ended, with `results`."""
        self.results = results
        self.complete = True
        self.save()
