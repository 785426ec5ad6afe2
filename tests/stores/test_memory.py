"""The memory's card: what it says, and that a changed byte of weights or card is found."""

import contextlib
import json
from pathlib import Path

import pytest

from memdec import MemdecError
from memdec.stores.manifest import to_checked_text
from memdec.stores.memory import MemoryCard, is_memory, read_memory_card, write_memory_card, write_model_card
from memdec.stores.verify import verify

CARD = MemoryCard(0.6, "abc", 384, {"base": "tiny", "datastore": "123"})


def make(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(200))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_model_card(folder, CARD, title="Memory of leases", figures={"perplexity": 7.25})
    write_memory_card(folder, CARD)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    folder = make(tmp_path / "memory")
    assert is_memory(folder)
    assert read_memory_card(folder) == CARD
    assert verify(folder) == []
    text = (folder / "README.md").read_text()
    assert "α = 0.6" in text
    assert "| perplexity | 7.25 |" in text
    (folder / ".gitattributes").write_text("a hub download brings this")
    assert verify(folder) == []


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "memory")
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x20]) + whole[position + 1 :])
            with contextlib.suppress(MemdecError):  # the card cannot even be read
                assert verify(folder), f"byte {position} of {path.name}"
        path.write_bytes(whole)
    (folder / "model.safetensors").unlink()
    assert verify(folder.parent) == ["memory/model.safetensors is missing"]


def test_a_plain_model_is_no_memory(tmp_path: Path) -> None:
    with pytest.raises(MemdecError, match=r"holds no memory_config\.json"):
        read_memory_card(tmp_path)
    with pytest.raises(MemdecError, match="alpha"):
        write_memory_card(tmp_path, MemoryCard(1.5, "abc", 3))


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": "x"}, {"alpha": 7}, {"vocab_size": "q"}, {"provenance": []}, {"files": "x"}, {"files": {"a": 5}},
     {"files": {"../../x": {"bytes": 1, "sha256": ""}}}],
)  # fmt: skip
def test_a_card_signed_anew_with_values_that_cannot_be(tmp_path: Path, wrong: dict) -> None:
    folder = make(tmp_path / "memory")
    content = json.loads((folder / "memory_config.json").read_text())
    del content["checksum"]
    (folder / "memory_config.json").write_text(to_checked_text({**content, **wrong}))
    for read in (read_memory_card, verify):
        with pytest.raises(MemdecError, match="damaged"):
            read(folder)
