"""Files whole or not at all; one writer a folder; the system's refusals as one message."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memdec import MemdecError
from memdec.stores import atomic


def test_written_file_has_the_size_and_checksum_returned(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10
    written = atomic.write_file(tmp_path / "a.bin", content)
    assert (tmp_path / "a.bin").read_bytes() == content
    assert written == atomic.WrittenFile(2560, hashlib.sha256(content).hexdigest())
    streamed = atomic.write_file(tmp_path / "b.bin", lambda file: [file.write(content[:7]), file.write(content[7:])])
    assert streamed == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic.write_file(path, b"old")

    def fail(file: object) -> None:
        file.write(b"half of the new")  # type: ignore[attr-defined]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        atomic.write_file(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "No space left"),
        (errno.EROFS, "may write to"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "disk failed"),
    ],
)
def test_refusals_become_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    path = tmp_path / "a.bin"
    atomic.write_file(path, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(MemdecError, match=message) as caught:
        atomic.write_file(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic.write_file(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(MemdecError, match="largest file"):
            atomic.write_file(path, b"x" * 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MemdecError, match="a file stands where a folder is needed"):
        atomic.make_folder(tmp_path / "file" / "inner")
    with pytest.raises(MemdecError, match="folder does not exist"):
        atomic.write_file(tmp_path / "none" / "a.bin", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MemdecError, match="may write to"):
            atomic.write_file(tmp_path / "a.bin", b"new")
        with pytest.raises(MemdecError, match="may write to"):
            atomic.make_folder(tmp_path / "inner")
    finally:
        tmp_path.chmod(0o700)


HOLDER = """
import sys, time
from memdec.stores.atomic import folder_lock
with folder_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(MemdecError, match="is being written by another process") as caught,
            atomic.folder_lock(tmp_path),
        ):
            pass
        if Path("/proc/locks").exists():
            assert f"(id {holder.pid})" in str(caught.value)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with atomic.folder_lock(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with (
        atomic.folder_lock(tmp_path),
        pytest.raises(MemdecError, match="being written by"),
        atomic.folder_lock(tmp_path),
    ):
        pass
    with atomic.folder_lock(tmp_path):
        pass


ORPHAN = """
import os, sys, time
from memdec.stores.atomic import folder_lock
with folder_lock(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        time.sleep(0.05)
        os.kill(child, 0)  # the orphan lives
        with atomic.folder_lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.123.tmp").write_bytes(b"half")
    (tmp_path / "a.bin").write_bytes(b"whole")
    atomic.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
