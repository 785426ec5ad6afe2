"""The demo's domain: what the installed transformers says about the models that are younger than SmolLM2.

The text is the docstrings of transformers' own model folders, read from source with `ast`; nothing is imported. SmolLM2
is from November 2024, so we take the folders whose licence headers all say 2025 or later: documentation that the base
cannot have seen.

An honest held-out figure needs care here, because these folders copy from one another. So

1. one *model folder* is one document, hence everything about a model falls on one side of the split;
2. ``modular_*.py`` (from which ``modeling_*.py`` is generated) and conversion scripts are left out;
3. a docstring is dropped when more than half of its six-word runs stood in an earlier docstring, of this folder or
   another (this drops more than half of them);
4. a document keeps its leading docstrings up to a length that lets every folder take part in the budget of the demo.

What the folders still share (a sentence here, a signature there) is what makes it a domain. The evaluation measures how
much of the held-out text nevertheless stands word for word in the training text, and gives the perplexity with and
without it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memdec.errors import MemdecError

FIRST_YEAR = 2025
SHINGLE_WORDS = 6
_COPYRIGHT = re.compile(r"Copyright (\d{4})")
_HEADER_CHARS = 800  # the licence stands at the top of a file


@dataclass(frozen=True)
class DomainText:
    """The documents of the demo and how they came about.

    Attributes:
        documents: (name, text) in order of name.
        docstrings_found: docstrings in the folders that were looked at.
        docstrings_dropped: of these, how many were near duplicates of an earlier one.
        characters_found: characters of the docstrings that are not near duplicates, before documents were cut.
        transformers_version: the text depends on it.
    """

    documents: list[tuple[str, str]]
    docstrings_found: int
    docstrings_dropped: int
    characters_found: int
    transformers_version: str

    @property
    def characters(self) -> int:
        """Characters in all documents together."""
        return sum(len(text) for _, text in self.documents)


def docstrings_of(source: str) -> list[str]:
    """All docstrings of a Python source text, in the order in which they stand there; [] when it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def model_folders(root: Path, first_year: int = FIRST_YEAR) -> list[tuple[str, list[Path]]]:
    """The folders under ``root``/models of which every dated file is from ``first_year`` or later, with their sources.

    Returns:
        (folder name, sorted source files) in order of name; generated-from and conversion sources are left out.
    """
    folders: list[tuple[str, list[Path]]] = []
    for folder in sorted(path for path in (root / "models").iterdir() if path.is_dir()):
        files = [
            path
            for path in sorted(folder.glob("*.py"))
            if not path.name.startswith(("modular_", "convert_", "__init__"))
        ]
        years = []
        for path in files:
            with path.open(encoding="utf-8", errors="replace") as handle:
                match = _COPYRIGHT.search(handle.read(_HEADER_CHARS))
            if match:
                years.append(int(match.group(1)))
        if years and min(years) >= first_year:
            folders.append((folder.name, files))
    return folders


def drop_near_duplicates(documents: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Drop each docstring of whose six-word runs more than half occurred in any docstring before it.

    Args:
        documents: (name, docstrings) in a fixed order; the first to say something keeps it.
    """
    seen: set[tuple[str, ...]] = set()
    kept: list[tuple[str, list[str]]] = []
    for name, texts in documents:
        mine = []
        for text in texts:
            runs = _word_runs(text)
            if 2 * len(runs & seen) <= len(runs):
                mine.append(text)
            seen |= runs
        kept.append((name, mine))
    return kept


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def transformers_docstrings(max_characters: int = 400_000, root: Path | None = None) -> DomainText:
    """Read the demo's documents from the installed transformers package, without importing it.

    Args:
        max_characters: the most that all documents together hold; each is cut, between docstrings, to the length that
            brings the whole nearest to this.
        root: the package's folder, if not the installed one.

    Raises:
        MemdecError: transformers is not installed, or has no model folder that is young enough.
    """
    version = "unknown"
    if root is None:
        root, version = _installed_transformers()
    found = []
    for name, files in model_folders(root):
        texts = [text for path in files for text in docstrings_of(path.read_text(encoding="utf-8", errors="replace"))]
        found.append((name, texts))
    kept = [(name, texts) for name, texts in drop_near_duplicates(found) if texts]
    if not kept:
        raise MemdecError(
            f"The demo's text is the documentation of models of {FIRST_YEAR} or later in transformers, and {root} "
            f"(version {version}) documents none. Install transformers 5.17 or later."
        )
    limit = _length_limit([[len(text) for text in texts] for _, texts in kept], max_characters)
    documents = [(name, "\n\n".join(_leading(texts, limit)) + "\n") for name, texts in kept]
    total_found = sum(len(texts) for _, texts in found)
    total_kept = sum(len(texts) for _, texts in kept)
    return DomainText(
        documents=documents,
        docstrings_found=total_found,
        docstrings_dropped=total_found - total_kept,
        characters_found=sum(len(text) for _, texts in kept for text in texts),
        transformers_version=version,
    )


def _installed_transformers() -> tuple[Path, str]:
    import importlib.metadata
    import importlib.util

    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise MemdecError(
            "The demo's text comes from the transformers package, which is not installed: pip install transformers"
        )
    return Path(next(iter(spec.submodule_search_locations))), importlib.metadata.version("transformers")


def _leading(texts: list[str], limit: int) -> list[str]:
    """The first texts whose lengths add up to at most ``limit``; always at least one."""
    kept: list[str] = []
    length = 0
    for text in texts:
        if kept and length + len(text) > limit:
            break
        kept.append(text)
        length += len(text)
    return kept


def _length_limit(lengths: list[list[int]], budget: int) -> int:
    """The largest limit a document for which all documents together stay within ``budget`` characters (bisection)."""

    def total(limit: int) -> int:
        return sum(sum(len_ for len_ in _leading_lengths(document, limit)) for document in lengths)

    low, high = 0, max(sum(document) for document in lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if total(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _leading_lengths(lengths: list[int], limit: int) -> list[int]:
    kept: list[int] = []
    for length in lengths:
        if kept and sum(kept) + length > limit:
            break
        kept.append(length)
    return kept


def write_documents(documents: Iterable[tuple[str, str]], folder: Path) -> None:
    """Write (name, text) to ``folder``/NAME.txt, for `memdec fit` and for a curious reader."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in documents:
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
