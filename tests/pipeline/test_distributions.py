"""The distributions stage against a loop in plain Python; killed and continued; refusing what cannot be."""

import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from memdec import MemdecError
from memdec.pipeline.distributions import build_distributions
from memdec.stores.datastore import Datastore, DatastoreWriter, ValidationRows
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.manifest import Manifest, verify

FIELDS = {"model": "m", "layer": "l", "context": 8, "stride": None, "vocab_size": 30, "tokenizer_fingerprint": "f"}


def make(folder: Path, rows=300, dim=6, seed=0, validation=True, duplicates=False) -> Datastore:
    """Whole numbers as keys; tokens that go with them, so that neighbours tell something."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-3, 4, (rows, dim), generator=generator).float()
    if duplicates:
        keys = keys[torch.arange(rows) // 3]
    values = (keys[:, 0] * 4 + keys[:, 1]).long().remainder(30)
    starts = torch.tensor([0, rows // 4, rows // 2, rows + 1])
    with DatastoreWriter(folder, num_rows=rows, dim=dim, document_starts=starts, fields=FIELDS) as writer:
        for start in range(0, rows, 110):
            writer.append(keys[start : start + 110], values[start : start + 110])
        if validation:
            held_out = torch.randint(-3, 4, (90, dim), generator=generator).float()
            tokens = (held_out[:, 0] * 4 + held_out[:, 1]).long().remainder(30)
            tokens[::4] = torch.randint(30, (23,), generator=generator)
            base = torch.full((90,), -math.log(30.0))
            writer.write_validation(ValidationRows(held_out.half(), tokens.int(), base, torch.arange(90)))
        return writer.finish()


def by_hand(store: Datastore, row, k, temperature, hidden):
    """One row's distribution, in Python's own arithmetic."""
    keys, values = store.keys(0, store.num_rows).double(), store.values(0, store.num_rows)
    d = ((keys[row] - keys) ** 2).sum(1).tolist()
    near = sorted((d[i], i) for i in range(len(d)) if i not in hidden)[:k]
    q: dict[int, float] = {}
    for distance, i in near:
        q[int(values[i])] = q.get(int(values[i]), 0.0) + math.exp((near[0][0] - distance) / temperature)
    return {token: weight / sum(q.values()) for token, weight in q.items()}


@pytest.mark.parametrize("same_document", [False, True])
@pytest.mark.parametrize("backend", ["exact", "flat"])
def test_every_row_is_what_the_formula_says(tmp_path, backend, same_document):
    """k = 299 leaves the flat index no choice among equal distances; log8's codes are within 2.7% and the rescaling."""
    store = make(tmp_path / "d")
    k, temperature = (25, 4.0) if backend == "exact" else (299, 4.0)
    made = build_distributions(
        store,
        tmp_path / "q",
        k=k,
        temperature=temperature,
        backend=backend,
        exclude_same_document=same_document,
        min_prob=0.0,
    )
    assert made.num_rows == 300 and verify(tmp_path / "q") == []
    documents = store.documents(0, 300).tolist()
    dense = made.slice(0, 300).to_dense(torch.float64)
    for row in range(0, 300, 7):
        hidden = {i for i in range(300) if documents[i] == documents[row]} if same_document else {row}
        for token, probability in by_hand(store, row, k, temperature, hidden).items():
            if probability > 1e-5:
                assert float(dense[row, token]) == pytest.approx(probability, rel=0.06)
    assert float(dense.sum(1).min()) > 0.999


