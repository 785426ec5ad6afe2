"""The manifest: what an artefact is, how it was made, and which files, with which checksums, are in its folder.

Every artefact of memdec (corpus, datastore, distributions, …) is a folder with a ``manifest.json`` beside its
shards. The manifest is written first, with ``complete`` false and the parameters; a shard is listed once it stands
whole under its final name; ``complete`` turns true at the end. A killed stage therefore finds in it what is done.
Nothing in it depends on the day, the machine or the path, so that the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from memdec.errors import MemdecError
from memdec.stores.atomic import WrittenFile, make_folder, remove_leftovers, write_file, writing

MANIFEST_NAME = "manifest.json"

LARGEST = 2**63  # of numbers that count bytes and rows
REMEDY = "Delete the folder and run the command that made it again."


@dataclass(frozen=True)
class Shard:
    """One file of an artefact: its ``name`` relative to the folder, its size in ``bytes``, its ``sha256`` in hex,
    and the number of ``rows`` it holds (0 for a file that is not cut by rows)."""

    name: str
    bytes: int
    sha256: str
    rows: int = 0


@dataclass
class Manifest:
    """An artefact's ``manifest.json``.

    Attributes:
        format: what the artefact is, such as ``"memdec.datastore"``.
        version: the version of that format.
        fields: the parameters the artefact was made with; a re-run continues only where these are the same.
        results: what making it found out: counts, recall, the temperature chosen. Not compared on a re-run.
        shards: the files, in row order.
        complete: false until the last file stands.
    """

    format: str
    version: int
    fields: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @property
    def checksum(self) -> str:
        """The artefact's identity: sha256 over the manifest's content, and through the shards' checksums over all of
        it."""
        return hashlib.sha256(_canonical(self._content()).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """The number of rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    def _content(self) -> dict[str, Any]:
        shards = [{"name": s.name, "bytes": s.bytes, "sha256": s.sha256, "rows": s.rows} for s in self.shards]
        return {
            "format": self.format,
            "version": self.version,
            "fields": self.fields,
            "results": self.results,
            "shards": shards,
            "complete": self.complete,
        }

    def to_text(self) -> str:
        """The very text of ``manifest.json``: JSON with sorted keys, and ``checksum`` over all the rest of it."""
        return to_checked_text(self._content())

    @classmethod
    def load(cls, folder: str | Path, *, format: str | None = None, version: int | None = None) -> Manifest:
        """Read the manifest of ``folder``.

        Args:
            folder: the artefact.
            format: the format that is wanted; None takes any.
            version: the version that is wanted; None takes any.

        Raises:
            MemdecError: there is no manifest, it is damaged, or it is of another format or version.
        """
        path = Path(folder) / MANIFEST_NAME
        content = read_checked_text(path, format=format, version=version)
        try:
            shards = [
                Shard(str(s["name"]), int(s["bytes"]), str(s["sha256"]), int(s["rows"])) for s in content["shards"]
            ]
            for shard in shards:
                if not (0 <= shard.bytes < LARGEST and 0 <= shard.rows < LARGEST):
                    raise ValueError(f"{shard.name!r} has {shard.rows} rows in {shard.bytes} bytes")
                if leaves_folder(shard.name):
                    raise ValueError(f"shard name {shard.name!r} leaves the folder")
            if len({shard.name for shard in shards}) < len(shards):
                raise ValueError("a shard is listed twice")
            fields, results, complete = content["fields"], content["results"], content["complete"]
            if not isinstance(fields, dict) or not isinstance(results, dict) or not isinstance(complete, bool):
                raise TypeError("fields and results must be objects, complete a boolean")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MemdecError(f"{path} is damaged ({error!r}). {REMEDY}") from None
        return cls(content["format"], content["version"], fields, results, shards, complete)

    def save(self, folder: str | Path) -> None:
        """Write ``manifest.json`` into ``folder``, whole or not at all."""
        write_file(Path(folder) / MANIFEST_NAME, self.to_text().encode())

    @classmethod
    def start(cls, folder: str | Path, *, format: str, version: int, fields: dict[str, Any]) -> Manifest:
        """Begin an artefact in ``folder``, or take up the one that a run with the same ``fields`` has left there.

        Call it under the folder's lock. The caller looks at ``shards`` and ``complete`` for what is done already. What
        was begun with other ``fields`` but has no rows yet is begun anew.

        Raises:
            MemdecError: the folder holds an artefact made with other parameters (the message says which), or other
                files.
        """
        folder = make_folder(folder)
        fields = json.loads(json.dumps(fields, allow_nan=False))
        remove_leftovers(folder)
        if (folder / MANIFEST_NAME).exists():
            manifest = cls.load(folder, format=format, version=version)
            changed = difference(manifest.fields, fields)
            if changed and not manifest.complete and manifest.rows == 0:
                # A first try that came to nothing must not stand in the way of the corrected one.
                return cls._begin(folder, format, version, fields)
            if changed:
                raise MemdecError(
                    f"{folder} was made with other parameters: {changed}. "
                    "Use the same parameters to continue it, choose another folder, or delete this one and what was "
                    "made from it."
                )
            return manifest
        strangers = sorted(entry.name for entry in os.scandir(folder))
        if strangers:
            shown = ", ".join(strangers[:5]) + (", …" if len(strangers) > 5 else "")
            raise MemdecError(
                f"{folder} holds files but no {MANIFEST_NAME} ({shown}), "
                "so it is not an artefact of memdec. Choose another folder."
            )
        return cls._begin(folder, format, version, fields)

    @classmethod
    def _begin(cls, folder: Path, format: str, version: int, fields: dict[str, Any]) -> Manifest:
        manifest = cls(format, version, fields)
        manifest.discard_unlisted(folder)
        manifest.save(folder)
        return manifest

    def add(self, folder: str | Path, name: str, written: WrittenFile, rows: int = 0) -> None:
        """List the file ``name``, which stands whole in ``folder`` and is described by ``written``, and save the
        manifest."""
        self.shards.append(Shard(name, written.bytes, written.sha256, rows))
        self.save(folder)

    def finish(self, folder: str | Path) -> None:
        """Mark the artefact complete."""
        self.complete = True
        self.save(folder)

    def discard_unlisted(self, folder: str | Path) -> None:
        """Delete the safetensors files that were written but not yet listed when a run was killed; they are made
        again."""
        listed = {shard.name for shard in self.shards}
        with writing(folder):
            for path in sorted(Path(folder).glob("*.safetensors")):
                if path.name not in listed:
                    path.unlink()

    @classmethod
    def load_whole(cls, folder: str | Path, *, format: str, version: int) -> Manifest:
        """Read the manifest of an artefact that is to be read: finished, and every shard there in its size.

        Raises:
            MemdecError: as ``load``, ``check_complete`` and ``check_sizes``.
        """
        manifest = cls.load(folder, format=format, version=version)
        manifest.check_complete(folder)
        manifest.check_sizes(folder)
        return manifest

    def check_complete(self, folder: str | Path) -> None:
        """Raise ``MemdecError`` if the artefact was not finished."""
        if not self.complete:
            raise MemdecError(
                f"{folder} is not finished: run the command that makes it again, it continues where it stopped."
            )

    def check_sizes(self, folder: str | Path) -> None:
        """The cheap check made at every opening: each shard is there and has its size.

        Raises:
            MemdecError: a shard is missing or truncated.
        """
        for shard in self.shards:
            problem = _size_problem(Path(folder), shard)
            if problem is not None:
                raise MemdecError(f"{Path(folder) / problem}. Restore the file, or: {REMEDY[0].lower()}{REMEDY[1:]}")


