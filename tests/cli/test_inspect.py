"""memdec info and memdec verify on artefacts made by hand."""

from __future__ import annotations

import hashlib
import json

import pytest

from memdec.cli import main
from memdec.stores.manifest import Manifest, Shard
from memdec.stores.memory import MemoryCard, write_memory_card


@pytest.fixture
def run_dir(tmp_path):
    """A folder with a finished corpus, a datastore that was stopped, and a memory; empty of real data."""
    corpus = Manifest.start(tmp_path / "corpus", format="memdec.corpus", version=1, fields={"seed": 7})
    path = tmp_path / "corpus" / "train.safetensors"
    path.write_bytes(b"0" * 1234)
    corpus.shards.append(Shard(path.name, 1234, hashlib.sha256(path.read_bytes()).hexdigest()))
    corpus.results["documents"] = {"train": 3}
    corpus.finish(tmp_path / "corpus")
    Manifest.start(tmp_path / "datastore", format="memdec.datastore", version=1, fields={"context": 512}).save(
        tmp_path / "datastore"
    )
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "model.safetensors").write_bytes(b"1" * 99)
    write_memory_card(tmp_path / "memory", MemoryCard(0.45, "f" * 64, 384, {"base": "tiny"}))
    return tmp_path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code or 0


def test_info_tells_of_every_part(run_dir, capsys):
    assert call("info", str(run_dir)) == 0
    text = capsys.readouterr().out
    assert "memdec.corpus" in text and "memdec.datastore" in text and "memdec.memory" in text
    assert "not finished" in text and "0.45" in text and "512" in text


def test_info_as_json_is_the_whole_truth(run_dir, capsys):
    assert call("info", str(run_dir / "corpus"), "--json") == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["complete"] is True and facts["parameters"] == {"seed": 7}
    assert facts["bytes"] == sum(p.stat().st_size for p in (run_dir / "corpus").iterdir())
    assert call("info", str(run_dir / "memory"), "--json") == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["results"]["alpha"] == 0.45 and facts["provenance"] == {"base": "tiny"}


def test_info_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert call("info", str(tmp_path)) == 1
    assert "holds nothing of memdec" in capsys.readouterr().err
    assert call("info", str(tmp_path / "file")) == 1
    assert "is a file" in capsys.readouterr().err


def test_verify_finds_a_flipped_byte(run_dir, capsys):
    assert call("verify", str(run_dir / "corpus")) == 0
    assert "whole" in capsys.readouterr().out
    assert call("verify", str(run_dir / "memory")) == 0
    path = run_dir / "memory" / "model.safetensors"
    path.write_bytes(b"1" * 50 + b"2" + b"1" * 48)
    assert call("verify", str(run_dir / "memory")) == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert call("verify", str(run_dir)) == 1  # the memory's problem is found from the folder above, too
    error = capsys.readouterr().err
    assert "memory/model.safetensors" in error and "Traceback" not in error
