"""Low-rank adapters: what they start as, what they train, and that the merged weights are the adapted model."""

from __future__ import annotations

import pytest
import torch

from memdec.errors import MemdecError
from memdec.pipeline.checkpoints import save_model
from memdec.pipeline.lora import adapted_maps, add_adapters, matched_rank, merged_tensors, parameters_per_rank

IDS = torch.tensor([[5, 9, 200, 17, 33, 8]])


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_llama, tiny_gpt2):
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]()


def disturb(model) -> None:
    """Give the adapters something to add: B is no longer 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)


def test_it_starts_as_the_model_and_trains_adapters_only(model):
    before = model(input_ids=IDS).logits
    count = parameters_per_rank(model)
    add_adapters(model, 3)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * count


def test_merged_weights_are_the_adapted_model(model, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = model(input_ids=IDS).logits
    add_adapters(model, 3)
    disturb(model)
    adapted = model(input_ids=IDS).logits
    save_model(model, tmp_path / "merged", merged_tensors(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1, "the adapters changed nothing, so the test shows nothing"
    assert not any("lora" in name for name in loaded.state_dict())


def test_a_seed_draws_the_same_adapters(tiny_llama):
    drawn = []
    for _ in range(2):
        model = tiny_llama()
        add_adapters(model, 2, seed=7)
        drawn.append({name: value.clone() for name, value in model.named_parameters() if "lora_A" in name})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_the_rank_that_comes_nearest(tiny_llama):
    model = tiny_llama(layers=1)  # hidden 32, MLP 64, two heads of 8 for keys and values
    each = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    assert parameters_per_rank(model) == each
    assert matched_rank(model, 5 * each) == 5
    assert matched_rank(model, 5 * each - 1) == 4
    assert matched_rank(model, 1) == 1
    assert matched_rank(model, 1000 * each) == 32, "no map is of higher rank"
    assert len(adapted_maps(model)) == 7


def test_a_rank_of_nothing_is_refused(tiny_llama):
    with pytest.raises(MemdecError, match="lora-rank is 0"):
        add_adapters(tiny_llama(), 0)
