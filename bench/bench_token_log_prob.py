"""token_log_prob: one log-prob a row, at the width of GPT-2's and Qwen's vocabularies, and the cost of a tiny call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memdec import ops

SIZES = {
    "cpu": {"rows, vocab": [(1024, 50257), (4, 151936)]},
    "cuda": {"rows, vocab": [(1024, 50257), (1024, 151936), (8, 151936), (1, 151936)]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_rows(compare, rows, vocab, dtype):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab).to(dtype)
    targets = torch.randint(vocab, (rows,))
    contestants = {
        "memdec": lambda: ops.token_log_prob(logits, targets),
        "eager, logsumexp": lambda: logits.gather(-1, targets[:, None])[:, 0].float() - logits.float().logsumexp(-1),
        "eager, cross_entropy": lambda: -F.cross_entropy(logits.float(), targets, reduction="none"),
    }
    case = {"shape": [rows, vocab], "dtype": str(dtype).removeprefix("torch.")}
    compare("token_log_prob", case, contestants, logits.nbytes)


def bench_call(compare):
    """A call with next to no work in it: what crossing into the extension costs."""
    logits, targets = torch.randn(1, 8), torch.tensor([3])

    def thousand(function):
        def run():
            for _ in range(1000):
                function()

        return run

    contestants = {
        "memdec": thousand(lambda: ops.token_log_prob(logits, targets)),
        "eager, cross_entropy": thousand(lambda: F.cross_entropy(logits, targets, reduction="none")),
    }
    compare("token_log_prob", {"shape": [1, 8], "dtype": "float32", "calls": 1000}, contestants, 32000)
