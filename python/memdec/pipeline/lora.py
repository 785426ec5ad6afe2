"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on every linear map of a model but its output head.

    W' = W + s·B·A,   A (r, in), B (out, r), s = 2; B starts at 0, so the model starts as it is

peft puts the adapters into the model and trains nothing else. What is saved is the model with the adapters added to its
weights, a plain transformers folder like any other, in float32 so that a small B·A is not rounded away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.modeling.structure import output_head
from memdec.pipeline.checkpoints import saved_buffers

SCALE = 2
_BASE = ".base_layer"


def add_adapters(model: Any, rank: int, seed: int = 0) -> None:
    """Put adapters of `rank` into `model`, in place, and freeze everything else.

    Args:
        model: a transformers causal LM.
        rank: r, at least 1; of a map that is narrower, its width.
        seed: of A.

    Raises:
        MemdecError: peft is not installed, or the model has no linear map that it knows.
    """
    peft = load_peft()
    if rank < 1:
        raise MemdecError(f"lora-rank is {rank}; wanted at least 1.")
    names = [name for name, _ in adapted_maps(model)]
    if not names:
        raise MemdecError(f"{type(model).__name__} has no linear map for an adapter.")
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def load_peft() -> Any:
    """The module peft, which may not be installed."""
    try:
        import peft
    except ImportError as error:
        raise MemdecError("LoRA needs the package peft: pip install 'memdec[rivals]', or leave lora out.") from error
    return peft


def adapted_maps(model: Any) -> list[tuple[str, Any]]:
    """The linear maps that get adapters, by name: all but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = output_head(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def parameters_per_rank(model: Any) -> int:
    """How many parameters adapters of rank 1 have: Σ (in + out) over the maps."""
    return sum(sum(module.weight.shape) for _, module in adapted_maps(model))


def matched_rank(model: Any, parameters: int) -> int:
    """The rank whose adapters come nearest to `parameters` from below: at least 1, at most the model's width."""
    maps = adapted_maps(model)
    if not maps:
        raise MemdecError(f"{type(model).__name__} has no linear map for an adapter.")
    widest = max(min(module.weight.shape) for _, module in maps)
    return max(1, min(parameters // parameters_per_rank(model), int(widest)))


def merged_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Parameters and saved buffers by the names of the model without adapters, the adapters added in float32."""
    merged: list[tuple[str, Tensor]] = []
    added = {
        f"{name}.weight": module.get_delta_weight("default").float()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *saved_buffers(model)]:
        if "lora_" in name:
            continue
        plain = name.replace(_BASE, "")
        merged.append((plain, tensor.detach().float() + added[plain] if plain in added else tensor))
    return merged
