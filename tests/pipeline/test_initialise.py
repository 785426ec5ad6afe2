"""A cut start: the structure is whole, and mended it is far nearer to the uncut model than a plain cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from memdec import MemdecError
from memdec.modeling.scoring import load_causal_lm, perplexity, score_tokens
from memdec.modeling.structure import blocks
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.checkpoints import save_model
from memdec.pipeline.initialise import (
    calibration_windows,
    changed_places,
    choose_blocks,
    cut_blocks,
    hidden_states,
    initialise,
    last_linear,
    mend,
)
from memdec.stores.windows import windows as windows_of

CALIBRATION = torch.randint(384, (2048,), generator=torch.Generator().manual_seed(0))
FRESH = torch.randint(384, (4, 64), generator=torch.Generator().manual_seed(1))


def test_the_first_and_the_last_blocks_are_kept() -> None:
    assert choose_blocks(30, 8) == [0, 1, 2, 3, 4, 5, 28, 29]
    assert choose_blocks(30, 3) == [0, 1, 29] and choose_blocks(30, 1) == [0]
    assert choose_blocks(4, 4) == [0, 1, 2, 3]
    assert changed_places([0, 1, 2, 28, 29], 30) == [2, 3, 4]
    for layers in (0, 31):
        with pytest.raises(MemdecError, match=f"layers is {layers}; the model has 30 blocks"):
            choose_blocks(30, layers)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_cut_model_is_its_kept_blocks_one_after_another(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """An independent cut: the blocks left out are made to do nothing, by zeroing what they add."""
    make: Callable[..., Any] = request.getfixturevalue(family)
    model = make(layers=5)
    for name, parameter in model.named_parameters():
        out = ("o_proj", "down_proj", "c_proj")
        if any(f".{block}." in name for block in (2, 3)) and any(part in name for part in out):
            parameter.data.zero_()
    want = model(FRESH).logits
    cut_blocks(model, [0, 1, 4])
    torch.testing.assert_close(model(FRESH).logits, want, rtol=1e-4, atol=1e-5)
    # The cache is indexed by the blocks' numbers: decoding with it must agree with a forward over everything.
    cached = model(FRESH[:, :30], use_cache=True)
    step = model(FRESH[:, 30:31], past_key_values=cached.past_key_values)
    torch.testing.assert_close(step.logits[:, 0], model(FRESH[:, :31]).logits[:, -1], rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(loaded(FRESH).logits, want, rtol=1e-4, atol=1e-5)


def distance(got: Tensor, want: Tensor) -> float:
    """Mean KL(want ‖ got) over positions, in nats."""
    p = want.log_softmax(-1)
    return float((p.exp() * (p - got.log_softmax(-1))).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_mended_cut_is_nearer_to_the_whole_model(family: str, request: pytest.FixtureRequest) -> None:
    make: Callable[..., Any] = request.getfixturevalue(family)
    want = make(layers=6)(FRESH).logits
    unmended = initialise(make(layers=6), layers=4)
    mended = initialise(make(layers=6), layers=4, calibration=CALIBRATION, context=64)
    assert distance(mended(FRESH).logits, want) < 0.85 * distance(unmended(FRESH).logits, want)
    again = initialise(make(layers=6), layers=4, calibration=CALIBRATION, context=64)
    assert all(torch.equal(a, b) for a, b in zip(mended.parameters(), again.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_spoilt_map_is_found_again(family: str, request: pytest.FixtureRequest) -> None:
    """A block's output is linear in the map that is fitted, so with enough text the fit has one answer: the old."""
    make: Callable[..., Any] = request.getfixturevalue(family)
    model = make(layers=2)
    windows = calibration_windows(CALIBRATION, 64)
    targets = hidden_states(model, windows, [1])[1]
    linear = last_linear(blocks(model)[1][0], 32)
    assert linear is not None
    old = linear.weight.clone()
    linear.weight.add_(torch.randn(old.shape, generator=torch.Generator().manual_seed(2)))
    spoilt = float((linear.weight - old).norm())
    assert mend(model, 0, windows, targets)
    assert float((linear.weight - old).norm()) < 0.3 * spoilt  # the ridge holds it back a little


@pytest.mark.real
@torch.no_grad()
def test_a_mended_cut_of_a_real_model_starts_far_below_a_naive_one(smollm2_path: Path) -> None:
    """8 of SmolLM2's 30 blocks, mended on one part of Python's own documentation and judged on another."""
    from pydoc_data.topics import topics

    tokens = torch.tensor(
        load_tokenizer(smollm2_path)("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    )
    held_out, cut = tokens[-1025:], windows_of(1025, 512)
    naive = load_causal_lm(smollm2_path)
    cut_blocks(naive, list(range(8)))
    naive_perplexity = perplexity(score_tokens(naive, held_out, cut))
    mended = initialise(smollm2_path, layers=8, calibration=tokens[:8192], context=512)
    found = perplexity(score_tokens(mended, held_out, cut))
    print(f"naive {naive_perplexity:.0f}, mended {found:.0f}")
    assert found < 1000 < 0.01 * naive_perplexity


def test_a_whole_start_is_the_model_itself_in_float32(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path)
    for layers in (None, 2):
        start = initialise(tmp_path, layers=layers)
        for got, want in zip(start.parameters(), model.parameters(), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, want.float())
