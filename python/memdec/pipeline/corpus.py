"""From text to tokens: read, drop duplicates, hold out validation and test, tokenise.

    memdec's first stage: ``build_corpus("manuals/", "path/to/model", "out/corpus")``

What is held out is decided by a hash of each document's text, so that it is the same on every machine, in whatever
order the files come, and stays so when documents are added. A corpus of fewer than 20 documents cannot be split so
without luck: there the end of each document is held out (its last 10% by default), in one piece and cut at a
paragraph's end, so that no held-out sentence has trained-on text on both sides. That text is closer to what was
trained on than another document would be; the manifest says which of the two was done (``split_by``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memdec.errors import MemdecError
from memdec.modeling.tokenizers import fingerprint, load_tokenizer, width
from memdec.pipeline.documents import Document, read_documents
from memdec.pipeline.progress import progress
from memdec.stores.atomic import folder_lock, writing
from memdec.stores.corpus import FORMAT, SPLITS, VERSION, Corpus, write_split
from memdec.stores.manifest import Manifest

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

FEW_DOCUMENTS = 20  # below it, luck decides whether 5% of the documents are one or none
LONG_DOCUMENT = 2000  # characters; a tenth of it is a few sentences
CHUNK_CHARACTERS = 1 << 18  # text handed to the tokenizer at once


class _Entry(NamedTuple):
    """What the first reading keeps of a document."""

    name: str
    digest: bytes  # sha256 of the text
    split: str | None  # where the source puts it
    characters: int


class _Piece(NamedTuple):
    """A stretch of a document that goes into one split: the document's number, the split, and from and to which
    fraction of the text (0 and 1 for a whole document)."""

    document: int
    split: str
    start: float
    stop: float


def build_corpus(
    source: str | Path,
    tokenizer: Any,  # a transformers tokenizer, or the path or name of one
    out: str | Path,
    *,
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    text_field: str = "text",
    workers: int = 1,
    max_tokens: int | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
) -> Corpus:
    """Make a corpus of the text in ``source``; the bytes depend on the text, the tokenizer and the parameters only.

    Args:
        source: a file or folder of .txt, .md, .html, .jsonl(.gz) or .parquet, or a dataset (see ``read_documents``).
            Splits that a dataset brings are kept.
        tokenizer: a transformers tokenizer with an end-of-text token, or the path or name of one. No text is added to a
            document but that token at its end.
        out: the folder for the corpus.
        fractions: of the text, for train, validation and test; they sum to 1.
        seed: another one holds out other documents.
        text_field: where the text is in .jsonl, Parquet and datasets.
        workers: processes that tokenise; it does not change the result.
        max_tokens: at most so many tokens of ``source``, shared out by ``fractions``; documents are taken in the
            order of their hashes, and the last one is cut.
        validation: a source of its own to validate on; then nothing of ``source`` is held out for it.
        test: the same for the test.

    Returns:
        The corpus. Its manifest's results hold, by split, ``documents`` and ``tokens``, the numbers of
        ``duplicates`` and ``empty`` documents that were dropped, and ``split_by``: "documents" or "blocks".

    Raises:
        MemdecError: nothing to read, broken files, too little text, a tokenizer without an end-of-text token, or a
            folder that holds something else.
    """
    _check(fractions, workers, max_tokens)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
    eos = loaded.eos_token_id
    if eos is None:
        raise MemdecError(
            "The tokenizer has no end-of-text token (eos_token), which must stand between documents. "
            "Use the model's own tokenizer, or set its eos_token."
        )
    readers: list[tuple[str | None, Callable[[], Iterator[Document]]]] = [
        (None, read_documents(source, text_field=text_field))
    ]
    for split, given in (("validation", validation), ("test", test)):
        if given is not None:
            readers.append((split, read_documents(given, text_field=text_field)))

    def documents() -> Iterator[Document]:
        for split, read in readers:
            for document in read():
                if split is None:
                    yield document
                else:
                    yield Document(f"{split}:{document.name}", document.text, split)

    entries = _survey(documents())
    for own, _ in readers[1:]:
        if not any(entry.digest and entry.split == own for entry in entries):
            raise MemdecError(f"The {own} text has no document with any text. Check the path given for it.")
    fields = {
        "source_sha256": _source_digest(entries),
        "tokenizer_fingerprint": fingerprint(loaded),
        "vocab_size": width(loaded),
        "eos_token_id": int(eos),
        "fractions": [float(share) for share in fractions],
        "seed": seed,
        "max_tokens": max_tokens,
    }
    with folder_lock(out):
        manifest = Manifest.start(out, format=FORMAT, version=VERSION, fields=fields)
        if manifest.complete:
            return Corpus.open(out)
        manifest.shards, manifest.results = [], {}
        kept, duplicates = _drop_duplicates(entries)
        pieces, split_by = _plan(entries, kept, fractions, seed)
        encode = _Encoder(loaded, int(eos), documents, entries, min(workers, max(1, os.cpu_count() or 1)))
        limits: dict[_Piece, int] = {}
        if max_tokens is not None:
            free = {
                split for split in SPLITS if any(p.split == split and entries[p.document].split is None for p in pieces)
            }
            pieces, limits = _budget(entries, pieces, fractions, free, seed, max_tokens, encode)
        _write(Path(out), manifest, entries, pieces, limits, encode)
        manifest.results["duplicates"] = duplicates
        manifest.results["split_by"] = split_by
        _check_splits(manifest, fractions, len(kept))
        manifest.finish(out)
    return Corpus.open(out)


def _check(fractions: Sequence[float], workers: int, max_tokens: int | None) -> None:
    # Asked this way round, NaN is refused as well.
    if not (len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-9 and fractions[0] > 0):
        raise MemdecError(
            "fractions must be three numbers for train, validation and test that sum to 1, the first above 0; "
            f"got {fractions}"
        )
    if workers < 1:
        raise MemdecError(f"workers must be at least 1, got {workers}")
    if max_tokens is not None and max_tokens < 2:
        raise MemdecError(f"max_tokens must be at least 2, got {max_tokens}")


def _survey(documents: Iterable[Document]) -> list[_Entry]:
    """Read everything once and keep hashes. The numbers of the documents are their places in this list."""
    entries = []
    with progress(None, unit="documents", label="Reading") as advance:
        for document in documents:
            empty = not document.text.strip()
            digest = b"" if empty else hashlib.sha256(_encoded(document.text)).digest()
            entries.append(_Entry(document.name, digest, document.split, len(document.text)))
            advance(1)
    if not any(entry.digest for entry in entries):
        raise MemdecError("The corpus is empty: no document has any text. Check the path and the text field.")
    return entries


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _source_digest(entries: list[_Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.name, entry.digest.hex(), entry.split]).encode())
    return digest.hexdigest()


def _drop_duplicates(entries: list[_Entry]) -> tuple[list[int], int]:
    """The documents that are kept, in order, and how many exact copies were dropped. What is given as validation or
    test keeps its place, and its copies leave the training text."""
    seen: set[bytes] = set()
    kept = []
    rank: dict[str | None, int] = {"test": 0, "validation": 1}
    for index in sorted(range(len(entries)), key=lambda i: (rank.get(entries[i].split, 2), i)):
        digest = entries[index].digest
        if digest and digest not in seen:
            seen.add(digest)
            kept.append(index)
    filled = sum(bool(entry.digest) for entry in entries)
    return sorted(kept), filled - len(kept)


def _place(digest: bytes, seed: int, purpose: str) -> int:
    """Where a document stands in the order that ``seed`` draws: 64 bits, uniform."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} ".encode() + digest).digest()[:8], "big")


