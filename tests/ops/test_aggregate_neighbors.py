"""aggregate_neighbors against a loop over a Python dict, and against the dense float64 reference."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import _C, SparseDistributions, build_info, ops

LEVELS = build_info()["simd_levels"]


def by_dict(distances, tokens, temperature, min_prob=0.0, max_tokens=None):
    """One row, as the formula reads: ({token: probability}, mass cut), in Python's floats."""
    present = [(d, t) for d, t in zip(distances, tokens, strict=True) if t >= 0 and d < math.inf]
    if not present:
        return {}, 0.0
    least = min(d for d, _ in present)
    weight = {}
    for d, t in present:
        weight[t] = weight.get(t, 0.0) + math.exp((least - d) / temperature)
    total = math.fsum(weight.values())
    row = {t: w / total for t, w in weight.items()}
    kept = sorted(row, key=lambda t: (-row[t], t))[:max_tokens]
    kept = {t: row[t] for t in sorted(kept) if row[t] >= min_prob and row[t] > 1e-37}
    return kept, math.fsum(p for t, p in row.items() if t not in kept)


def assert_matches_dict(got: SparseDistributions, distances, tokens, tolerance, **options):
    got, distances, tokens = got.to("cpu"), distances.cpu(), tokens.cpu()
    for i in range(got.num_rows):
        begin, end = int(got.indptr[i]), int(got.indptr[i + 1])
        ids, probs = got.token_ids[begin:end].tolist(), got.probs[begin:end].tolist()
        wanted, cut = by_dict(distances[i].tolist(), tokens[i].tolist(), **options)
        # Below 1e-36 the float32 exponential is allowed to give 0, and the token then to be missing.
        assert [t for t in ids if wanted.get(t, 1) > 1e-36] == [t for t in wanted if wanted[t] > 1e-36]
        assert probs == pytest.approx([wanted[t] for t in ids], rel=tolerance, abs=1e-36)
        assert got.residual[i].item() == pytest.approx(cut, rel=tolerance, abs=1e-7)


