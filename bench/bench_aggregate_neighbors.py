"""aggregate_neighbors, N = 4096, k = 1024, V = 50257: wanted are 50 times the dense scatter + nonzero.

Two kinds of tokens: all alike, so that nearly every neighbour has its own and 1014 remain in a row (the most output
there can be), and a few dozen frequent ones, as a search in text finds them (about 130 remain).
"""

from __future__ import annotations

import pytest
import torch

from memdec import ops

NEIGHBOURS, VOCAB, TEMPERATURE = 1024, 50257, 16.0
SIZES = {"cpu": {"rows": [4096]}, "cuda": {"rows": [16384]}}


def dense(distances, token_ids):
    """What is usually done: softmax, scatter into (N, V), then look for what is not 0."""
    weights = torch.softmax(-distances.float() / TEMPERATURE, dim=-1)
    probs = weights.new_zeros(len(distances), VOCAB).scatter_add_(1, token_ids, weights)
    where = probs.nonzero(as_tuple=True)
    return where[0], where[1], probs[where]


def sort_and_sum(distances, token_ids):
    """The careful way in PyTorch: sort the tokens of each row, sum runs; nothing of width V."""
    weights = torch.softmax(-distances.float() / TEMPERATURE, dim=-1)
    tokens, order = token_ids.sort(dim=1)
    weights = weights.gather(1, order)
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    pair = first.view(-1).cumsum(0) - 1
    probs = weights.new_zeros(int(pair[-1]) + 1).index_add_(0, pair, weights.view(-1))
    return first.sum(1).cumsum(0), tokens[first], probs


@pytest.mark.parametrize("tokens", ["uniform", "text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_rows(compare, generator, rows, tokens, dtype):
    distances = (torch.rand(rows, NEIGHBOURS, generator=generator) * 300 + 100).to(dtype)
    draws = torch.rand(rows, NEIGHBOURS, generator=generator)
    wide = (draws if tokens == "uniform" else draws**30).mul_(VOCAB).long()
    narrow = wide.int()  # as a datastore holds its values
    result = ops.aggregate_neighbors(distances, narrow, temperature=TEMPERATURE, vocab_size=VOCAB)
    contestants = {
        "memdec": lambda: ops.aggregate_neighbors(distances, narrow, temperature=TEMPERATURE, vocab_size=VOCAB),
        "memdec, int64 tokens": lambda: ops.aggregate_neighbors(
            distances, wide, temperature=TEMPERATURE, vocab_size=VOCAB
        ),
        "eager, sort and sum": lambda: sort_and_sum(distances, wide),
        "eager, dense scatter + nonzero": lambda: dense(distances, wide),
    }
    nbytes = distances.nbytes + narrow.nbytes + 8 * (result.nnz + rows) + 4 * rows
    case = {"shape": [rows, NEIGHBOURS, VOCAB], "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    results = compare("aggregate_neighbors", case, contestants, nbytes, rounds=5)
    print(f"  {result.nnz / rows:.0f} tokens a row; dense: {results['eager, dense scatter + nonzero']['ratio']} times")