def verify(folder: str | Path) -> list[str]:
    """Read every byte of the artefact in ``folder`` and compare it with the manifest.

    Returns:
        The problems, one line each, relative to the folder; empty when the artefact is whole. Found are: a changed,
        truncated, missing or extra file, a changed byte of the manifest itself, and an artefact that was not finished.

    Raises:
        MemdecError: there is no manifest, or it cannot be read as one.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    problems = []
    if (folder / MANIFEST_NAME).read_bytes() != manifest.to_text().encode():
        problems.append(f"{MANIFEST_NAME} has been changed since it was written")
    if not manifest.complete:
        problems.append(f"{MANIFEST_NAME} says that the artefact is not finished; run the command that makes it again")
    problems += check_files(folder, manifest.shards, own_name=MANIFEST_NAME)
    return problems


def check_files(folder: Path, shards: list[Shard], *, own_name: str) -> list[str]:
    """The problems of the listed files of ``folder``, and the files there that are neither listed nor ``own_name``."""
    problems = []
    for shard in shards:
        problem = _size_problem(folder, shard)
        if problem is None and file_sha256(folder / shard.name) != shard.sha256:
            problem = f"{shard.name} is damaged: its checksum differs"
        if problem is not None:
            problems.append(problem)
    known = {shard.name for shard in shards} | {own_name}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known:
            problems.append(f"{name} does not belong to the artefact")
    return problems


def list_files(folder: str | Path, *, except_names: tuple[str, ...] = ()) -> list[Shard]:
    """Every file under ``folder``, sorted, with its size and checksum."""
    folder = Path(folder)
    shards = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in except_names:
            shards.append(Shard(name, path.stat().st_size, file_sha256(path)))
    return sorted(shards, key=lambda shard: shard.name)


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def leaves_folder(name: str) -> bool:
    """Whether a listed file's name leads out of the folder that lists it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _size_problem(folder: Path, shard: Shard) -> str | None:
    try:
        size = (folder / shard.name).stat().st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return f"{shard.name} is missing"
    if size != shard.bytes:
        return f"{shard.name} has {size} bytes instead of {shard.bytes}: it is truncated or another file"
    return None


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def to_checked_text(content: dict[str, Any]) -> str:
    """``content`` as indented JSON with sorted keys and a ``checksum``: sha256 over the compact form of all the
    rest."""
    checksum = hashlib.sha256(_canonical(content).encode()).hexdigest()
    return (
        json.dumps({**content, "checksum": checksum}, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
        + "\n"
    )


def read_checked_text(path: Path, *, format: str | None, version: int | None) -> dict[str, Any]:
    """Read what ``to_checked_text`` wrote, without its ``checksum``.

    Raises:
        MemdecError: the file is missing, damaged, or of another format or version.
    """
    folder = path.parent
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not folder.exists() else f"holds no {path.name}"
        wanted = f"{_article(format)} folder" if format else "an artefact of memdec"
        raise MemdecError(f"{folder} {what}: {wanted} was expected. Check the path.") from None
    except OSError as error:
        raise MemdecError(f"Cannot read {path}: {error.strerror}.") from None
    try:
        content = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        found_format, found_version, checksum = str(content["format"]), content["version"], content.pop("checksum")
    except (ValueError, KeyError, RecursionError) as error:
        raise MemdecError(f"{path} is damaged ({error}). {REMEDY}") from None
    if format is not None and found_format != format:
        raise MemdecError(f"{folder} is {_article(found_format)}, but {_article(format)} was expected. Check the path.")
    if version is not None and found_version != version:
        raise MemdecError(
            f"{folder} has version {found_version} of the format {found_format}; this memdec reads version {version}. "
            "Use the memdec that made it, or delete the folder and make it again."
        )
    if checksum != hashlib.sha256(_canonical(content).encode()).hexdigest():
        raise MemdecError(
            f"{path} is damaged: its own checksum differs. Files of memdec cannot be edited by hand. {REMEDY}"
        )
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:20]}, which no float holds")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def _article(format: str) -> str:
    return f"a {format}" if format[:1] not in "aeiou" else f"an {format}"


# Parameters that say nothing to a person, and what it means that they differ.
CHANGES = {"source_sha256": "the text has been changed since"}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which parameters differ, for a message; empty where none does."""
    missing = object()
    parts = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, missing), new.get(name, missing)
        if before != now:
            shown = ["absent" if value is missing else _shorten(json.dumps(value)) for value in (before, now)]
            parts.append(CHANGES.get(name) or f"{name} was {shown[0]}, now {shown[1]}")
    return "; ".join(parts)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
