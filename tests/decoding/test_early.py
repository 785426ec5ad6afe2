"""What is final before the base has run: a streamer has it by then, and it is what the round then brings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from memdec import MemoryModel
from memdec.decoding import engine
from memdec.decoding.plan import LONGEST_RUN, Estimates
from memdec.ops import interpolate_argmax
from memdec.ops.reference import acceptance_coins

PROMPT = torch.tensor([[4, 8, 15]])
ALPHA = 0.8
DRAWN = {"do_sample": True, "top_k": 0}
GREEDY = {"do_sample": False}
HOW: dict[str, dict[str, Any]] = {
    "γ = 1": {"decoding": "speculative", "draft_tokens": 1},
    "γ = 5": {"decoding": "speculative", "draft_tokens": 5},
    "γ = 30": {"decoding": "speculative", "draft_tokens": 30},
    "auto": {"decoding": "auto"},
}
how_to = pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
drawn_or_not = pytest.mark.parametrize("kind", [DRAWN, GREEDY], ids=["drawn", "greedy"])


class Collect(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:  # the prompt has two dimensions
            self.tokens += value.tolist()

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def model(make_pair: Callable[..., MemoryModel], tiny_tokenizer: Any) -> MemoryModel:
    """A pair whose memory is sure of its word, rightly about half of the time."""
    pair = make_pair(close=0.35, alpha=ALPHA, tokenizer=tiny_tokenizer)
    with torch.no_grad():
        pair.memory.model.norm.weight *= 3
    return pair


def stream(model: MemoryModel, tokens: int = 40, seed: int = 1, **settings: Any) -> list[int]:
    streamer = Collect()
    torch.manual_seed(seed)
    output = model.generate(PROMPT, max_new_tokens=tokens, streamer=streamer, **settings)
    assert output[0, PROMPT.shape[1] :].tolist() == streamer.tokens
    return streamer.tokens


@how_to
@drawn_or_not
def test_what_is_streamed_early_is_what_the_round_brings(
    model: MemoryModel, kind: dict[str, Any], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every verification: the tokens streamed since the last are a leading part of those that then stand."""
    early: list[list[int]] = []
    before: list[int] = []
    streamers: list[Collect] = []
    init, verify, read = Collect.__init__, engine.verify_draft, engine.Reader.read

    def made(self: Collect) -> None:
        init(self)
        streamers.append(self)

    def reads(self: engine.Reader, *given: Any, **how: Any) -> Tensor:
        if self.model is model.base and not how:  # not the prompt
            early.append(streamers[-1].tokens[sum(before) :])
        return read(self, *given, **how)

    def verified(base: Tensor, memory: Tensor, drafts: Tensor, alpha: float, **how: Any) -> Any:
        found = verify(base, memory, drafts, alpha, **how)
        stood = drafts[0, : int(found.num_accepted)].tolist()
        assert early[-1] == stood[: len(early[-1])]
        before.append(len(stood) + 1)
        return found

    monkeypatch.setattr(Collect, "__init__", made)
    monkeypatch.setattr(engine.Reader, "read", reads)
    monkeypatch.setattr(engine, "verify_draft", verified)
    for seed in range(6):
        before.clear()
        text = stream(model, seed=seed, **kind, **how)
        assert len(text) == 40
    assert sum(map(len, early)) > (20 if how["decoding"] == "auto" else 40)  # of 240
    counted = model.last_decode
    torch.manual_seed(5)
    assert model.generate(PROMPT, max_new_tokens=40, **kind, **how)[0, 3:].tolist() == text
    plain = model.last_decode
    if how["decoding"] != "auto":  # which looks at the clock
        assert [counted.rounds, counted.drafted, counted.accepted, counted.acceptance] == [
            *(plain.rounds, plain.drafted, plain.accepted, plain.acceptance)
        ]
    torch.manual_seed(5)
    assert model.generate(PROMPT, max_new_tokens=40, decoding="parallel", **kind)[0, 3:].tolist() == text


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_k": 0, "temperature": 0.9}])
def test_nothing_is_certain_under_warpers(
    model: MemoryModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.Continuations, "take_early", None)
    stream(model, do_sample=True, **settings, **HOW["γ = 5"])


