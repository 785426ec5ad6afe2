"""Retrieval against BM25 written out by hand, and its log-probs against one full forward for each token."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.evaluation import rag
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.perplexity import document_protocol, sliding_protocol
from memdec.evaluation.rag import Retriever, plan_reads, rag_log_prob, score_reads, tune_rag
from memdec.modeling.scoring import score_tokens
from memdec.stores.corpus import Corpus, TokenSplit
from memdec.stores.windows import Window, windows

CONTEXT, STRIDE = 48, 24
# The English stop words of Lucene.
STOP = {
    *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of"),
    *(
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ),
}


def words(text: str) -> list[str]:
    return [word for word in re.split(r"\W+", text.lower()) if len(word) > 1 and word not in STOP]


def bm25(query: str, texts: list[str], k1: float = 0.9, b: float = 0.4) -> list[float]:
    """Σ over the query's words, repeated ones too, of idf·tf / (tf + k1(1 − b + b·length/mean length))."""
    bags = [Counter(words(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    holding = {word: sum(word in bag for bag in bags) for word in words(query)}
    scores = []
    for bag in bags:
        score = 0.0
        for word in words(query):
            df = holding[word]
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            score += idf * bag[word] / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
        scores.append(score)
    return scores


def passages_of(documents: list[Tensor], length: int) -> list[list[int]]:
    return [d.tolist()[i : i + length] for d in documents for i in range(0, len(d), length)]


class Search:
    """Ids of the best passages with a word in common, by the formula above; of equals the lower id."""

    def __init__(self, documents: list[Tensor], length: int, tokenizer: Any) -> None:
        self.passages = passages_of(documents, length)
        self.texts = [tokenizer.decode(p) for p in self.passages]
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, query: list[int], count: int) -> list[int]:
        text = self.tokenizer.decode(query, skip_special_tokens=True)
        if text not in self.known:
            scores = bm25(text, self.texts)
            ranked = sorted(range(len(scores)), key=lambda i: (-round(scores[i], 6), i))
            self.known[text] = [i for i in ranked if scores[i] > 0]
        return self.known[text][:count]


def brute_force(
    model, tokenizer, documents, tokens, cut, *, length, count=1, every=4, query=32, room=None
) -> tuple[Tensor, int]:
    """One forward for each row over all that it may read, float64; and how many rows had their context cut."""
    search = Search(documents, length, tokenizer)
    room = room or max(w.stop - 1 - w.start for w in cut)
    found = torch.full((len(tokens) - 1,), math.nan, dtype=torch.float64)
    cuts = 0
    for window in cut:
        text = tokens[window.start : window.stop].tolist()  # all that the window holds
        for row in range(window.score_from, window.stop - 1):
            at = row - window.start
            first = at - (row - window.score_from) % every  # the row in the window at which its stride begins
            last = min(first + every, len(text) - 1) - 1
            best = search(text[: first + 1][-query:], count)
            prefix = [token for i in reversed(best) for token in search.passages[i]]
            dropped = 0
            if len(prefix) + last + 1 > room:
                dropped = len(prefix) + len(text) - 1 - room
                cuts += 1
            ids = prefix + text[dropped : at + 1]
            assert len(ids) <= room and len(ids) > len(prefix)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            found[row] = logits.log_softmax(-1)[text[at + 1]]
    return found, cuts


@pytest.fixture(scope="module")
def documents(tiny_run) -> list[Tensor]:
    """The training documents, without end-of-text."""
    train = Corpus.open(tiny_run.corpus).split("train")
    return [train.document(i)[:-1] for i in range(train.num_documents)]


@pytest.fixture(scope="module")
def held_out(tiny_run):
    return load_held_out(tiny_run.corpus, tiny_run.tokenizer).first_tokens(150)


def texts_to_ids(tokenizer, texts: list[str]) -> list[Tensor]:
    return [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32) for text in texts]


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_scores_are_bm25_s(tiny_run, documents, k1, b):
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=13, k1=k1, b=b)
    passages = passages_of(documents, 13)
    assert [retriever.passage(i).tolist() for i in range(retriever.num_passages)] == passages
    texts = [tiny_run.tokenizer.decode(p) for p in passages]
    for query in ("The court granted the lease", "lease lease noon", "It is of the motion. Judge!", "to be", ""):
        ids = torch.tensor(tiny_run.tokenizer(query)["input_ids"], dtype=torch.int64)
        expected = bm25(query, texts, k1, b)
        assert retriever.scores(ids).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert max(expected) == 0 < max(bm25("lease", texts))