def _plan(entries: list[_Entry], kept: list[int], fractions: Sequence[float], seed: int) -> tuple[list[_Piece], str]:
    """Which part of which document goes where, in document order, and by what the text was split."""
    given = {entries[index].split for index in kept}
    pieces = [_Piece(i, split, 0.0, 1.0) for i in kept if (split := entries[i].split) is not None]
    free = [index for index in kept if entries[index].split is None]
    train, validation, test = (0.0 if split in given else share for split, share in zip(SPLITS, fractions, strict=True))
    total = train + validation + test
    first, second = train / total, (train + validation) / total
    long = [index for index in free if entries[index].characters >= LONG_DOCUMENT]
    split_by = "documents"
    if validation + test == 0:
        pieces += [_Piece(index, "train", 0.0, 1.0) for index in free]
    elif len(free) < FEW_DOCUMENTS and (long or len(free) < 3):
        split_by = "blocks"
        for index in free:
            if index in long or not long:
                bounds = (("train", 0.0, first), ("validation", first, second), ("test", second, 1.0))
                pieces += [_Piece(index, split, start, stop) for split, start, stop in bounds if stop > start]
            else:
                pieces.append(_Piece(index, "train", 0.0, 1.0))
    else:
        order = sorted(free, key=lambda index: _place(entries[index].digest, seed, "split"))
        places = [_place(entries[index].digest, seed, "split") / 2**64 for index in order]
        ends = [sum(place < bound for place in places) for bound in (first, second)]
        if test:  # at least one document each
            ends[1] = min(ends[1], len(order) - 1)
        if validation:
            ends[0] = min(ends[0], ends[1] - 1)
        ends[0] = max(ends[0], 1)
        for number, index in enumerate(order):
            split = "train" if number < ends[0] else "validation" if number < ends[1] else "test"
            pieces.append(_Piece(index, split, 0.0, 1.0))
    if split_by == "blocks":
        logger.warning(
            "few documents (%d): the end of each is held out instead of whole documents, so the held-out text is "
            "closer to the training text than a new document would be",
            len(free),
        )
    return sorted(pieces, key=lambda piece: (piece.document, piece.start)), split_by


