"""A decoding step in a CUDA graph, N = 1 and 8, V = 151936: wanted are 6 µs for interpolate_argmax, 8 for _sample.

A graph holds as many steps as there are pairs of logits, which together do not fit in the second-level cache, so that
each step reads from memory; times are of one step.
"""

from __future__ import annotations

import pytest
import torch

from bench_interpolate_argmax import in_probabilities
from bench_interpolate_sample import eager as eager_sample
from memdec import ops

ALPHA, VOCAB = 0.4, 151936
SIZES = {"cpu": {"rows": [1]}, "cuda": {"rows": [1, 8]}}


def replayed(step, inputs):
    """One replay runs `step` on all of the inputs."""
    graph = torch.cuda.CUDAGraph()
    for one in inputs[:2]:
        step(*one)  # allocates, compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for one in inputs:
            step(*one)
    return graph.replay


@pytest.mark.parametrize(
    ("op", "warpers"),
    [("interpolate_argmax", {}), ("interpolate_sample", {}), ("interpolate_sample", {"top_k": 50, "top_p": 0.9})],
    ids=["argmax", "sample", "sample with cuts"],
)
def bench_step(compare, device, rows, op, warpers):
    if device != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    torch.manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = 2 * cache // (4 * rows * VOCAB) + 1
    pairs = torch.randn(sets, 2, rows, VOCAB, dtype=torch.bfloat16).mul_(3)
    seed, offset = torch.tensor(1), torch.tensor(0)

    def sample(base, memory):
        offset.add_(1)
        return ops.interpolate_sample(base, memory, ALPHA, seed=seed, offset=offset, **warpers)

    ours, eager = {
        "interpolate_argmax": (lambda b, m: ops.interpolate_argmax(b, m, ALPHA), in_probabilities),
        "interpolate_sample": (sample, lambda b, m: eager_sample(b, m, **warpers)),
    }[op]
    contestants = {"memdec": replayed(ours, pairs), "eager": replayed(eager, pairs)}
    # A draw from the mixture as it is reads one of the two tensors.
    nbytes = (4 if op == "interpolate_argmax" or warpers else 2) * rows * VOCAB
    case = {"shape": [rows, VOCAB], "dtype": "bfloat16", "graph": True, "steps": sets, "warpers": warpers}
    compare(op, case, contestants, nbytes, calls=sets)
