"""Exact and faiss search against brute force in float64, on keys that float16 holds exactly."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdec import MemdecError, build_info
from memdec.pipeline import search
from memdec.pipeline.search import (
    build_index,
    knn_probabilities,
    neighbour_tokens,
    open_index,
    parse_bytes,
    recall_at_k,
    search_exact,
)
from memdec.stores.datastore import Datastore, DatastoreWriter
from memdec.stores.manifest import verify

FIELDS = {"model": "m", "layer": "l", "context": 8, "stride": None, "vocab_size": 50, "tokenizer_fingerprint": "f"}


class Rows:
    """Keys in memory, cut into shards anywhere."""

    def __init__(self, keys, cuts=()):
        self._keys = keys.half()
        edges = [0, *cuts, len(keys)]
        self.shard_bounds = list(pairwise(edges))
        self.num_rows, self.dim = keys.shape

    def keys(self, start, stop):
        return self._keys[start:stop]

    def document_bounds(self, rows):
        """Documents of five rows each."""
        first = rows // 5 * 5
        return torch.stack([first, (first + 5).clamp(max=self.num_rows)], 1)


def write(folder: Path, keys, values, starts=None, shards=1) -> Datastore:
    starts = torch.tensor([0, len(keys) + 1]) if starts is None else starts
    with DatastoreWriter(
        folder, num_rows=len(keys), dim=keys.shape[1], document_starts=starts, fields=FIELDS
    ) as writer:
        for k, v in zip(keys.chunk(shards), values.chunk(shards), strict=True):
            writer.append(k, v)
        return writer.finish()


def brute_force(queries, keys, k, hidden=None):
    """The k least (distance, id) pairs, every distance computed in float64."""
    d = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    d = ((queries.double()[:, None] - keys.double()[None]) ** 2).sum(-1) if d.numel() < 4e6 else d
    if hidden is not None:
        ids = torch.arange(len(keys))
        d = d.masked_fill((ids >= hidden[:, :1]) & (ids < hidden[:, 1:]), math.inf)
    d, order = torch.sort(d, dim=1, stable=True)  # equal distances stay in the order of their ids
    return d[:, :k], order[:, :k].masked_fill(d[:, :k] == math.inf, -1)


def whole_numbers(rows, dim, seed, high=4):
    return torch.randint(-high, high + 1, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() and build_info()["cuda"] == "on" else [])])
def device(request, monkeypatch):
    """Where products are made and filtered. With --cuda=host CUDA kernels take CPU tensors, and want more room."""
    if build_info()["cuda"] == "host":
        capacity = search._capacity
        monkeypatch.setattr(search, "_capacity", lambda keep, _: capacity(keep, torch.device("cuda")))
    return request.param


@pytest.mark.parametrize("simd", build_info()["simd_levels"], indirect=True)
# Whole numbers: every distance is exact in float32, ties abound, and the one right answer has equal distances in the
# order of their ids. 3000 rows are three key blocks of 1024, the last one short; a width of 37 leaves a tail to every
# vector.
@pytest.mark.parametrize(("rows", "dim", "k"), [(1, 1, 1), (5, 3, 5), (40, 8, 7), (3000, 37, 100), (3000, 16, 1500)])
def test_exact_search_is_brute_force(simd, device, rows, dim, k):
    keys, queries = whole_numbers(rows, dim, 0), whole_numbers(23, dim, 1)
    wanted, wanted_ids = brute_force(queries, keys, k)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found, ids = search_exact(queries.to(dtype), Rows(keys), k, device=device)
        assert torch.equal(found.double(), wanted)
        assert torch.equal(ids, wanted_ids)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_small_search(device, data):
    rows, dim, n = (data.draw(st.integers(1, m)) for m in (70, 5, 9))
    k = data.draw(st.integers(1, rows))
    seed = data.draw(st.integers(0, 2**30))
    keys, queries = whole_numbers(rows, dim, seed, 2), whole_numbers(n, dim, seed + 1, 2)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=3))) if rows > 1 else []
    own = torch.tensor(data.draw(st.lists(st.integers(-1, rows - 1), min_size=n, max_size=n)))
    whole = data.draw(st.booleans())
    store = Rows(keys, cuts)
    hidden = store.document_bounds(own.clamp(min=0)) if whole else torch.stack([own, own + 1], 1)
    hidden[own < 0] = 0
    wanted, wanted_ids = brute_force(queries, keys, k, hidden)
    found, ids = search_exact(queries, store, k, exclude_rows=own, exclude_documents=whole, device=device)
    assert torch.equal(found.double(), wanted)
    assert torch.equal(ids, wanted_ids)


def test_the_cut_of_the_work_does_not_show(device, monkeypatch):
    """Real numbers with a large common part, where ‖x‖² − 2qx keeps few digits: to the bit the same for any blocks,
    shards, threads and memory, and the distances are those of float64 to float32's rounding of a sum of squares."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(100, generator=generator) * 40
    keys = (common + torch.randn(2500, 100, generator=generator)).half()
    # On the host every thread of every block takes its turn: fewer of them.
    queries = (common + torch.randn(12 if build_info()["cuda"] == "host" else 70, 100, generator=generator)).half()
    wanted, wanted_ids = brute_force(queries, keys, 300)
    reference = search_exact(queries, Rows(keys), 300, device=device)
    assert torch.equal(reference[1], wanted_ids)
    torch.testing.assert_close(reference[0].double(), wanted, rtol=1e-6, atol=0)
    for key_block, query_block, threads, cuts in [(64, 7, 1, [1, 2400]), (1000, 64, 2, [1250]), (2500, 1, 2, [])]:
        monkeypatch.setattr(search, "_KEY_BLOCK", key_block)
        monkeypatch.setattr(search, "_DEVICE_KEY_BLOCK", key_block)
        monkeypatch.setattr(search, "_QUERY_BLOCK", query_block)
        torch.set_num_threads(threads)
        for one, other in zip(search_exact(queries, Rows(keys, cuts), 300, device=device), reference, strict=True):
            assert torch.equal(one, other)
    copied = search._copied_keys(Rows(keys, [2400]), torch.device(device))
    own = torch.arange(12)
    for found, same in [
        (search_exact(queries, copied, 300, device=device), reference),
        (
            search_exact(queries[:12], copied, 9, exclude_rows=own, exclude_documents=True, device=device),
            search_exact(queries[:12], Rows(keys), 9, exclude_rows=own, exclude_documents=True, device=device),
        ),
    ]:
        assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])
    assert search.keys_on_device(store := Rows(keys), "cpu") is store
    tight = search_exact(queries, Rows(keys), 300, memory_limit=2_000_000, device=device)
    assert torch.equal(tight[0], reference[0]) and torch.equal(tight[1], reference[1])


