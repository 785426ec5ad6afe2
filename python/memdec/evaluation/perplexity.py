"""Perplexity, counted in the two ways that the literature counts it; both are named wherever they stand.

*Sliding window* (the paper's): the documents are joined into one stream, every document ended by the end-of-text
token; a window of ``context`` tokens moves by ``stride``, and of each window only the tokens that no earlier window
scored count. With 1024 and 512 every token but the first 1023 is predicted from at least 512 tokens. The figure is
exp(−mean log p) over all tokens but the first.

*Per document* (lm-evaluation-harness, ``loglikelihood_rolling``): every document by itself, after one prefix token (the
tokenizer's beginning-of-text token, or end-of-text where it has none), cut into windows of ``context`` that do not
overlap; the last window is filled up with context to its left. The document's own tokens count, without the
end-of-text token. With L the sum of all log p, the figures are exp(−L/words), exp(−L/bytes), −L/(bytes·ln 2) and
exp(−L/tokens); words are what ``re.split(r"\\s+", text)`` gives, which counts an empty string at either end, as the
harness does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.stores.windows import Window, windows

SLIDING = "sliding window"
PER_DOCUMENT = "per document"


@dataclass(frozen=True)
class HeldOutText:
    """Documents to measure on, tokenised.

    Attributes:
        tokens: int32 (T,), the documents one after the other, each ended by the end-of-text token.
        document_starts: int64 (D+1,): document i is ``tokens[document_starts[i] : document_starts[i + 1]]``.
        names: D names.
        words: for each document, the number of words in its text.
        num_bytes: for each document, the number of UTF-8 bytes in its text.
    """

    tokens: Tensor
    document_starts: Tensor
    names: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end-of-text tokens included."""
        return int(self.tokens.numel())

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return int(self.document_starts.numel()) - 1

    def first_tokens(self, most: int, context: int = 0) -> HeldOutText:
        """The leading documents with at most ``most`` tokens; the last may be cut, if ``context`` tokens or more of
        it fit.

        A cut document loses its counts of words and bytes to proportion, hence whole documents are preferred.
        """
        if most >= self.num_tokens:
            return self
        starts = self.document_starts.tolist()
        whole = max(index for index, start in enumerate(starts) if start <= most)
        cut_at = most if whole == 0 or most - starts[whole] >= max(context, 1) else starts[whole]
        new_starts = [*starts[: whole + 1], cut_at] if cut_at > starts[whole] else starts[: whole + 1]
        count = len(new_starts) - 1
        words, num_bytes = list(self.words[:count]), list(self.num_bytes[:count])
        if cut_at > starts[whole] and words:
            share = (cut_at - starts[whole]) / (starts[whole + 1] - starts[whole])
            words[-1] = max(1, round(words[-1] * share))
            num_bytes[-1] = max(1, round(num_bytes[-1] * share))
        return HeldOutText(
            self.tokens[:cut_at], torch.tensor(new_starts, dtype=torch.int64), self.names[:count], words, num_bytes
        )


@dataclass(frozen=True)
class Protocol:
    """What to score, and how to cut it: rows as in `memdec.stores.windows`, row r predicts ``tokens[r + 1]``.

    Attributes:
        name: `SLIDING` or `PER_DOCUMENT`.
        tokens: int32 (T,), the stream that the windows point into.
        windows: each scored row is scored by exactly one.
        document_of_row: int64 (T−1,), the document that the predicted token is in.
    """

    name: str
    tokens: Tensor
    windows: list[Window]
    document_of_row: Tensor

    @property
    def num_scored(self) -> int:
        """How many tokens the protocol counts."""
        return sum(window.num_rows for window in self.windows)


def count_words(text: str) -> int:
    r"""Words as lm-evaluation-harness counts them, ``len(re.split(r"\s+", text))``."""
    return len(re.split(r"\s+", text))


def sliding_protocol(text: HeldOutText, context: int = 1024, stride: int | None = 512) -> Protocol:
    """The paper's sliding window over the joined documents; ``stride`` None scores each window's tokens once, unslid.

    Raises:
        MemdecError: the text has fewer than two tokens, or context or stride are out of range.
    """
    if text.num_tokens < 2:
        raise MemdecError(f"the text has {text.num_tokens} token(s), and a prediction needs two. Give a longer text.")
    cut = windows(text.num_tokens, context, stride)
    predicted = torch.arange(1, text.num_tokens)
    documents = torch.searchsorted(text.document_starts, predicted, right=True) - 1
    return Protocol(SLIDING, text.tokens, cut, documents)


