"""SparseDistributions against dense matrices: every method must agree with the same thing done to the (N, V) matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import SparseDistributions


@st.composite
def dense_rows(draw, max_rows=6, max_vocab=9):
    """Matrices whose rows sum to at most 1, with many zeros and some empty rows."""
    rows, vocab = draw(st.integers(0, max_rows)), draw(st.integers(1, max_vocab))
    weights = draw(st.lists(st.integers(0, 4), min_size=rows * vocab, max_size=rows * vocab))
    matrix = torch.tensor(weights, dtype=torch.float32).reshape(rows, vocab)
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1)


@given(dense_rows())
@settings(deadline=None)
def test_dense_and_back(matrix):
    q = SparseDistributions.from_dense(matrix).validate()
    assert torch.equal(q.to_dense(), matrix)
    assert q.nnz == int((matrix > 0).sum()) and q.num_rows == len(q) == matrix.shape[0]
    assert torch.equal(q.row_lengths(), (matrix > 0).sum(1))
    torch.testing.assert_close(q.mass(), matrix.sum(1))
    assert torch.equal(q.residual, torch.zeros(matrix.shape[0]))


@given(dense_rows(), st.floats(0, 1))
@settings(deadline=None)
def test_what_from_dense_cuts_is_in_the_residual(matrix, min_prob):
    q = SparseDistributions.from_dense(matrix, min_prob=min_prob).validate()
    assert torch.equal(q.to_dense(), torch.where(matrix >= min_prob, matrix, torch.zeros_like(matrix)))
    torch.testing.assert_close(q.mass() + q.residual, matrix.sum(1))


@given(dense_rows(max_rows=5), st.data())
@settings(deadline=None)
def test_select_and_cat(matrix, data):
    q = SparseDistributions.from_dense(matrix, min_prob=0.2)
    rows = data.draw(st.lists(st.integers(0, matrix.shape[0] - 1), max_size=8)) if matrix.shape[0] else []
    chosen = q.select(rows).validate()
    assert torch.equal(chosen.to_dense(), q.to_dense()[torch.tensor(rows, dtype=torch.int64)])
    assert torch.equal(chosen.residual, q.residual[torch.tensor(rows, dtype=torch.int64)])
    joined = SparseDistributions.cat([q, chosen, q]).validate()
    assert torch.equal(joined.to_dense(), torch.cat([q.to_dense(), chosen.to_dense(), q.to_dense()]))
    assert torch.equal(joined.residual, torch.cat([q.residual, chosen.residual, q.residual]))


@given(dense_rows(), st.data())
@settings(deadline=None)
def test_lookup(matrix, data):
    rows, vocab = matrix.shape
    targets = torch.tensor(
        data.draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)), dtype=torch.int64
    )
    found = SparseDistributions.from_dense(matrix).lookup(targets)
    assert torch.equal(found, matrix[torch.arange(rows), targets])


def test_lookup_of_a_token_that_no_row_holds_is_zero():
    q = SparseDistributions.from_dense(torch.tensor([[0.5, 0.5]]))
    assert q.lookup(torch.tensor([-100])).tolist() == [0.0]


def test_cat_drops_the_residual_when_one_part_has_none():
    whole = SparseDistributions.from_dense(torch.eye(3))
    bare = SparseDistributions(whole.indptr, whole.token_ids, whole.probs, 3)
    assert SparseDistributions.cat([whole, bare]).residual is None


def test_to_dense_dtype_and_to_same_device():
    q = SparseDistributions.from_dense(torch.eye(3))
    assert q.to_dense(torch.float64).dtype == torch.float64
    assert q.to("cpu") is q
    assert q.to("meta").device.type == "meta"


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = {
    "indptr": int64(0, 2, 2, 3),
    "token_ids": int32(1, 4, 0),
    "probs": torch.tensor([0.25, 0.5, 1.0]),
    "vocab_size": 5,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indptr": int32(0, 2, 2, 3)}, TypeError, "indptr: got torch.int32, wanted torch.int64"),
        ({"indptr": int64()}, ValueError, "indptr: got 0 elements"),
        ({"token_ids": int64(1, 4, 0)}, TypeError, "token_ids: got torch.int64, wanted torch.int32"),
        ({"token_ids": [1, 4, 0]}, TypeError, "token_ids: got list"),
        ({"token_ids": int32(1, 4)}, ValueError, "probs: got 3 elements, wanted 2"),
        ({"probs": torch.ones(3, dtype=torch.float64)}, TypeError, "probs: got torch.float64"),
        ({"probs": torch.ones(3, 1)}, ValueError, r"probs: got shape \(3, 1\)"),
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0"),
        ({"vocab_size": 5.0}, TypeError, "vocab_size: got float"),
        ({"residual": torch.zeros(2)}, ValueError, "residual: got 2 elements, wanted 3"),
        ({"residual": torch.zeros(3, device="meta")}, ValueError, "residual: got device meta"),
    ],
)
def test_the_constructor_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        SparseDistributions(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": int64(0, 2, 2, 4)}, "indptr: got first 0 and last 4, wanted 0 and nnz = 3"),
        ({"indptr": int64(1, 2, 2, 3)}, "indptr: got first 1"),
        ({"indptr": int64(0, 3, 2, 3)}, "indptr: falls after row 1"),
        ({"token_ids": int32(1, 5, 0)}, "token_ids: is outside the vocabulary at pair 1"),
        ({"token_ids": int32(-1, 4, 0)}, "token_ids: is outside the vocabulary at pair 0"),
        ({"token_ids": int32(4, 1, 0)}, "token_ids: is repeated or falls after pair 0"),
        ({"token_ids": int32(4, 4, 0)}, "token_ids: is repeated or falls after pair 0"),
        ({"probs": torch.tensor([0.25, -0.5, 1.0])}, "probs: is negative or not finite at pair 1"),
        ({"probs": torch.tensor([0.25, float("nan"), 1.0])}, "probs: is negative or not finite at pair 1"),
        ({"probs": torch.tensor([0.25, 0.8, 1.0])}, "probs: with the residual sums to more than 1 in row 0"),
        ({"residual": torch.tensor([0.5, 0.0, 0.0])}, "probs: with the residual sums to more than 1 in row 0"),
        ({"residual": torch.tensor([-0.1, 0.0, 0.0])}, "residual: is negative"),
    ],
)
def test_validate_names_what_is_wrong(change, message):
    assert SparseDistributions(**GOOD).validate().nnz == 3
    with pytest.raises(ValueError, match=message):
        SparseDistributions(**{**GOOD, **change}).validate()


def test_methods_refuse_what_they_cannot_do():
    q = SparseDistributions(**GOOD)
    with pytest.raises(IndexError, match="rows: got 0 to 3, wanted 0 to 2"):
        q.select([0, 3])
    for indptr in (int64(0, 2, 2, 4), int64(0, 3, 2, 3), int64(-1, 2, 2, 3)):
        broken = SparseDistributions(**{**GOOD, "indptr": indptr})
        with pytest.raises(ValueError, match="indptr: leaves the stored pairs in selected row"):
            broken.select([0, 1, 2])
        with pytest.raises(ValueError, match="indptr: "):
            broken.to_dense()
    with pytest.raises(ValueError, match="token_ids: is outside the vocabulary at pair 0"):
        SparseDistributions(**{**GOOD, "token_ids": int32(-1, 4, 0)}).to_dense()
    with pytest.raises(ValueError, match="targets: got shape"):
        q.lookup(int64(1))
    with pytest.raises(ValueError, match="parts: got none"):
        SparseDistributions.cat([])
    with pytest.raises(ValueError, match=r"vocabularies of \[5, 6\]"):
        SparseDistributions.cat([q, SparseDistributions(**{**GOOD, "vocab_size": 6})])
    with pytest.raises(ValueError, match=r"probs: got torch\.int64"):
        SparseDistributions.from_dense(torch.ones(2, 2, dtype=torch.int64))