# k: one neighbour, fewer and more than a vector (8, 16), the paper's 1024, and past the 32 bits that a
# (token, place) pair may share with V = 2^18. V: one digit, one pass, two passes (50257, 262144), four (2^31).
@pytest.mark.parametrize(
    ("k", "vocab"),
    [
        (1, 1),
        (1, 7),
        (5, 7),
        (16, 50257),
        (33, 2),
        (40, 600),
        (1024, 50257),
        (1000, 262144),
        (16500, 262144),
        (50, 2**31 - 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_a_dict(simd, device, dtype, k, vocab):
    """Rounded distances are taken as exact; what is left is float32's (for float64: float32 outputs') rounding:
    an exponent (d − d_min)/T of up to 25 carries 25·2⁻²⁴·2 and the exponential and output 3 more units of 2⁻²⁴."""
    generator = torch.Generator().manual_seed(k)
    n = 19 if k < 10000 else 2  # more than a chunk of rows
    distances = (torch.rand(n, k, generator=generator) * 400 + 50).to(dtype)
    # Half of the tokens from a few, as text has them, half from anywhere.
    few = torch.randint(max(1, vocab // 1000), (n, k), generator=generator)
    tokens = torch.where(
        torch.rand(n, k, generator=generator) < 0.5, few, torch.randint(vocab, (n, k), generator=generator)
    )
    distances, tokens = distances.to(device), tokens.to(device)
    got = ops.aggregate_neighbors(distances, tokens, temperature=16.0, vocab_size=vocab)
    assert got.validate().vocab_size == vocab
    assert_matches_dict(got, distances.double(), tokens, 4e-6, temperature=16.0)
    narrow = ops.aggregate_neighbors(distances, tokens.int(), temperature=16.0, vocab_size=vocab)
    for one, other in zip(pieces(got), pieces(narrow), strict=True):
        assert torch.equal(one, other)


def pieces(q):
    return q.indptr, q.token_ids, q.probs, q.residual


def test_more_tokens_than_there_are_is_all_of_them(device):
    distances, tokens = torch.tensor([[0.0, 1.0, 2.0]], device=device), torch.tensor([[3, 1, 3]], device=device)
    whole = ops.aggregate_neighbors(distances, tokens, temperature=1.0, vocab_size=5)
    for most in (5, 6, 2**31, 2**63):
        kept = ops.aggregate_neighbors(distances, tokens, temperature=1.0, vocab_size=5, max_tokens=most)
        assert torch.equal(kept.to_dense(), whole.to_dense()) and kept.residual.item() == 0


@pytest.mark.parametrize(
    "options", [{"min_prob": 0.004}, {"max_tokens": 7}, {"min_prob": 0.006, "max_tokens": 60}, {"max_tokens": 1}]
)
def test_cuts_as_the_reference_does(simd, device, on_cuda, options):
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 40, (50, 200), generator=generator).double()  # many equal probabilities
    tokens = torch.randint(0, 80, (50, 200), generator=generator)
    ours = ops.aggregate_neighbors(
        (distances.float() if on_cuda else distances).to(device),
        tokens.to(device),
        temperature=5.0,
        vocab_size=100,
        **options,
    )
    ours = ours.to("cpu")
    theirs = ops.reference.aggregate_neighbors(distances, tokens, temperature=5.0, vocab_size=100, **options)
    assert torch.equal(ours.indptr, theirs.indptr)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    # In float32 an exponent of up to 8 carries 8·2⁻²⁴, twice, the exponential and the output 3 more units.
    torch.testing.assert_close(ours.probs, theirs.probs, rtol=1.2e-6 if on_cuda else 2e-7, atol=0)
    torch.testing.assert_close(ours.residual, theirs.residual, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(ours.mass() + ours.residual, torch.ones(50), rtol=0, atol=1e-6)


def test_equal_probabilities_are_cut_by_id(simd, device):
    got = ops.aggregate_neighbors(
        torch.zeros(1, 40, device=device),
        torch.arange(40, 0, -1, device=device)[None],
        temperature=1.0,
        vocab_size=41,
        max_tokens=3,
    )
    assert got.token_ids.tolist() == [1, 2, 3]
    assert got.residual.item() == pytest.approx(37 / 40)


# On CUDA a row of up to 64, 256 and 1024 neighbours is sorted in a warp's registers, one of up to 8192 in shared memory
# (as is a shorter one where V is large), one of more in the workspace.
@pytest.mark.parametrize(
    ("k", "vocab"), [(60, 20), (256, 90), (1024, 700), (1025, 900), (8192, 300), (8193, 50257), (70, 2**31 - 1)]
)
def test_the_most_probable_are_kept_exactly(device, k, vocab):
    """All neighbours at one distance: weights are whole numbers, probabilities quotients of them, ties abound."""
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randint(min(vocab, 5000), (3, k), generator=generator) + max(0, vocab - 5000)
    tokens[1, ::3] = -1
    tokens[2] = vocab - 1
    distances = torch.full((3, k), 5.0, dtype=torch.float16)
    for most, least in [(None, 0.0), (1, 0.0), (7, 0.0), (k // 3, 0.0), (k // 3, 3 / k), (None, 2 / k)]:
        got = ops.aggregate_neighbors(
            distances.to(device), tokens.to(device), temperature=3.0, vocab_size=vocab, max_tokens=most, min_prob=least
        ).validate()
        for row, (begin, end) in enumerate(pairwise(got.indptr.tolist())):
            ids, counts = tokens[row][tokens[row] >= 0].unique(return_counts=True)
            quotients = counts.double() / counts.sum()
            order = quotients.argsort(descending=True, stable=True)[:most].sort().values
            order = order[quotients[order] >= least]
            assert got.token_ids[begin:end].tolist() == ids[order].tolist()
            assert got.probs[begin:end].tolist() == quotients[order].float().tolist()
            assert got.residual[row].item() == pytest.approx(1 - quotients[order].sum().item(), abs=3e-6)


def test_min_prob_keeps_what_equals_it(simd, device):
    """Ten equal neighbours, three of one token: 0.3 as Python divides it, and 0.1."""
    tokens, zeros = torch.tensor([[1, 1, 1, 2, 3, 4, 5, 6, 7, 8]], device=device), torch.zeros(1, 10, device=device)
    at = ops.aggregate_neighbors(zeros, tokens, temperature=1.0, vocab_size=9, min_prob=3 / 10)
    assert at.token_ids.tolist() == [1]
    all_of_them = ops.aggregate_neighbors(zeros, tokens, temperature=1.0, vocab_size=9, min_prob=0.1)
    assert all_of_them.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    above = ops.aggregate_neighbors(zeros, tokens, temperature=1.0, vocab_size=9, min_prob=math.nextafter(0.3, 1))
    assert above.nnz == 0 and above.residual.item() == 1


def test_small_temperature_and_large_offset(simd, device):
    """The nearest wins however small T is and however large all distances are; the others weigh 0."""
    distances = torch.tensor([[1e4, 1e4 + 1, 1e4]], device=device)
    tokens = torch.tensor([[4, 5, 3]], device=device)
    got = ops.aggregate_neighbors(distances, tokens, temperature=1e-3, vocab_size=6)
    assert got.token_ids.tolist() == [3, 4] and got.probs.tolist() == [0.5, 0.5]
    got = ops.aggregate_neighbors(distances * 1e30, tokens, temperature=1e-30, vocab_size=6)
    assert got.token_ids.tolist() == [3, 4] and got.probs.tolist() == [0.5, 0.5]
    for extreme in (5e-324, 1e-39):
        got = ops.aggregate_neighbors(distances, tokens, temperature=extreme, vocab_size=6)
        assert got.token_ids.tolist() == [3, 4] and got.probs.tolist() == [0.5, 0.5]
    flat = ops.aggregate_neighbors(distances, tokens, temperature=1e30, vocab_size=6)
    assert flat.probs.tolist() == pytest.approx([1 / 3] * 3)


def test_absent_neighbours(simd, device):
    inf = math.inf
    distances = torch.tensor([[inf, 1.0, 2.0, 3.0], [inf, inf, 1.0, inf], [0.0, inf, inf, 0.0], [5.0, 5.0, 5.0, 5.0]])
    tokens = torch.tensor([[1, 2, -1, 2], [1, 1, -1, 1], [7, 1, -1, 6], [-1, -1, 3, 3]])
    got = ops.aggregate_neighbors(distances.to(device), tokens.to(device), temperature=1.0, vocab_size=8).validate()
    assert got.row_lengths().tolist() == [1, 0, 2, 1]
    assert got.token_ids.tolist() == [2, 6, 7, 3]
    assert got.probs.tolist() == [1.0, 0.5, 0.5, 1.0]
    assert got.residual.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing(device, shape):
    got = ops.aggregate_neighbors(
        torch.zeros(shape, device=device),
        torch.zeros(shape, dtype=torch.int64, device=device),
        temperature=1.0,
        vocab_size=3,
    )
    assert got.num_rows == shape[0] and got.nnz == 0 and got.residual.tolist() == [0] * shape[0]


def test_rows_may_be_strided_or_shared(simd, device):
    generator = torch.Generator().manual_seed(1)
    distances = torch.rand(9, 200, generator=generator).to(device)
    tokens = torch.randint(50, (9, 200), generator=generator).to(device)
    wanted = ops.aggregate_neighbors(
        distances[:, 3:103].contiguous(), tokens[:, 3:103].contiguous(), temperature=0.2, vocab_size=50
    )
    for d, t in [
        (distances[:, 3:103], tokens[:, 3:103]),
        (distances.T.contiguous().T[:, 3:103], tokens.T.contiguous().T[:, 3:103]),
    ]:
        got = ops.aggregate_neighbors(d, t, temperature=0.2, vocab_size=50)
        for one, other in zip(pieces(got), pieces(wanted), strict=True):
            assert torch.equal(one, other)
    shared = ops.aggregate_neighbors(
        distances[:1].expand(4, 200), tokens[:1].expand(4, 200), temperature=0.2, vocab_size=50
    )
    assert torch.equal(shared.to_dense()[3], shared.to_dense()[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_small_input(device, data):
    """Any mixture of duplicates, absent neighbours and cuts, as a dict would have it, at every number of threads."""
    rows, k, vocab = (data.draw(st.integers(1, n)) for n in (40, 50, 12))
    number = st.one_of(st.integers(0, 6).map(float), st.just(math.inf))
    distances = torch.tensor(
        data.draw(st.lists(st.lists(number, min_size=k, max_size=k), min_size=rows, max_size=rows))
    )
    tokens = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-1, vocab - 1), min_size=k, max_size=k), min_size=rows, max_size=rows))
    )
    # 0.0307 is no quotient of sums of these few weights, so rounding cannot decide what is cut.
    options = {
        "temperature": data.draw(st.sampled_from([0.7, 3.0])),
        "min_prob": data.draw(st.sampled_from([0.0, 0.0307])),
    }
    got = ops.aggregate_neighbors(distances.to(device), tokens.to(device), vocab_size=vocab, **options).validate()
    assert_matches_dict(got, distances, tokens, 2e-6, **options)


def test_does_not_depend_on_threads_or_on_the_order_of_neighbours(simd, device, on_cuda):
    """To the bit for threads; for the order, to a float32 rounding of a float64 sum."""
    generator = torch.Generator().manual_seed(2)
    rows = 131 if on_cuda else 3001  # enough for several chunks a thread; on CUDA, for looking back over 33 tiles
    distances = (torch.rand(rows, 100, generator=generator) * 50).to(device)
    tokens = torch.randint(300, (rows, 100), generator=generator).to(device)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(ops.aggregate_neighbors(distances, tokens, temperature=4.0, vocab_size=300, min_prob=1e-3))
    for other in results[1:]:
        for one, two in zip(pieces(results[0]), pieces(other), strict=True):
            assert torch.equal(one, two)
    order = torch.randperm(100, generator=generator)
    shuffled = ops.aggregate_neighbors(
        distances[:, order], tokens[:, order], temperature=4.0, vocab_size=300, min_prob=1e-3
    )
    assert torch.equal(shuffled.token_ids, results[0].token_ids)
    torch.testing.assert_close(shuffled.probs, results[0].probs, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("vocab", [1, 64, 65, 4095, 4097, 10000])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(simd, vocab):
    """Alone a row is sorted; in a batch large enough its weights are summed in a table of the vocabulary.

    The table's words of 64 tokens and groups of 4096 have edges at these sizes. Some neighbours are absent.
    """
    generator = torch.Generator().manual_seed(vocab)
    rows, k = 2 * vocab // 50 + 300, 50
    distances = torch.rand(rows, k, generator=generator) * 50
    distances[::3, ::7] = math.inf
    tokens = torch.randint(vocab, (rows, k), generator=generator)
    tokens[1::3, 5] = vocab - 1
    tokens[1::3, 6::11] = -1
    options = {"temperature": 4.0, "vocab_size": vocab}
    batch = ops.aggregate_neighbors(distances, tokens, **options).validate()
    for row in range(0, rows, 13):
        alone = ops.aggregate_neighbors(distances[row : row + 1], tokens[row : row + 1], **options)
        for one, two in zip(pieces(alone), pieces(batch.select(torch.tensor([row]))), strict=True):
            assert torch.equal(one, two)


def test_levels_agree():
    generator = torch.Generator().manual_seed(3)
    distances = torch.rand(200, 300, generator=generator) * 50
    tokens = torch.randint(1000, (200, 300), generator=generator)
    before = build_info()["simd"]
    wanted = ops.reference.aggregate_neighbors(distances, tokens, temperature=4.0, vocab_size=1000)
    for level in LEVELS:
        try:
            _C.set_simd_level(level)
        except ValueError:
            continue
        got = ops.aggregate_neighbors(distances, tokens, temperature=4.0, vocab_size=1000)
        assert torch.equal(got.token_ids, wanted.token_ids)
        torch.testing.assert_close(got.probs, wanted.probs, rtol=2e-6, atol=0)
    _C.set_simd_level(before)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("token", [2, -1])
def test_refuses_what_is_not_a_distance(simd, device, bad, token):
    distances = torch.rand(300, 40, device=device)
    tokens = torch.randint(5, (300, 40), device=device)
    distances[217, 13], tokens[217, 13] = bad, token
    distances[230, 1] = bad
    with pytest.raises(ValueError, match=f"distances holds NaN or -inf at position {217 * 40 + 13}"):
        ops.aggregate_neighbors(distances, tokens, temperature=1.0, vocab_size=5)


@pytest.mark.parametrize("bad", [5, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_refuses_tokens_outside_the_vocabulary(simd, device, bad, dtype):
    tokens = torch.zeros(70, 40, dtype=dtype, device=device)
    tokens[33, 4] = bad
    tokens[34, 0] = tokens[69, 39] = 77
    with pytest.raises(ValueError, match=f"token_ids holds {bad} at position {33 * 40 + 4}"):
        ops.aggregate_neighbors(torch.zeros(70, 40, device=device), tokens, temperature=1.0, vocab_size=5)


def test_refuses_a_64_bit_token_that_would_wrap(device):
    with pytest.raises(ValueError, match="token_ids holds 4294967296"):
        ops.aggregate_neighbors(
            torch.zeros(1, 1, device=device), torch.tensor([[2**32]], device=device), temperature=1.0, vocab_size=5
        )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size"),
        ({"min_prob": 1.5}, ValueError, "min_prob: got 1.5"),
        ({"max_tokens": 0}, ValueError, "max_tokens: got 0"),
        ({"token_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"token_ids: got shape \(2, 4\)"),
        ({"token_ids": torch.zeros(2, 3)}, TypeError, "token_ids: got torch.float32"),
        ({"distances": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "distances: got torch.int64"),
        (
            {"distances": torch.zeros(2, 3, requires_grad=True)},
            ValueError,
            "distances: got a tensor that requires grad",
        ),
    ],
)
def test_explains_wrong_arguments(change, error, words):
    arguments = {
        "distances": torch.zeros(2, 3),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "temperature": 1.0,
        "vocab_size": 4,
    }
    with pytest.raises(error, match=words):
        ops.aggregate_neighbors(**{**arguments, **change})


def test_is_a_registered_operator(device):
    generator = torch.Generator().manual_seed(4)
    distances, tokens = torch.rand(6, 20, generator=generator), torch.randint(9, (6, 20), generator=generator)
    distances, tokens = distances.to(device), tokens.to(device)
    arguments = (distances, tokens, 0.3, 9, 0.0, None)
    torch.library.opcheck(torch.ops.memdec.aggregate_neighbors, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")  # the graph is the point, not inductor's code
    def dense(distances, tokens):
        return ops.aggregate_neighbors(distances, tokens, temperature=0.3, vocab_size=9).probs * 2

    eager = ops.aggregate_neighbors(distances, tokens, temperature=0.3, vocab_size=9)
    assert torch.equal(dense(distances, tokens), eager.probs * 2)
