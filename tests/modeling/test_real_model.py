"""SmolLM2-135M: the composite, its scores and its keys on real weights, against plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memdec import MemoryModel
from memdec.modeling.keys import hidden_and_keys
from memdec.modeling.scoring import load_causal_lm, score_tokens
from memdec.modeling.tokenizers import fingerprint, load_tokenizer
from memdec.stores.windows import Window

pytestmark = pytest.mark.real

PROMPTS = ["The tenant shall pay", "import"]


@pytest.fixture(scope="module")
def pair(smollm2_path: Path) -> tuple[Any, Any]:
    """The model, and its first six layers in the place of a memory; float32, so that tokens are exactly comparable."""
    torch.set_num_threads(2)
    base = load_causal_lm(smollm2_path, dtype="float32")
    memory = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32, num_hidden_layers=6).eval()
    return base, memory


@pytest.fixture(autouse=True)
def both_threads(one_thread: None) -> None:
    torch.set_num_threads(2)


def test_a_gguf_file_is_read_as_plain_weights(smollm2_path: Path) -> None:
    from memdec.demo.model import find_gguf

    model = load_causal_lm(find_gguf(), dtype="bfloat16")
    expected = load_causal_lm(smollm2_path, dtype="bfloat16").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")
    assert fingerprint(load_tokenizer(find_gguf())) == fingerprint(load_tokenizer(smollm2_path))


@pytest.mark.parametrize("cache", [None, "static"])
def test_batched_greedy_is_the_plain_loops(pair: tuple[Any, Any], smollm2_path: Path, cache: str | None) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model = MemoryModel.from_pretrained(*pair, alpha=0.5, tokenizer=tokenizer)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    for row, prompt in zip(output, PROMPTS, strict=True):
        ids = tokenizer(prompt).input_ids
        for _ in range(4):
            with torch.no_grad():
                base, memory = (m(torch.tensor([ids])).logits[0, -1].double().softmax(-1) for m in pair)
            ids.append(int((0.5 * base + 0.5 * memory).argmax()))
        assert row[-4:].tolist() == ids[-4:]


def test_scores_are_the_plain_loops(pair: tuple[Any, Any], smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    text = (Path(__file__).parents[1] / "conftest.py").read_text()
    tokens = torch.tensor(tokenizer(text).input_ids[:160], dtype=torch.int32)
    windows = [Window(0, 64, 0), Window(40, 120, 63), Window(100, 160, 119)]
    scores = score_tokens(pair[0], tokens, windows)
    for window in windows:
        with torch.no_grad():
            log_probs = pair[0](tokens[None, window.start : window.stop].long()).logits[0].double().log_softmax(-1)
        for row in range(window.score_from, window.stop - 1):
            expected = float(log_probs[row - window.start, int(tokens[row + 1])])
            assert float(scores[row]) == pytest.approx(expected, abs=2e-4)
    assert not scores.isnan().any() and 2 < math.exp(-float(scores.mean())) < 100


def test_the_key_follows_from_the_last_block(pair: tuple[Any, Any]) -> None:
    """The last block's output is its MLP of the key, added to the residual; the final norm makes the hidden state."""
    ids = torch.tensor([[504, 2, 33, 71, 9]])
    captured: list[torch.Tensor] = []
    norm = pair[0].model.layers[-1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: captured.extend([args[0], out]))
    try:
        hidden, keys = hidden_and_keys(pair[0], ids)
    finally:
        handle.remove()
    residual, normed = captured
    assert torch.equal(keys, normed)
    with torch.no_grad():
        expected = pair[0].model.norm(residual + pair[0].model.layers[-1].mlp(keys))
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
