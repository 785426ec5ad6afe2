"""Every CUDA kernel, run on the host, gives the same bits in whatever order threads and blocks run."""

from __future__ import annotations

import pytest
import torch

from memdec import SparseDistributions, build_info, ops

pytestmark = pytest.mark.skipif(build_info()["cuda"] != "host", reason="needs --cuda=host")

ORDERS = ["forward", "reverse", "1", "2", "3"]
TARGETS = torch.tensor([0, 8192, 16400, 5, 1])


def logits(rows: int = 5, vocab: int = 16401) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()


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


# name → what it computes, as a list of tensors; a row of 16401 is three spans, and few rows are split over blocks.
CASES = {
    "token_log_prob": lambda: [ops.token_log_prob(logits(), TARGETS)],
    "token_log_prob of many rows": lambda: [ops.token_log_prob(logits(300, 100), torch.arange(300) % 100)],
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