def test_own_row_is_left_out_by_id_among_duplicates():
    """The leak of dropping the first column: with equal keys the first is another row, and the own label stays in."""
    keys = torch.zeros(6, 4)
    keys[5] = 1
    distances, ids = search_exact(keys, Rows(keys), 4, exclude_rows=torch.arange(6))
    for row in range(6):
        assert row not in ids[row].tolist()
    assert ids[2].tolist() == [0, 1, 3, 4] and distances[2].tolist() == [0, 0, 0, 0]
    assert ids[5].tolist() == [0, 1, 2, 3] and distances[5].tolist() == [4, 4, 4, 4]


def test_many_duplicates_are_taken_in_the_order_of_their_ids(device):
    """Text that is repeated a thousand times: more equals than k and the spare candidates together."""
    kinds = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half()
    which = torch.arange(3000) % 3
    keys = kinds[which]
    distances, ids = search_exact(kinds, Rows(keys), 50, device=device)
    for kind in range(3):
        assert ids[kind].tolist() == list(range(kind, 150, 3))
    assert (distances == 0).all()


def test_too_few_after_exclusion_is_padded(device):
    keys = whole_numbers(7, 3, 0)
    distances, ids = search_exact(
        keys, Rows(keys), 7, exclude_rows=torch.arange(7), exclude_documents=True, device=device
    )
    assert (ids >= 0).sum(1).tolist() == [2] * 5 + [5] * 2
    assert torch.equal(torch.isinf(distances), ids < 0)


