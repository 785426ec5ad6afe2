"""Files that are there whole or not at all, and folders that one process writes at a time.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so that a process killed
at any moment, or a disk that fills up, leaves either the old file or the new one. A folder is locked by ``flock`` on
the folder itself: the lock leaves nothing behind, and the kernel drops it when the process dies, however it dies.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from memdec.errors import MemdecError

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing there keeps two processes apart, and all else works
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_held_locks: set[int] = set()


def _forget_locks_in_child() -> None:
    # A forked worker (a DataLoader's, say) shares the parent's open lock: were the parent killed, the orphan would
    # keep the folder locked for as long as it lives. Closing the child's copy does not release the parent's lock.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks_in_child)


@dataclass(frozen=True)
class WrittenFile:
    """What was written: the number of ``bytes`` and the ``sha256`` of the content, in hex."""

    bytes: int
    sha256: str


class _HashingFile:
    """A binary file open for writing that keeps the count and the checksum of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self._sha256.update(data)
        count = data.nbytes if isinstance(data, memoryview) else len(data)
        self._bytes += count
        return count

    def written(self) -> WrittenFile:
        return WrittenFile(self._bytes, self._sha256.hexdigest())


def write_file(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> WrittenFile:
    """Put ``content`` at ``path``, whole or not at all.

    Args:
        path: where the file goes; its folder must exist.
        content: the bytes, or a function that writes them to the binary file it is given (only ``write`` is offered).

    Returns:
        The size and the checksum of the file, from the bytes as they were handed to the system.

    Raises:
        MemdecError: the disk is full or the folder cannot be written; what was at ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                sink = _HashingFile(file)
                if callable(content):
                    content(cast(BinaryIO, sink))
                else:
                    sink.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("could not remove %s: %s", temporary, error)
        raise
    return sink.written()


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries, so that a rename in it outlives a power cut. Does nothing where folders cannot be
    opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        logger.debug("could not flush folder %s: %s", folder, error)
    finally:
        os.close(descriptor)


def make_folder(folder: str | Path) -> Path:
    """Create ``folder`` and its parents if they are not there.

    Raises:
        MemdecError: it cannot be made, or a file has its name.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed ``write_file`` left directly in ``folder``. Call it under the
    folder's lock."""
    with writing(folder):
        for path in Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's refusals while writing ``path`` (disk full, read-only, no permission) into a
    ``MemdecError``."""
    try:
        yield
    except OSError as error:
        message = _explain(Path(path), error)
        if message is None:
            raise
        raise MemdecError(message) from error


def _explain(path: Path, error: OSError) -> str | None:
    keeps = "What was there before is untouched"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left on the disk (or in the quota) for {path}. {keeps}; free some, then run the same command."
    if error.errno == errno.EFBIG:
        return (
            f"{path} grew beyond the largest file that this file system or `ulimit -f` allows. {keeps}; "
            "raise the limit or choose another folder, and run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"Cannot write {path}: {error.strerror}. {keeps}; choose a folder that you may write to."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"Cannot make {path}: a file stands where a folder is needed. {keeps}; choose another folder."
    if error.errno == errno.EISDIR:
        return f"Cannot write {path}: it is a folder, and a file was wanted. Choose another name."
    if error.errno == errno.ENOENT:
        return f"Cannot write {path}: its folder does not exist or was removed meanwhile. Check the path."
    if error.errno == errno.ENAMETOOLONG:
        return f"Cannot write {path}: the name is too long for this file system. Choose a shorter one."
    if error.errno == errno.EIO:
        return f"The disk failed while {path} was written ({error.strerror}). {keeps}; check the disk."
    return None


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold ``folder`` (made if it is not there) against every other writer until the block ends or the process dies.

    Raises:
        MemdecError: another process, named by its id where the system tells it, or another writer of this process
            has it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, folder_lock(folder):
    ...     pass
    """
    folder = make_folder(folder)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held_locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # A few network file systems have no locks; refusing to write there would help nobody.
                logger.warning(
                    "%s cannot be locked (%s); make sure that no second process writes it", folder, error.strerror
                )
            else:
                raise MemdecError(
                    f"{folder} is being written by {_lock_owner(descriptor)}. "
                    "Wait for it to end, or choose another folder."
                ) from None
        yield
    finally:
        if descriptor in _held_locks:  # not in a forked child that left the block: it has closed its copy already
            _held_locks.discard(descriptor)
            os.close(descriptor)


def _lock_owner(descriptor: int) -> str:
    inode = os.fstat(descriptor).st_ino
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "->" not in fields and fields[1] == "FLOCK" and fields[5].rsplit(":", 1)[-1] == str(inode):
                owner = int(fields[4])
                if owner == os.getpid():
                    return f"this process already (id {owner})"
                if owner > 0:
                    return f"another process (id {owner})"
    except (OSError, ValueError, IndexError):
        pass
    return "another process"
