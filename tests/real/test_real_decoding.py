"""Decoding with the real pair, SmolLM2-135M and the memory that the demo makes of it: the engine is the composite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from continuations import assert_same_texts, greedy, padded

from memdec import MemdecError, MemoryModel
from memdec.stores.corpus import Corpus

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

DRAFTING: dict[str, Any] = {"decoding": "speculative", "draft_tokens": 4}


@pytest.fixture(scope="module")
def pair(smollm2_path, small_demo) -> MemoryModel:
    """In float32; alpha as a memory smaller than its base would have it, so that drafts fall as well."""
    folder, _, _ = small_demo
    return MemoryModel.from_pretrained(smollm2_path, folder / "memory", dtype="float32", alpha=0.6)


@pytest.fixture(scope="module")
def held_out(small_demo) -> list[int]:
    return Corpus.open(small_demo[0] / "corpus").split("test").tokens.tolist()


def prompts_of(tokens: list[int], count: int) -> list[list[int]]:
    """Stretches of 1 to 32 tokens from all over the text."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 33, (count,), generator=generator).tolist()
    starts = torch.randint(0, len(tokens) - 32, (count,), generator=generator).tolist()
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def test_greedy_is_the_composite_s_over_200_prompts(pair, held_out):
    """In batches of ten, as either loop takes them; and a tenth of the prompts alone, beside their rows in a batch."""
    prompts = prompts_of(held_out, 200)
    accepted = trials = 0
    for start in range(0, 200, 10):
        batch = prompts[start : start + 10]
        wanted = greedy(pair, padded(batch), 8, decoding="composite", eos_token_id=None)
        got = greedy(pair, padded(batch), 8, **DRAFTING, eos_token_id=None)
        last = pair.last_decode
        assert last.mode == "speculative" and last.reason is None
        accepted, trials = accepted + last.accepted, trials + last.drafted
        assert_same_texts(pair, batch, got, wanted)
        alone = greedy(pair, {"input_ids": torch.tensor([batch[0]])}, 8, **DRAFTING, eos_token_id=None)
        assert_same_texts(pair, batch[:1], alone, wanted[:1])
    assert 0.3 < accepted / trials < 1


def test_ends_inside_a_draft(pair, held_out):
    """max_new_tokens, an end of text and a stop string, each in the middle of what was drafted."""
    ids = {"input_ids": torch.tensor([held_out[:24]])}
    (free,) = greedy(pair, ids, 12, decoding="composite", eos_token_id=None)
    for tokens in (1, 2, 3, 7):
        assert greedy(pair, ids, tokens, **DRAFTING, eos_token_id=None) == [free[:tokens]]
    for at in (1, 2, 6):
        end = free.index(free[at]) + 1
        assert greedy(pair, ids, 12, **DRAFTING, eos_token_id=free[at]) == [free[:end]]
    stop = pair.tokenizer.decode(free[3:6])
    options = {"stop_strings": [stop], "tokenizer": pair.tokenizer, "eos_token_id": None}
    wanted = greedy(pair, ids, 12, decoding="composite", **options)
    assert greedy(pair, ids, 12, **DRAFTING, **options) == wanted and len(wanted[0]) <= 6


def test_a_memory_with_a_shorter_context(pair, held_out, monkeypatch):
    """Its positions end at 40: up to there all is as before, and beyond it is refused, not guessed."""
    monkeypatch.setattr(pair.memory.config, "max_position_embeddings", 40)
    ids = {"input_ids": torch.tensor([held_out[:32]])}
    wanted = greedy(pair, ids, 8, decoding="composite", eos_token_id=None)
    assert_same_texts(pair, [held_out[:32]], greedy(pair, ids, 8, **DRAFTING, eos_token_id=None), wanted)
    with pytest.raises(MemdecError, match="the memory reads up to 40 tokens"):
        greedy(pair, ids, 9, **DRAFTING, eos_token_id=None)
    assert len(greedy(pair, ids, 9, decoding="auto", eos_token_id=None)[0]) == 9
    assert pair.last_decode.mode == "composite" and "40 tokens" in pair.last_decode.reason
