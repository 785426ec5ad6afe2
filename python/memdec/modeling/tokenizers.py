"""Tokenizers: loading, and telling whether two of them speak of the same tokens.

A memory and a base may be mixed when every id means the same token in both, for then p_mem(v) and p_base(v) speak of
the same event. What a tokenizer *does* with an id (which one ends a text, which one pads) may differ: a chat model and
its base model often differ in nothing else, and one memory serves both. Nor do tokens matter that one of them adds
behind the end of the other's vocabulary (tools, modes of a newer chat model): the memory never saw them in training,
and the base keeps its share of their probability.
"""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from typing import Any

from transformers import AutoTokenizer

from memdec.errors import MemdecError
from memdec.modeling.sources import first_line, locate

SHOWN_DIFFERENCES = 3


def load_tokenizer(source: str | PathLike[str]) -> Any:
    """The tokenizer of a transformers folder, a hub id, or a ``.gguf`` file.

    Raises:
        MemdecError: the folder does not exist or holds no tokenizer, or the hub id cannot be fetched.
    """
    folder, options = locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizers library raises bare ones
        raise MemdecError(
            f"{source} has no tokenizer that transformers can load: {first_line(error)} "
            "Save one beside the model with tokenizer.save_pretrained(folder), or name the folder that has it."
        ) from error
    # Where there are no tokenizer files, transformers may make an empty tokenizer from the model's configuration.
    if len(tokenizer.get_vocab()) <= len(tokenizer.added_tokens_encoder):
        raise MemdecError(
            f"{source} has no tokenizer: what transformers finds there has no tokens but special ones. "
            "Save the right one beside the model with tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def width(tokenizer: Any) -> int:
    """Number of ids that the tokenizer can give, added tokens included: its highest id + 1.

    It is not ``len(tokenizer)``: an added token may have an id with a gap before it.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return max(vocabulary.values()) + 1


def merges(tokenizer: Any) -> list[Any] | None:
    """The learned segmentation of a fast tokenizer: BPE merges in order, or unigram pieces with scores; else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    if model.get("merges") is not None:
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = model.get("vocab")
    return vocabulary if isinstance(vocabulary, list) else None


def fingerprint(tokenizer: Any) -> str:
    """Sha256 (hex) of what makes a tokenizer's ids mean what they mean.

    Covers each id with its token (added tokens included) and the learned segmentation (merges or piece scores). Leaves
    out what may differ between models that share their tokens: special-token roles, chat template, padding.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    state = {"tokens": sorted((index, token) for token, index in vocabulary.items()), "merges": merges(tokenizer)}
    return hashlib.sha256(json.dumps(state, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def compare(base: Any, memory: Any, *, base_name: str = "the base", memory_name: str = "the memory") -> None:
    """Returns quietly when the two tokenizers give every id that both have the same meaning.

    One may have further tokens that were added behind the other's last.

    Raises:
        MemdecError: they do not; the message says whether sizes, ids or segmentation differ, and where first.
    """
    if fingerprint(base) == fingerprint(memory):
        return
    base_vocabulary: dict[str, int] = base.get_vocab()
    memory_vocabulary: dict[str, int] = memory.get_vocab()
    base_tokens = {index: token for token, index in base_vocabulary.items()}
    memory_tokens = {index: token for token, index in memory_vocabulary.items()}
    differing = [
        index
        for index in sorted(base_tokens.keys() | memory_tokens.keys())
        if base_tokens.get(index) != memory_tokens.get(index)
    ]
    same_merges = merges(base) == merges(memory)
    if differing and same_merges and (extends(base, memory) or extends(memory, base)):
        return
    if not differing:
        what = "the tokens and ids are the same, but text is split differently (other merges)"
    else:
        shown = "; ".join(
            f"id {index} is {describe(base_tokens.get(index))} in {base_name} and "
            f"{describe(memory_tokens.get(index))} in {memory_name}"
            for index in differing[:SHOWN_DIFFERENCES]
        )
        if base_vocabulary.keys() == memory_vocabulary.keys():
            kind = "both have the same tokens, but under other ids"
        elif len(base_vocabulary) == len(memory_vocabulary):
            kind = f"both have {len(base_vocabulary)} tokens, but not the same ones"
        else:
            kind = f"{base_name} has {len(base_vocabulary)} tokens, {memory_name} {len(memory_vocabulary)}"
        what = f"{kind}; {len(differing)} ids differ: {shown}"
    raise MemdecError(
        f"{base_name} and {memory_name} have different tokenizers, so their probabilities cannot be mixed: {what}. "
        "Use a base of the family that the memory was made for, or make a memory with this base's tokenizer."
    )


def extends(longer: Any, shorter: Any) -> bool:
    """Whether `longer` has all tokens of `shorter` under the same ids, and further only added ones behind its end."""
    vocabulary: dict[str, int] = longer.get_vocab()
    known: dict[str, int] = shorter.get_vocab()
    added: dict[str, int] = longer.added_tokens_encoder
    end = width(shorter)
    return all(vocabulary.get(token) == index for token, index in known.items()) and all(
        token in added and index >= end for token, index in vocabulary.items() if token not in known
    )


def describe(token: str | None) -> str:
    """A token as a message shows it; None is an id without a token."""
    return "absent" if token is None else repr(token)
