"""In-context retrieval augmentation (In-Context RALM, Ram et al., TACL 2023, arXiv 2302.00083), a rival on the same
tokens: what is retrieved stands before the text, and the model reads both.

    p(yᵢ … yᵢ₊ₛ₋₁ | x) = p_base( · | passage(last ℓ tokens before yᵢ) ∘ x)

every s = 4 tokens anew, with a query of ℓ = 32 tokens, by BM25 over passages of the *training* text. The passage takes
its room from the window: passage and context together are never longer than what the base reads at once, so that of a
context that would be too long the beginning gives way.

Consecutive strides that find the same passages and keep the same beginning are read in one forward, which gives each
token the very log-prob that a forward for its stride alone would give it.

    >>> retriever = Retriever.of_corpus(corpus, tokenizer, passage_tokens=128)             # doctest: +SKIP
    >>> log_probs = rag_log_prob(model, retriever, protocol.tokens, protocol.windows)      # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdec.errors import MemdecError
from memdec.modeling.scoring import perplexity, score_tokens
from memdec.modeling.tokenizers import fingerprint
from memdec.stores.corpus import Corpus
from memdec.stores.windows import Window, windows

LOGGER = logging.getLogger(__name__)

QUERY_TOKENS = 32
EVERY = 4
PASSAGE_TOKENS = 128
# BM25's parameters as Pyserini has them, which the paper retrieves with.
K1, B = 0.9, 0.4
# What tune_rag tries, and on so many rows of validation text, in stretches of so many.
PASSAGE_LENGTHS = (64, 128, 256)
PASSAGE_COUNTS = (1, 2)
TUNING_ROWS = 1024
STRETCH = 64
# Texts of forwards that are laid out at once: 4096 of 1024 tokens take 17 MB.
READS_AT_ONCE = 4096


@dataclass(frozen=True)
class RagSettings:
    """How retrieval is set, and where that comes from.

    Attributes:
        query_tokens: ℓ, tokens before a position that are searched for.
        every: s, tokens that are predicted with the same passages.
        passage_tokens: the most tokens in a passage.
        passages: how many passages stand before the text.
        source: where passage_tokens and passages come from.
        tried: (passage_tokens, passages, perplexity on the validation sample) of every pair that was tried.
    """

    query_tokens: int
    every: int
    passage_tokens: int
    passages: int
    source: str
    tried: tuple[tuple[int, int, float], ...] = ()


class Retriever:
    """BM25 (bm25s, the variant of Lucene) over passages of documents.

    A passage is a stretch of a document's tokens; the last of a document may be shorter. For BM25 it is decoded and cut
    into lower-case words of two characters and more, without the English stop words of Lucene.

    Args:
        documents: token ids of each document, int (n,), without end-of-text.
        tokenizer: that made them.
        passage_tokens: tokens in a passage.
        k1: saturation of a word's count.
        b: how much a passage's length counts.

    Raises:
        MemdecError: there is no token to retrieve, ``passage_tokens`` is less than 1, or bm25s is not installed.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        tokenizer: Any,
        *,
        passage_tokens: int = PASSAGE_TOKENS,
        k1: float = K1,
        b: float = B,
    ) -> None:
        if passage_tokens < 1:
            raise MemdecError(f"passage_tokens must be at least 1, got {passage_tokens}")
        self.tokenizer = tokenizer
        self.passage_tokens = passage_tokens
        self._passages: list[Tensor] = []
        for document in documents:
            if document.numel():  # else it would be split into one empty part
                self._passages += torch.split(document, passage_tokens)
        if not self._passages:
            raise MemdecError("The training text holds no token, so there is nothing to retrieve. Leave rag out.")
        self._bm25s = load_bm25s()
        texts = tokenizer.batch_decode(
            [part.tolist() for part in self._passages], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        words = self._bm25s.tokenize(texts, stopwords="en", show_progress=False)
        self._index: Any = None
        if words.vocab:  # else there is no word in the text, and no query finds anything
            self._index = self._bm25s.BM25(k1=k1, b=b, method="lucene")
            self._index.index(words, show_progress=False)

    @classmethod
    def of_corpus(
        cls, corpus: Corpus, tokenizer: Any, *, passage_tokens: int = PASSAGE_TOKENS, k1: float = K1, b: float = B
    ) -> Retriever:
        """A retriever over the training text of a corpus.

        Raises:
            MemdecError: as the class, and where the corpus has another tokenizer.
        """
        if corpus.tokenizer_fingerprint != fingerprint(tokenizer):
            raise MemdecError(
                f"The corpus {corpus.folder} was tokenised with another tokenizer than the base model's, so its tokens "
                "mean something else to it. Build a corpus with this model, or leave rag out."
            )
        train = corpus.split("train")
        documents = [train.document(index)[:-1] for index in range(train.num_documents)]
        return cls(documents, tokenizer, passage_tokens=passage_tokens, k1=k1, b=b)

    @property
    def num_passages(self) -> int:
        """How many passages there are."""
        return len(self._passages)

    def passage(self, index: int) -> Tensor:
        """The tokens of a passage, int (n,)."""
        return self._passages[index]

    def prefix(self, found: Sequence[int]) -> Tensor:
        """What stands before the text, int64 (P,): the passages found, the best of them next to the text."""
        parts = [self._passages[index].long() for index in reversed(found)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def scores(self, query: Tensor) -> NDArray[np.float32]:
        """BM25 of every passage for the text of ``query``, token ids (n,); 0 where no word is shared."""
        text = self.tokenizer.decode(query.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        words = self._bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)[0]
        if self._index is None or not words:
            return np.zeros(self.num_passages, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores(words)
        return found

    def search(self, query: Tensor, passages: int = 1) -> tuple[int, ...]:
        """The ids of the best passages for ``query``, token ids (n,), best first; of equals the lower id.

        Passages that share no word with the query are not found, so that there may be fewer than asked for, or none.
        """
        scores = self.scores(query)
        found: list[int] = []
        for _ in range(min(passages, self.num_passages)):
            best = int(scores.argmax())  # the first of equals
            if scores[best] <= 0:
                break
            found.append(best)
            scores[best] = 0
        return tuple(found)


@dataclass(frozen=True)
class Read:
    """One forward: passages, then ``tokens[start : stop − 1]``; the rows from ``score_from`` on are scored.

    Attributes:
        passages: ids, best first.
        prefix_tokens: tokens in these passages.
        start: the first token of the text that is read.
        stop: the token after the last one that is predicted.
        score_from: the first row scored.
    """

    passages: tuple[int, ...]
    prefix_tokens: int
    start: int
    stop: int
    score_from: int

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads."""
        return self.prefix_tokens + self.stop - 1 - self.start


def plan_reads(
    retriever: Retriever,
    tokens: Tensor,  # (T,) int token ids
    cut: Sequence[Window],
    *,
    query_tokens: int = QUERY_TOKENS,
    every: int = EVERY,
    passages: int = 1,
    most_inputs: int | None = None,
) -> list[Read]:
    """Retrieve for every stride of every window, and say what is to be read to score it.

    The strides of a window begin at its first scored row. The query of a stride are the last tokens that the window
    holds before the first one that the stride predicts. A stride for which passages and context fit into
    ``most_inputs`` keeps the whole context; the others of the window all lose its first tokens, as many as its last row
    has to. So the context of each row is a function of its window and its passages alone.

    Args:
        retriever: finds the passages.
        tokens: the stream that the windows point into.
        cut: the windows.
        query_tokens: ℓ.
        every: s, rows in a stride.
        passages: how many are read.
        most_inputs: the most tokens that the model may read at once, passages included; None: as many as in the longest
            window, which is what the base has.

    Returns:
        Forwards that score each row that a window scores, once. Their ``num_inputs`` add up to the method's cost.

    Raises:
        MemdecError: a number that is less than 1, or passages that would leave less than half of the window.
    """
    longest = max((window.stop - 1 - window.start for window in cut), default=0)
    room = longest if most_inputs is None else most_inputs
    if not cut:
        return []
    check_room(retriever, room, query_tokens=query_tokens, every=every, passages=passages)
    if longest > room:
        raise MemdecError(f"most_inputs: got {room}, but there are windows of {longest} inputs; give at least as many.")
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    reads: list[Read] = []
    for window in cut:
        inputs = window.stop - 1 - window.start
        first_read = len(reads)
        for row in range(window.score_from, window.stop - 1, every):
            end = min(row + every, window.stop - 1)  # the row after the stride's last
            query = tokens[max(window.start, row + 1 - query_tokens) : row + 1]
            key = tuple(query.tolist())
            if key not in known:
                known[key] = retriever.search(query, passages)
            found = known[key]
            prefix = sum(retriever.passage(index).numel() for index in found)
            start = window.start
            if prefix + end - start > room:
                start += prefix + inputs - room
            if len(reads) > first_read and (reads[-1].passages, reads[-1].start) == (found, start):
                reads[-1] = Read(found, prefix, start, end + 1, reads[-1].score_from)
            else:
                reads.append(Read(found, prefix, start, end + 1, row))
    return reads


def score_reads(
    model: Any,
    retriever: Retriever,
    tokens: Tensor,  # (T,) int token ids
    reads: Sequence[Read],
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Tensor:  # (T−1,) float32
    """log p of every row that the reads score, NaN for the others.

    Args:
        model: a causal LM, or a MemoryModel.
        retriever: has the passages.
        tokens: the stream that the reads point into.
        reads: from `plan_reads`.
        batch_size: reads a forward.
        progress: called with the number of rows scored since the last call.

    Raises:
        MemdecError: the model gave NaN for a scored token.
    """
    scores = torch.full((max(int(tokens.numel()) - 1, 0),), math.nan)
    # Longest first over all parts, as score_tokens sorts within one: then reads of one length share a batch.
    ordered = sorted(reads, key=lambda read: -read.num_inputs)
    for first in range(0, len(ordered), READS_AT_ONCE):
        part = ordered[first : first + READS_AT_ONCE]
        # Each forward's text, one after the other, is itself a stream with a window for each.
        texts = [torch.cat([retriever.prefix(read.passages), tokens[read.start : read.stop].long()]) for read in part]
        laid: list[Window] = []
        offset = 0
        for read, text in zip(part, texts, strict=True):
            stop = offset + text.numel()
            laid.append(Window(offset, stop, stop - read.stop + read.score_from))
            offset = stop
        found = score_tokens(model, torch.cat(texts), laid, batch_size=batch_size, progress=progress)
        for read, window in zip(part, laid, strict=True):
            scores[read.score_from : read.stop - 1] = found[window.score_from : window.stop - 1]
    return scores


def rag_log_prob(
    model: Any,
    retriever: Retriever,
    tokens: Tensor,  # (T,) int token ids
    cut: Sequence[Window],
    *,
    query_tokens: int = QUERY_TOKENS,
    every: int = EVERY,
    passages: int = 1,
    most_inputs: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Tensor:  # (T−1,) float32
    """log p(token r+1 | passages, its window up to token r) for every row r that a window scores, NaN for the others.

    `plan_reads`, then `score_reads`: call the two for the number of tokens read, or to score other models with the same
    passages.

    Args:
        model: a causal LM, or a MemoryModel.
        retriever: finds the passages.
        tokens: held-out tokens.
        cut: windows over them; the rows scored are those that the base scores.
        query_tokens: ℓ.
        every: s, tokens that are predicted with the same passages.
        passages: how many are read.
        most_inputs: as `plan_reads`.
        batch_size: texts a forward.
        progress: called with the number of rows scored since the last call.

    Returns:
        float32 log-probs on the CPU, in nats.

    Raises:
        MemdecError: as `plan_reads` and `score_reads`.
    """
    reads = plan_reads(
        retriever,
        tokens,
        cut,
        query_tokens=query_tokens,
        every=every,
        passages=passages,
        most_inputs=most_inputs,
    )
    inputs = sum(read.num_inputs for read in reads)
    rows = sum(read.stop - 1 - read.score_from for read in reads)
    LOGGER.info("retrieval reads %d tokens in %d forwards to score %d", inputs, len(reads), rows)
    return score_reads(model, retriever, tokens, reads, batch_size=batch_size, progress=progress)


def check_room(retriever: Retriever, room: int | None, *, query_tokens: int, every: int, passages: int) -> None:
    """Raise ``MemdecError`` for numbers below 1, and for passages that leave less than half of ``room`` tokens."""
    for name, value in (("query_tokens", query_tokens), ("every", every), ("passages", passages)):
        if value < 1:
            raise MemdecError(f"{name} must be at least 1, got {value}")
    if room is not None and not _fits(retriever.passage_tokens, passages, every, room):
        raise MemdecError(
            f"{passages} passage(s) of {retriever.passage_tokens} tokens leave less than half of the {room} tokens "
            "that are read at once to the text itself. Take shorter passages or a longer window."
        )


def _fits(passage_tokens: int, passages: int, every: int, room: int) -> bool:
    # With this much, the first row of a stride whose context is cut still has some of it.
    return 2 * passages * passage_tokens + every <= room


def tune_rag(
    model: Any,
    corpus: Corpus,
    tokenizer: Any,
    *,
    context: int = 1024,
    stride: int | None = 512,
    query_tokens: int = QUERY_TOKENS,
    every: int = EVERY,
    passage_lengths: Sequence[int] = PASSAGE_LENGTHS,
    passage_counts: Sequence[int] = PASSAGE_COUNTS,
    rows: int = TUNING_ROWS,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> RagSettings:
    """Length and number of passages by perplexity on a sample of the corpus's validation text.

    Args:
        model: the base.
        corpus: its training text is retrieved from, its validation text is scored.
        tokenizer: the base's.
        context: tokens in a window, as in the evaluation.
        stride: of the windows, as in the evaluation.
        query_tokens: ℓ.
        every: s.
        passage_lengths: to be tried; those that leave less than half of the window are left out.
        passage_counts: to be tried.
        rows: how many tokens to score, in stretches of 64 spread evenly over the validation text.
        batch_size: texts a forward.
        progress: called with the number of rows scored since the last call; a row is scored once for each pair tried.

    Returns:
        The settings of the least perplexity; of equals the fewest tokens.

    Raises:
        MemdecError: no validation text, or no passage fits.
    """
    held_out = corpus.split("validation")
    if held_out.num_tokens < 2:
        raise MemdecError(
            "The corpus has no validation text, so the length of the passages cannot be chosen. Make it again with a "
            "validation split (--fractions), or leave rag out."
        )
    room = context - 1
    pairs = [(length, count) for length in passage_lengths for count in passage_counts]
    fitting = [(length, count) for length, count in pairs if _fits(length, count, every, room)]
    if not fitting:
        raise MemdecError(
            f"passages of {min(passage_lengths, default=0)} tokens leave less than half of a window of {context} to "
            "the text itself. Use a longer --context, shorter passages, or leave rag out."
        )
    sample = _sample(windows(held_out.num_tokens, context, stride), rows)
    tried: list[tuple[int, int, float]] = []
    for length in sorted({length for length, _ in fitting}):
        retriever = Retriever.of_corpus(corpus, tokenizer, passage_tokens=length)
        for count in sorted(count for other, count in fitting if other == length):
            found = rag_log_prob(
                model,
                retriever,
                held_out.tokens,
                sample,
                query_tokens=query_tokens,
                every=every,
                passages=count,
                most_inputs=room,
                batch_size=batch_size,
                progress=progress,
            )
            tried.append((length, count, perplexity(found)))
            LOGGER.info("%d passage(s) of %d tokens: perplexity %.4f", count, length, tried[-1][2])
    length, count, _ = min(tried, key=lambda pair: (pair[2], pair[0] * pair[1]))
    scored = sum(window.num_rows for window in sample)
    return RagSettings(
        query_tokens, every, length, count, f"chosen on {scored} tokens of validation text", tuple(tried)
    )


def _sample(cut: Sequence[Window], rows: int) -> list[Window]:
    """Stretches of the rows that the windows score, spread evenly, with about ``rows`` rows in all; at least one."""
    stretches = [
        Window(window.start, min(first + STRETCH, window.stop - 1) + 1, first)
        for window in cut
        for first in range(window.score_from, window.stop - 1, STRETCH)
    ]
    count = min(len(stretches), max(1, -(-rows // STRETCH)))
    return [stretches[index * len(stretches) // count] for index in range(count)]


def load_bm25s() -> Any:
    """The module bm25s, which may not be installed."""
    try:
        import bm25s
    except ImportError:
        raise MemdecError("Retrieval needs bm25s: pip install 'memdec[rivals]', or leave rag out.") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG, and every handler would hear it
    return bm25s
