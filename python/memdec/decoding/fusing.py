"""A step of fewer kernels, for the families whose blocks are Llama's: what a GPU waits for when few rows are computed.

As transformers writes it, a block of Llama or Qwen is some forty kernels, most of which touch a few kilobytes and take
the time of their launch, in a CUDA graph as well. Three things are written otherwise while a step is captured:

- a norm is one kernel instead of eight, and the rotation of queries and keys five instead of ten (both round less often
  than the originals in half precision);
- the query heads that share a key head are rows of one attention, so that keys and values are not copied for each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
ATTENTION = "memdec_grouped"


def group_of(model: Any) -> int | None:
    """Query heads that share a key head, where steps of the model can be fused; None where they cannot."""
    config = model.config
    blocks = sys.modules[type(model).__module__]
    if config.model_type not in FAMILIES or not hasattr(blocks, "apply_rotary_pos_emb"):
        return None
    if config._attn_implementation != "sdpa" or getattr(config, "partial_rotary_factor", 1.0) != 1.0:
        return None
    group: int = config.num_attention_heads // config.num_key_value_heads
    return group


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Within it a forward takes fewer kernels, and a mask of (B, 1, group·n, keys), the heads of a group outermost."""
    norms = [module for module in model.modules() if type(module).__name__ in NORMS]
    before = model.config._attn_implementation
    blocks: Any = sys.modules[type(model).__module__]  # whose attention calls a function of the module's
    rotate = blocks.apply_rotary_pos_emb
    try:
        blocks.apply_rotary_pos_emb = _rotate
        for norm in norms:
            norm.__dict__["forward"] = _forward(norm)
        model.config._attn_implementation = ATTENTION
        yield
    finally:
        model.config._attn_implementation = before
        blocks.apply_rotary_pos_emb = rotate
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _forward(norm: nn.Module) -> Any:
    weight: Any = norm.weight
    epsilon: Any = norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, epsilon)

    return forward


def _rotate(
    query: Tensor,  # (B, heads, n, dim)
    key: Tensor,  # (B, key heads, n, dim)
    cos: Tensor,  # (B, n, dim)
    sin: Tensor,  # (B, n, dim)
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, in one go."""
    both, half = torch.cat((query, key), 1), query.shape[-1] // 2
    turned = torch.cat((-both[..., half:], both[..., :half]), -1)
    out = torch.addcmul(both * cos.unsqueeze(unsqueeze_dim), turned, sin.unsqueeze(unsqueeze_dim))
    return out[:, : query.shape[1]], out[:, query.shape[1] :]


def _attend(
    module: Any,
    query: Tensor,  # (B, heads, n, dim)
    key: Tensor,  # (B, key heads, keys, dim)
    value: Tensor,  # (B, key heads, keys, dim)
    attention_mask: Tensor,  # (B, 1, group·n, keys), added
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, key heads, group·n) rows; what comes out is (B, n, heads, dim), as transformers wants it."""
    rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
