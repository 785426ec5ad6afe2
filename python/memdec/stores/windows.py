"""Windows over a stream of tokens in which every token but the first is predicted exactly once.

Row r stands for the prediction of token r + 1 from the tokens up to r. A window of tokens [start, stop) feeds the model
tokens[start : stop − 1] and so computes the rows start … stop − 2; of these it *scores* (stores, counts) the rows from
``score_from`` on, and leaves the others, which an earlier window scored, as context.
"""

from __future__ import annotations

from typing import NamedTuple

from memdec.errors import MemdecError


class Window(NamedTuple):
    """Tokens [start, stop) of a stream: inputs tokens[start : stop−1], labels tokens[start+1 : stop], scored rows
    score_from … stop − 2 (a row's id is the position of its input token)."""

    start: int
    stop: int
    score_from: int

    @property
    def num_rows(self) -> int:
        """How many rows the window scores."""
        return self.stop - 1 - self.score_from


def windows(num_tokens: int, context: int, stride: int | None = None) -> list[Window]:
    """Cut ``num_tokens`` tokens into windows that score every row once.

    Args:
        num_tokens: the length of the stream.
        context: tokens in a window, at least 2; the last window may be shorter.
        stride: how far a window starts after the one before, 1 … context − 1. None is context − 1: the windows
            overlap by the one token that is the last label of one and the first input of the next, and the work is
            least. ``context=1024, stride=512`` is the paper's sliding window: all rows but the first window's have
            at least 512 tokens of context.

    Returns:
        The windows in order; none for fewer than two tokens.

    Raises:
        MemdecError: context or stride out of range.

    >>> [tuple(window) for window in windows(10, 4)]
    [(0, 4, 0), (3, 7, 3), (6, 10, 6)]
    >>> [tuple(window) for window in windows(7, 4, stride=2)]
    [(0, 4, 0), (2, 6, 3), (4, 7, 5)]
    """
    if context < 2:
        raise MemdecError(f"context must be at least 2 tokens (one to read, one to predict), got {context}")
    step = context - 1 if stride is None else stride
    if not 1 <= step <= context - 1:
        raise MemdecError(
            f"stride must be from 1 to context − 1 = {context - 1}, or no window would predict some token; got {step}"
        )
    result: list[Window] = []
    stop = 1
    start = 0
    while stop < num_tokens:
        score_from = stop - 1
        stop = min(start + context, num_tokens)
        result.append(Window(start, stop, score_from))
        start += step
    return result
