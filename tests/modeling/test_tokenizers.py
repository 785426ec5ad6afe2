"""Fingerprints and comparison of tokenizers: what must be refused, and what must not."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from memdec import MemdecError
from memdec.modeling.tokenizers import compare, fingerprint, load_tokenizer, merges, width


def rebuilt(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy of a fast tokenizer whose JSON state was changed."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=tokenizer.eos_token
    )


def test_a_saved_tokenizer_keeps_its_fingerprint(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tiny_tokenizer)
    compare(tiny_tokenizer, loaded)


def test_use_does_not_change_the_fingerprint(tiny_tokenizer: Any) -> None:
    used = copy.deepcopy(tiny_tokenizer)
    used.pad_token = used.eos_token
    used(
        ["a", "a tenant"], padding=True, truncation=True, max_length=4
    )  # leaves padding and truncation set in the backend
    used.chat_template = "{{ messages }}"
    assert fingerprint(used) == fingerprint(tiny_tokenizer)


def test_other_role_of_a_token_is_no_other_vocabulary(tiny_tokenizer: Any) -> None:
    """A chat model ends its turns with another token than its base model; one memory serves both."""
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "."
    compare(tiny_tokenizer, other)


def test_other_size_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(MemdecError, match=r"the base has 384 tokens, the memory 400; .*id 384 is absent in the base"):
        compare(make_tokenizer(), make_tokenizer(400))


def test_same_size_but_other_tokens_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    def rename(state: dict[str, Any]) -> None:
        vocabulary = state["model"]["vocab"]
        vocabulary["Ġzebra"] = vocabulary.pop(last)
        state["model"]["merges"].pop()

    tokenizer = make_tokenizer()
    last = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    with pytest.raises(
        MemdecError, match=r"both have 384 tokens, but not the same ones; 1 ids differ: id 383 .*Ġzebra"
    ):
        compare(tokenizer, rebuilt(tokenizer, rename))


def test_same_tokens_under_other_ids_is_refused(tiny_tokenizer: Any) -> None:
    def swap(state: dict[str, Any]) -> None:
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    with pytest.raises(MemdecError, match="the same tokens, but under other ids; 2 ids differ") as caught:
        compare(tiny_tokenizer, rebuilt(tiny_tokenizer, swap))
    assert "'a'" in str(caught.value) and "'b'" in str(caught.value)


def test_tokens_added_behind_the_end_are_no_other_vocabulary(tiny_tokenizer: Any) -> None:
    """A chat model's tools and modes; the base model's memory goes with it, and the other way round."""
    chat = copy.deepcopy(tiny_tokenizer)
    chat.add_tokens(["<tool_call>", "<|think|>"])
    assert fingerprint(chat) != fingerprint(tiny_tokenizer)
    compare(tiny_tokenizer, chat)
    compare(chat, tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<other>"])
    with pytest.raises(
        MemdecError, match=r"the base has 386 tokens, the memory 385; 2 ids differ: id 384 is '<tool_call>'"
    ):
        compare(chat, other)


def test_tokens_added_before_the_end_are(make_tokenizer: Callable[..., Any]) -> None:
    """All ids behind an added token are shifted, though each vocabulary holds the other's tokens."""
    with pytest.raises(MemdecError, match="different tokenizers"):
        compare(make_tokenizer(384), make_tokenizer(385, pad=True))


def test_other_segmentation_is_refused(tiny_tokenizer: Any) -> None:
    def reverse(state: dict[str, Any]) -> None:
        state["model"]["merges"].reverse()

    other = rebuilt(tiny_tokenizer, reverse)
    assert other("the court").input_ids != tiny_tokenizer("the court").input_ids  # it matters
    with pytest.raises(MemdecError, match="text is split differently"):
        compare(tiny_tokenizer, other)


def test_width_counts_added_tokens_and_gaps(tiny_tokenizer: Any) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<|tool|>"])
    assert width(tiny_tokenizer) == 384
    assert width(other) == 385


def test_merges_are_read_in_order(tiny_tokenizer: Any) -> None:
    found = merges(tiny_tokenizer)
    assert found is not None
    vocabulary = tiny_tokenizer.get_vocab()
    made = [vocabulary[merge.replace(" ", "")] for merge in found]
    assert made == sorted(made) and len(made) == 384 - 1 - 256


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing-here", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(MemdecError, match="does not exist"):
        load_tokenizer(name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_empty_tokenizer_that_transformers_makes_up_is_no_tokenizer(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(MemdecError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MemdecError, match=r"has no tokenizer .*save_pretrained"):
        load_tokenizer(tmp_path)
