"""Windows: every row scored once, by a window that holds it, with as much context as the definition promises."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdec import MemdecError
from memdec.stores.windows import Window, windows


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_every_row_is_scored_once_within_its_window(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, context - 1))
    cut = windows(num_tokens, context, stride)
    scored = [row for window in cut for row in range(window.score_from, window.stop - 1)]
    assert scored == list(range(max(0, num_tokens - 1)))
    assert sum(window.num_rows for window in cut) == len(scored)
    for window in cut:
        assert 0 <= window.start <= window.score_from < window.stop - 1 < num_tokens
        assert window.stop - window.start <= context


@given(st.integers(2, 300), st.integers(2, 40))
def test_consecutive_windows_overlap_by_one_token(num_tokens: int, context: int) -> None:
    cut = windows(num_tokens, context)
    assert all(left.stop - 1 == right.start for left, right in itertools.pairwise(cut))
    assert all(window.score_from == window.start for window in cut)


def test_sliding_window_is_the_papers() -> None:
    # The usual loop over a long text: begin = 0, 512, 1024, …; end = min(begin + 1024, T); the labels scored are
    # those past the previous end (the first window has no label for its first token).
    num_tokens, context, stride = 5000, 1024, 512
    expected, previous_end = [], 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        expected.append(Window(begin, end, previous_end - 1))
        previous_end = end
        if end == num_tokens:
            break
    assert windows(num_tokens, context, stride) == expected
    # All rows past the first window see at least context − stride tokens.
    assert all(window.score_from - window.start + 1 >= context - stride for window in expected[1:])


def test_short_text_is_one_short_window() -> None:
    assert windows(5, 1024) == [Window(0, 5, 0)]
    assert windows(1, 8) == windows(0, 8) == []


@pytest.mark.parametrize(("context", "stride"), [(1, None), (8, 0), (8, 8), (8, -1)])
def test_settings_that_would_lose_rows_are_refused(context: int, stride: int | None) -> None:
    with pytest.raises(MemdecError, match="context" if context < 2 else "stride"):
        windows(100, context, stride)
