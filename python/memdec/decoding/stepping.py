"""A step of a model on the CPU in one call of the extension, for the families whose blocks are Llama's.

As transformers writes it, a step of a small model is a thousand calls of PyTorch, between which the memory is idle, and
the reading of the weights is less than half of its time. Here the extension is told where the weights and the cache
lie, and does the rest: see csrc/cpu/decode_step.cpp. Nothing is copied, and no weight is rearranged.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from memdec import _C
from memdec.decoding.cache import begin_without_prompt
from memdec.decoding.fusing import qualifies
from memdec.decoding.packing import packed_linears
from memdec.decoding.support import rotates_by_length, why_not_itself
from memdec.errors import MemdecError
from memdec.ops.launch import run
from memdec.ops.rows import DTYPE_CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TURNS = 256  # positions whose turns are computed at once
MOST_ROWS = 16  # texts times tokens; of more, PyTorch's products are the faster ones


class _Steps(threading.local):
    """Those of the models that this thread is within :func:`quick_steps` of."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, CpuStep] = WeakKeyDictionary()


_STEPS = _Steps()


@contextmanager
def quick_steps(*models: Any) -> Iterator[None]:
    """Within it, steps of `models` that lie on the CPU are quick ones: :func:`step_of`, or else packed products."""
    found = {model: step for model in models if (step := cpu_step(model)) is not None}
    before = WeakKeyDictionary(_STEPS.of)
    try:
        _STEPS.of.update(found)
        with packed_linears(*(model for model in models if model not in found)):
            yield
    finally:
        _STEPS.of = before


def step_of(model: Any) -> CpuStep | None:
    """The model's step, within :func:`quick_steps` and where it has one."""
    return _STEPS.of.get(model)


def cpu_step(model: Any) -> CpuStep | None:
    """A step of a model on the CPU; None where it is elsewhere or does not compute what such a step does.

    ``MEMDEC_STEP=0`` in the environment does without.
    """
    if os.environ.get("MEMDEC_STEP", "") == "0" or torch.is_autocast_enabled("cpu"):
        return None
    if next(model.parameters()).device.type != "cpu" or why_not_itself(model) is not None:
        return None
    if not qualifies(model) or type(model.lm_head) is not nn.Linear:
        return None
    weights = list(model.parameters())
    if any(not weight.is_cpu or not weight.is_contiguous() for weight in weights) or weights[0].dtype not in DTYPES:
        return None
    if len({part.variance_epsilon for part in model.modules() if hasattr(part, "variance_epsilon")}) != 1:
        return None
    if len({block.self_attn.scaling for block in model.model.layers}) != 1:
        return None
    return CpuStep(model)


