"""The distribution store: what comes back is what went in up to the codec's stated error, at the stated size."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import MemdecError
from memdec.distributions import SparseDistributions
from memdec.stores.distribution_store import DistributionStore, DistributionWriter
from memdec.stores.verify import verify


def teacher_rows(num_rows: int, vocab_size: int, seed: int, *, mean_length: int = 40) -> SparseDistributions:
    """Rows with the long-tailed probabilities that neighbours give, all above both codecs' floors; some
    rows are empty, some have one token, some have lost mass to a cut."""
    draw = np.random.default_rng(seed)
    ids, probs, indptr, residual = [], [], [0], []
    for _ in range(num_rows):
        length = int(min(vocab_size, draw.choice([0, 1, draw.integers(2, 2 * mean_length)], p=[0.05, 0.1, 0.85])))
        weight = np.exp(-np.minimum(draw.exponential(3.0, length), 7))
        mass = float(min(1.0, draw.uniform(0.5, 1.5))) if length else 0.0
        ids.append(np.sort(draw.choice(vocab_size, length, replace=False)))
        probs.append(weight / max(weight.sum(), 1e-30) * mass)
        residual.append(1 - mass)
        indptr.append(indptr[-1] + length)
    return SparseDistributions(
        torch.tensor(indptr),
        torch.from_numpy(np.concatenate(ids).astype(np.int32)),
        torch.from_numpy(np.concatenate(probs).astype(np.float32)),
        vocab_size,
        torch.tensor(residual, dtype=torch.float32),
    )


def write(folder: Path, teacher: SparseDistributions, *, step: int = 100, **options: object) -> DistributionStore:
    settings = {"fields": {"k": 4}, **options}
    with DistributionWriter(
        folder,
        num_rows=teacher.num_rows,
        vocab_size=teacher.vocab_size,
        **settings,  # type: ignore[arg-type]
    ) as writer:
        while writer.next_row < teacher.num_rows:
            stop = min(writer.next_row + step, teacher.num_rows)
            writer.append(teacher.select(torch.arange(writer.next_row, stop)))
        return writer.finish({"recall": 1.0})


def assert_close(found: SparseDistributions, expected: SparseDistributions, relative: float) -> None:
    assert found.vocab_size == expected.vocab_size
    assert torch.equal(found.indptr, expected.indptr)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.probs, expected.probs, rtol=relative, atol=0)
    assert found.residual is not None
    assert expected.residual is not None
    torch.testing.assert_close(found.residual, expected.residual, rtol=0, atol=0)
    found.validate()
    filled = found.row_lengths() > 0
    torch.testing.assert_close(found.mass()[filled], (1 - found.residual)[filled], rtol=1e-5, atol=1e-6)


# log8: half a step of the logarithm is 2.75%; rescaling the row can add as much again in the worst case. float16:
# 2⁻²⁵ of absolute error in a probability of 1e-5.
@pytest.mark.parametrize(("codec", "relative"), [("log8", 0.056), ("float16", 5e-3)])
@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 262144])
def test_round_trip(tmp_path: Path, codec: str, relative: float, vocab_size: int) -> None:
    teacher = teacher_rows(700, vocab_size, seed=vocab_size)
    store = write(tmp_path, teacher, codec=codec, rows_per_shard=256)
    assert store.num_rows == 700
    assert store.nnz == teacher.nnz
    assert store.codec == codec
    assert [shard.rows for shard in store.manifest.shards] == [256, 256, 188]
    assert_close(store.slice(0, 700), teacher, relative)
    assert verify(tmp_path) == []
    some = torch.tensor([699, 0, 1, 2, 255, 256, 257, 5, 5, 4, 600])
    for one in (store, pickle.loads(pickle.dumps(store))):
        assert_close(one.rows(some), teacher.select(some), relative)
    shuffled = torch.randint(0, 700, (300,), generator=torch.Generator().manual_seed(0))
    assert_close(store.rows(shuffled), teacher.select(shuffled), relative)
    assert store.rows(torch.zeros(0, dtype=torch.int64)).num_rows == 0
    assert store.slice(300, 300).num_rows == 0
    with pytest.raises(IndexError):
        store.rows(torch.tensor([700]))
    with pytest.raises(IndexError):
        store.slice(0, 701)


def test_the_kl_error_of_log8_is_as_stated(tmp_path: Path) -> None:
    teacher = teacher_rows(4000, 50257, seed=3, mean_length=65)
    found = write(tmp_path, teacher).slice(0, 4000)
    terms = teacher.probs.double() * (teacher.probs.double().log() - found.probs.double().log())
    kl = torch.zeros(4000, dtype=torch.float64).index_add_(0, teacher.row_ids(), terms)
    kl = kl[teacher.row_lengths() > 0]
    assert float(kl.mean()) < 1.3e-4
    assert float(kl.max()) < 1e-3


@pytest.mark.parametrize(
    ("vocab_size", "codec", "bytes_a_pair"), [(50257, "log8", 3), (151936, "log8", 4), (50257, "float16", 4)]
)
def test_size_a_pair(tmp_path: Path, vocab_size: int, codec: str, bytes_a_pair: int) -> None:
    teacher = teacher_rows(3000, vocab_size, seed=4, mean_length=65)
    write(tmp_path, teacher, codec=codec)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < bytes_a_pair * teacher.nnz + 6 * teacher.num_rows + 2000


def test_the_bytes_depend_on_the_rows_only(tmp_path: Path) -> None:
    teacher = teacher_rows(500, 1000, seed=5)
    for name, step in (("a", 1), ("b", 77), ("c", 500)):
        write(tmp_path / name, teacher, step=step, rows_per_shard=200)
    for path in (tmp_path / "a").iterdir():
        assert (
            path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() == (tmp_path / "c" / path.name).read_bytes()
        )


def test_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    teacher = teacher_rows(500, 1000, seed=6)
    write(tmp_path / "a", teacher, rows_per_shard=100)
    options = {"num_rows": 500, "vocab_size": 1000, "fields": {"k": 4}, "rows_per_shard": 100}
    with DistributionWriter(tmp_path / "b", **options) as writer:  # type: ignore[arg-type]
        writer.append(teacher.select(torch.arange(250)))
        assert writer.next_row == 250
    with DistributionWriter(tmp_path / "b", **options) as writer:  # type: ignore[arg-type]
        assert writer.rows_done == writer.next_row == 200
        with pytest.raises(ValueError, match="200 rows were written instead of 500"):
            writer.finish()
    write(tmp_path / "b", teacher, rows_per_shard=100)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


@given(st.integers(0, 2**31), st.sampled_from(["log8", "float16"]), st.integers(1, 2000))
@settings(max_examples=25, deadline=None)
def test_any_rows(tmp_path_factory: pytest.TempPathFactory, seed: int, codec: str, vocab_size: int) -> None:
    teacher = teacher_rows(50, vocab_size, seed, mean_length=20)
    store = write(tmp_path_factory.mktemp("store"), teacher, codec=codec, rows_per_shard=16)
    assert_close(store.slice(0, 50), teacher, 0.056 if codec == "log8" else 5e-3)


def test_what_the_codec_cannot_hold_goes_to_the_residual(tmp_path: Path) -> None:
    probs = torch.tensor([1 - 2e-7, 2e-7, 0.0, 1e-8, 1e-6])
    teacher = SparseDistributions(torch.tensor([0, 3, 5]), torch.tensor([3, 5, 9, 0, 2], dtype=torch.int32), probs, 10,
                                  torch.tensor([0.0, 1 - 1.01e-6]))  # fmt: skip
    found = write(tmp_path / "log8", teacher, codec="log8").slice(0, 2)
    assert found.token_ids.tolist() == [3, 2]
    assert found.residual is not None
    assert float(found.residual[0]) == pytest.approx(2e-7)
    assert found.probs.tolist() == pytest.approx([1 - 2e-7, 1e-6], rel=0.06)


def test_without_a_residual_the_missing_mass_is_stored(tmp_path: Path) -> None:
    teacher = SparseDistributions(torch.tensor([0, 1, 3, 3]), torch.tensor([1, 0, 1], dtype=torch.int32),
                                  torch.tensor([0.75, 0.5, 0.5]), 2)  # fmt: skip
    found = write(tmp_path, teacher).slice(0, 3)
    assert found.residual is not None
    assert found.residual.tolist() == [0.25, 0.0, 1.0]
    assert found.probs.tolist() == pytest.approx([0.75, 0.5, 0.5])


def test_rows_that_are_no_distributions_are_refused(tmp_path: Path) -> None:
    good = teacher_rows(10, 100, seed=7)
    with DistributionWriter(tmp_path, num_rows=10, vocab_size=100, fields={}) as writer:
        assert good.residual is not None
        bad = SparseDistributions(good.indptr, good.token_ids, good.probs, 100, good.residual * 0.5)
        with pytest.raises(ValueError, match="do not sum to 1"):
            writer.append(bad)
    with DistributionWriter(tmp_path, num_rows=10, vocab_size=100, fields={}) as writer:
        with pytest.raises(ValueError, match="vocab_size"):
            writer.append(teacher_rows(10, 99, seed=7))
        with pytest.raises(ValueError, match="more than"):
            writer.append(teacher_rows(11, 100, seed=7))
    with pytest.raises(MemdecError, match="codec"):
        DistributionWriter(tmp_path, num_rows=10, vocab_size=100, codec="zip", fields={})


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path, teacher_rows(10, 100, seed=8))
    path = tmp_path / "shard-00000.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["lengths"][:2] = arrays["lengths"][:2][::-1] + 1
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(MemdecError, match="does not hold the 10 rows"):
        store.slice(0, 10)
    assert verify(tmp_path) == ["shard-00000.safetensors is damaged: its checksum differs"]
