"""Exact search, 10,000 queries against 100,000 × 576, k = 1024, beside faiss's IndexFlatL2 on the same cores.

Wanted: at least as fast, in memory that memory_limit bounds. The index's own float32 copy of the keys, which exact
search does without, stands in memory before the measurement and is not counted.
"""

from __future__ import annotations

import pytest
import torch

from memdec.pipeline.search import recall_at_k, search_exact

QUERIES, ROWS, WIDTH, NEIGHBOURS = 10_000, 100_000, 576, 1024


class Keys:
    """A datastore's keys, as they lie in a memory-mapped shard: float16."""

    def __init__(self, keys):
        self._keys = keys
        self.num_rows, self.dim = keys.shape
        self.shard_bounds = [(0, len(keys))]

    def keys(self, start, stop):
        return self._keys[start:stop]

    def document_bounds(self, rows):
        raise NotImplementedError


def bench_exact_search(compare):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(ROWS, WIDTH, generator=generator).half()
    queries = torch.randn(QUERIES, WIDTH, generator=generator).half()
    store, wide = Keys(keys), queries.float().numpy()
    index = faiss.IndexFlatL2(WIDTH)
    index.add(keys.float().numpy())
    _, ids = search_exact(queries[:200], store, NEIGHBOURS)
    recall = recall_at_k(ids, torch.from_numpy(index.search(wide[:200], NEIGHBOURS)[1]))
    contestants = {
        "memdec": lambda: search_exact(queries, store, NEIGHBOURS, memory_limit="256MiB"),
        "faiss IndexFlatL2": lambda: index.search(wide, NEIGHBOURS),
    }
    nbytes = keys.nbytes + queries.nbytes + 12 * QUERIES * NEIGHBOURS
    case = {"shape": [QUERIES, ROWS, WIDTH], "k": NEIGHBOURS, "dtype": "float16", "recall": round(recall, 5)}
    results = compare("search_exact", case, contestants, nbytes, rounds=2)
    flops = 2 * QUERIES * ROWS * WIDTH
    print("  GFLOP/s:", {name: round(flops / line["median_ms"] / 1e6, 1) for name, line in results.items()})
