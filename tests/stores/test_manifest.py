"""The manifest: resuming, refusing, and finding any change of any byte."""

import json
from pathlib import Path

import numpy as np
import pytest

from memdec import MemdecError
from memdec.stores import manifest as manifests
from memdec.stores.manifest import Manifest, to_checked_text
from memdec.stores.tensors import write_tensors
from memdec.stores.verify import verify

FIELDS = {"k": 4, "model": "tiny", "fractions": (0.9, 0.1)}


def make(folder: Path, *, finish: bool = True) -> Manifest:
    manifest = Manifest.start(folder, format="memdec.test", version=1, fields=FIELDS)
    for number in range(2):
        name = f"shard-{number:05d}.safetensors"
        manifest.add(folder, name, write_tensors(folder / name, {"x": np.arange(number, 9)}), rows=9 - number)
    manifest.results["recall"] = 0.5
    if finish:
        manifest.finish(folder)
    return manifest


def test_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path)
    read = Manifest.load(tmp_path, format="memdec.test", version=1)
    assert read == made
    assert read.rows == 17
    assert read.checksum == made.checksum
    assert verify(tmp_path) == []


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name)
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_resuming_takes_up_what_is_listed(tmp_path: Path) -> None:
    make(tmp_path, finish=False)
    (tmp_path / "shard-00002.safetensors").write_bytes(b"written, but not yet listed")
    (tmp_path / ".shard-00003.safetensors.77.tmp").write_bytes(b"half written")
    resumed = Manifest.start(tmp_path, format="memdec.test", version=1, fields=FIELDS)
    resumed.discard_unlisted(tmp_path)
    assert resumed.rows == 17
    assert not resumed.complete
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    with pytest.raises(MemdecError, match="not finished"):
        resumed.check_complete(tmp_path)
    assert any("not finished" in problem for problem in verify(tmp_path))


def test_other_parameters_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MemdecError, match=r"k was 4, now 8; layer was absent, now \"mlp\""):
        Manifest.start(tmp_path, format="memdec.test", version=1, fields={**FIELDS, "k": 8, "layer": "mlp"})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MemdecError, match=r"thesis\.txt"):
        Manifest.start(tmp_path, format="memdec.test", version=1, fields={})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_every_flipped_byte_of_every_file_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
            try:
                problems = verify(tmp_path)
            except MemdecError:
                continue  # the manifest cannot even be read
            assert problems, f"byte {position} of {path.name}"
        path.write_bytes(whole)
    assert verify(tmp_path) == []


def test_truncated_missing_and_stray_files_are_found(tmp_path: Path) -> None:
    made = make(tmp_path)
    first, second = tmp_path / "shard-00000.safetensors", tmp_path / "shard-00001.safetensors"
    first.write_bytes(first.read_bytes()[:-3])
    second.unlink()
    (tmp_path / "shard-00002.safetensors").write_bytes(b"")
    problems = "\n".join(verify(tmp_path))
    assert "shard-00000.safetensors has" in problems
    assert "shard-00001.safetensors is missing" in problems
    assert "shard-00002.safetensors does not belong" in problems
    with pytest.raises(MemdecError, match="truncated"):
        made.check_sizes(tmp_path)


def test_other_formats_versions_and_wrong_folders_are_explained(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(MemdecError, match=r"is a memdec\.test, but a memdec\.corpus was expected"):
        Manifest.load(tmp_path, format="memdec.corpus")
    with pytest.raises(MemdecError, match=r"version 1 of the format memdec\.test; this memdec reads version 2"):
        Manifest.load(tmp_path, format="memdec.test", version=2)
    with pytest.raises(MemdecError, match="does not exist"):
        Manifest.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MemdecError, match=r"holds no manifest\.json"):
        Manifest.load(tmp_path / "empty")
    with pytest.raises(MemdecError, match="no artefact"):
        verify(tmp_path / "empty")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b'{"format": "x"}', b"\xff\xfe", b'{"format":"x","version":1,"checksum":""}']
)
def test_a_corrupt_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(MemdecError, match="damaged"):
        Manifest.load(tmp_path)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    made = make(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["checksum"]
    content["shards"][0]["name"] = "../outside"
    (tmp_path / "manifest.json").write_text(manifests.to_checked_text(content))
    with pytest.raises(MemdecError, match="leaves the folder"):
        Manifest.load(tmp_path)
    assert made.complete


def test_a_folder_of_artefacts_is_verified_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "datastore")
    make(tmp_path / "distributions")
    assert verify(tmp_path) == []
    path = tmp_path / "distributions/shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert verify(tmp_path) == ["distributions/shard-00000.safetensors is damaged: its checksum differs"]


@pytest.mark.parametrize(
    "shard",
    [
        {"name": "a\0b", "bytes": 1, "sha256": "0", "rows": 1},
        {"name": "x" * 300, "bytes": 1, "sha256": "0", "rows": 1},
        {"name": "a", "bytes": 1, "sha256": "0", "rows": -5},
        {"name": "a", "bytes": 1, "sha256": "0", "rows": 1e300},
        {"name": "a", "bytes": 1e999, "sha256": "0", "rows": 1},
    ],
)
def test_a_manifest_signed_anew_with_values_that_cannot_be(tmp_path, shard):
    """Whoever edits it and makes a new checksum gets a message, and no other exception."""
    manifest = Manifest("memdec.corpus", 1, complete=True)
    content = {**manifest._content(), "shards": [shard]}
    if shard["bytes"] == 1e999:
        text = json.dumps({**content, "checksum": ""}).replace("Infinity", "1e999")
    else:
        text = to_checked_text(content)
    (tmp_path / "manifest.json").write_text(text)
    if len(shard["name"]) > 1:  # a name that no file has is a file that is missing
        assert verify(tmp_path) == [f"{shard['name']} is missing"]
    else:
        with pytest.raises(MemdecError, match="is damaged"):
            verify(tmp_path)
