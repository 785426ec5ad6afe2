"""The engine against transformers' loop over the composite: the same greedy texts, ends and stops, in any batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from continuations import TOKENS, assert_same_texts, greedy, padded
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from memdec import MemdecError, MemoryModel
from memdec.decoding import engine, graphs, support

HOW: dict[str, dict[str, Any]] = {
    "parallel": {"decoding": "parallel"},
    "γ = 1": {"decoding": "speculative", "draft_tokens": 1},
    "γ = 4": {"decoding": "speculative", "draft_tokens": 4},
    "γ = 30": {"decoding": "speculative", "draft_tokens": 30},
    "auto": {"decoding": "auto"},
}
how_to = pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())


def prompts_of(count: int, seed: int = 0, longest: int = 12, vocab: int = 384) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model(make_pair: Callable[..., MemoryModel], tiny_tokenizer: Any) -> MemoryModel:
    """A pair of which about half of the drafts stand."""
    return make_pair(close=0.35, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def strangers(make_pair: Callable[..., MemoryModel], tiny_tokenizer: Any) -> MemoryModel:
    """A llama and a gpt2 that agree on little."""
    return make_pair(tokenizer=tiny_tokenizer)


@how_to
@pytest.mark.parametrize("which", ["model", "strangers"])
def test_greedy_is_the_composite_s(which: str, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Prompts of 1 to 12 tokens in left-padded batches of forty, 200 for γ = 4; some drafts stand, others fall."""
    model = request.getfixturevalue(which)
    for start in range(5 if how == HOW["γ = 4"] else 1):
        prompts = prompts_of(40, seed=start)
        wanted = greedy(model, padded(prompts), decoding="composite")
        assert model.last_decode.mode == "composite" and model.last_decode.reason is None
        got = greedy(model, padded(prompts), **how)
        assert_same_texts(model, prompts, got, wanted)
    last = model.last_decode
    assert last.reason is None and last.tokens == 40 * TOKENS
    if how.get("draft_tokens", 0) > 1 and which == "model":
        assert 0.2 < last.acceptance < 0.95 and last.tokens_per_round > 1.3
        assert 0 < last.accepted < last.drafted and 0 < last.rounds <= last.row_rounds


@how_to
def test_one_prompt_as_in_a_batch(model: MemoryModel, how: dict[str, Any]) -> None:
    """Greedy: each prompt alone gives its row of the batch. Prompts of one token among them."""
    prompts = [[7], *prompts_of(6, seed=3), [9]]
    together = greedy(model, padded(prompts), **how)
    alone = [greedy(model, {"input_ids": torch.tensor([p])}, **how)[0] for p in prompts]
    assert_same_texts(model, prompts, alone, together)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 50, "temperature": 0.9, "top_p": 0.95}])