def test_of_equals_the_lower_id_and_nothing_without_a_common_word(tiny_tokenizer):
    texts = ["a court of law", "the lease of a tenant", "the court", "the lease of a tenant", "noon"]
    retriever = Retriever(texts_to_ids(tiny_tokenizer, texts), tiny_tokenizer, passage_tokens=100)
    (query,) = texts_to_ids(tiny_tokenizer, ["which lease"])
    assert retriever.search(query) == (1,)
    assert retriever.search(query, 2) == (1, 3) == retriever.search(query, 5)
    (query,) = texts_to_ids(tiny_tokenizer, ["of the boundary"])
    assert retriever.search(query, 3) == ()
    assert retriever.prefix(()).tolist() == []
    # The best stands next to the text.
    assert tiny_tokenizer.decode(retriever.prefix((1, 4))) == "noonthe lease of a tenant"


@pytest.mark.parametrize(
    ("every", "count", "length", "query", "batch_size", "room"),
    [(4, 1, 16, 32, 8, None), (4, 2, 10, 32, 3, None), (7, 1, 11, 9, 1, None), (1, 1, 20, 12, 8, None),
     (4, 1, 16, 32, 8, 60), (100, 1, 5, 32, 8, 130)],
)  # fmt: skip
def test_log_probs_are_those_of_one_forward_a_token(
    tiny_run, documents, held_out, every, count, length, query, batch_size, room
):
    protocol = sliding_protocol(held_out, CONTEXT, STRIDE)
    settings = {"every": every, "query_tokens": query, "passages": count, "most_inputs": room}
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=length)
    seen: list[int] = []
    found = rag_log_prob(
        tiny_run.base_model,
        retriever,
        protocol.tokens,
        protocol.windows,
        **settings,
        batch_size=batch_size,
        progress=seen.append,
    )
    expected, cuts = brute_force(
        tiny_run.base_model,
        tiny_run.tokenizer,
        documents,
        protocol.tokens,
        protocol.windows,
        length=length,
        count=count,
        every=every,
        query=query,
        room=room,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32 and sum(seen) == protocol.num_scored == len(found)
    base = score_tokens(tiny_run.base_model, protocol.tokens, protocol.windows)
    assert (found - base).abs().max() > 0.1  # the passages change something
    # Rows with their whole context and rows without, but where there is room for all.
    assert (0 < cuts < protocol.num_scored) == (room is None or room < CONTEXT + length)

    # What was saved, and that every row is read for once.
    reads = plan_reads(retriever, protocol.tokens, protocol.windows, **settings)
    strides = sum(math.ceil(window.num_rows / every) for window in protocol.windows)
    assert (len(reads) < strides) == (every < 7)  # long strides seldom find again what the one before found
    rows = [row for read in reads for row in range(read.score_from, read.stop - 1)]
    assert sorted(rows) == list(range(len(found)))
    limit = room or CONTEXT - 1
    for read in reads:
        assert read.prefix_tokens == len(retriever.prefix(read.passages))
        assert read.num_inputs <= limit


def test_the_per_document_protocol_and_rows_that_no_window_scores(tiny_run, documents, held_out):
    protocol = document_protocol(held_out, prefix_token_id=0, context=CONTEXT)
    cut = protocol.windows[1:]
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=12)
    found = rag_log_prob(tiny_run.base_model, retriever, protocol.tokens, cut)
    base = score_tokens(tiny_run.base_model, protocol.tokens, cut)
    assert torch.equal(found.isnan(), base.isnan()) and base.isnan().sum() >= protocol.windows[0].num_rows > 0
    expected, _ = brute_force(tiny_run.base_model, tiny_run.tokenizer, documents, protocol.tokens, cut, length=12)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_windows_of_one_beginning_are_not_taken_for_one(tiny_run, documents):
    """Nothing is found, so that all strides could be read at once; but rows 19 to 29 are nobody's."""
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=4)
    tokens = torch.zeros(60, dtype=torch.int32)  # ends of text: no words
    found = rag_log_prob(tiny_run.base_model, retriever, tokens, [Window(0, 20, 0), Window(0, 50, 30)])
    assert found.isnan().logical_not().nonzero().flatten().tolist() == [*range(19), *range(30, 49)]