def test_memory_is_bounded_by_the_setting():
    keys = whole_numbers(50, 8, 0)
    with pytest.raises(MemdecError, match=r"memory_limit: 1000 bytes are too few .* is the least"):
        search_exact(keys, Rows(keys), 5, memory_limit=1000)
    here = search._Place.of(torch.device("cpu"))
    assert search._queries_that_fit(10**9, 576, 1056, 1024, here) == 4096
    few = search._queries_that_fit(64 << 20, 576, 1056, 1024, here)
    assert 0 < few * (4 * 2 * 576 + 4 * 1024 + 8 * 2144) + 4 * 1024 * 577 < 64 << 20


def test_a_threshold_that_falls_all_the_time(device):
    """Rows come nearer and nearer: each is below the threshold, and the buffer of candidates is cut again and again.
    Then the same with an own row to leave out among the nearest, and more neighbours than a buffer in shared memory."""
    keys = torch.arange(2040, 0, -1.0)[:, None].repeat(4, 3)
    for k in (3, 1100, 2500):
        wanted, wanted_ids = brute_force(torch.zeros(2, 3), keys, k, torch.tensor([[2039, 2040], [0, 0]]))
        found, ids = search_exact(
            torch.zeros(2, 3), Rows(keys), k, exclude_rows=torch.tensor([2039, -1]), device=device
        )
        assert torch.equal(found.double(), wanted)
        assert torch.equal(ids, wanted_ids)


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 40, 576])
def test_distances_have_the_bits_of_sixteen_sums_and_a_tree(device, dim):
    """What every backend adds up: element i of (q − x)² into sum i mod 16 by fused multiply-add, but for the elements
    beyond the last sixteen, which are squared first; then sums 8, 4, 2 and 1 apart."""
    if device == "cpu" and build_info()["cuda"] != "host" and build_info()["simd"] == "portable":
        pytest.skip("portable code has no fused multiply-add")
    generator = torch.Generator().manual_seed(dim)
    keys, queries = torch.randn(40, dim, generator=generator).half(), torch.randn(3, dim, generator=generator)
    difference = (queries[:, None] - keys.float()[None]).numpy()
    sums = np.zeros((3, 40, 16), np.float32)
    whole = dim // 16 * 16
    for i in range(
        whole
    ):  # a product of two float32 is exact in float64; its sum with a third is rounded twice, rarely so
        square = difference[..., i].astype(np.float64) ** 2
        sums[..., i % 16] = (sums[..., i % 16].astype(np.float64) + square).astype(np.float32)
    for i in range(whole, dim):
        sums[..., i % 16] += difference[..., i] * difference[..., i]
    for half in (8, 4, 2, 1):
        sums[..., :half] += sums[..., half : 2 * half]
    wanted, order = torch.from_numpy(sums[..., 0].copy()).sort(dim=1, stable=True)
    found, ids = search_exact(queries, Rows(keys), 40, device=device)
    assert torch.equal(found, wanted)
    assert torch.equal(ids, order)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_numbers_that_are_not_finite(device, bad):
    keys, queries = whole_numbers(3000, 4, 0), whole_numbers(3, 4, 1)
    broken = keys.clone()
    broken[2077, 1] = bad
    with pytest.raises(MemdecError, match="key of row 2077 holds NaN or infinity"):
        search_exact(queries, Rows(broken), 5, device=device)
    queries[2, 0] = bad
    with pytest.raises(MemdecError, match="query of row 2 holds NaN or infinity"):
        search_exact(queries, Rows(keys), 5, device=device)