@drawn_or_not
@pytest.mark.parametrize("end", ["token", "string", "criterion"])
def test_an_end_inside_a_certain_run(
    model: MemoryModel, kind: dict[str, Any], end: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text ends where it would without a streamer, wherever that is; the base does not run where it need not."""
    free = stream(model, seed=3, **kind, **HOW["γ = 5"])
    forwards: list[int] = []
    verify = engine.verify_draft
    monkeypatch.setattr(engine, "verify_draft", lambda *a, **k: forwards.append(1) or verify(*a, **k))
    asked: list[int] = []
    saved = 0
    for place in range(2, 20):
        if end == "token":
            settings: dict[str, Any] = {"eos_token_id": free[place]}
        elif end == "string":
            word = tiny_tokenizer.decode(free[place])
            if not word.strip() or not word.isascii():
                continue
            settings = {"stop_strings": [word], "tokenizer": tiny_tokenizer}
        else:
            asked.clear()

            def full(input_ids: Tensor, scores: Any, at: int = place, **_: Any) -> Tensor:
                asked.append(input_ids.shape[1])
                return torch.full((1,), input_ids.shape[1] >= 3 + at)

            settings = {"stopping_criteria": [full]}
        torch.manual_seed(3)
        forwards.clear()
        wanted = model.generate(PROMPT, max_new_tokens=40, **kind, **settings, **HOW["γ = 5"])[0, 3:].tolist()
        without = len(forwards)
        asked.clear()
        forwards.clear()
        assert stream(model, seed=3, **kind, **settings, **HOW["γ = 5"]) == wanted
        assert model.last_decode is not None and model.last_decode.tokens == len(wanted)
        assert model.last_decode.rounds == len(forwards) <= without
        assert end != "criterion" or asked == list(range(4, 4 + len(wanted)))
        saved += without - len(forwards)
    assert saved > 2


def test_a_text_that_ends_before_the_base_has_run(model: MemoryModel) -> None:
    model.alpha = 1.0
    model._estimates.clear()  # no forward of the base was ever timed
    try:
        assert len(stream(model, eos_token_id=list(range(384)), **DRAWN, **HOW["γ = 5"])) == 1
    finally:
        model.alpha = ALPHA
    last = model.last_decode
    assert last is not None and (last.rounds, last.drafted, last.accepted, last.tokens) == (0, 1, 1, 1)
    assert last.cost_ratio is None and last.tokens_per_round is None


def test_the_certificate_against_the_worst_base() -> None:
    """A base that gives all to the memory's second token, at every distance from where the certificate begins."""
    generator = torch.Generator().manual_seed(0)
    certain = missed = 0
    for _ in range(3000):
        alpha = 0.5 + 0.5 * float(torch.rand((), generator=generator))
        gap = (1 - alpha) / alpha + 0.01 * float(torch.randn((), generator=generator))
        if not 0 < gap < 1:
            continue
        rest = (1 - gap) * float(torch.rand((), generator=generator))
        second = (1 - gap - rest) / 2
        probs = torch.tensor([second + gap, second] + [rest / 5] * 5)
        if probs[2] > second:
            continue
        logits = probs.log() + 100 * torch.rand((), generator=generator)
        base = torch.full((7,), -math.inf)
        base[1] = 0
        if engine.surely_likeliest(logits, alpha):
            certain += 1
            assert int(interpolate_argmax(base, logits, alpha)) == 0
        elif alpha * gap > 1 - alpha + 2 * engine.MARGIN:
            missed += 1
    assert certain > 500 and missed == 0
    assert engine.surely_likeliest(torch.zeros(1), 0.7)  # a vocabulary of one
    assert not engine.surely_likeliest(torch.tensor([math.nan, 0.0]), 0.9)
    assert not engine.surely_likeliest(torch.tensor([50.0, 0.0]), 0.5)


def test_auto_knows_the_coins(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row, at the place where it is: rows advance and end on their own."""
    seeds = torch.arange(5) * 987654321 - 7
    coins = acceptance_coins(seeds, torch.zeros_like(seeds), 100)
    kinds = (coins >= ALPHA).long() + (coins >= (1 + ALPHA) / 2).long()
    seen: list[Any] = []
    learnt: list[tuple[int, bool]] = []
    choose, take = Estimates.draft_tokens, engine.Continuations.take
    made = dict.fromkeys(range(5), 0)

    def chosen(self: Estimates, given: Any = (), alpha: float = 0.0) -> int:
        assert alpha == ALPHA
        seen.append(given)
        return choose(self, given, alpha)

    def taken(self: engine.Continuations, *given: Any) -> list[int]:
        for row, ahead in zip(self.active, seen[-1], strict=True):
            assert ahead == kinds[row, made[row] : made[row] + LONGEST_RUN].tolist()
        staying = take(self, *given)
        made.update((row, len(text)) for row, text in enumerate(self.made))
        return staying

    monkeypatch.setattr(Estimates, "draft_tokens", chosen)
    monkeypatch.setattr(engine.Continuations, "take", taken)
    monkeypatch.setattr(Estimates, "add_coin", lambda self, kind, stood: learnt.append((kind, stood)))
    monkeypatch.setattr(engine, "row_seeds", lambda rows, device: seeds)
    output = model.generate(
        PROMPT.expand(5, 3), max_new_tokens=40, eos_token_id=[7, 9, 40, 41], pad_token_id=0, **DRAWN
    )
    assert len(seen) > 5 and output.shape[0] == 5
    last = model.last_decode
    assert last is not None and len(learnt) == round(last.accepted / last.acceptance)
    assert sum(stood for _, stood in learnt) == last.accepted < len(learnt)
    assert all(stood for kind, stood in learnt if kind == 0)