class CpuStep:
    """A forward of few tokens of a model that :func:`cpu_step` lets pass, behind what its cache holds.

    Args:
        model: whose weights are read where they lie now; what is assigned afterwards is not seen.
    """

    def __init__(self, model: Any) -> None:
        inner = model.model
        attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
        self.embed, self.rotary = inner.embed_tokens, inner.rotary_emb
        self.dim: int = attention.head_dim
        self.key_heads: int = attention.k_proj.out_features // self.dim
        self.shape = (
            len(inner.layers),
            attention.q_proj.in_features,
            attention.q_proj.out_features // self.dim,
            self.key_heads,
            self.dim,
            mlp.gate_proj.out_features,
        )
        self.scale = float(attention.scaling)
        self.epsilon = float(inner.norm.variance_epsilon)
        self.dtype = inner.norm.weight.dtype
        # Not the parameters, whose memory may be replaced, but what has the memory, so that the addresses stay theirs.
        self.weights = [tuple(map(_held, _weights(block))) for block in inner.layers]
        self.table = array("q", (address for layer in self.weights for address in (*map(_address, layer), 0, 0, 0)))
        # What a step would make anew with a hundred small calls, which cost several times as much behind a forward,
        # whose weights have driven their code from the processor's caches: the table with a cache's addresses, and
        self.addresses: tuple[list[Any], array[int]] = ([], self.table)
        # the turns of positions: (N, 2·dim), their cosines and their sines, or None where they depend on the length.
        self.turns = None if rotates_by_length(model) else inner.norm.weight.new_empty(0, 2 * self.dim)
        self.mlps = [block.mlp for block in inner.layers]
        self.watched: int | None = None
        self.caught: Tensor | None = None  # (B, n, hidden), what the watched layer's MLP has read in the last step
        self.last = tuple(map(_held, (inner.norm.weight, model.lm_head.weight, model.lm_head.bias)))
        self.most_tokens = len(model.lm_head.weight)

    def watch(self, module: nn.Module) -> bool:
        """Keep from now on what a module reads, in `caught`; whether it is one that a step knows: a layer's MLP."""
        self.watched = next((i for i, mlp in enumerate(self.mlps) if mlp is module), None)
        return self.watched is not None

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache,
        vocab_size: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, n, vocab_size) after each of the tokens, which are appended to the cache.

        Args:
            tokens: (B, n) int64.
            positions: (B, n).
            mask: (B, filled + n) int64, 0 where nobody looks, or None; `filled` is what the cache holds.
            cache: of RollbackLayers.
            vocab_size: tokens of which logits are wanted, the first ones; no more than the head has.
            out: (B, n, vocab_size) to write them to, whose texts may be any number of elements apart.

        Raises:
            MemdecError: the model was converted meanwhile.
        """
        rows, count = tokens.shape
        vocab_size = min(vocab_size, self.most_tokens)
        x = self.embed(tokens)
        if x.dtype != self.dtype or not x.is_cpu:
            raise MemdecError(
                f"A model was converted from {self.dtype} on the CPU to {x.dtype} on {x.device} while it was writing: "
                "do that between calls of generate."
            )
        begin_without_prompt(cache, x, rows, self.key_heads, self.dim)
        table = self.with_cache(cache, count)
        if self.watched is not None:
            self.caught = torch.empty_like(x)
            table = table[:]
            table[(self.watched + 1) * (len(table) // len(cache.layers)) - 1] = self.caught.data_ptr()
        filled: int = cache.layers[0].length
        turns = self.turns_of(x, positions, filled + count)
        if out is None:
            out = x.new_empty(rows, count, vocab_size)
        run(
            _C.decode_step,
            x.device,
            DTYPE_CODES[self.dtype],
            rows,
            count,
            (*self.shape, vocab_size),
            cache.layers[0].room,
            filled,
            table.buffer_info()[0],
            self.epsilon,
            self.scale,
            x.data_ptr(),
            turns.data_ptr(),
            turns.data_ptr() + self.dim * turns.element_size(),
            2 * self.dim,
            _address(mask),
            0 if mask is None else mask.stride(0),
            *map(_address, self.last),
            out.data_ptr(),
            out.stride(0),
        )
        for layer in cache.layers:
            layer.length += count
        return out

    def with_cache(self, cache: Cache, count: int) -> array[int]:
        """The table of addresses with those of a cache, which gets room for `count` more tokens."""
        layers = cache.layers
        if any(layer.length + count > layer.room for layer in layers):  # of all: one may have failed to grow
            self.addresses = ([], self.table)  # so that a layer's old memory is free once it is copied
            for layer in layers:
                layer.reserve(count)
        stores = [layer.stores for layer in layers]
        known, table = self.addresses
        if len(known) != len(stores) or not all(map(is_, known, stores)):
            table = self.table[:]
            width = len(table) // len(layers)
            for i, (keys, values) in enumerate(stores):
                table[(i + 1) * width - 3] = keys.data_ptr()
                table[(i + 1) * width - 2] = values.data_ptr()
            self.addresses = (stores, table)  # they are kept alive, so that no other list is taken for one of them
        return table

    def turns_of(self, x: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Cosines and sines (B, n, 2·dim) of positions (B, n) or (1, n), all below `longest`."""
        turns = self.turns
        if turns is None:
            parts = self.rotary(x, positions)
            return torch.cat([part.expand(len(x), -1, -1) for part in parts], -1)
        while len(turns) < longest:
            more = self.rotary(x, torch.arange(len(turns), len(turns) + TURNS, device=x.device)[None])
            self.turns = turns = torch.cat([turns, torch.cat(more, -1)[0]])
        return torch.embedding(turns, positions.expand(len(x), -1))


def _weights(block: Any) -> tuple[Tensor | None, ...]:
    """Of a layer, as `StepLayer` in csrc/memdec.h has them."""
    attention, mlp = block.self_attn, block.mlp
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    norms = (getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm"))
    return (
        block.input_layernorm.weight,
        *(tensor for part in (query, key, value) for tensor in (part.weight, part.bias)),
        *norms,
        attention.o_proj.weight,
        attention.o_proj.bias,
        block.post_attention_layernorm.weight,
        *(tensor for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) for tensor in (part.weight, part.bias)),
    )


def _held(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