def test_explains_wrong_arguments():
    keys = whole_numbers(10, 4, 0)
    with pytest.raises(MemdecError, match="k = 11 neighbours are more than the 10 rows"):
        search_exact(keys, Rows(keys), 11)
    with pytest.raises(MemdecError, match="k must be at least 1"):
        search_exact(keys, Rows(keys), 0)
    with pytest.raises(ValueError, match=r"queries: got torch.float32 of shape \(10, 3\)"):
        search_exact(keys[:, :3], Rows(keys), 2)
    with pytest.raises(ValueError, match="exclude_rows: got -1 to 10"):
        search_exact(keys[:2], Rows(keys), 2, exclude_rows=torch.tensor([-1, 10]))
    with pytest.raises(ValueError, match=r"exclude_rows: got shape \(3,\)"):
        search_exact(keys[:2], Rows(keys), 2, exclude_rows=torch.arange(3))
    with pytest.raises(MemdecError, match="memory_limit: got 'lots'"):
        parse_bytes("lots")
    assert [parse_bytes(s) for s in ("1GiB", "1 gb", "3K", "12", 5)] == [2**30, 10**9, 3072, 12, 5]


def test_recall():
    true = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert recall_at_k(true.flip(1), true) == 1
    assert recall_at_k(torch.tensor([[9, 2, 1, -1], [7, 8, -1, -1]]), true) == 2 / 6


def test_tokens_of_neighbours_from_several_shards(tmp_path):
    values = torch.arange(100, 123)
    store = write(tmp_path, whole_numbers(23, 3, 0), values, shards=4)
    ids = torch.tensor([[0, 22, -1], [7, 6, 5]])
    assert neighbour_tokens(store, ids).tolist() == [[100, 122, -1], [107, 106, 105]]


def test_documents_of_a_datastore(tmp_path):
    """Tokens 0…3 | 4…8 | 9…23; a row belongs to the document of the token it predicts."""
    store = write(tmp_path, whole_numbers(23, 3, 0), torch.arange(23), torch.tensor([0, 4, 4, 9, 24]))
    assert store.document_bounds(torch.tensor([0, 2, 3, 7, 8, 22])).tolist() == [
        [0, 3],
        [0, 3],
        [3, 8],
        [3, 8],
        [8, 23],
        [8, 23],
    ]
    for row, (start, stop) in enumerate(store.document_bounds(torch.arange(23)).tolist()):
        assert len(set(store.documents(start, stop).tolist())) == 1 and start <= row < stop


def test_knn_probabilities_by_hand(tmp_path):
    """Distances 0, 1, 4 to tokens 7, 8, 7 at T = 2; nothing excluded."""
    store = write(tmp_path, torch.tensor([[0.0], [1.0], [2.0], [50.0]]), torch.tensor([7, 8, 7, 9]))
    weights = [1, math.exp(-0.5), math.exp(-2)]
    for k, total in ((3, sum(weights)), (50, sum(weights))):  # the row at 50 weighs exp(-1250)
        q = knn_probabilities(torch.zeros(3, 1), torch.tensor([7, 8, 9]), store, k=k, temperature=2.0)
        assert q.tolist() == pytest.approx([(1 + weights[2]) / total, weights[1] / total, 0])
    assert knn_probabilities(torch.zeros(0, 1), torch.zeros(0), store, k=2, temperature=1.0).shape == (0,)


# ---------------------------------------------------------------------------------------------------------------- faiss