def document_protocol(text: HeldOutText, prefix_token_id: int, context: int = 1024) -> Protocol:
    """lm-evaluation-harness's rolling windows (``context_len=1``) over every document by itself.

    Args:
        text: the documents; their last token, end-of-text, is not scored.
        prefix_token_id: what stands before a document's first token.
        context: the most tokens that the model reads at once (the harness's ``max_length``).
    """
    if context < 1:
        raise MemdecError(f"context must be at least 1, got {context}")
    stream: list[Tensor] = []
    cut: list[Window] = []
    owner: list[Tensor] = []
    offset = 0
    prefix = torch.tensor([prefix_token_id], dtype=text.tokens.dtype)
    for index in range(text.num_documents):
        start, stop = int(text.document_starts[index]), int(text.document_starts[index + 1])
        body = text.tokens[start : stop - 1]
        length = int(body.numel())
        stream += [prefix, body]
        owner.append(torch.full((length + 1,), index, dtype=torch.int64))
        # In the stream the document's token j stands at offset + 1 + j and is predicted by row offset + j.
        done = 0
        while done < length:
            until = min(done + context, length)
            # The window's inputs are the `context` positions before position `until`, prefix included.
            first = max(0, until - context)
            cut.append(Window(offset + first, offset + until + 1, offset + done))
            done = until
        offset += length + 1
    if not cut:
        raise MemdecError("every document of the text is empty. Give a longer text.")
    # Row r predicts position r + 1, so the owner of the row is the owner of the position after it.
    return Protocol(PER_DOCUMENT, torch.cat(stream), cut, torch.cat(owner)[1:])


def document_figures(log_probs: Tensor, text: HeldOutText) -> dict[str, float]:
    """The per-document protocol's figures, with the harness's names.

    Args:
        log_probs: (T−1,) of `document_protocol`'s stream, NaN where not scored.
        text: gives the words and bytes.

    Returns:
        ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte``, ``token_perplexity``.
    """
    scored = log_probs[~log_probs.isnan()].double()
    total = -float(scored.sum())
    words, num_bytes = sum(text.words), sum(text.num_bytes)
    return {
        "word_perplexity": _exp(total / max(words, 1)),
        "byte_perplexity": _exp(total / max(num_bytes, 1)),
        "bits_per_byte": total / max(num_bytes, 1) / math.log(2),
        "token_perplexity": _exp(total / max(int(scored.numel()), 1)),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def relative_interval(
    log_probs: Tensor,  # (T−1,) of the method, NaN where not scored
    reference: Tensor,  # (T−1,) of what it is compared with
    groups: Tensor,  # int64 (T−1,): the document of each row
    *,
    resamples: int = 2000,
    seed: int = 0,
    min_groups: int = 8,
    block: int = 256,
) -> tuple[float, float] | None:
    """A 95% bootstrap interval of ppl(method)/ppl(reference) − 1, both on the same tokens.

    Tokens of one document are not independent, so whole documents are drawn with replacement; where there are fewer
    than ``min_groups`` documents, runs of ``block`` tokens are drawn instead, which is the optimistic of the two.
    None where there is only one to draw.
    """
    both = ~(log_probs.isnan() | reference.isnan())
    difference = (reference[both].double() - log_probs[both].double()).nan_to_num(nan=0.0)
    owner = groups[both]
    if len(set(owner.tolist())) < min_groups:
        owner = torch.arange(difference.numel()) // block
    owner = torch.searchsorted(torch.tensor(sorted(set(owner.tolist()))), owner)
    count = int(owner.max()) + 1
    if count < 2:
        return None
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, difference)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, torch.ones_like(difference))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    change = torch.expm1(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.quantile(change, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(low), float(high)


def prefix_token(bos_token_id: int | None, eos_token_id: int) -> int:
    """What lm-evaluation-harness puts before a document: beginning-of-text, or end-of-text where there is none."""
    return eos_token_id if bos_token_id is None else bos_token_id


def join_documents(
    documents: Sequence[Sequence[int]],
    texts: Sequence[str],
    names: Sequence[str],
    eos_token_id: int,
) -> HeldOutText:
    """A `HeldOutText` of token lists (without end-of-text) and their texts; empty documents are left out."""
    stream: list[int] = []
    starts = [0]
    kept: list[int] = []
    for index, ids in enumerate(documents):
        if ids:
            stream += [*ids, eos_token_id]
            starts.append(len(stream))
            kept.append(index)
    return HeldOutText(
        torch.tensor(stream, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int64),
        [names[i] for i in kept],
        [count_words(texts[i]) for i in kept],
        [len(texts[i].encode("utf-8", "surrogatepass")) for i in kept],
    )
