"""linear_alignment_loss, forward and backward, N = 2048, d = 576, V = 49152 (SmolLM2's head).

Wanted: at most 1/8 of the peak memory of the unfused version (the product, then a careful eager loss), and at most 1.1
times its time. The product followed by memdec's own alignment_loss is shown beside it.
"""

from __future__ import annotations

import pytest
import torch

from bench_alignment_loss import careful, teacher_of
from memdec import ops

ROWS, WIDTH, VOCAB = 2048, 576, 49152


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_forward_and_backward(compare, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).to(dtype)
    labels = torch.randint(VOCAB, (ROWS,))
    teacher = teacher_of(ROWS, VOCAB)
    rows, ids = teacher.row_ids(), teacher.token_ids.long()
    entropy = torch.zeros(ROWS).index_add(0, rows, teacher.probs * teacher.probs.log())
    sparse = (rows, ids, teacher.probs, teacher.mass(), entropy)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step(loss):
        def run():
            # Both have a gradient before and after: what the peak shows beside is the loss's own.
            torch.autograd.backward(loss(), inputs=[h, w])

        return run

    contestants = {
        "memdec": step(lambda: ops.linear_alignment_loss(h, w, labels, teacher).total),
        "linear, then memdec's alignment_loss": step(lambda: ops.alignment_loss(h @ w.T, labels, teacher).total),
        "linear, then careful eager": step(lambda: careful(h @ w.T, labels, *sparse)),
    }
    case = {"shape": [ROWS, WIDTH, VOCAB], "dtype": str(dtype).removeprefix("torch.")}
    results = compare("linear_alignment_loss", case, contestants, 2 * (hidden.nbytes + weight.nbytes), rounds=3)
    print("  GFLOP/s:", {k: round(6 * ROWS * WIDTH * VOCAB / v["median_ms"] / 1e6, 1) for k, v in results.items()})