def cut_text(text: str, fraction: float, tolerance: float = 0.02) -> int:
    """The place near ``fraction`` of ``text`` where it is best cut: after a blank line, else a line, a sentence, a
    word.

    >>> text = "One.\\n\\nTwo, which is longer.\\n\\nThree."
    >>> text[cut_text(text, 0.8, tolerance=0.2):]
    'Three.'
    """
    if fraction <= 0 or fraction >= 1:
        return 0 if fraction <= 0 else len(text)
    target = round(fraction * len(text))
    reach = max(1, round(tolerance * len(text)))
    low, high = max(1, target - reach), min(len(text) - 1, target + reach)
    for pattern in (r"\n[ \t]*\n\s*", r"\n\s*", r"[.!?。！？]\s+", r"\s+"):
        ends = [match.end() for match in re.compile(pattern).finditer(text, max(0, low - 200), high)]
        if near := [end for end in ends if low <= end <= high]:
            return min(near, key=lambda end: (abs(end - target), end))
    return target


@dataclass
class _Encoder:
    """Tokenises pieces, reading the source again; the order is that of the documents whatever the number of workers."""

    tokenizer: Any
    eos: int
    documents: Callable[[], Iterator[Document]]
    entries: list[_Entry]
    workers: int

    def __call__(self, pieces: Sequence[_Piece], label: str) -> Iterator[tuple[_Piece, Tokens]]:
        """Yields each piece with its tokens, the end-of-text token last; a piece of blanks gives no tokens."""
        with progress(len(pieces), unit="documents", label=label) as advance, ExitStack() as stack:
            run: Callable[[list[str]], Callable[[], list[Tokens]]]
            if self.workers == 1:
                run = self._run_here
            else:
                # spawn: a forked child would inherit the threads' locks of tokenizer and torch in whatever state
                # they are
                pool = ProcessPoolExecutor(
                    self.workers, get_context("spawn"), _set_tokenizer, (self.tokenizer, self.eos)
                )
                stack.callback(pool.shutdown, cancel_futures=True)
                run = _Submit(pool)
            waiting: deque[tuple[list[_Piece], Callable[[], list[Tokens]]]] = deque()

            def finish_first() -> Iterator[tuple[_Piece, Tokens]]:
                batch, result = waiting.popleft()
                try:
                    found = result()
                except BrokenProcessPool:
                    raise MemdecError(
                        "A tokenising process died (out of memory, or started from a script without "
                        "`if __name__ == '__main__':`). Use --workers 1."
                    ) from None
                advance(len(batch))
                yield from zip(batch, found, strict=True)

            batch: list[_Piece] = []
            texts: list[str] = []
            size = 0
            for piece, text in self._texts(pieces):
                batch.append(piece)
                texts.append(text)
                size += len(text)
                if size >= CHUNK_CHARACTERS:
                    waiting.append((batch, run(texts)))
                    batch, texts, size = [], [], 0
                    if len(waiting) >= 2 * self.workers:
                        yield from finish_first()
            if batch:
                waiting.append((batch, run(texts)))
            while waiting:
                yield from finish_first()

    def _run_here(self, texts: list[str]) -> Callable[[], list[Tokens]]:
        found = _tokenise(self.tokenizer, self.eos, texts)
        return lambda: found

    def _texts(self, pieces: Sequence[_Piece]) -> Iterator[tuple[_Piece, str]]:
        wanted = iter(pieces)
        piece = next(wanted, None)
        for number, document in enumerate(self.documents()):
            if piece is None:
                return
            if number >= len(self.entries) or number != piece.document:
                continue
            if hashlib.sha256(_encoded(document.text)).digest() != self.entries[number].digest:
                break
            while piece is not None and piece.document == number:
                start, stop = cut_text(document.text, piece.start), cut_text(document.text, piece.stop)
                yield piece, document.text[start:stop]
                piece = next(wanted, None)
        if piece is not None:
            name = self.entries[piece.document].name
            raise MemdecError(
                f"{name} changed while the corpus was read. Run the command again when nothing writes there."
            )