def test_a_sampled_row_is_its_seed_s(
    model: MemoryModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a seed of its own a row draws alone what it draws in a batch, and with any γ."""
    prompts = prompts_of(6, seed=4)
    seeds = torch.arange(6) * 1234567 - 5
    texts = []
    for how in HOW.values():
        monkeypatch.setattr(engine, "row_seeds", lambda rows, device: seeds)
        output = model.generate(**padded(prompts), max_new_tokens=TOKENS, do_sample=True, **settings, **how)
        texts.append(output[:, -TOKENS:].tolist())
    for i, prompt in enumerate(prompts):
        monkeypatch.setattr(engine, "row_seeds", lambda rows, device, i=i: seeds[i : i + 1])
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=True, **settings, **HOW["γ = 4"]
        )
        texts.append(alone[0, len(prompt) :].tolist())
    assert all(text == texts[0] for text in texts[1 : len(HOW)])
    assert texts[len(HOW) :] == texts[0]
    assert len({tuple(text) for text in texts[0]}) == 6


def test_draws_follow_torch_s_generator(model: MemoryModel) -> None:
    ids = {"input_ids": torch.tensor([[4, 8, 15]]), "max_new_tokens": 12, "do_sample": True, "top_k": 0}
    torch.manual_seed(1)
    first, second = model.generate(**ids), model.generate(**ids)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**ids), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    own = model.generate(**ids, generator=torch.Generator().manual_seed(1))
    assert torch.equal(own, first) and torch.equal(torch.get_rng_state(), before)
    model.generate(**{**ids, "do_sample": False})
    assert torch.equal(torch.get_rng_state(), before)  # greedy draws nothing


def test_several_samples_of_a_prompt(model: MemoryModel) -> None:
    torch.manual_seed(0)
    output = model.generate(
        **padded([[1, 2, 3], [4]]), max_new_tokens=8, do_sample=True, num_return_sequences=5, **HOW["γ = 4"]
    )
    assert output.shape == (10, 11) and len({tuple(row) for row in output[:5].tolist()}) > 1


# -- ends ------------------------------------------------------------------------------------------------------------


@how_to
def test_end_of_text_inside_a_draft(model: MemoryModel, how: dict[str, Any]) -> None:
    """Ends chosen from what the texts hold, so that rows end at different places; what follows is padding."""
    prompts = prompts_of(30, seed=6)
    free = greedy(model, padded(prompts), decoding="composite")
    ends = sorted({text[i % 17] for i, text in enumerate(free)})[::3]
    settings = {"eos_token_id": ends, "pad_token_id": 1}
    wanted = greedy(model, padded(prompts), decoding="composite", **settings)
    tokens = model.last_decode.tokens
    got = greedy(model, padded(prompts), **settings, **how)
    assert got == wanted and model.last_decode.tokens == tokens
    assert len({text.index(1) if 1 in text else TOKENS for text in wanted}) > 4


@how_to
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6])
def test_max_new_tokens_inside_a_draft(model: MemoryModel, how: dict[str, Any], tokens: int) -> None:
    prompts = prompts_of(8, seed=7)
    got = greedy(model, padded(prompts), tokens, **how)
    assert got == greedy(model, padded(prompts), tokens, decoding="composite") and len(got[0]) == tokens


@how_to
def test_stop_strings(model: MemoryModel, how: dict[str, Any], tiny_tokenizer: Any) -> None:
    for prompt in prompts_of(12, seed=8):
        ids = {"input_ids": torch.tensor([prompt])}
        text = greedy(model, ids, decoding="composite")[0]
        word = tiny_tokenizer.decode(text[5])
        if not word.strip() or not word.isascii():
            continue
        settings = {"stop_strings": [word], "tokenizer": tiny_tokenizer}
        wanted = greedy(model, ids, decoding="composite", **settings)
        assert greedy(model, ids, **settings, **how) == wanted and len(wanted[0]) <= 6
        assert model.last_decode.reason is None


@how_to
def test_a_streamer_gets_token_after_token(model: MemoryModel, how: dict[str, Any]) -> None:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    prompt = [4, 8, 15]
    wanted = greedy(model, {"input_ids": torch.tensor([prompt])}, decoding="composite")[0]
    streamer = Collect()
    greedy(model, {"input_ids": torch.tensor([prompt])}, streamer=streamer, **how)
    assert streamer.pieces == [prompt, *[[token] for token in wanted]] and streamer.ended == 1


def test_a_criterion_of_one_s_own_is_asked_after_every_token(model: MemoryModel) -> None:
    def after_seven(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= 3 + 7)

    lengths: list[int] = []
    ids = {"input_ids": torch.tensor([[4, 8, 15]])}
    got = greedy(model, ids, stopping_criteria=[after_seven], **HOW["γ = 4"])
    assert lengths == [4, 5, 6, 7, 8, 9, 10]
    assert got == [greedy(model, ids, decoding="composite")[0][:7]]


# -- limits and refusals ---------------------------------------------------------------------------------------------


def test_a_prompt_as_long_as_the_context(model: MemoryModel, strangers: MemoryModel) -> None:
    """256 positions, gpt2's table of them included: drafts never reach beyond the last."""
    for one in (model, strangers):
        prompts = [torch.arange(1, 250).tolist(), torch.arange(1, 240).tolist()]
        got = greedy(one, padded(prompts), 7, **HOW["γ = 30"])
        assert_same_texts(one, prompts, got, greedy(one, padded(prompts), 7, decoding="composite"))


def test_a_memory_with_a_shorter_context(make_pair: Callable[..., MemoryModel], caplog: Any) -> None:
    """Its positions are a table, so that the composite could not go on either."""
    short = make_pair(n_positions=32)
    ids = {"input_ids": torch.arange(1, 30)[None]}
    for how in (HOW["parallel"], HOW["γ = 4"], {"decoding": "auto"}):
        with pytest.raises(MemdecError, match=r"the memory reads up to 32 tokens \(the base 256\).* 39 long"):
            greedy(short, ids, 10, **how)
    assert len(greedy(short, ids, 3, **HOW["γ = 4"])[0]) == 3


def test_falling_back_says_why(model: MemoryModel, caplog: pytest.LogCaptureFixture) -> None:
    ids = {"input_ids": torch.tensor([[4, 8, 15]]), "max_new_tokens": 3}

    class Own:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    two = torch.tensor([[4, 8], [15, 16]])
    for settings, reason in (
        ({"num_beams": 2}, "beams"),
        ({"repetition_penalty": 1.3}, "logits processors other than"),
        ({"logits_processor": [Own()]}, "logits processors other than"),
        ({"do_sample": True, "typical_p": 0.5}, "logits processors other than"),
        ({"return_dict_in_generate": True}, "more than the tokens"),
        ({"cache_implementation": "static"}, "a kind of cache"),
        ({"past_key_values": model.new_cache()}, "a cache was given"),
        ({"use_cache": False}, "use_cache is off"),
        ({"input_ids": two, "stopping_criteria": [lambda i, s, **_: torch.zeros(len(i)).bool()]}, "of one's own"),
        ({"input_ids": two, "max_time": 100.0}, "no end-of-text token to pad behind"),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "pad_token_id": 1}, "padded on the right"),
    ):
        for decoding, level in (("auto", logging.INFO), ("speculative", logging.WARNING)):
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="memdec"):
                if "past_key_values" in settings:
                    settings["past_key_values"] = model.new_cache()
                model.generate(**{**ids, **settings}, decoding=decoding)
            assert model.last_decode is not None and model.last_decode.mode == "composite"
            assert reason in str(model.last_decode.reason)
            if "num_beams" not in settings:
                ours = [record for record in caplog.records if record.name.startswith("memdec")]
                assert ours[-1].levelno == level and reason in caplog.text
    with model.disable_memory():
        greedy(model, {"input_ids": two})
        assert model.last_decode.reason == "the memory is disabled"


