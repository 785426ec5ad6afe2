"""Scores against a plain loop over full softmaxes, and the α curve against a brute-force one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from memdec import MemdecError
from memdec.modeling import scoring
from memdec.modeling.scoring import load_causal_lm, mixture_log_prob, perplexity, score_tokens, tune_alpha


@dataclass(frozen=True)
class Window:
    start: int
    stop: int
    score_from: int


# Sliding by 5 with 12 tokens of context, the last window short; and a document that is scored alone.
SLIDING = [Window(0, 12, 0), Window(5, 17, 11), Window(10, 22, 16), Window(15, 24, 21)]


def plain_scores(model: Any, tokens: Tensor, windows: list[Window]) -> Tensor:
    """One window at a time, the whole softmax, float64."""
    found = torch.full((len(tokens) - 1,), math.nan, dtype=torch.float64)
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=tokens[None, window.start : window.stop].long()).logits[0]
        log_probs = logits.double().log_softmax(-1)
        for row in range(window.score_from, window.stop - 1):
            found[row] = log_probs[row - window.start, int(tokens[row + 1])]
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("budget", [1, 2**20])  # one row a chunk; all rows at once
def test_scores_are_the_plain_loops(
    tiny_llama: Callable[..., Any], batch_size: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", budget)
    model = tiny_llama()
    tokens = torch.randint(0, 384, (24,), dtype=torch.int32)
    seen: list[int] = []
    scores = score_tokens(model, tokens, SLIDING, batch_size=batch_size, progress=seen.append)
    torch.testing.assert_close(scores.double(), plain_scores(model, tokens, SLIDING), rtol=1e-5, atol=1e-5)
    assert scores.dtype == torch.float32 and scores.shape == (23,) and sum(seen) == 23
    assert not model.training


def test_padding_columns_do_not_count_when_told(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    tokens = torch.randint(0, 300, (6,), dtype=torch.int32)
    scores = score_tokens(model, tokens, [Window(0, 6, 0)], vocab_size=300)
    with torch.no_grad():
        expected = model(tokens[None].long()).logits[0, :-1, :300].double().log_softmax(-1)
    expected = expected.gather(-1, tokens[1:, None].long())[:, 0]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_without_a_window_are_nan(tiny_llama: Callable[..., Any]) -> None:
    tokens = torch.randint(0, 384, (24,), dtype=torch.int32)
    scores = score_tokens(tiny_llama(), tokens, [Window(3, 9, 5), Window(20, 21, 20)])
    assert scores.isnan().logical_not().nonzero().flatten().tolist() == [5, 6, 7]
    assert score_tokens(tiny_llama(), tokens, []).isnan().all()


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_soft_caps_and_scales_after_the_head_count(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_BUDGET", 64 * 4 * 3)  # chunks of three rows
    torch.manual_seed(0)
    settings = {"final_logit_softcapping": 2.0} if family == "gemma2" else {"logits_scaling": 0.1}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,
            **settings,
        )
    ).eval()
    tokens = torch.randint(3, 64, (24,), dtype=torch.int32)
    torch.testing.assert_close(
        score_tokens(model, tokens, SLIDING).double(), plain_scores(model, tokens, SLIDING), rtol=1e-5, atol=1e-5
    )


def test_a_broken_model_is_named_and_not_averaged_away(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(MemdecError, match="LlamaForCausalLM gave no number"):
        score_tokens(model, torch.arange(10, dtype=torch.int32), [Window(0, 10, 0)])


def test_mixture_is_the_mixture_of_probabilities() -> None:
    base, memory = torch.tensor([-1.0, -30.0, -0.1]), torch.tensor([-2.0, -0.5, -80.0])
    for alpha in (0.0, 0.3, 1.0):
        expected = (alpha * memory.double().exp() + (1 - alpha) * base.double().exp()).log()
        torch.testing.assert_close(mixture_log_prob(base, memory, alpha), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"alpha: got 1\.5"):
        mixture_log_prob(base, memory, 1.5)


def test_alpha_is_tuned_on_the_tokens_that_both_scored() -> None:
    torch.manual_seed(0)
    base, memory = -5 * torch.rand(500), -5 * torch.rand(500)
    base[3], memory[7] = math.nan, math.nan
    alpha, curve = tune_alpha(base, memory)
    kept = [i for i in range(500) if i not in (3, 7)]
    brute = {
        i / 100: math.exp(
            -sum(
                math.log(i / 100 * math.exp(float(memory[j])) + (1 - i / 100) * math.exp(float(base[j]))) for j in kept
            )
            / len(kept)
        )
        for i in range(101)
    }
    assert alpha == min(brute, key=brute.__getitem__) and 0.2 < alpha < 0.8
    assert [a for a, _ in curve] == list(brute)
    for (_, found), expected in zip(curve, brute.values(), strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    with pytest.raises(MemdecError, match="cannot be tuned"):
        tune_alpha(torch.tensor([math.nan]), torch.tensor([-1.0]))


def test_perplexity_of_a_fair_die_is_six() -> None:
    assert perplexity(torch.tensor([math.log(1 / 6), math.nan, math.log(1 / 6)])) == pytest.approx(6)
    assert perplexity(torch.tensor([-math.inf])) == math.inf
    with pytest.raises(MemdecError, match="no token was scored"):
        perplexity(torch.tensor([math.nan]))


def test_loading_from_a_folder(tiny_model_dir: Path) -> None:
    model = load_causal_lm(tiny_model_dir, dtype="float32")
    assert model.dtype == torch.float32 and not model.training
    assert load_causal_lm(model) is model
    assert load_causal_lm(str(tiny_model_dir), dtype="bfloat16").dtype == torch.bfloat16
    automatic = torch.bfloat16 if scoring.native_bfloat16("cpu") else torch.float32
    assert load_causal_lm(tiny_model_dir).dtype == automatic


def test_what_cannot_be_loaded_is_explained(tmp_path: Path, tiny_tokenizer: Any, tiny_model_dir: Path) -> None:
    with pytest.raises(MemdecError, match="does not exist"):
        load_causal_lm("/no/such/folder")
    with pytest.raises(MemdecError, match=r"not a file; give the path of a \.gguf file"):
        load_causal_lm(tmp_path / "model.gguf")
    with pytest.raises(MemdecError, match=r"is no causal LM .*config\.json"):
        load_causal_lm(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with pytest.raises(MemdecError, match="is no causal LM"):  # no weights
        load_causal_lm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(MemdecError, match="is no causal LM"):  # cut short
        load_causal_lm(tmp_path)
    weights = load_file(tiny_model_dir / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MemdecError, match=r"lacks 1 of its model's weights \(model.layers.1.mlp.up_proj.weight\)"):
        load_causal_lm(tmp_path)
    with pytest.raises(MemdecError, match="--dtype int8: wanted auto"):
        load_causal_lm(tiny_model_dir, dtype="int8")
