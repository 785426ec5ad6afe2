"""The demo's parts on the real model: the unpacked weights, and the whole job on a quarter of the demo's text."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.real


def test_the_unpacked_model_is_plain_and_knows_its_language(smollm2_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((smollm2_path / "config.json").read_text())
    assert "quantization_config" not in config and config["vocab_size"] == 49152
    assert not list(smollm2_path.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == config["eos_token_id"] == 0
    text = "def f(x):\n    return x  # naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(smollm2_path)
    assert model.dtype == torch.bfloat16
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])


@pytest.mark.timeout(1800)  # minutes on a quiet machine, many more on a busy one
def test_a_quarter_of_the_demo(small_demo):
    """On 26k tokens a memory takes at least a fifth off the perplexity of text it has not seen (the demo: more)."""
    _, result, paths = small_demo
    base, knn, mixture = (result.measure(name) for name in ("base", "knn-lm", "base+memory"))
    assert 5 < base.perplexity < 40
    assert knn.perplexity < base.perplexity
    assert mixture.relative < -0.2
    assert mixture.interval is not None and mixture.interval[1] < 0
    assert "Q4_1" in result.models["base"] and any("Q4_1" in note for note in result.notes)
    content = json.loads(paths["json"].read_text())
    assert content["text"]["documents"] >= 8
    assert any(generation["base"] != generation["base+memory"] for generation in content["generations"])
    page = paths["report"].read_text()
    assert "Q4_1" in page and f"{mixture.perplexity:.2f}" in page
