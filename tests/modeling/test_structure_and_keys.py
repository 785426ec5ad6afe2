"""The key is the input of the last block's MLP, in whatever family, recomputed from the model's own parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from memdec import MemdecError
from memdec.modeling.keys import hidden_and_keys
from memdec.modeling.structure import blocks, head_is_plain, key_width, last_mlp, logits_from_hidden, output_head, trunk

WIDTH = 32
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Family: what differs from COMMON (None: an argument the family does not take), and the name of the last block's MLP.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "model.layers.2.mlp"),
    "qwen2": ({}, "model.layers.2.mlp"),
    "qwen3": ({}, "model.layers.2.mlp"),
    "mistral": ({}, "model.layers.2.mlp"),
    "gemma2": ({"query_pre_attn_scalar": 8}, "model.layers.2.mlp"),
    "gemma3_text": ({"query_pre_attn_scalar": 8}, "model.layers.2.mlp"),
    "phi": ({}, "model.layers.2.mlp"),
    "phi3": ({}, "model.layers.2.mlp"),
    "olmo2": ({}, "model.layers.2.mlp"),
    "gpt_neox": ({}, "gpt_neox.layers.2.mlp"),
    "gpt2": ({"n_embd": WIDTH, "n_layer": 3, "n_head": 4}, "transformer.h.2.mlp"),
    "gptj": ({"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "rotary_dim": 4}, "transformer.h.2.mlp"),
    "gpt_bigcode": ({"n_embd": WIDTH, "n_layer": 3, "n_head": 4}, "transformer.h.2.mlp"),
    "gpt_neo": ({"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]}, "transformer.h.2.mlp"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, "model.decoder.layers.2.fc1"),
    "bloom": ({"n_layer": 3, "n_head": 4}, "transformer.h.2.mlp"),
    "falcon": ({"new_decoder_architecture": False, "head_dim": None}, "transformer.h.2.mlp"),
    "mpt": ({"d_model": WIDTH, "n_layers": 3, "n_heads": 4}, "transformer.blocks.2.ffn"),
    "mixtral": ({"num_local_experts": 4}, "model.layers.2.mlp"),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "model.layers.2.mlp",
    ),
    "granite": ({"logits_scaling": 4.0}, "model.layers.2.mlp"),
    "cohere": ({"logit_scale": 0.5}, "model.layers.2.mlp"),
    "stablelm": ({}, "model.layers.2.mlp"),
}


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES[family][0]}
    config = AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not None})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_is_the_input_of_the_last_mlp(family: str) -> None:
    model = make_model(family)
    name, module = last_mlp(model)
    assert name == FAMILIES[family][1]
    ids = torch.randint(3, 64, (2, 7))
    expected: list[Tensor] = []
    inner = model.get_submodule(FAMILIES[family][1])
    original = inner.forward

    def spying(*arguments: Any, **named: Any) -> Any:  # an independent way in: the MLP's own forward
        expected.append((arguments[0] if arguments else named["hidden_states"]).clone())
        return original(*arguments, **named)

    inner.forward = spying
    with torch.no_grad():
        reference = model(input_ids=ids, output_hidden_states=True)
    inner.forward = original
    hidden, keys = hidden_and_keys(model, ids)
    assert keys.shape == (2, 7, WIDTH) == (*ids.shape, key_width(model))
    torch.testing.assert_close(keys, expected[0].reshape(2, 7, WIDTH), rtol=0, atol=0)
    torch.testing.assert_close(hidden, reference.hidden_states[-1], rtol=0, atol=0)
    # The MLP is position-wise: its output at a position depends on that position's key alone.
    first = module(*extra_arguments(family, keys[:, :1]))
    both = module(*extra_arguments(family, keys))
    first, both = (out[0] if isinstance(out, tuple) else out for out in (first, both))
    torch.testing.assert_close(first, both.reshape(2, 7, -1)[:, :1], rtol=1e-5, atol=1e-6)


def extra_arguments(family: str, keys: Tensor) -> tuple[Tensor, ...]:
    """Bloom's and MPT's MLP also take the residual that they add."""
    return (keys, torch.zeros_like(keys)) if family in ("bloom", "mpt") else (keys,)


def test_keys_of_llama_recomputed_from_its_parts() -> None:
    """Independent of any hook: the last block's attention and norm applied by hand to the block's input."""
    model = make_model("llama")
    ids = torch.randint(3, 64, (1, 6))
    with torch.no_grad():
        entering = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        block = model.model.layers[2]
        rotary = model.model.rotary_emb(entering, torch.arange(6)[None])
        mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
        attended = block.self_attn(block.input_layernorm(entering), position_embeddings=rotary, attention_mask=mask)[0]
        expected = block.post_attention_layernorm(entering + attended)
    torch.testing.assert_close(hidden_and_keys(model, ids)[1], expected, rtol=1e-5, atol=1e-6)


def test_left_padding_leaves_keys_alone(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 64, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    # Llama's positions are relative, so a shift changes nothing but rounding.
    torch.testing.assert_close(
        hidden_and_keys(model, padded, attention_mask=mask)[1][:, 3:],
        hidden_and_keys(model, ids)[1],
        rtol=1e-4,
        atol=1e-5,
    )


def test_no_hook_is_left_behind(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    hidden_and_keys(model, torch.tensor([[1, 2]]))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_named_layer_is_taken_instead(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    ids = torch.tensor([[3, 4, 5]])
    _, keys = hidden_and_keys(model, ids, layer="model.layers.0.mlp")
    assert not torch.equal(keys, hidden_and_keys(model, ids)[1])
    with pytest.raises(MemdecError, match=r"--layer nowhere: LlamaForCausalLM has no module of that name"):
        hidden_and_keys(model, ids, layer="nowhere")
    with pytest.raises(MemdecError, match="called 0 times"):
        hidden_and_keys(model, ids, layer="lm_head")


def test_blocks_are_not_experts() -> None:
    name, found = blocks(make_model("qwen2_moe"))
    assert name == "model.layers" and len(found) == 3


def test_a_bare_trunk_is_refused(tiny_llama: Callable[..., Any]) -> None:
    body = trunk(tiny_llama())
    with pytest.raises(MemdecError, match="needs a causal LM"):
        output_head(body)
    with pytest.raises(MemdecError, match="no trunk"):
        trunk(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("family", "plain"),
    [("llama", True), ("gpt2", True), ("phi", True), ("gemma2", False), ("granite", False), ("cohere", False)],
)
def test_what_a_model_does_after_its_head_is_noticed(family: str, plain: bool) -> None:
    model = make_model(family)
    assert head_is_plain(model) is plain
    ids = torch.randint(3, 64, (2, 5))
    hidden, _ = hidden_and_keys(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(logits_from_hidden(model, hidden), model(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
