"""Copied runs against a brute-force search."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec.evaluation.overlap import copied_tokens


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.integers(0, 2), max_size=60),
    st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_copied_tokens_are_those_in_a_shared_run(held_out, train, run):
    runs = {tuple(train[i : i + run]) for i in range(len(train) - run + 1)}
    expected = [False] * len(held_out)
    for i in range(len(held_out) - run + 1):
        if tuple(held_out[i : i + run]) in runs:
            expected[i : i + run] = [True] * run
    found = copied_tokens(torch.tensor(held_out, dtype=torch.int32), torch.tensor(train, dtype=torch.int32), run)
    assert found.tolist() == expected
