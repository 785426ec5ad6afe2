"""A fused step beside the model's own forward, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from memdec.decoding import fusing
from memdec.decoding.cache import slot_cache
from memdec.decoding.fusing import fused_step
from memdec.modeling.cache import cache_name

ROOM = 16
PROMPT = 5
# Family, and settings: groups of query heads and none, biases, norms of queries and keys, heads that are not as wide as
# the hidden size has it, a rotation that is scaled, an odd size.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, a key head for each": ("Llama", {"num_key_value_heads": 4, "intermediate_size": 75}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "hidden_size": 44}),
    "llama, yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}

# What a step goes by, and what of fusing.py is to be set for it.
PATHS: dict[str, dict[str, int]] = {
    "few rows": {},
    "few rows, a long room": {"NEAR": ROOM - 1},
    "many rows": {"FEW": 0},
}


def go_by(path: str, monkeypatch: Any) -> None:
    """Steps go by one of the PATHS."""
    for name, value in PATHS[path].items():
        monkeypatch.setattr(fusing, name, value)


def tiny(name: str, **settings: Any) -> Any:
    """One of the MODELS, random weights (norms and biases as well), float32."""
    family, own = MODELS[name]
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{family}Config")(**{**shape, **own, **settings})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def both(model: Any, count: int) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
    """Logits (2, count, V) and caches after `count` tokens behind a prompt, by the model's forward and by a fused step.

    The second row is padded with two tokens on the left; slots behind the tokens hold something that must be hidden.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    ids = torch.randint(0, 97, (2, PROMPT + count), generator=torch.Generator().manual_seed(1)).to(device)
    slots = (PROMPT + torch.arange(count, device=device)).expand(2, count)
    padding = torch.tensor([[0], [2]], device=device)
    columns = torch.arange(ROOM, device=device)
    hidden = (columns > slots[..., None]) | (columns < padding)[:, None]
    step = fused_step(model)
    assert step is not None
    found = []
    for fuse in (False, True):
        cache, where = slot_cache(model, ROOM)
        given = {cache_name(model.forward): cache}
        with torch.no_grad():
            before = (torch.arange(PROMPT, device=device) - padding).clamp(min=0)
            mask = torch.ones(2, PROMPT, dtype=torch.int64, device=device)
            mask[1, :2] = 0
            model(ids[:, :PROMPT], mask, position_ids=before, **given)
            for layer in cache.layers:  # padding that attended to nothing may have become NaN
                layer.clear((columns < padding) | (columns >= PROMPT))
                layer.keys[:, :, PROMPT + count :] = 9.0
            positions = slots - padding
            if fuse:
                logits = step(ids[:, PROMPT:], positions, slots, hidden, cache)
            else:
                where.at = slots
                added = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)
                logits = model(ids[:, PROMPT:], added[:, None], position_ids=positions, **given).logits
        found.append((logits, [store for layer in cache.layers for store in (layer.keys, layer.values)]))
    return found[0], found[1]


def assert_same(model: Any, count: int, tolerance: float) -> None:
    """What a fused step says and stores is what the model's forward does."""
    (plain, plain_stores), (fused, fused_stores) = both(model, count)
    assert not plain.isnan().any() and plain.shape == fused.shape == (2, count, 97)
    assert plain.float().std() > 0.5
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(fused_stores, plain_stores, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
