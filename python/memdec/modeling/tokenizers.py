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
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from memdec.errors import MemdecError
from memdec.stores.manifest import MANIFEST_NAME
from memdec.stores.memory import is_memory, read_memory_card

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


def locate(source: str | PathLike[str]) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` wants for `source`: the folder (or hub id) and further options (``gguf_file``).

    Raises:
        MemdecError: `source` looks like a path, and there is nothing.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MemdecError(f"{source} is not a file; give the path of a .gguf file, a model folder or a hub id.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        refuse_artefact(path)
        return str(path), {}
    if path.is_file():
        raise MemdecError(f"{source} is a file; a model is a folder (with config.json), a hub id or a .gguf file.")
    name = str(source)
    # A hub id is NAME or OWNER/NAME; whatever else was written was meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise MemdecError(f"the folder {source} does not exist; check the path, or give a hub id such as OWNER/NAME.")
    return name, {}


def refuse_artefact(folder: Path) -> None:
    """Raise ``MemdecError`` for a folder of memdec's that is no model: a run's, or a stage's."""
    if (folder / "config.json").is_file():
        return
    if is_memory(folder / "memory"):
        read_memory_card(folder)  # whose message says where the memory is
    if (folder / MANIFEST_NAME).is_file():
        raise MemdecError(
            f"{folder} is a stage's folder (it has a {MANIFEST_NAME}) and no model; a run's memory is in its folder "
            "`memory`."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as one sentence: what other libraries raise can fill a page."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


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