# Of each test, not importorskip: that would skip the whole file.
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss: pip install faiss-cpu")


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """2000 keys of 16 numbers around 20 centres, with every key twice, in two shards."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 16, generator=generator) * 5
    keys = centres[torch.randint(20, (1000,), generator=generator)] + torch.randn(1000, 16, generator=generator)
    keys = torch.cat([keys, keys]).half()
    starts = torch.cat([torch.arange(0, 2000, 50), torch.tensor([2001])])
    return write(tmp_path_factory.mktemp("store"), keys, torch.arange(2000) % 50, starts, shards=2)


@needs_faiss
@pytest.mark.parametrize(("backend", "least"), [("flat", 0.999), ("ivfflat", 0.95), ("ivfpq", 0.4)])
@pytest.mark.parametrize("whole_documents", [False, True])
def test_faiss_finds_what_exact_search_finds(clustered, tmp_path, backend, least, whole_documents):
    index = build_index(clustered, tmp_path / "index", backend)
    assert verify(tmp_path / "index") == []
    rows = torch.arange(0, 2000, 13)
    keys = torch.cat([clustered.keys(r, r + 1) for r in rows.tolist()])
    options = {"exclude_rows": rows, "exclude_documents": whole_documents}
    true_distances, true = search_exact(keys, clustered, 10, **options)
    distances, found = index.search(keys, clustered, 10, **options)
    assert recall_at_k(found, true) >= least
    # The distances are exact, whatever the index holds of the keys.
    exact = ((keys.double()[:, None] - clustered.keys(0, 2000)[found.clamp(min=0)].double()) ** 2).sum(-1)
    torch.testing.assert_close(distances.double()[found >= 0], exact[found >= 0], rtol=1e-6, atol=1e-6)
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    for i, row in enumerate(rows.tolist()):
        assert row not in found[i].tolist()
    if whole_documents:
        documents = clustered.documents(0, 2000)
        assert not ((documents[found.clamp(min=0)] == documents[rows][:, None]) & (found >= 0)).any()
    elif backend == "flat":
        assert (distances[:, 0] == 0).all(), "each key's duplicate must be found"
        assert torch.equal(distances, true_distances)


@needs_faiss
@pytest.mark.parametrize("backend", ["flat", "ivfflat", "ivfpq"])
def test_a_reopened_index_finds_the_same(clustered, tmp_path, backend):
    built = build_index(clustered, tmp_path / "a", backend)
    again = build_index(clustered, tmp_path / "a", backend)  # not built a second time
    afresh = build_index(clustered, tmp_path / "b", backend)
    queries = clustered.keys(0, 100)
    wanted = built.search(queries, clustered, 20)
    for index in (again, afresh, open_index(tmp_path / "a", clustered)):
        got = index.search(queries, clustered, 20)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert (tmp_path / "a" / "index.faiss").read_bytes() == (tmp_path / "b" / "index.faiss").read_bytes()


@needs_faiss
def test_faiss_errors(clustered, tmp_path, monkeypatch):
    with pytest.raises(MemdecError, match="backend: got 'hnsw'"):
        build_index(clustered, tmp_path / "x", "hnsw")
    with pytest.raises(MemdecError, match="takes 128000 bytes of memory, memory_limit is 100000"):
        build_index(clustered, tmp_path / "x", "flat", memory_limit=100_000)
    with pytest.raises(MemdecError, match="divisor of the keys' width 16"):
        build_index(clustered, tmp_path / "x", "ivfpq", subquantizers=3)
    build_index(clustered, tmp_path / "x", "flat")
    other = write(tmp_path / "other", whole_numbers(300, 16, 0), torch.arange(300))
    with pytest.raises(MemdecError, match=r"made with other parameters: .*datastore"):
        build_index(other, tmp_path / "x", "flat")
    with pytest.raises(MemdecError, match="made of another datastore"):
        open_index(tmp_path / "x", other)
    content = (tmp_path / "x" / "index.faiss").read_bytes()
    (tmp_path / "x" / "index.faiss").write_bytes(content[: len(content) // 2])
    with pytest.raises(MemdecError, match=r"index\.faiss"):
        open_index(tmp_path / "x", clustered)
    few = write(tmp_path / "few", whole_numbers(50, 16, 0), torch.arange(50))
    with pytest.raises(MemdecError, match="ivfpq cannot be trained on 50 rows"):
        build_index(few, tmp_path / "y", "ivfpq")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MemdecError, match=r"pip install 'memdec\[faiss\]'"):
        build_index(few, tmp_path / "z", "flat")


@needs_faiss
def test_small_corpora_can_be_indexed(tmp_path):
    store = write(tmp_path / "s", whole_numbers(60, 16, 0), torch.arange(60))
    index = build_index(store, tmp_path / "i", "ivfflat")
    found = index.search(store.keys(0, 60), store, 59, exclude_rows=torch.arange(60))[1]
    assert np.array_equal(found.sort(1).values.numpy(), [[j for j in range(60) if j != i] for i in range(60)])
