"""Every CUDA kernel, run on the host, gives the same bits in whatever order threads and blocks run."""

from __future__ import annotations

import pytest
import torch

from memdec import SparseDistributions, build_info, ops
from memdec.decoding.products import linear_of_rows
from memdec.pipeline import search

pytestmark = pytest.mark.skipif(build_info()["cuda"] != "host", reason="needs --cuda=host")

ORDERS = ["forward", "reverse", "1", "2", "3"]
TARGETS = torch.tensor([0, 8192, 16400, 5, 1])


def logits(rows: int = 5, vocab: int = 16401) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()


def aggregated(rows: int, k: int, **cuts: float) -> list[torch.Tensor]:
    """Neighbours of which a third share a token, and some are absent."""
    generator = torch.Generator().manual_seed(k)
    distances = torch.randint(0, 60, (rows, k), generator=generator).float()
    tokens = torch.randint(-1, 2 * k, (rows, k), generator=generator)
    tokens[:, ::3] = 7
    q = ops.aggregate_neighbors(distances, tokens, temperature=9.0, vocab_size=50257, **cuts)
    return [q.indptr, q.token_ids, q.probs, q.residual]


class Rows:
    """1500 stored rows in two shards, each twice, so that distances are equal by pairs."""

    num_rows, dim, shard_bounds = 1500, 20, [(0, 700), (700, 1500)]
    stored = torch.randn(750, 20, generator=torch.Generator().manual_seed(0)).half().repeat(2, 1)

    def keys(self, start: int, stop: int) -> torch.Tensor:
        return self.stored[start:stop]


