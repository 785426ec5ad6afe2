"""aggregate_neighbors, N = 4096, k = 1024, V = 50257: wanted are 50 times the dense scatter + nonzero.

Two kinds of tokens: all alike, so that nearly every neighbour has its own and 1014 remain in a row (the most output
there can be), and a few dozen frequent ones, as a search in text finds them (about 130 remain).
"""

from __future__ import annotations

import pytest
import torch

from memdec import ops

ROWS, NEIGHBOURS, VOCAB, TEMPERATURE = 4096, 1024, 50257, 16.0


def dense(distances, token_ids):
    """What is usually done: softmax, scatter into (N, V), then look for what is not 0."""
    weights = torch.softmax(-distances.float() / TEMPERATURE, dim=-1)
    probs = torch.zeros(len(distances), VOCAB).scatter_add_(1, token_ids, weights)
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
    probs = torch.zeros(int(pair[-1]) + 1).index_add_(0, pair, weights.view(-1))
    return first.sum(1).cumsum(0), tokens[first], probs


@pytest.mark.parametrize("tokens", ["uniform", "text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_rows(compare, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    distances = (torch.rand(ROWS, NEIGHBOURS, generator=generator) * 300 + 100).to(dtype)
    draws = torch.rand(ROWS, NEIGHBOURS, generator=generator)
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
    nbytes = distances.nbytes + narrow.nbytes + 8 * (result.nnz + ROWS) + 4 * ROWS
    case = {"shape": [ROWS, NEIGHBOURS, VOCAB], "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    results = compare("aggregate_neighbors", case, contestants, nbytes, rounds=5)
    print(f"  {result.nnz / ROWS:.0f} tokens a row; dense: {results['eager, dense scatter + nonzero']['ratio']} times")
