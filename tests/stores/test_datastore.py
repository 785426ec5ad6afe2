"""The datastore: rows come back as they went in, wherever shards end and however often the writer was stopped."""

import pickle
from pathlib import Path

import pytest
import torch

from memdec import MemdecError
from memdec.stores.datastore import Datastore, DatastoreWriter, ValidationRows
from memdec.stores.verify import verify

FIELDS = {"model": "tiny", "layer": "mlp", "context": 8, "stride": None, "vocab_size": 50, "tokenizer_fingerprint": "f"}
STARTS = torch.tensor([0, 4, 4, 9, 24])  # four documents, one of them empty, 24 tokens, 23 rows
ROWS, DIM = 23, 5
SHARDS = [(0, 10), (10, 11), (11, 23)]


def content() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, DIM, generator=generator), torch.randint(0, 50, (ROWS,), generator=generator)


def validation() -> ValidationRows:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(6, DIM, generator=generator).half()
    return ValidationRows(keys, torch.arange(6, dtype=torch.int32), torch.linspace(-3, -1, 6), torch.arange(6))


def write(folder: Path, *, stop_after: int | None = None) -> None:
    keys, values = content()
    with DatastoreWriter(folder, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS) as writer:
        for number, (start, stop) in enumerate(SHARDS):
            if start < writer.rows_done:
                continue
            if number == stop_after:
                raise KeyboardInterrupt
            writer.append(keys[start:stop], values[start:stop])
        if not writer.validation_done:
            writer.write_validation(validation())
        writer.finish({"seconds": 0})


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path)
    store = Datastore.open(tmp_path)
    keys, values = content()
    assert (store.num_rows, store.dim, store.context, store.stride, store.model) == (ROWS, DIM, 8, None, "tiny")
    for start in range(ROWS + 1):
        for stop in range(start, ROWS + 1):
            found = store.keys(start, stop)
            assert found.dtype == torch.float16
            torch.testing.assert_close(found, keys[start:stop].half(), rtol=0, atol=0)
            assert store.values(start, stop).tolist() == values[start:stop].tolist()
    assert store.values(0, 3).dtype == torch.int32
    # The document of a row is that of the token it predicts: tokens 1…3 | 4…8 | 9…23.
    assert store.documents(0, ROWS).tolist() == [0] * 3 + [2] * 5 + [3] * 15
    assert store.documents(7, 9).tolist() == [2, 3]
    bounds = {0: [0, 3], 2: [3, 8], 3: [8, 23]}
    rows = torch.arange(ROWS).flip(0)
    assert store.document_bounds(rows).tolist() == [bounds[d] for d in store.documents(0, ROWS).flip(0).tolist()]
    assert store.shard_bounds == SHARDS
    found, expected = store.validation, validation()
    assert found is not None
    torch.testing.assert_close(found.keys, expected.keys)
    torch.testing.assert_close(found.base_log_prob, expected.base_log_prob)
    assert verify(tmp_path) == []
    copy = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(copy.keys(3, 13), keys[3:13].half())
    for start, stop in [(-1, 2), (3, 2), (0, ROWS + 1)]:
        with pytest.raises(IndexError, match="not within"):
            store.keys(start, stop)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path, stop_after: int) -> None:
    write(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", stop_after=stop_after)
    with pytest.raises(MemdecError, match="not finished"):
        Datastore.open(tmp_path / "stopped")
    write(tmp_path / "stopped")
    for path in (tmp_path / "undisturbed").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    assert len(list((tmp_path / "stopped").iterdir())) == len(list((tmp_path / "undisturbed").iterdir()))
    write(tmp_path / "stopped")  # a finished one is left as it is


def test_resuming_over_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_after=2)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MemdecError, match=r"shard-00001\.safetensors has .* truncated"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "NaN or infinite hidden states at row 12 "),
        (float("-inf"), "NaN or infinite hidden states at row 12 "),
        (65520.0, "key of row 12 has the value 6.552e.04, .*--layer"),
    ],
)
def test_keys_that_float16_cannot_hold_are_named(tmp_path: Path, value: float, message: str) -> None:
    keys, values = content()
    keys[12, 3] = value
    with DatastoreWriter(tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS) as writer:
        writer.append(keys[:10], values[:10])
        with pytest.raises(MemdecError, match=message):
            writer.append(keys[10:], values[10:])
        assert writer.rows_done == 10
    keys[12, 3] = -65504.0  # float16's largest is fine
    with DatastoreWriter(tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS) as writer:
        writer.append(keys[10:], values[10:])
        assert float(writer.finish().keys(12, 13)[0, 3]) == -65504.0


def test_a_datastore_is_not_a_corpus_and_misfits_are_refused(tmp_path: Path) -> None:
    keys, values = content()
    with DatastoreWriter(tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS) as writer:
        with pytest.raises(ValueError, match="are not"):
            writer.append(keys[:, :4], values)
        with pytest.raises(ValueError, match="more than"):
            writer.append(torch.cat([keys, keys]), torch.cat([values, values]))
        with pytest.raises(ValueError, match="0 rows were written"):
            writer.finish()
        with (
            pytest.raises(MemdecError, match="being written"),
            DatastoreWriter(tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS),
        ):
            pass
    # What has no rows yet is begun anew with other parameters; what has some is not.
    with DatastoreWriter(
        tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields={**FIELDS, "context": 16}
    ) as writer:
        writer.append(keys[:1], values[:1])
    with (
        pytest.raises(MemdecError, match="context was 16, now 8"),
        DatastoreWriter(tmp_path, num_rows=ROWS, dim=DIM, document_starts=STARTS, fields=FIELDS),
    ):
        pass