def searched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Twice the columns that the filter takes at a time, and a buffer that they fill."""
    monkeypatch.setattr(search, "_KEY_BLOCK", 1500)
    monkeypatch.setattr(search, "_capacity", lambda keep, _: keep + max(keep, 1024))
    return list(search.search_exact(Rows.stored[::90], Rows(), 40, exclude_rows=torch.arange(0, 1500, 90)))


def alignment(rows: int, vocab: int, **options: bool) -> list[torch.Tensor]:
    """Losses and gradient against teachers of 40 tokens, every fourth label ignored."""
    leaf = logits(rows, vocab).requires_grad_()
    labels = torch.arange(rows) * 31 % vocab
    labels[::4] = -100
    dense = torch.zeros(rows, vocab)
    dense[:, 5 : 5 + 40 * (vocab // 41) : vocab // 41] = 0.02
    dense[1, labels[1]] = 0.1
    loss = ops.alignment_loss(leaf, labels, SparseDistributions.from_dense(dense), **options)
    loss.total.backward()
    assert leaf.grad is not None
    return [*loss, leaf.grad]


def pair(rows: int = 5, vocab: int = 16401) -> tuple[torch.Tensor, torch.Tensor]:
    return logits(rows, vocab), logits(rows, vocab).flip(-1)


def sparse(rows: int, vocab: int) -> list[torch.Tensor]:
    """Teachers of every seventh token and of every one of the last ten."""
    q = torch.zeros(rows, vocab)
    q[:, ::7] = 0.5 / vocab
    q[:, -10:] = 0.05
    return [ops.interpolate_sparse(logits(rows, vocab), SparseDistributions.from_dense(q), 0.4)]


def sample(vocab: int = 16401, **settings: float) -> list[torch.Tensor]:
    """Rows as they are, rounded to few values (ties everywhere) and flat."""
    return [
        ops.interpolate_sample(x, y, 0.4, seed=4, **settings)
        for x, y in (pair(vocab=vocab), (x.round() for x in pair(vocab=vocab)), (x * 0 for x in pair(vocab=vocab)))
    ]


def verified(vocab: int = 16401, models: int = 4, **settings: float) -> list[torch.Tensor]:
    """Drafts of which some stand and some fall; models that are equal, with drafts that neither can give; flat rows."""
    x, y = (z.reshape(3, 2, vocab) for z in pair(6, vocab))
    equal = x.clone()
    equal[..., 7] = -torch.inf
    results = []
    for base, memory in ((x, y), (equal, equal), (y, x), (x * 0, x * 0))[:models]:
        for drafts in (memory[:, :1].argmax(-1), torch.full((3, 1), 7)):
            results += ops.verify_draft(base, memory, drafts, 0.3, seed=5, **settings)
    return results


def products(outputs: int, width: int) -> list[torch.Tensor]:
    """A layer of normed rows, gated and not, and one of rows as they are."""
    x, weight = logits(3, width), logits(2 * outputs, width)
    return [
        linear_of_rows(x, weight, None, weight[5], gated=True),
        linear_of_rows(x, weight, None, weight[5]),
        linear_of_rows(x, weight, weight[:, 1].contiguous(), residual=logits(3, 2 * outputs)),
    ]


# name → what it computes, as a list of tensors; a row of 16401 is three spans, and few rows are split over blocks.
CASES = {
    "token_log_prob": lambda: [ops.token_log_prob(logits(), TARGETS)],
    "token_log_prob of many rows": lambda: [ops.token_log_prob(logits(300, 100), torch.arange(300) % 100)],
    "aggregate_neighbors in registers": lambda: aggregated(9, 1000),
    "aggregate_neighbors of many tiles": lambda: aggregated(150, 50, min_prob=0.01),
    "aggregate_neighbors in registers, cut": lambda: aggregated(5, 200, max_tokens=30, min_prob=1e-4),
    "aggregate_neighbors in shared memory": lambda: aggregated(3, 1500, max_tokens=200),
    "aggregate_neighbors in the workspace": lambda: aggregated(2, 8200),
    "alignment_loss": lambda: alignment(5, 16401),
    "alignment_loss in place": lambda: alignment(5, 16401, grad_in_place=True),
    "alignment_loss in place of many rows": lambda: alignment(257, 301, grad_in_place=True),
    "interpolate": lambda: [ops.interpolate(*pair(), 0.4)],
    "interpolate of many rows": lambda: [ops.interpolate(*pair(17, 8200), torch.linspace(0, 1, 17))],
    "interpolate_log_prob": lambda: [ops.interpolate_log_prob(*pair(), TARGETS, 0.4)],
    "interpolate_argmax": lambda: [ops.interpolate_argmax(*pair(), 0.4)],
    "interpolate_argmax of flat rows": lambda: [ops.interpolate_argmax(*(x * 1e-3 for x in pair()), 0.4)],
    "interpolate_sample": lambda: sample(),
    "interpolate_sample, temperature": lambda: sample(temperature=0.7),
    "interpolate_sample, top_k": lambda: sample(top_k=40),
    "interpolate_sample, top_p": lambda: sample(9000, top_p=0.9),
    "interpolate_sample, all": lambda: sample(9000, temperature=1.3, top_k=3000, top_p=0.8, min_p=0.01),
    "interpolate_sparse": lambda: sparse(17, 16401),
    "linear_of_rows": lambda: products(70, 5000),
    "linear_of_rows, more tiles than blocks": lambda: products(150, 136),
    "verify_draft": lambda: verified(),
    "verify_draft, temperature": lambda: verified(temperature=0.7),
    "verify_draft, all": lambda: verified(9000, 2, temperature=1.3, top_k=300, top_p=0.8, min_p=0.01),
    "verify_draft, greedy": lambda: verified(greedy=True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_order_changes_nothing(monkeypatch, device, name):
    results = []
    for order in ORDERS:
        monkeypatch.setenv("MEMDEC_EXECUTOR_ORDER", order)
        results.append(CASES[name]())
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=0, equal_nan=True)


def test_the_order_changes_no_search(monkeypatch, device):
    """What is pushed stands in the buffers in the order of the threads; what is found must not."""
    results = []
    for order in ORDERS:
        monkeypatch.setenv("MEMDEC_EXECUTOR_ORDER", order)
        results.append(searched(monkeypatch))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
