"""linear_alignment_loss, forward and backward, N = 2048, d = 576, V = 49152 (SmolLM2's head).

Wanted: at most 1/8 of the peak memory of the unfused version (the product, then a careful eager loss), and at most 1.1
times its time. The product followed by memdec's own alignment_loss is shown beside it.
"""

from __future__ import annotations

import pytest
import torch

from bench_alignment_loss import careful, teacher_of
from measuring import importable
from memdec import ops

SIZES = {"cpu": {"rows, width, vocab": [(2048, 576, 49152)]}, "cuda": {"rows, width, vocab": [(8192, 2048, 151936)]}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_forward_and_backward(compare, rows, width, vocab, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).to(dtype)
    weight = torch.randn(vocab, width).mul_(width**-0.5).to(dtype)
    labels = torch.randint(vocab, (rows,))
    teacher = teacher_of(rows, vocab)
    row_ids, ids = teacher.row_ids(), teacher.token_ids.long()
    entropy = torch.zeros(rows).index_add(0, row_ids, teacher.probs * teacher.probs.log())
    sparse = (row_ids, ids, teacher.probs, teacher.mass(), entropy)
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
    if hidden.is_cuda and (liger := importable("liger_kernel.transformers")):
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        contestants["Liger's fused linear cross-entropy (no teacher)"] = step(lambda: fused(w, h, labels))
    case = {"shape": [rows, width, vocab], "dtype": str(dtype).removeprefix("torch.")}
    results = compare("linear_alignment_loss", case, contestants, 2 * (hidden.nbytes + weight.nbytes), rounds=3)
    print("  GFLOP/s:", {k: round(6 * rows * width * vocab / v["median_ms"] / 1e6, 1) for k, v in results.items()})
