"""Keys: what the model holds just before its last MLP, from one forward without the output head.

φ(x) is the *input of the last block's MLP*, after its norm (the best of the layers that Khandelwal et al., arXiv
1911.00172, tried).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.modeling.structure import input_device, last_mlp, trunk


def hidden_and_keys(
    model: nn.Module,
    input_ids: Tensor,  # (B, L) int
    layer: str | None = None,
    attention_mask: Tensor | None = None,  # (B, L), 1 where a token counts
) -> tuple[Tensor, Tensor]:
    """Final hidden states and keys of every position, in the model's dtype, without gradient.

    Args:
        model: a transformers causal LM, or one that wraps it; its output head is not run.
        input_ids: token ids; on any device, they are moved to the model's.
        layer: name of the module whose input is the key; None finds the last block's MLP.
        attention_mask: 1 for tokens, 0 for padding; None when nothing is padded.

    Returns:
        The final hidden states (B, L, d), from which the output head makes logits, and the keys (B, L, d_key).

    Raises:
        MemdecError: no such layer, or it was not called exactly once in a forward.

    Example:
        >>> hidden, keys = hidden_and_keys(model, torch.tensor([[1, 2, 3]]))   # doctest: +SKIP
        >>> keys.shape                                                         # doctest: +SKIP
        torch.Size([1, 3, 576])
    """
    name, module = last_mlp(model, layer)
    with captured_inputs(module) as captured, torch.no_grad():
        body = trunk(model)
        device = input_device(model)
        mask = None if attention_mask is None else attention_mask.to(device)
        ids = input_ids.to(device=device, dtype=torch.long)
        hidden: Tensor = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    if len(captured) != 1:
        raise MemdecError(
            f"the module {name} was called {len(captured)} times in one forward, so its input is not one key "
            "a position; name another module with --layer."
        )
    keys = captured[0]
    if not keys.is_floating_point() or keys.shape[:-1].numel() != input_ids.numel():
        raise MemdecError(
            f"the input of the module {name} is {tuple(keys.shape)} of {keys.dtype}, not one key of numbers for each "
            f"of {input_ids.numel()} positions; name another module with --layer."
        )
    # Some models flatten the positions before their MLP.
    return hidden, keys.reshape(*input_ids.shape, keys.shape[-1])


@contextmanager
def captured_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, each call of `module` adds its input, the first tensor among its arguments, to the list yielded."""
    captured: list[Tensor] = []

    def capture(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        captured.append(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    handle = module.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()
