"""The products of a decoding step of a few tokens: Qwen2.5's 0.5B, 1.5B and 7B shapes, in a CUDA graph.

A graph holds as many products as there are weights, which together do not fit in the second-level cache. cuBLAS's time
is of the bare product, without norm, gate or residual, which ours has. Wanted is what reading the weights takes.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from bench_decoding_step import replayed
from memdec.decoding import kernels
from memdec.decoding.bench import SHAPES
from memdec.decoding.products import linear_of_rows

SIZES = {"cpu": {"rows": [3]}, "cuda": {"rows": [1, 3]}}
PRODUCTS = ("query_key_value", "output", "gate_up", "down")


def sizes(shape, product):
    """Outputs and width of a weight."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    key_value = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "query_key_value": (hidden + 2 * key_value, hidden),
        "output": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }[product]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"])
def bench_linear_of_rows(compare, device, rows, shape, product):
    if device != "cuda":
        pytest.skip("its kernel is for a GPU")
    outputs, width = sizes(SHAPES[shape], product)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(4, 3 * cache // (2 * outputs * width))
    weights = [(one,) for one in torch.randn(count, outputs, width, dtype=torch.bfloat16)]
    x, norm = torch.randn(rows, width, dtype=torch.bfloat16), torch.randn(width, dtype=torch.bfloat16)
    normed, gated = product in ("query_key_value", "gate_up"), product == "gate_up"
    residual = None if normed else torch.randn(rows, outputs, dtype=torch.bfloat16)

    def ours(weight):
        return linear_of_rows(x, weight, None, norm if normed else None, 1e-6, residual, gated)

    def in_a_step(weight):
        if gated:
            return kernels.norm_gate_up(x, norm, 1e-6, weight, None)
        if normed:
            return kernels.norm_linear(x, norm, 1e-6, weight, None)
        return kernels.linear_add(x, weight, None, residual)

    ways = {"memdec": ours, "cuBLAS, the product alone": lambda weight: linear(x, weight)}
    if rows == 1:
        ways["memdec, as a step of one row chooses"] = in_a_step
    contestants = {name: replayed(way, weights) for name, way in ways.items()}
    case = {"shape": [rows, outputs, width], "dtype": "bfloat16", "graph": True, "product": f"{shape} {product}"}
    compare("linear_of_rows", case, contestants, 2 * outputs * width, calls=count)
