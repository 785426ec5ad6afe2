"""Exact search, 10,000 queries against 100,000 × 576, k = 1024, beside faiss's IndexFlatL2 on the same cores.

Wanted: at least as fast, in memory that memory_limit bounds. The index's own float32 copy of the keys, which exact
search does without, stands in memory before the measurement and is not counted.
"""

from __future__ import annotations

import pytest
import torch

from measuring import importable
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


def faiss_index(device):
    """An exact index on the device; None where this faiss, if any, has none."""
    faiss = importable("faiss")
    if faiss is None:
        return None
    if device == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        return faiss.IndexFlatL2(WIDTH)
    return faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), WIDTH) if hasattr(faiss, "GpuIndexFlatL2") else None


def bench_exact_search(compare, device):
    """Keys, queries and results are in the CPU's memory, as in the pipeline; on CUDA faiss's index is on the device."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(ROWS, WIDTH, generator=generator).half()
        queries = torch.randn(QUERIES, WIDTH, generator=generator).half()
    store, wide = Keys(keys), queries.float().numpy()
    limit = "256MiB" if device == "cpu" else "2GiB"

    def ours(queries=queries):
        with torch.device("cpu"):
            return search_exact(queries, store, NEIGHBOURS, memory_limit=limit, device=device)

    contestants, recall = {"memdec": ours}, None
    index = faiss_index(device)
    if index is None:
        if device == "cpu":
            pytest.skip("needs faiss")
    else:
        index.add(keys.float().numpy())
        contestants["faiss IndexFlatL2"] = lambda: index.search(wide, NEIGHBOURS)
        recall = round(
            recall_at_k(ours(queries[:200])[1], torch.from_numpy(index.search(wide[:200], NEIGHBOURS)[1])), 5
        )
    nbytes = keys.nbytes + queries.nbytes + 12 * QUERIES * NEIGHBOURS
    case = {"shape": [QUERIES, ROWS, WIDTH], "k": NEIGHBOURS, "dtype": "float16", "recall": recall}
    results = compare("search_exact", case, contestants, nbytes, rounds=2)
    flops = 2 * QUERIES * ROWS * WIDTH
    print("  GFLOP/s:", {name: round(flops / line["median_ms"] / 1e6, 1) for name, line in results.items()})
