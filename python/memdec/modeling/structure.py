"""What a causal LM is made of, found by structure and not by a table of model names.

    trunk  ──▶ hidden (B, L, d) ──▶ output head ──▶ logits (B, L, V)
      └─ blocks[-1] ── its MLP: the child with weight matrices that does not attend

A block's attention (or any other mixer of positions) shows itself by its call signature: it takes a mask or a cache.
What is left with weight matrices of its own is the position-wise part: one module (`mlp`, `ffn`, a mixture of experts)
or, in blocks that have no module for it, the linear layers themselves (`fc1`, `fc2`): the first gets the MLP's input.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError

# Arguments that only a module which looks at other positions needs.
MIXER_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "cache",
        "past_key_values",
        "past_key_value",
        "layer_past",
        "cache_params",
        "alibi",
        "position_embeddings",
    }
)
MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "moe")


def trunk(model: nn.Module) -> nn.Module:
    """The model without its output head: maps input ids (B, L) to the final hidden states (B, L, d).

    Raises:
        MemdecError: the model has no trunk apart from itself.
    """
    found = getattr(bare(model), "base_model", None)
    if isinstance(found, nn.Module) and found is not bare(model):
        return found
    raise MemdecError(
        f"{type(model).__name__} has no trunk that can be run without its output head; "
        "memdec needs a transformers causal LM (AutoModelForCausalLM)."
    )


def bare(model: nn.Module) -> Any:
    """The transformers model inside an adapter's wrapper (peft), adapters included; another model is itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(bare(model).forward).parameters


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids: where its embeddings are.

    Weights that accelerate keeps elsewhere (offloaded) are on "meta"; its hooks then take ids from the CPU.
    """
    embeddings = bare(model).get_input_embeddings()
    found = next(iter(embeddings.parameters()), next(model.parameters())).device
    return torch.device("cpu") if found.type == "meta" else found


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states (N, d) to logits (N, V): a linear layer, tied to the embedding or not.

    Raises:
        MemdecError: the model has none.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module):
        return head
    raise MemdecError(
        f"{type(model).__name__} has no output head; memdec needs a causal LM, not a bare trunk "
        "(load it with AutoModelForCausalLM)."
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part, which for a text model is its configuration."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def key_width(model: nn.Module) -> int:
    """Width d of a key: of the input of a block's MLP, which is the model's hidden size."""
    return int(text_config(model).hidden_size)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's transformer blocks, with its dotted name inside `model`.

    Raises:
        MemdecError: the model has no such list.
    """
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    names = [name for name, _ in lists]
    # Lists inside blocks (experts, heads) are no blocks.
    outer = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(other + ".") for other in names if other != name)
    ]
    layers = getattr(text_config(model), "num_hidden_layers", None)
    matching = [(name, module) for name, module in outer if len(module) == layers]
    # A model that also sees or hears has several lists; the text decoder's is registered last.
    chosen = matching or sorted(outer, key=lambda pair: len(pair[1]))
    if not chosen:
        raise MemdecError(
            f"{type(model).__name__} has no list of blocks; name the module whose input is the key (--layer)."
        )
    return chosen[-1]


def last_mlp(model: nn.Module, override: str | None = None) -> tuple[str, nn.Module]:
    """The module whose input is the key: the last block's MLP, with its dotted name inside `model`.

    Args:
        model: a transformers causal LM.
        override: name of the module to take instead, as in ``model.named_modules()``.

    Raises:
        MemdecError: there is no module called `override`, or none looks like the last block's MLP.
    """
    if override is not None:
        try:
            return override, model.get_submodule(override)
        except AttributeError:
            raise MemdecError(
                f"--layer {override}: {type(model).__name__} has no module of that name; "
                f"its last block is called {'.'.join(blocks_path(model))}."
            ) from None
    path = blocks_path(model)
    block = model.get_submodule(".".join(path))
    candidates = [
        (name, child) for name, child in block.named_children() if has_matrix(child) and not mixes_positions(child)
    ]
    named = [(name, child) for name, child in candidates if any(part in name.lower() for part in MLP_NAMES)]
    if not named and all(is_linear(child) for _, child in candidates):
        # The linear layers of an MLP stand in the block itself; the one that widens comes first.
        named = [(name, child) for name, child in candidates if matrix_width(child) >= key_width(model)]
    found = named or candidates
    if not found:
        raise MemdecError(
            f"the last block of {type(model).__name__} ({'.'.join(path)}) has no MLP that its structure shows; "
            f"name the module whose input is the key with --layer, one of: "
            f"{', '.join('.'.join([*path, name]) for name, _ in block.named_children())}."
        )
    name, module = found[0]
    return ".".join([*path, name]), module


def blocks_path(model: nn.Module) -> list[str]:
    """The dotted name of the last block, in parts."""
    name, found = blocks(model)
    return [*name.split("."), str(len(found) - 1)]


def has_matrix(module: nn.Module) -> bool:
    """Whether the module has a weight of two or more dimensions: norms, dropouts and activations have none."""
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one weight matrix and nothing below it."""
    return not any(True for _ in module.children()) and sum(p.ndim >= 2 for p in module.parameters()) == 1


def matrix_width(linear: nn.Module) -> int:
    """Output width of a linear layer, whichever way round its weight is stored."""
    stated = getattr(linear, "out_features", None)
    return int(stated if stated is not None else max(cast(Tensor, linear.weight).shape))


def mixes_positions(module: nn.Module) -> bool:
    """Whether the module takes what only a mixer of positions needs: a mask, a cache, position embeddings."""
    return not MIXER_ARGUMENTS.isdisjoint(inspect.signature(module.forward).parameters)


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are its output head's output and nothing else is done to them.

    False for models that scale or soft-cap their logits after the head: the head of those cannot be fused with a loss,
    and logits are had through :func:`logits_from_hidden`.
    """
    mode = model.training
    model.eval()
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        # Scaling and capping leave small logits almost alone; large ones give them away.
        hidden = torch.linspace(-64, 64, hidden.shape[-1]).expand_as(hidden).to(hidden)
        head = output_head(model)
        return torch.equal(head(hidden).float(), logits_from_hidden(model, hidden).float())
    finally:
        model.train(mode)


def logits_from_hidden(
    model: nn.Module,
    hidden: Tensor,  # (B, L, d) final hidden states
) -> Tensor:  # (B, L, V)
    """The logits that `model` itself makes of given final hidden states, whatever it does besides its output head.

    Runs the model on one token per row and puts `hidden` in the place of its trunk's output: a model's own forward is
    the only full account of what it does between hidden states and logits (soft caps, scales, biases).
    """

    def substitute(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    handle = trunk(model).register_forward_hook(substitute)
    try:
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=input_device(model))
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits)
    finally:
        handle.remove()
