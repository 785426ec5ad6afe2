"""The two protocols against independent statements of what each token is predicted from, and against a real forward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec.errors import MemdecError
from memdec.evaluation import perplexity as pp
from memdec.modeling.scoring import score_tokens

EOS = 0


def make_text(lengths: list[int], vocab: int = 384, seed: int = 0) -> pp.HeldOutText:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]
    return pp.join_documents(ids, ["a b " * n for n in lengths], [f"d{i}" for i in range(len(lengths))], EOS)


def context_of_each_token(protocol: pp.Protocol) -> dict[int, list[int]]:
    """Position of a scored token → positions that its window lets the model read; a token scored twice fails."""
    found: dict[int, list[int]] = {}
    for window in protocol.windows:
        for row in range(window.score_from, window.stop - 1):
            assert row + 1 not in found
            found[row + 1] = list(range(window.start, row + 1))
    return found


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    context=st.integers(2, 40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_sliding_window_is_the_papers(lengths, context, data):
    """Every token but the first once; from the window of `context` tokens that starts at a multiple of the stride and
    is the first to hold the token."""
    stride = data.draw(st.integers(1, context - 1))
    text = make_text(lengths)
    found = context_of_each_token(pp.sliding_protocol(text, context, stride))
    assert sorted(found) == list(range(1, text.num_tokens))
    for position, seen in found.items():
        window = 0 if position < context else math.ceil((position - context + 1) / stride)
        assert seen == list(range(window * stride, position))
        if position >= context:
            assert len(seen) >= context - stride  # the promise of the stride


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4), context=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_per_document_windows_are_rolling_with_one_prefix_token(lengths, context):
    """lm-evaluation-harness: token j of a document of n is predicted in block j // context; a block's inputs are the
    `context` positions before the block's last token, counted with the prefix, as far as there are so many."""
    text = make_text(lengths)
    protocol = pp.document_protocol(text, prefix_token_id=7, context=context)
    found = context_of_each_token(protocol)
    offset = 0
    expected = {}
    for n in lengths:
        for j in range(n):
            block_end = min((j // context + 1) * context, n)  # tokens of the document up to the block's last
            first = max(0, block_end - context)  # position in [prefix, tokens…]
            expected[offset + 1 + j] = list(range(offset + first, offset + 1 + j))
        offset += n + 1
    assert found == expected
    starts = torch.tensor([0, *[n + 1 for n in lengths]]).cumsum(0)[:-1]
    assert protocol.tokens[starts].tolist() == [7] * len(lengths)
    assert EOS not in protocol.tokens.tolist()  # ends of text are neither read nor scored
    owners = protocol.document_of_row
    for position in found:
        assert owners[position - 1] == torch.searchsorted(starts, torch.tensor(position), right=True) - 1


def test_scores_are_those_of_one_forward_a_token(tiny_llama):
    """Through the real scorer: each log-prob equals the last position of a forward over that token's context."""
    model = tiny_llama()
    text = make_text([23, 9, 31], seed=3)
    for protocol in (pp.sliding_protocol(text, 16, 8), pp.document_protocol(text, EOS, 16)):
        scores = score_tokens(model, protocol.tokens, protocol.windows, batch_size=3)
        found = context_of_each_token(protocol)
        assert int((~scores.isnan()).sum()) == len(found) == protocol.num_scored
        for position, seen in found.items():
            with torch.no_grad():
                logits = model(input_ids=protocol.tokens[seen][None].long()).logits[0, -1].double()
            expected = logits.log_softmax(-1)[int(protocol.tokens[position])]
            assert float(scores[position - 1]) == pytest.approx(float(expected), abs=2e-4)


def test_document_figures_on_numbers_worked_by_hand():
    text = pp.HeldOutText(
        torch.tensor([5, 6, 0, 7, 0], dtype=torch.int32),
        torch.tensor([0, 3, 5]),
        ["a", "b"],
        words=[2, 2],
        num_bytes=[6, 2],
    )
    log_probs = torch.tensor([-1.0, -2.0, math.nan, -3.0])
    figures = pp.document_figures(log_probs, text)
    assert figures["word_perplexity"] == pytest.approx(math.exp(6 / 4))
    assert figures["byte_perplexity"] == pytest.approx(math.exp(6 / 8))
    assert figures["bits_per_byte"] == pytest.approx(6 / 8 / math.log(2))
    assert figures["token_perplexity"] == pytest.approx(math.exp(6 / 3))


@pytest.mark.parametrize(
    ("text", "words"), [("one two", 2), ("one  two\nthree", 3), (" one ", 3), ("", 1), ("one\n", 2)]
)
def test_words_are_counted_as_the_harness_counts_them(text, words):
    assert pp.count_words(text) == words  # an empty string at either end counts


def test_prefix_is_bos_where_there_is_one():
    assert pp.prefix_token(1, 0) == 1 and pp.prefix_token(None, 0) == 0 and pp.prefix_token(0, 2) == 0


def test_interval_covers_the_truth_as_often_as_it_says():
    """Documents with a common effect: of 200 intervals at 95%, fewer than 175 covering has chance under 1e-4 at a true
    coverage of 93% (a bootstrap over 40 documents is a little short of 95%)."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        groups = torch.arange(40).repeat_interleave(25)
        effect = 0.2 + 0.1 * torch.randn(40, generator=generator)[groups]
        reference = -2 + 0.5 * torch.randn(1000, generator=generator)
        method = reference + effect + 0.1 * torch.randn(1000, generator=generator)
        low, high = pp.relative_interval(method, reference, groups, resamples=400, seed=seed)
        covered += low <= math.expm1(-0.2) <= high
    assert covered >= 175
    assert covered < 200  # and it is not simply too wide


def test_interval_of_few_documents_uses_blocks():
    reference = torch.full((1024,), -2.0)
    low, high = pp.relative_interval(reference + 0.5, reference, torch.zeros(1024, dtype=torch.int64))
    assert low == pytest.approx(math.expm1(-0.5)) and high == pytest.approx(math.expm1(-0.5))


def test_one_block_has_no_interval():
    reference = torch.full((200,), -2.0)
    assert pp.relative_interval(reference + 0.5, reference, torch.zeros(200, dtype=torch.int64)) is None


def test_first_tokens_prefers_whole_documents():
    text = make_text([9, 19, 29])  # 10, 20 and 30 tokens with their ends
    assert text.first_tokens(1000) is text
    assert text.first_tokens(35, context=16).document_starts.tolist() == [
        0,
        10,
        30,
    ]  # 5 tokens of the third are too few
    cut = text.first_tokens(50, context=16)
    assert cut.document_starts.tolist() == [0, 10, 30, 50] and cut.num_tokens == 50
    assert cut.words[2] == round(text.words[2] * 20 / 30)
    assert text.first_tokens(6, context=16).document_starts.tolist() == [0, 6]  # one document, cut: better than none


def test_too_short_a_text_is_refused():
    one = pp.HeldOutText(torch.tensor([5], dtype=torch.int32), torch.tensor([0, 1]), ["a"], [1], [1])
    with pytest.raises(MemdecError, match="longer text"):
        pp.sliding_protocol(one)
    empty = pp.HeldOutText(torch.tensor([0], dtype=torch.int32), torch.tensor([0, 1]), ["a"], [1], [1])
    with pytest.raises(MemdecError, match="longer text"):
        pp.document_protocol(empty, 0)