def test_parts_of_the_reads_and_another_model(tiny_run, documents, held_out, monkeypatch):
    protocol = sliding_protocol(held_out, CONTEXT, STRIDE)
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=16)
    reads = plan_reads(retriever, protocol.tokens, protocol.windows)
    monkeypatch.setattr(rag, "READS_AT_ONCE", 3)
    found = score_reads(tiny_run.memory_model, retriever, protocol.tokens, reads)
    expected, _ = brute_force(
        tiny_run.memory_model, tiny_run.tokenizer, documents, protocol.tokens, protocol.windows, length=16
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_query_ends_before_the_first_token_scored_and_is_searched_for_once(tiny_run, documents, monkeypatch):
    """Tokens that are all different say where a query comes from."""
    queries: list[list[int]] = []

    def record(self, query, passages=1):
        queries.append(query.tolist())
        return ()

    monkeypatch.setattr(Retriever, "search", record)
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=8)
    tokens = torch.arange(100, 160, dtype=torch.int32)
    plan_reads(retriever, tokens, [Window(0, 30, 0), Window(10, 40, 29)], query_tokens=6, every=5)
    # Token number r + 1 is 101 + r: the stride that begins at row r must not know it, and its window begins at 0 or 10.
    expected = [
        list(range(100 + max(start, row - 5), 101 + row))
        for start, rows in ((0, range(0, 29, 5)), (10, range(29, 39, 5)))
        for row in rows
    ]
    assert queries == expected
    queries.clear()
    repeated = torch.tensor([7, 8, 9, 7] * 20, dtype=torch.int32)
    plan_reads(retriever, repeated, [Window(0, 80, 0)], query_tokens=4, every=4)
    assert queries == [[7], [8, 9, 7, 7]]


def test_what_comes_later_changes_no_passage(tiny_run, documents, held_out):
    retriever = Retriever(documents, tiny_run.tokenizer, passage_tokens=12)
    cut = windows(held_out.num_tokens, CONTEXT, STRIDE)

    def passages_of_rows(tokens: Tensor) -> dict[int, tuple[int, ...]]:
        reads = plan_reads(retriever, tokens, cut)
        return {row: read.passages for read in reads for row in range(read.score_from, read.stop - 1)}

    tokens = held_out.tokens
    before = passages_of_rows(tokens)
    changed = 0
    for window in cut[1:]:
        for row in range(window.score_from, window.stop - 1, 4):
            other = tokens.clone()
            other[row + 1 :] = torch.randint(1, 384, (len(tokens) - row - 1,), dtype=torch.int32)
            after = passages_of_rows(other)
            assert all(after[r] == before[r] for r in range(min(row + 4, window.stop - 1)))
            changed += after != before
    assert changed > 10  # the passages do depend on the text


def test_text_without_a_word_retrieves_nothing_and_leaves_the_base(tiny_run, held_out):
    marks = texts_to_ids(tiny_run.tokenizer, ["... ; - ! ?", ".,. - a I ."])
    retriever = Retriever(marks, tiny_run.tokenizer, passage_tokens=4)
    cut = windows(held_out.num_tokens, CONTEXT, STRIDE)
    found = rag_log_prob(tiny_run.base_model, retriever, held_out.tokens, cut, passages=2)
    base = score_tokens(tiny_run.base_model, held_out.tokens, cut)
    torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-5)
    assert len(plan_reads(retriever, held_out.tokens, cut)) == len(cut)  # the same forwards, too


def test_the_library_s_own_log_is_quiet(tiny_tokenizer, caplog):
    Retriever(texts_to_ids(tiny_tokenizer, ["the court"]), tiny_tokenizer)
    assert [record for record in caplog.records if record.name == "bm25s"] == []


def test_a_single_passage(tiny_run, held_out):
    one = texts_to_ids(tiny_run.tokenizer, ["The court granted the lease."])
    retriever = Retriever(one, tiny_run.tokenizer, passage_tokens=64)
    assert retriever.num_passages == 1 and retriever.passage(0).tolist() == one[0].tolist()
    cut = windows(held_out.num_tokens, 160, None)
    found = rag_log_prob(tiny_run.base_model, retriever, held_out.tokens, cut, passages=1, most_inputs=200)
    expected, _ = brute_force(
        tiny_run.base_model, tiny_run.tokenizer, one, held_out.tokens, cut, length=64, count=2, room=200
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_retrieved_is_explained(tiny_run, documents, make_tokenizer, monkeypatch):
    tokenizer = tiny_run.tokenizer
    for empty in ([], [torch.empty(0, dtype=torch.int32)]):
        with pytest.raises(MemdecError, match="holds no token, so there is nothing to retrieve"):
            Retriever(empty, tokenizer)
    with pytest.raises(MemdecError, match="passage_tokens must be at least 1, got 0"):
        Retriever(documents, tokenizer, passage_tokens=0)
    with pytest.raises(MemdecError, match="was tokenised with another tokenizer"):
        Retriever.of_corpus(Corpus.open(tiny_run.corpus), make_tokenizer(seed=3))
    retriever = Retriever(documents, tokenizer, passage_tokens=16)
    tokens = torch.arange(60, dtype=torch.int32)
    for name in ("query_tokens", "every", "passages"):
        with pytest.raises(MemdecError, match=f"{name} must be at least 1, got 0"):
            plan_reads(retriever, tokens, [Window(0, 60, 0)], **{name: 0})
    assert plan_reads(retriever, tokens, [Window(0, 37, 0)])  # 36 inputs = 2·16 + 4
    with pytest.raises(MemdecError, match=r"1 passage\(s\) of 16 tokens leave less than half of the 35 tokens"):
        plan_reads(retriever, tokens, [Window(0, 36, 0)])
    with pytest.raises(MemdecError, match="most_inputs: got 40, but there are windows of 59 inputs"):
        plan_reads(retriever, tokens, [Window(0, 60, 0)], most_inputs=40)
    assert plan_reads(retriever, tokens, []) == []
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MemdecError, match=r"pip install 'memdec\[rivals\]'"):
        Retriever(documents, tokenizer)