def test_arguments_that_cannot_be(model: MemoryModel) -> None:
    ids = torch.tensor([[1]])
    with pytest.raises(MemdecError, match="decoding='fast' is not available"):
        model.generate(ids, decoding="fast")
    for settings in (
        {"draft_tokens": 3},
        {"draft_tokens": 0, "decoding": "speculative"},
        {"draft_tokens": 2.0, "decoding": "speculative"},
        {"draft_tokens": 3, "decoding": "parallel"},
    ):
        with pytest.raises(ValueError, match="draft_tokens: got"):
            model.generate(ids, **settings)


def test_broken_weights_are_said_to_be(make_pair: Callable[..., MemoryModel]) -> None:
    broken = make_pair()
    with torch.no_grad():
        broken.base.model.norm.weight.fill_(torch.nan)
    with pytest.raises(MemdecError, match="no token to choose"):
        greedy(broken, {"input_ids": torch.tensor([[1, 2]])}, **HOW["γ = 4"])


@pytest.mark.parametrize("captured", [False, True])
def test_a_broken_memory_says_so_but_where_it_has_no_weight(
    make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    """What it drafts then is no token, which no embedding has."""
    if captured:
        monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    broken = make_pair()
    with torch.no_grad():
        broken.memory.transformer.ln_f.weight.fill_(torch.nan)
    ids = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(MemdecError, match="no token to choose"):
        greedy(broken, ids, 6, **HOW["γ = 4"])
    broken.alpha = 0.0
    wanted = greedy(broken, ids, 6, decoding="composite")
    for how in (HOW["γ = 4"], HOW["parallel"]):
        assert greedy(broken, ids, 6, **how) == wanted


@pytest.mark.parametrize("captured", [False, True])
def test_a_mask_of_another_length(model: MemoryModel, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is transformers that refuses it, as it does for every model."""
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",) if captured else ())
    inputs = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(RuntimeError, match="size of tensor"):
        greedy(model, inputs, **HOW["γ = 4"])


def test_the_tensors_of_a_model(tiny_gpt2: Callable[..., Any]) -> None:
    """What is looked through before a text is what torch lists, where modules and weights are shared as well."""
    model = tiny_gpt2(tie_word_embeddings=True)
    model.again, model.nothing = model.transformer, None  # a module under two names, and none under one
    model.register_buffer("absent", None)
    expected = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(tensor) for tensor in support.tensors_of(model)} == expected
