"""A fused step says what the model says; weights that were moved for it are still the model's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fused_checks
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from memdec.decoding import fusing
from memdec.decoding.cache import slot_cache
from memdec.decoding.fusing import fused_step, qualifies

everyone = pytest.mark.parametrize("name", fused_checks.MODELS)
paths = pytest.mark.parametrize("path", fused_checks.PATHS)


@everyone
@pytest.mark.parametrize("count", [1, 3])
@paths
def test_says_what_the_model_says(name: str, count: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_checks.go_by(path, monkeypatch)
    fused_checks.assert_same(fused_checks.tiny(name), count, 2e-5)


@everyone
@paths
def test_rounds_as_the_model_does(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: on the CPU the twins round at the same places, and products of several weights may differ."""
    fused_checks.go_by(path, monkeypatch)
    fused_checks.assert_same(fused_checks.tiny(name).to(torch.bfloat16), 3, 0.1)


@pytest.mark.parametrize("rows, count, room, wanted", [(1, 8, 16, "few"), (2, 4, 17, "far"), (3, 3, 16, "many")])
def test_which_way_a_step_goes(rows: int, count: int, room: int, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of rows times tokens, and by the room."""
    called = {"norm_linear": "few", "cached_attention": "near", "rotate_and_store": "far", "silu_mul": "many"}
    found = set()
    for name, what in called.items():
        function = getattr(fusing, name)
        monkeypatch.setattr(fusing, name, lambda *given, f=function, w=what: (found.add(w), f(*given))[1])
    monkeypatch.setattr(fusing, "NEAR", 16)
    model = fused_checks.tiny("llama")
    step, (cache, _) = fused_step(model), slot_cache(model, room)
    assert step is not None
    at = torch.arange(count).expand(rows, count)
    step(at, at, at, torch.arange(room) > at[..., None], cache)
    assert found == {"few": {"few", "near"}, "far": {"few", "far"}, "many": {"many", "far"}}[wanted]


def test_without_a_prompt() -> None:
    """The cache is made by the first step."""
    model = fused_checks.tiny("llama")
    step, (cache, _) = fused_step(model), slot_cache(model, 8)
    assert step is not None
    first = torch.zeros(2, 1, dtype=torch.int64)
    hidden = (torch.arange(8) > 0).expand(2, 1, 8)
    logits = step(torch.tensor([[5], [9]]), first, first, hidden, cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([[5], [9]])).logits, rtol=2e-5, atol=2e-5)
    assert all(layer.keys.shape == (2, 2, 8, 12) for layer in cache.layers)


# -- weights side by side --------------------------------------------------------------------------------------------


def are_side_by_side(model: nn.Module) -> bool:
    """By their addresses."""
    groups = [[f"self_attn.{part}_proj" for part in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]]
    return all(
        one.data_ptr() + one.nbytes == other.data_ptr()
        for block in model.model.layers
        for group in groups
        for kind in ("weight", "bias")
        for one, other in pairwise([getattr(block.get_submodule(name), kind) for name in group])
        if one is not None
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_values(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.fixture
def moved() -> tuple[Any, dict[str, Tensor]]:
    """A model with tied embeddings and biases whose weights lie side by side, and their values."""
    model = fused_checks.tiny("qwen2")
    wanted = values(model)
    assert not are_side_by_side(model) and fused_step(model) is not None and are_side_by_side(model)
    return model, wanted


def test_parameters_stay_what_they_are(moved: tuple[Any, dict[str, Tensor]]) -> None:
    """A second step moves nothing; of the weights there is one copy."""
    model, wanted = moved
    assert_values(model, wanted)
    places = {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()}
    assert fused_step(model) is not None
    assert places == {name: (id(weight), weight.data_ptr()) for name, weight in model.named_parameters()}
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())
    stores = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    assert len(stores) == len(list(model.parameters()))
    assert sum(stores.values()) == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_saved_by_transformers(moved: tuple[Any, dict[str, Tensor]], shard: str, tmp_path: Path) -> None:
    model, wanted = moved
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert_values(AutoModelForCausalLM.from_pretrained(tmp_path), wanted)


def test_saved_by_others(tmp_path: Path) -> None:
    """safetensors refuses tensors that are parts of one storage, and accelerate leaves all but one out."""
    model = fused_checks.tiny("qwen2", tie_word_embeddings=False)
    wanted = values(model)
    assert fused_step(model) is not None and are_side_by_side(model)
    save_file(model.state_dict(), tmp_path / "file")
    save_model(model, str(tmp_path / "model"))
    Accelerator().save_model(model, tmp_path)
    for path in ("file", "model", "model.safetensors"):
        saved = load_file(tmp_path / path)
        assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], value) for name, value in wanted.items())
    torch.save(model.state_dict(), tmp_path / "torch")
    assert (tmp_path / "torch").stat().st_size < 1.1 * sum(value.nbytes for value in wanted.values()) + 20_000


def test_copied_and_moved_elsewhere(moved: tuple[Any, dict[str, Tensor]]) -> None:
    """The copies lie elsewhere, and are put side by side when they are asked for a step."""
    model, wanted = moved
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert_values(other, wanted)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        fused_checks.assert_same(other, 3, 2e-5)
        assert are_side_by_side(other)
    with torch.no_grad():
        copy.deepcopy(model).model.layers[0].mlp.up_proj.weight.zero_()
    assert_values(model, wanted)


def test_a_weight_is_replaced(moved: tuple[Any, dict[str, Tensor]]) -> None:
    """A step that was made before sees it, and so does one whose weights were loaded in place."""
    model, wanted = moved
    step = fused_step(model)
    assert step is not None
    model.load_state_dict({name: 0.5 * value for name, value in wanted.items()})
    assert are_side_by_side(model)
    fused_checks.assert_same(model, 1, 2e-5)
    model.model.layers[1].self_attn.k_proj.weight.data = torch.ones(24, 48)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(80, 48))
    assert not are_side_by_side(model)
    cache, _ = slot_cache(model, 4)
    first = torch.zeros(1, 1, dtype=torch.int64)
    logits = step(torch.tensor([[5]]), first, first, (torch.arange(4) > 0)[None, None], cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([[5]])).logits, rtol=2e-5, atol=2e-5)


def test_trained_on(moved: tuple[Any, dict[str, Tensor]]) -> None:
    """A training step does to moved weights what it does to others, also where they were moved in inference mode."""
    plain, model = fused_checks.tiny("qwen2"), moved[0]
    late = fused_checks.tiny("qwen2")
    with torch.inference_mode():
        assert fused_step(late) is not None
    assert are_side_by_side(late) and not any(weight.is_inference() for weight in late.parameters())
    ids = torch.arange(10)[None]
    for one in (plain, model, late):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(ids, labels=ids).loss.backward()
        optimizer.step()
    assert are_side_by_side(model)
    for one in (model, late):
        for name, value in values(plain).items():
            torch.testing.assert_close(one.state_dict()[name], value)


# -- who is left alone -----------------------------------------------------------------------------------------------


def shared(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def mixed(model: Any) -> None:
    model.model.norm.double()


def other_linear(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def other_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def other_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.RMSNorm(48)


def one_more(model: Any) -> None:
    model.model.layers[1].self_attn.gate = nn.Linear(48, 4)


def one_less(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def less_bias(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.bias = None


def other_attention(model: Any) -> None:
    model.config._attn_implementation = "eager"


def own(model: Any) -> None:
    model.__class__ = type("Qwen2ForCausalLM", (type(model),), {"__module__": "elsewhere"})


@pytest.mark.parametrize(
    "change",
    [shared, mixed, other_linear, other_activation, other_norm, one_more, one_less, less_bias, other_attention, own],
    ids=lambda change: change.__name__,
)
def test_what_computes_otherwise_does_not_qualify(change: Callable[[Any], None]) -> None:
    model = fused_checks.tiny("qwen2")
    assert qualifies(model)
    change(model)
    wanted = values(model)
    assert not qualifies(model) and fused_step(model) is None
    assert_values(model, wanted)


def test_other_models_do_not_qualify(tiny_gpt2: Callable[..., Any]) -> None:
    windows = fused_checks.tiny("mistral", sliding_window=8)
    partly = fused_checks.tiny("llama")
    partly.model.rotary_emb.inv_freq = partly.model.rotary_emb.inv_freq[:3]
    assert not any(map(qualifies, (windows, partly, tiny_gpt2())))


def test_adapted_models_do_not_qualify() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(fused_checks.tiny("qwen2"), peft.LoraConfig(target_modules=["q_proj"]))
    assert not qualifies(adapted) and not qualifies(adapted.get_base_model())


def test_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, moved: tuple[Any, dict[str, Tensor]]) -> None:
    """The model stays as it is and goes without."""
    model = fused_checks.tiny("qwen2")

    def full(tensors: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fusing.torch, "cat", full)
    assert fused_step(model) is None
    monkeypatch.undo()
    assert_values(model, moved[1])
