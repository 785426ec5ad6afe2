"""What a fused step does between its products: the twins against transformers, and Triton's kernels against the twins.

On a GPU tests/cuda/test_gpu_decoding.py runs Triton's kernels; without one its interpreter does, where it is installed.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DTYPES, numbers
from torch import nn
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from memdec.decoding import kernels

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
def test_add_norm_is_transformers_(dtype: torch.dtype) -> None:
    x, residual, weight = (numbers("cpu", dtype, *shape, seed=i) for i, shape in enumerate([(5, 77), (5, 77), (77,)]))
    norm = qwen3.Qwen3RMSNorm(77, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        for other, total in ((None, x), (residual, x + residual)):
            normed, kept = kernels.add_norm(x, other, weight, 1e-5)
            assert torch.equal(kept, total)
            eps = torch.finfo(dtype).eps  # a unit: PyTorch may sum in another order
            torch.testing.assert_close(normed, norm(total), rtol=eps, atol=eps)


@dtypes
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store_is_transformers_(dtype: torch.dtype, normed: bool) -> None:
    """Three rows of two tokens, five query heads and two key heads; the last row writes before the first two."""
    rows, count, heads, key_heads, dim, room = 3, 2, 5, 2, 16, 7
    merged = numbers("cpu", dtype, rows, count, (heads + 2 * key_heads) * dim)
    angles = numbers("cpu", torch.float32, rows, count, dim // 2, seed=1).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key, value = (
        part.view(rows, count, -1, dim).transpose(1, 2)
        for part in merged.split([heads * dim, key_heads * dim, key_heads * dim], -1)
    )
    norms = None
    if normed:
        made = [qwen3.Qwen3RMSNorm(dim, eps=1e-6).to(dtype) for _ in range(2)]
        for i, norm in enumerate(made):
            norm.weight.data = numbers("cpu", dtype, dim, seed=2 + i)
        norms = (made[0].weight.data, made[1].weight.data, 1e-6)
        query, key = made[0](query).detach(), made[1](key).detach()
    query, key = qwen3.apply_rotary_pos_emb(query, key, cos, sin)
    keys, values = torch.zeros(2, rows, key_heads, room, dim, dtype=dtype)
    slots = torch.tensor([[3, 4], [5, 6], [1, 2]])
    queries = kernels.rotate_and_store(merged, cos, sin, slots, keys, values, norms)
    eps = torch.finfo(dtype).eps if normed else 0
    torch.testing.assert_close(queries, query, rtol=4 * eps, atol=4 * eps)
    for row, places in enumerate(slots.tolist()):
        torch.testing.assert_close(keys[row, :, places], key[row], rtol=4 * eps, atol=4 * eps)
        assert torch.equal(values[row, :, places], value[row])
        others = [slot for slot in range(room) if slot not in places]
        assert not keys[row, :, others].any() and not values[row, :, others].any()


@dtypes
def test_silu_mul_is_transformers_(dtype: torch.dtype) -> None:
    merged = numbers("cpu", dtype, 5, 66)
    gate, up = merged.chunk(2, -1)
    assert torch.equal(kernels.silu_mul(merged), nn.SiLU()(gate) * up)


@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_few_rows_are_transformers_(dtype: torch.dtype, biased: bool) -> None:
    """An attention's part that ends in its output's product, and an MLP, both of normed rows."""
    x, attended = numbers("cpu", dtype, 5, 48), numbers("cpu", dtype, 5, 32, seed=1)
    norm = qwen3.Qwen3RMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data = numbers("cpu", dtype, 48, seed=2)
    mlp = qwen3.Qwen3MLP(qwen3.Qwen3Config(hidden_size=48, intermediate_size=80)).to(dtype)
    linears = [nn.Linear(m, n, biased, dtype=dtype) for m, n in ((48, 80), (48, 80), (80, 48), (48, 70), (32, 48))]
    mlp.gate_proj, mlp.up_proj, mlp.down_proj, first, last = linears
    eps = 2 * torch.finfo(dtype).eps
    with torch.no_grad():
        got = kernels.norm_linear(x, norm.weight, 1e-5, first.weight, first.bias)
        torch.testing.assert_close(got, first(norm(x)), rtol=eps, atol=4 * eps)
        s = kernels.linear_add(attended, last.weight, last.bias, x)
        torch.testing.assert_close(s, x + last(attended), rtol=eps, atol=4 * eps)
        weight = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        bias = torch.cat((mlp.gate_proj.bias, mlp.up_proj.bias)) if biased else None
        gated = kernels.norm_gate_up(s, norm.weight, 1e-5, weight, bias)
        got = kernels.linear_add(gated, mlp.down_proj.weight, mlp.down_proj.bias, s)
        torch.testing.assert_close(got, s + mlp(norm(s)), rtol=eps, atol=4 * eps)


@dtypes
def test_cached_attention_is_by_hand(dtype: torch.dtype) -> None:
    """Of each token by itself, over the slots that it sees, its own and the other's among them."""
    rows, count, heads, key_heads, dim, room = 2, 2, 6, 2, 16, 9
    merged = numbers("cpu", dtype, rows, count, (heads + 2 * key_heads) * dim)
    angles = numbers("cpu", torch.float32, rows, count, dim // 2, seed=1).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    stores = [numbers("cpu", dtype, rows, key_heads, room, dim, seed=seed).contiguous() for seed in (2, 3)]
    copies = [store.clone() for store in stores]
    slots = torch.tensor([[3, 4], [7, 2]])
    hidden = torch.rand(rows, count, room, generator=torch.Generator().manual_seed(4)) < 0.4
    hidden.scatter_(2, slots[..., None], False)
    out = kernels.cached_attention(merged, cos, sin, slots, *stores, hidden, 0.3)
    queries = kernels.rotate_and_store(merged, cos, sin, slots, *copies).double()
    assert all(map(torch.equal, stores, copies))
    for row, token, head in itertools.product(range(rows), range(count), range(heads)):
        seen = ~hidden[row, token]
        keys, values = (store[row, head // 3, seen].double() for store in copies)
        wanted = (0.3 * keys @ queries[row, head, token]).softmax(0) @ values
        got = out.view(rows, count, heads, dim)[row, token, head].double()
        torch.testing.assert_close(got, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_tiles_are_enough_programs_and_fit() -> None:
    """Of widths and numbers of outputs from tiny to those of models of 70B."""
    triton_kernels = pytest.importorskip("memdec.decoding.triton_kernels", reason="Triton is not installed")
    for width, outputs, size in itertools.product((16, 48, 896, 1536, 8960, 28672), (5, 896, 9728, 57344), (2, 4)):
        each, warps = triton_kernels.tile(outputs, width, size)
        assert each & (each - 1) == 0 and warps & (warps - 1) == 0 and 1 <= warps <= 8
        assert each == 1 or outputs >= triton_kernels.ENOUGH * each


def test_triton_s_kernels_interpreted() -> None:
    """In a process of its own: Triton asks whether to interpret when it is loaded."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA only")
    script = Path(__file__).with_name("kernel_checks.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-2:] == ["68", "cases"]


def test_where_triton_does_not_work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and the twins do it."""

    def fails(name: str) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(kernels, "import_module", fails)
    kernels.fast_kernels.cache_clear()
    try:
        for _ in range(2):
            assert kernels.fast_kernels(torch.device("cuda"), torch.float32) is None
    finally:
        kernels.fast_kernels.cache_clear()
    assert caplog.text.count("Triton does not work here: Failed to find C compiler.") == 1
