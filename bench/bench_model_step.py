"""A step of a model of SmolLM2-135M's shape on the CPU: N tokens behind 150, bfloat16 and float32, random weights."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from bench_training import VOCAB, smollm2_shape
from memdec.decoding.bench import bytes_read
from memdec.decoding.engine import Reader
from memdec.decoding.packing import packed_linears
from memdec.decoding.stepping import quick_steps

FILLED, ROOM = 150, 256
SIZES = {"cpu": {"rows": [1, 3, 5, 8]}, "cuda": {"rows": [1]}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def bench_model_step(compare, device, rows, dtype):
    if device != "cpu":
        pytest.skip("a step on a GPU is measured by bench/gpu/decoding.py")
    ids = torch.randint(0, VOCAB, (1, FILLED + rows))
    positions = torch.arange(FILLED + rows)[None]
    with ExitStack() as stack, torch.no_grad():
        contestants = {}
        for name, how in (
            ("memdec", quick_steps),
            ("transformers, packed weights", packed_linears),
            ("transformers", None),
        ):
            model = smollm2_shape().to(dtype).eval()
            if how is not None:
                stack.enter_context(how(model))
            reader = Reader(model, ROOM, VOCAB)
            reader.read(ids[:, :FILLED], None, positions[:, :FILLED], last_only=True)

            def step(reader=reader):
                logits = reader.read(ids[:, FILLED:], None, positions[:, FILLED:])
                reader.cache.crop(-rows)
                return logits

            contestants[name] = step
        case = {"shape": [rows, FILLED], "dtype": str(dtype).removeprefix("torch.")}
        compare("model_step", case, contestants, bytes_read(model))