class _Submit:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, texts: list[str]) -> Callable[[], list[Tokens]]:
        future: Future[list[Tokens]] = self._pool.submit(_tokenise_in_worker, texts)
        return future.result


_worker: tuple[Any, int] | None = None


def _set_tokenizer(tokenizer: Any, eos: int) -> None:
    global _worker
    _worker = (tokenizer, eos)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A pool's worker whose parent was killed waits for work forever.
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def _tokenise_in_worker(texts: list[str]) -> list[Tokens]:
    assert _worker is not None
    return _tokenise(*_worker, texts)


def _tokenise(tokenizer: Any, eos: int, texts: list[str]) -> list[Tokens]:
    # Truncation and padding are set off by name: a tokenizer file may have them on, and tokens would be lost without
    # a word.
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    empty = np.zeros(0, np.int32)
    return [
        np.asarray([*ids, eos], dtype=np.int32) if len(ids) and text.strip() else empty
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _budget(
    entries: list[_Entry],
    pieces: list[_Piece],
    fractions: Sequence[float],
    free: set[str],
    seed: int,
    max_tokens: int,
    encode: _Encoder,
) -> tuple[list[_Piece], dict[_Piece, int]]:
    """Choose pieces in the order of their hashes until each split that is drawn from the source has its share of
    ``max_tokens``. Returns the pieces in document order, and how many tokens are taken of one that is cut."""
    shares = {split: share for split, share in zip(SPLITS, fractions, strict=True) if split in free}
    chosen = [piece for piece in pieces if entries[piece.document].split is not None]
    limits: dict[_Piece, int] = {}
    lengths: dict[_Piece, int] = {}
    budgets = {split: max(2, round(max_tokens * share / sum(shares.values()))) for split, share in shares.items()}
    orders = {
        split: sorted(
            (piece for piece in pieces if piece.split == split and entries[piece.document].split is None),
            key=lambda piece: _place(entries[piece.document].digest, seed, "budget"),
        )
        for split in shares
    }
    guess = 8  # characters a token; doubled until the tokens suffice
    while True:
        unknown: list[_Piece] = []
        short = False
        for split, order in orders.items():
            characters = 0.0
            for number, piece in enumerate(order):
                if characters >= guess * budgets[split]:
                    taken = sum(lengths.get(earlier, 0) for earlier in order[:number])
                    short |= taken < budgets[split]
                    break
                characters += entries[piece.document].characters * (piece.stop - piece.start)
                if piece not in lengths:
                    unknown.append(piece)
        if not unknown:
            if not short:
                break
            guess *= 2
            continue
        unknown.sort(key=lambda piece: (piece.document, piece.start))
        lengths.update((piece, len(tokens)) for piece, tokens in encode(unknown, "Counting"))
    for split, order in orders.items():
        left = budgets[split]
        for piece in order:
            if left < 2:
                break
            length = lengths.get(piece, 0)
            if length > left:
                limits[piece] = left
            chosen.append(piece)
            left -= min(length, left)
    return sorted(chosen, key=lambda piece: (piece.document, piece.start)), limits


def _write(
    out: Path,
    manifest: Manifest,
    entries: list[_Entry],
    pieces: list[_Piece],
    limits: dict[_Piece, int],
    encode: _Encoder,
) -> None:
    """Tokenise ``pieces`` into the three files, by way of raw temporary ones, so that memory does not grow with the
    text."""
    starts: dict[str, list[int]] = {split: [0] for split in SPLITS}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    spools = {split: out / f".{split}.tokens.tmp" for split in SPLITS}
    empty = sum(not entry.digest for entry in entries)
    try:
        with writing(out), ExitStack() as stack:
            files: dict[str, IO[bytes]] = {split: stack.enter_context(open(spools[split], "wb")) for split in SPLITS}
            for piece, tokens in encode(pieces, "Tokenising"):
                if piece in limits:
                    tokens = np.append(tokens[: limits[piece] - 1], tokens[-1:])
                if not len(tokens):
                    empty += piece.start == 0.0 and piece.stop == 1.0
                    continue
                files[piece.split].write(tokens.data)
                starts[piece.split].append(starts[piece.split][-1] + len(tokens))
                part = "" if piece.stop - piece.start == 1 else f" [{piece.start:.0%}–{piece.stop:.0%}]"
                names[piece.split].append(entries[piece.document].name + part)
        for split in SPLITS:
            count = starts[split][-1]
            tokens = np.memmap(spools[split], np.int32, mode="r") if count else np.zeros(0, np.int32)
            written = write_split(out, split, tokens, np.asarray(starts[split], np.int64), names[split])
            manifest.add(out, f"{split}.safetensors", written)
    finally:
        with writing(out):
            for spool in spools.values():
                spool.unlink(missing_ok=True)
    manifest.results["tokens"] = {split: starts[split][-1] for split in SPLITS}
    manifest.results["documents"] = {split: len(names[split]) for split in SPLITS}
    manifest.results["empty"] = empty


def _check_splits(manifest: Manifest, fractions: Sequence[float], documents: int) -> None:
    tokens = manifest.results["tokens"]
    for split, share in zip(SPLITS, fractions, strict=True):
        if share > 0 and tokens[split] < 2:
            raise MemdecError(
                f"The corpus ({documents} documents, {sum(tokens.values())} tokens) is too small: "
                f"nothing is left for {split}. "
                + ("Add text." if split == "train" else f"Add text, or give a text of its own with --{split}.")
            )
