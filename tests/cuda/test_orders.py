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


# name → what it computes, as a list of tensors; a row of 16401 is three spans, and few rows are split over blocks.
CASES = {
    "token_log_prob": lambda: [ops.token_log_prob(logits(), TARGETS)],
    "token_log_prob of many rows": lambda: [ops.token_log_prob(logits(300, 100), torch.arange(300) % 100)],
    "alignment_loss": lambda: alignment(5, 16401),
    "alignment_loss in place": lambda: alignment(5, 16401, grad_in_place=True),
    "alignment_loss in place of many rows": lambda: alignment(257, 301, grad_in_place=True),
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