def test_the_corpus_s_training_text_is_searched(tiny_run, documents):
    retriever = Retriever.of_corpus(Corpus.open(tiny_run.corpus), tiny_run.tokenizer, passage_tokens=20)
    found = [retriever.passage(i).tolist() for i in range(retriever.num_passages)]
    assert found == passages_of(documents, 20)
    assert tiny_run.tokenizer.eos_token_id not in {token for passage in found for token in passage}


def test_tuning_takes_the_pair_of_least_perplexity(tiny_run, documents):
    """All of the validation text, so that the truth needs no sample; of the lengths 30 does not fit in the window."""
    corpus = Corpus.open(tiny_run.corpus)
    tokens = corpus.split("validation").tokens
    cut = windows(len(tokens), CONTEXT, STRIDE)
    settings = tune_rag(
        tiny_run.base_model,
        corpus,
        tiny_run.tokenizer,
        context=CONTEXT,
        stride=STRIDE,
        query_tokens=10,
        every=6,
        passage_lengths=(18, 30, 6),
        passage_counts=(1, 2),
        rows=10**6,
    )
    truth = {}
    for length, count in ((6, 1), (6, 2), (18, 1)):
        scores, _ = brute_force(
            tiny_run.base_model,
            tiny_run.tokenizer,
            documents,
            tokens,
            cut,
            length=length,
            count=count,
            every=6,
            query=10,
        )
        truth[length, count] = math.exp(-float(scores.mean()))
    assert {(length, count): ppl for length, count, ppl in settings.tried} == pytest.approx(truth, rel=1e-4)
    assert (settings.passage_tokens, settings.passages) == min(truth, key=truth.__getitem__)
    assert (settings.query_tokens, settings.every) == (10, 6)
    assert settings.source == f"chosen on {len(tokens) - 1} tokens of validation text"


def test_passages_may_fill_what_a_short_text_leaves_of_the_window(tiny_run):
    corpus = Corpus.open(tiny_run.corpus)
    tokens = corpus.split("validation").tokens[:60]
    corpus._splits["validation"] = TokenSplit(tokens, torch.tensor([0, 60]))
    settings = tune_rag(
        tiny_run.base_model,
        corpus,
        tiny_run.tokenizer,
        context=120,
        stride=60,
        passage_lengths=(50,),
        passage_counts=(1,),
    )
    assert (settings.passage_tokens, settings.passages) == (50, 1)


def test_the_sample_is_spread_over_the_validation_text(monkeypatch):
    monkeypatch.setattr(rag, "STRETCH", 8)
    cut = windows(1001, 50, 25)
    sample = rag._sample(cut, 100)
    rows = [row for window in sample for row in range(window.score_from, window.stop - 1)]
    assert len(set(rows)) == len(rows) and 60 <= len(rows) <= 104
    assert len(sample) == 13 and all(window.num_rows <= 8 for window in sample)
    assert all(any(w.start == window.start and w.score_from <= window.score_from for w in cut) for window in sample)
    assert min(rows) < 50 and max(rows) > 900
    whole = rag._sample(cut, 10**9)
    assert sorted(r for w in whole for r in range(w.score_from, w.stop - 1)) == list(range(1000))
    assert len(rag._sample(cut, 1)) == 1


def test_tuning_says_what_it_lacks(tiny_run):
    corpus = Corpus.open(tiny_run.corpus)
    with pytest.raises(MemdecError, match="passages of 64 tokens leave less than half of a window of 48"):
        tune_rag(tiny_run.base_model, corpus, tiny_run.tokenizer, context=CONTEXT, stride=STRIDE)
    corpus = Corpus.open(tiny_run.corpus)
    corpus._splits["validation"] = TokenSplit(torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(MemdecError, match="has no validation text"):
        tune_rag(tiny_run.base_model, corpus, tiny_run.tokenizer, context=CONTEXT)
