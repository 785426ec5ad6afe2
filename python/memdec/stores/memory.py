"""A memory on disk: a plain transformers model folder with ``memory_config.json`` and a model card beside the weights.

``memory_config.json`` (format ``memdec.memory``) holds what the composite needs, the recommended α and the tokenizer's
fingerprint, where the memory comes from, and the size and checksum of every other file, so that ``verify`` finds a
changed byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError
from memdec.stores.atomic import write_file
from memdec.stores.manifest import (
    REMEDY,
    Shard,
    check_files,
    leaves_folder,
    list_files,
    read_checked_text,
    to_checked_text,
)

FORMAT = "memdec.memory"
VERSION = 1
CARD_NAME = "memory_config.json"


@dataclass(frozen=True)
class MemoryCard:
    """What a memory tells about itself.

    Attributes:
        alpha: the recommended weight of the memory in the mixture, 0 to 1.
        tokenizer_fingerprint: of the tokenizer that base and memory share.
        vocab_size: the tokenizer's number of ids.
        provenance: JSON: the base, the checksums of corpus, datastore and distributions, the training settings, the
            figures.
    """

    alpha: float
    tokenizer_fingerprint: str
    vocab_size: int
    provenance: dict[str, Any] = field(default_factory=dict)


def write_memory_card(folder: str | Path, card: MemoryCard) -> None:
    """Write ``memory_config.json``, with the checksums of the files that are in ``folder`` now. Call it last.

    Raises:
        MemdecError: α is outside [0, 1], or the folder cannot be written.
    """
    if not 0 <= card.alpha <= 1:
        raise MemdecError(f"alpha must be from 0 to 1, got {card.alpha}")
    folder = Path(folder)
    files = [shard for shard in list_files(folder, except_names=(CARD_NAME,)) if not _hidden(shard.name)]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "alpha": float(card.alpha),
        "tokenizer_fingerprint": card.tokenizer_fingerprint,
        "vocab_size": card.vocab_size,
        "provenance": card.provenance,
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
    write_file(folder / CARD_NAME, to_checked_text(content).encode())


def read_memory_card(folder: str | Path) -> MemoryCard:
    """Read ``memory_config.json`` of a memory folder.

    Raises:
        MemdecError: there is none, it is damaged, or it is of another version.
    """
    content = _read(Path(folder))
    return MemoryCard(
        float(content["alpha"]),
        str(content["tokenizer_fingerprint"]),
        int(content["vocab_size"]),
        content["provenance"],
    )


def is_memory(folder: str | Path) -> bool:
    """Whether ``folder`` holds a memory."""
    return (Path(folder) / CARD_NAME).is_file()


def verify_memory(folder: str | Path) -> list[str]:
    """Compare every file of a memory with the checksums in its card; the problems, one line each."""
    folder = Path(folder)
    content = _read(folder)
    problems = []
    if (folder / CARD_NAME).read_bytes() != to_checked_text(content).encode():
        problems.append(f"{CARD_NAME} has been changed since it was written")
    files = [Shard(name, entry["bytes"], entry["sha256"]) for name, entry in sorted(content["files"].items())]
    # A hub download brings hidden files of its own.
    found = check_files(folder, files, own_name=CARD_NAME)
    return problems + [problem for problem in found if not _hidden(problem)]


def write_model_card(
    folder: str | Path,
    card: MemoryCard,
    *,
    title: str,
    figures: dict[str, float] | None = None,  # name → held-out perplexity, or another number
) -> None:
    """Write the model card, ``README.md``: what the memory is, how to attach it, where it comes from and how it
    measured."""
    base = str(card.provenance.get("base", "the base model"))
    lines = [
        "---",
        "library_name: memdec",
        "tags: [memory-decoder]",
        "---",
        "",
        f"# {title}",
        "",
        "A memory for language models: a small model trained to imitate a nearest-neighbour retriever over the text of",
        "one domain (Memory Decoder, arXiv 2508.09874). It is mixed with any base model that has the same tokenizer:",
        "",
        "```",
        "from memdec import MemoryModel",
        f'model = MemoryModel.from_pretrained("{base}", "path/to/this/folder")',
        "```",
        "",
        f"Recommended weight of the memory: α = {card.alpha:g} (chosen on validation text). "
        f"Vocabulary: {card.vocab_size} tokens.",
        "",
    ]
    if figures:
        lines += ["| measure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in figures.items()]
        lines.append("")
    if card.provenance:
        lines += ["## Provenance", "", "```json", json.dumps(card.provenance, indent=2, sort_keys=True), "```", ""]
    write_file(Path(folder) / "README.md", "\n".join(lines).encode())


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _read(folder: Path) -> dict[str, Any]:
    if not is_memory(folder) and is_memory(folder / "memory"):
        raise MemdecError(f"{folder} is the folder of a run; the memory that it made is {folder / 'memory'}.")
    content = read_checked_text(folder / CARD_NAME, format=FORMAT, version=VERSION)
    missing = {"alpha", "tokenizer_fingerprint", "vocab_size", "provenance", "files"} - content.keys()
    if missing:
        raise MemdecError(f"{folder / CARD_NAME} lacks {', '.join(sorted(missing))}. {REMEDY}")
    alpha, files = content["alpha"], content["files"]
    fine = (
        isinstance(alpha, int | float)
        and 0 <= alpha <= 1
        and isinstance(content["vocab_size"], int)
        and isinstance(content["provenance"], dict)
        and isinstance(files, dict)
        and all(
            isinstance(file, dict)
            and isinstance(file.get("bytes"), int)
            and isinstance(file.get("sha256"), str)
            and not leaves_folder(name)
            for name, file in files.items()
        )
    )
    if not fine:
        raise MemdecError(f"{folder / CARD_NAME} is damaged: it holds values that cannot be. {REMEDY}")
    return content