def test_the_own_label_does_not_leak(tmp_path):
    """Every key three times, each time with another token: dropping the first column, as the reference does, would drop
    a twin's token twice and keep the own one. By id, a row finds its two twins and never its own token."""
    rows = 90
    keys = torch.arange(rows).div(3, rounding_mode="floor").float()[:, None] * torch.ones(1, 4) * 5
    values = torch.arange(rows) % 30
    starts = torch.tensor([0, rows + 1])
    with DatastoreWriter(tmp_path / "d", num_rows=rows, dim=4, document_starts=starts, fields=FIELDS) as writer:
        writer.append(keys, values)
        store = writer.finish()
    made = build_distributions(store, tmp_path / "q", k=2, temperature=1.0)
    dense = made.slice(0, rows).to_dense()
    for row in range(rows):
        twins = [i for i in range(row // 3 * 3, row // 3 * 3 + 3) if i != row]
        assert dense[row].nonzero()[:, 0].tolist() == sorted(int(values[i]) for i in twins)
        assert dense[row, values[row]] == 0


def test_chooses_the_temperature_and_measures_the_knn_lm(tmp_path, caplog):
    store = make(tmp_path / "d")
    with caplog.at_level(logging.INFO):
        made = build_distributions(store, tmp_path / "q", k=40)
    results = made.manifest.results
    knn_lm = results["knn_lm"]
    assert knn_lm["base_perplexity"] == pytest.approx(30, rel=1e-4)
    assert knn_lm["perplexity"] < 27 and 0 < knn_lm["weight"] < 1
    at = [point for point in knn_lm["curve"] if point["temperature"] == results["temperature"]]
    assert at[0]["perplexity"] == min(point["perplexity"] for point in knn_lm["curve"])
    assert "perplexity on 90 validation rows" in caplog.text
    given = build_distributions(store, tmp_path / "given", k=40, temperature=results["temperature"])
    assert given.manifest.results["knn_lm"]["perplexity"] == knn_lm["perplexity"]
    assert shards(tmp_path / "given") == shards(tmp_path / "q")
    sharper = build_distributions(store, tmp_path / "sharp", k=40, temperature=0.01)
    assert sharper.nnz < made.nnz


@pytest.mark.parametrize("backend", ["ivfflat", "flat"])
def test_recall_is_measured(tmp_path, backend):
    pytest.importorskip("faiss")
    store = make(tmp_path / "d", rows=600, dim=16)
    made = build_distributions(store, tmp_path / "q", k=10, backend=backend, index_options={"lists": 4, "probes": 4})
    recall = made.manifest.results["recall"]
    assert recall["k"] == 10 and recall["rows"] == 256
    assert recall["value"] > 0.8  # everything is looked at; what differs is which of equals stands at the k-th place
    assert verify(tmp_path / "q") == [] and verify(tmp_path / "q-index") == []


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_memory_and_threads_change_nothing(tmp_path):
    store = make(tmp_path / "d", duplicates=True)
    build_distributions(store, tmp_path / "a", k=20)
    torch.set_num_threads(1)
    build_distributions(store, tmp_path / "b", k=20, memory_limit="300KiB")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize("when", ["temperature", 1])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, when):
    """kill -9 of a real process: after the temperature was chosen, or after so many shards (4096 rows each)."""
    make(tmp_path / "d", rows=9000, dim=4)
    script = f"""
        import os, signal, sys, torch
        from memdec.pipeline import distributions
        from memdec.stores.distribution_store import DistributionWriter
        torch.set_num_threads(2)
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        write = DistributionWriter._write_shard
        def dying(self, rows):
            if len(self.manifest.shards) == {when!r}:
                kill()
            write(self, rows)
        DistributionWriter._write_shard = dying
        if {when!r} == "temperature":
            distributions._Search.train_rows = kill
        distributions.build_distributions(sys.argv[1], sys.argv[2], k=8, memory_limit="4MiB")
    """
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "d"), str(tmp_path / "killed")]
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    half = Manifest.load(tmp_path / "killed")
    assert not half.complete and len(half.shards) == (0 if when == "temperature" else when)
    assert half.results["temperature"] > 0
    build_distributions(tmp_path / "d", tmp_path / "killed", k=8, memory_limit="4MiB")
    build_distributions(tmp_path / "d", tmp_path / "undisturbed", k=8, memory_limit="4MiB")
    assert everything(tmp_path / "killed") == everything(tmp_path / "undisturbed")
    assert len(shards(tmp_path / "killed")) == 3


def test_a_finished_store_is_only_opened(tmp_path, monkeypatch):
    store = make(tmp_path / "d")
    build_distributions(store, tmp_path / "q", k=5)
    monkeypatch.setattr("memdec.pipeline.distributions.search_exact", None)
    assert build_distributions(store, tmp_path / "q", k=5).num_rows == 300


def test_default_k_adapts_and_says_so(tmp_path, caplog):
    store = make(tmp_path / "d", rows=40)
    with caplog.at_level(logging.INFO):
        made = build_distributions(store, tmp_path / "q")
    assert made.manifest.fields["k"] == 39
    assert "k = 39 neighbours instead of 1024: the datastore has only 40 rows" in caplog.text


def test_refuses_what_cannot_be(tmp_path):
    store = make(tmp_path / "d", rows=40)
    bare = make(tmp_path / "bare", rows=40, validation=False)
    single = make(tmp_path / "single", rows=1)
    out = tmp_path / "q"
    for arguments, words in [
        ({"k": 40}, "k = 40 neighbours are more than a datastore of 40 rows can give: .* 39 is the most"),
        ({"k": 0}, "k must be at least 1"),
        ({"backend": "hnsw"}, "backend: got 'hnsw'"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"min_prob": 1.0}, "min_prob: got 1.0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"codec": "zip"}, "codec"),
        ({"memory_limit": "1KiB", "temperature": 1.0}, "memory_limit: .* is the least"),
    ]:
        with pytest.raises(MemdecError, match=words):
            build_distributions(store, out, **arguments)
    with pytest.raises(MemdecError, match=r"no validation rows\. Pass a temperature"):
        build_distributions(bare, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(MemdecError, match="datastore of 1 rows has no neighbours"):
        build_distributions(single, tmp_path / "r")
    assert build_distributions(bare, tmp_path / "r", temperature=2.0).manifest.results["temperature"] == 2.0
    with pytest.raises(MemdecError, match=r"made with other parameters: .*k was 39, now 12"):
        build_distributions(bare, tmp_path / "r", temperature=2.0, k=12)
    assert DistributionStore.open(tmp_path / "r").num_rows == 40


def test_refuses_keys_that_are_not_finite(tmp_path):
    """A datastore is checked when it is written, so one such must have been damaged since."""
    store = make(tmp_path / "d", rows=40)
    store.keys(0, 40)[7, 2] = math.nan  # a private view: the file stays as it is
    with pytest.raises(MemdecError, match="of row 7 holds NaN or infinity"):
        build_distributions(store, tmp_path / "q", temperature=1.0)
