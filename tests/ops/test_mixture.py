"""What the whole interpolate family owes: the edge contract, any layout, any thread count, tracing, clear errors."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import SparseDistributions, ops
from memdec.ops import reference
from memdec.ops.mixture import described_pair, plain_pair
from memdec.ops.rows import plain_indices, plain_rows

NAN, INF = math.nan, math.inf


def sparse_like(base, memory):
    """A teacher of a few tokens a row that follows the memory, so that interpolate_sparse runs in the same tests."""
    probs = memory.reshape(math.prod(memory.shape[:-1]), memory.shape[-1]).float().softmax(-1)
    top = probs.topk(min(3, probs.shape[-1]), dim=-1)
    return SparseDistributions.from_dense(torch.zeros_like(probs).scatter(1, top.indices, top.values))


# name → (base, memory, alpha, library) ↦ result; targets and seeds are fixed functions of the shape.
FAMILY = {
    "interpolate": lambda b, m, a, lib=ops: lib.interpolate(b, m, a),
    "interpolate_log_prob": lambda b, m, a, lib=ops: lib.interpolate_log_prob(
        b, m, torch.arange(math.prod(b.shape[:-1]), device=b.device).reshape(b.shape[:-1]) % b.shape[-1], a
    ),
    "interpolate_argmax": lambda b, m, a, lib=ops: lib.interpolate_argmax(b, m, a),
    "interpolate_sample": lambda b, m, a, lib=ops: lib.interpolate_sample(b, m, a, seed=3, offset=2**40),
    "temperature": lambda b, m, a, lib=ops: lib.interpolate_sample(b, m, a, seed=3, temperature=0.8),
    "warped": lambda b, m, a, lib=ops: lib.interpolate_sample(b, m, a, seed=3, top_k=40, top_p=0.9, min_p=0.01),
}
WITH_SPARSE = {**FAMILY, "interpolate_sparse": lambda b, m, a, lib=ops: lib.interpolate_sparse(b, sparse_like(b, m), a)}
family = pytest.mark.parametrize("op", FAMILY.values(), ids=FAMILY.keys())
with_sparse = pytest.mark.parametrize("op", WITH_SPARSE.values(), ids=WITH_SPARSE.keys())


def pair(*shape, dtype=torch.float32, seed=0, scale=3.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype) for _ in range(2)
    )


def assert_same(got, wanted):
    """Bit for bit, NaN equal to NaN."""
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ the edges


@family
def test_broken_rows(simd, device, op):
    """Rows of NaN, +inf or nothing but −inf in a component with weight: NaN log-probs, token −1. Without: no matter.

    V = 5000 puts the one NaN into a later block than the first.
    """
    vocab = 5000
    good = pair(1, vocab, device=device)[0][0]
    rows = {
        "good": good,
        "masked": good.clone(),
        "nan": good.clone(),
        "inf": good.clone(),
        "none": torch.full_like(good, -INF),
    }
    rows["masked"][::2] = -INF
    rows["nan"][4500] = NAN
    rows["inf"][4500] = INF
    names = [(b, m) for b in rows for m in rows]
    base, memory = torch.stack([rows[b] for b, _ in names]), torch.stack([rows[m] for _, m in names])
    broken = ("nan", "inf", "none")
    for alpha in (0.0, 0.3, 1.0, torch.tensor(0.3), torch.linspace(0, 1, len(names), device=device)):
        got, wanted = op(base, memory, alpha), op(base.double(), memory.double(), alpha, reference)
        for i, (b, m) in enumerate(names):
            a = float(torch.as_tensor(alpha).expand(len(names))[i])
            is_broken = (b in broken and a < 1) or (m in broken and a > 0)
            if got.dtype == torch.int64:
                # Without warpers only the row that the coin picked counts, so the reference's token is the truth there.
                assert (int(got[i]) == -1) == (int(wanted[i]) == -1), (b, m, a)
                assert is_broken or -1 < int(got[i]) < vocab
            else:
                assert bool(got[i].isnan().all()) == is_broken, (b, m, a)
                torch.testing.assert_close(got[i].double(), wanted[i], rtol=1e-6, atol=1e-5, equal_nan=True)


@with_sparse
def test_masked_tokens_stay_masked(simd, device, op):
    base, memory = pair(6, 300, device=device)
    base[:, ::3] = -INF
    memory[:, ::3] = -INF
    got = op(base, memory, 0.4)
    if got.dtype == torch.int64:
        assert (got % 3 != 0).all()
    elif got.dim() == 2:
        assert (got[:, ::3] == -INF).all() and torch.isfinite(got[:, 1::3]).all()


@with_sparse
def test_a_common_offset_changes_nothing(simd, device, op):
    """Logits in steps of 2⁻⁹ are exact at 1e4 ± 16 in float32, so the results must agree bit for bit."""
    base, memory = ((x * 512).round() / 512 for x in pair(5, 5000, device=device))
    teacher = sparse_like(base, memory)
    for shift_base, shift_memory in ((1e4, 0.0), (0.0, -1e4), (1e4, 1e4)):
        if op is WITH_SPARSE["interpolate_sparse"]:
            got = ops.interpolate_sparse(base + shift_base, teacher, 0.4)
            assert_same(got, ops.interpolate_sparse(base, teacher, 0.4))
        else:
            assert_same(op(base + shift_base, memory + shift_memory, 0.4), op(base, memory, 0.4))


@with_sparse
def test_zero_rows_and_one_token(device, op):
    for shape in ((0, 7), (3, 0, 7)):
        empty = torch.zeros(shape, device=device)
        got = op(empty, empty, 0.5)
        assert got.shape in (shape, shape[:-1])
    one = torch.zeros(2, 1, device=device)
    assert (op(one, one, 0.5).abs() < 1e-6).all()  # token 0, log-prob 0


# ----------------------------------------------------------------------------------------------------------- the layout


@with_sparse
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_of_rows(device, op, dtype):
    """Slices of a vocabulary, of a batch and of a sequence, expanded and transposed rows: as from a contiguous copy."""
    wide = pair(4, 6, 3, 1200, dtype=dtype, device=device)
    for cut in (
        lambda x: x[..., 1:1101],  # odd starts: no alignment to rely on
        lambda x: x[:, :-1, 1],
        lambda x: x[1:, ::2, :, :1000],
        lambda x: x.transpose(0, 2),
        lambda x: x[:1, :1].expand(5, 7, 3, 1200),
        lambda x: x[0, 0, 0],
    ):
        base, memory = (cut(x) for x in wide)
        assert_same(op(base, memory, 0.4), op(base.contiguous(), memory.contiguous(), 0.4))


@with_sparse
def test_more_than_two_billion_elements(device, op):
    """Rows 2³¹ elements apart in a buffer of which only they are ever touched."""
    vocab, far = 1000, 2**31
    base, memory = pair(2, vocab, dtype=torch.bfloat16, device=device)
    distant = torch.empty(far + vocab, dtype=torch.bfloat16, device=device).as_strided((2, vocab), (far, 1))
    distant.copy_(base)
    assert_same(op(distant, memory, 0.4), op(base, memory, 0.4))


@with_sparse
@pytest.mark.parametrize("shape", [(1, 50257), (3, 151936), (40, 5000)])
def test_the_thread_count_changes_nothing(op, shape):
    base, memory = pair(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(op(base, memory, 0.4))
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@with_sparse
def test_a_row_is_the_same_in_a_batch_as_alone(device, op):
    """The batch gives rows to threads; one row alone is split over them."""
    base, memory = pair(24, 20000, device=device)
    if op in (FAMILY["interpolate_sample"], FAMILY["temperature"], FAMILY["warped"]):
        pytest.skip("an int seed is moved by the row's index: see test_interpolate_sample")
    if op is FAMILY["interpolate_log_prob"]:
        op = lambda b, m, a: ops.interpolate_log_prob(b, m, torch.full(b.shape[:1], 17, device=device), a)  # noqa: E731
    batch = op(base, memory, 0.4)
    for i in (0, 11, 23):
        assert_same(op(base[i : i + 1], memory[i : i + 1], 0.4)[0], batch[i])


# ------------------------------------------------------------------------------------------------- dtypes, alpha, trace


@family
def test_two_dtypes_meet_in_the_wider(device, op):
    base, memory = pair(4, 700, device=device)
    got = op(base.bfloat16(), memory, 0.4)
    assert_same(got, op(base.bfloat16().float(), memory, 0.4))
    if device == "cpu":
        assert op(base.bfloat16(), memory.double(), 0.4).dtype in (torch.float64, torch.int64)


@with_sparse
def test_alpha_of_every_shape(device, op):
    """Also a number in a tensor on the CPU, wherever the logits are."""
    base, memory = pair(2, 3, 400, device=device)
    alphas = torch.tensor([[0.0, 0.2, 1.0], [0.9, 0.0, 0.5]], device=device)
    got = op(base, memory, alphas)
    assert_same(op(base, memory, alphas.double()), op(base, memory, alphas.double().contiguous()))
    assert_same(op(base, memory, torch.tensor(0.25)), op(base, memory, 0.25))
    assert_same(op(base, memory, torch.tensor([0.25], device=device)), op(base, memory, 0.25))
    assert_same(op(base, memory, alphas[:, :1]), op(base, memory, alphas[:, :1].expand(2, 3)))
    if op in (WITH_SPARSE["interpolate"], WITH_SPARSE["interpolate_argmax"], WITH_SPARSE["interpolate_sparse"]):
        for i in range(2):
            for j in range(3):
                assert_same(got[i, j], op(base[i, j], memory[i, j], float(alphas[i, j])))


@with_sparse
def test_compiled_whole_and_as_eager(device, op):
    """One graph, same results; aot_eager traces as inductor does without its minutes of C++ compilation."""
    base, memory = pair(4, 300, device=device)
    teacher = sparse_like(base, memory)
    if op is WITH_SPARSE["interpolate_sparse"]:
        op = lambda b, m, a: ops.interpolate_sparse(b, teacher, a)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(compiled(base, memory, 0.4), op(base, memory, 0.4))
    alpha = torch.rand(4, device=device)
    assert_same(compiled(base, memory, alpha), op(base, memory, alpha))


def test_opcheck(device):
    """PyTorch's own checks of a registered operator: schema, fake shapes, autograd registration, tracing."""
    base, memory = pair(3, 50, device=device)
    targets = seeds = torch.tensor([1, 2, 3], device=device)
    alphas = torch.tensor([0.2, 0.5, 0.8], device=device)
    graded = tuple(x.clone().requires_grad_() for x in (base, memory, alphas))
    warpers = (1.0, 0, 1.0, 0.0)
    q = sparse_like(base, memory)
    check = torch.library.opcheck
    for b, m, a in ((base, memory, alphas), (base, memory, None), graded):
        check(torch.ops.memdec.interpolate.default, (b, m, 0.4, a))
        check(torch.ops.memdec.interpolate_log_prob.default, (b, m, targets, 0.4, a))
    check(torch.ops.memdec.interpolate_argmax.default, (base, memory, 0.4, alphas))
    check(torch.ops.memdec.interpolate_sample.default, (base, memory, 0.4, None, *warpers, 7, seeds, 0, None))
    check(torch.ops.memdec.interpolate_sparse.default, (base, q.indptr, q.token_ids, q.probs, 0.4, alphas))


@with_sparse
def test_meta_tensors_have_the_right_shapes(op):
    base, memory = pair(2, 3, 40)
    if op is WITH_SPARSE["interpolate_sparse"]:
        got = ops.interpolate_sparse(base.to("meta"), sparse_like(base, memory).to("meta"), 0.4)
    else:
        got = op(base.to("meta"), memory.to("meta"), 0.4)
    wanted = op(base, memory, 0.4)
    assert (got.shape, got.dtype, got.device.type) == (wanted.shape, wanted.dtype, "meta")


# --------------------------------------------------------------------------------------------------------------- errors


@with_sparse
def test_errors_name_the_argument(op):
    base, memory = pair(2, 3)
    for alpha, error, message in (
        (1.5, ValueError, "alpha: got 1.5, wanted 0 to 1"),
        (NAN, ValueError, "alpha: got nan, wanted 0 to 1"),
        ("0.5", TypeError, "alpha: got str, wanted a number"),
        (torch.tensor([0.5, -0.25]), ValueError, "alpha holds -0.25.* at position 1, wanted 0 to 1"),
        (torch.tensor([0.5, NAN]), ValueError, "alpha holds .*nan.* at position 1, wanted 0 to 1"),
        (torch.zeros(3), ValueError, r"alpha: got shape \(3,\), wanted a number or a tensor that broadcasts to \(2,\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, r"alpha: got torch\.int64"),
        (torch.tensor(0.5, device="meta"), ValueError, "alpha: got device meta, wanted cpu"),
    ):
        with pytest.raises(error, match=message):
            op(base, memory, alpha)
    with pytest.raises(TypeError, match=r"base_logits: got torch\.int64, wanted float32"):
        op(base.long(), memory, 0.5)
    if op in (FAMILY["interpolate"], FAMILY["interpolate_argmax"], FAMILY["warped"]):
        with pytest.raises(ValueError, match=r"base_logits: got shape \(\)"):
            op(torch.tensor(1.0), memory, 0.5)


@family
def test_pairs_that_do_not_fit(op):
    base, memory = pair(2, 3)
    with pytest.raises(ValueError, match=r"memory_logits: got shape \(2, 2\), wanted \(2, 3\).*slice padded"):
        op(base, memory[:, :2], 0.5)
    with pytest.raises(ValueError, match="memory_logits: got device meta, wanted cpu"):
        op(base, memory.to("meta"), 0.5)
    with pytest.raises(TypeError, match="memory_logits: got list"):
        op(base, memory.tolist(), 0.5)


# ------------------------------------------------------------------------------------------------------ anything at all

numbers = st.one_of(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e4, 1e38, -1e38]), st.floats(-30, 30, width=32))


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_anything_at_all(device, data):
    """Rows of arbitrary numbers: as the reference in float64, and never a token outside the vocabulary."""
    vocab = data.draw(st.integers(1, 40))
    row = st.lists(numbers, min_size=vocab, max_size=vocab)
    base, memory = (torch.tensor([data.draw(row), data.draw(row)], device=device) for _ in range(2))
    alpha = data.draw(st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0, 1)))
    got, wanted = ops.interpolate(base, memory, alpha), reference.interpolate(base.double(), memory.double(), alpha)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)
    targets = torch.randint(vocab, (2,), device=device)
    one = ops.interpolate_log_prob(base, memory, targets, alpha).double()
    torch.testing.assert_close(one, wanted.gather(1, targets[:, None])[:, 0], rtol=2e-6, atol=2e-6, equal_nan=True)
    for token, log_p in zip(ops.interpolate_argmax(base, memory, alpha).tolist(), wanted, strict=True):
        assert token == -1 if log_p.isnan().any() else log_p[token] >= log_p.max() - 1e-5
    for warpers in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        tokens = ops.interpolate_sample(base, memory, alpha, seed=data.draw(st.integers(0, 2**64 - 1)), **warpers)
        assert ((tokens >= -1) & (tokens < vocab)).all()


# ---------------------------------------------------------------------------------------------------- the common kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 32), (7, 1), (3, 5, 11), (1, 1, 1, 9)])
def test_the_common_kind_is_described_as_the_full_path_does(dtype, shape):
    base, memory = pair(*shape, dtype=dtype)
    found = plain_pair(base, memory, 0.25)
    assert found is not None
    assert [describe[:3] + describe[6:] for describe in found[:2]] == [
        describe[:3] + describe[6:] for describe in described_pair(base, memory)[2:]
    ]
    for data, _, count, inner, outer, stride, columns in found[:2]:  # where its rows begin
        places = [row // inner * outer + row % inner * stride for row in range(count)]
        assert places == [row * columns for row in range(count)] and data in (base.data_ptr(), memory.data_ptr())


class Own(torch.Tensor):
    """A subclass, which may do as it pleases."""


def test_all_else_takes_the_full_path():
    """What the full path refuses, copies, or hands on to whoever traces."""
    base, memory = pair(4, 12)
    targets = torch.zeros(4, dtype=torch.int64)
    assert plain_pair(base, memory, 0.5) and plain_indices(targets, base)
    freed = base.clone()
    freed.untyped_storage().resize_(0)
    others = [
        *(base.t().contiguous().t(), base[:, ::2], base[0], torch.zeros(0, 12), torch.zeros(4, 0), torch.tensor(1.0)),
        *(base.long(), base.bool(), base.to("meta"), base.to_sparse(), base.as_subclass(Own), torch.nn.Parameter(base)),
        *(freed, base.tolist(), None),
    ]
    for other in others:
        assert plain_rows(other) is None
        assert plain_pair(base, other, 0.5) is None and plain_pair(other, memory, 0.5) is None
    for other in (base[:3], base.double(), base.half(), base.reshape(2, 2, 12), base.reshape(8, 6)):
        assert plain_pair(base, other, 0.5) is None
    for alpha in (0, 1, True, -0.1, 1.1, NAN, INF, torch.tensor(0.5), None, "0.5"):
        assert plain_pair(base, memory, alpha) is None
    for indices in (targets.int(), targets[:3], targets[:, None], targets.to("meta"), targets.repeat(2)[::2], [0] * 4):
        assert not plain_indices(indices, base)
    seen = []

    def watched(b, m):
        seen.append(plain_pair(b, m, 0.5))
        return b.sum()

    torch.func.vmap(watched)(base[None], memory[None])
    with torch.autograd.forward_ad.dual_level():
        watched(base, memory)
    torch.compile(watched, backend="eager", fullgraph=True)(base, memory)
    assert seen == [None, None, None] or seen == [None, None]


@pytest.mark.parametrize("name", ["argmax", "log_prob", "token_log_prob", "sample", "seeds"])
def test_the_common_kind_gives_what_the_full_path_gives(name, monkeypatch):
    """Results bit for bit, gradients, and the words of errors."""

    def words(op, *given):
        try:
            return op(*given)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def results():
        base, memory = pair(6, 50)
        targets = torch.arange(6)
        op = {
            "argmax": lambda b, m, a, t: ops.interpolate_argmax(b, m, a),
            "log_prob": lambda b, m, a, t: ops.interpolate_log_prob(b, m, t, a),
            "token_log_prob": lambda b, m, a, t: ops.token_log_prob(b, t),
            "sample": lambda b, m, a, t: ops.interpolate_sample(b, m, a, seed=5, temperature=0.9),
            "seeds": lambda b, m, a, t: ops.interpolate_sample(b, m, a, seed=t + 7, offset=2 * t),
        }[name]
        found = [op(base, memory, alpha, targets) for alpha in (0.0, 0.3, 1.0)]
        found += [op(base.to(dtype), memory.to(dtype), 0.3, targets) for dtype in (torch.bfloat16, torch.float64)]
        found.append(op(base.reshape(2, 3, 50), memory.reshape(2, 3, 50), 0.3, targets.reshape(2, 3)))
        found.append(op(base[:, 1:], memory[:, 1:], 0.3, targets))
        if "log_prob" in name:
            wants = base.clone().requires_grad_()
            op(wants, memory, 0.3, targets).sum().backward()
            found.append(wants.grad)
        found += [
            words(op, *wrong)
            for wrong in (
                (base, memory, 1.5, targets),
                (base, memory, "a", targets),
                (base[:4], memory, 0.3, targets),
                (base, memory.long(), 0.3, targets),
                (base, memory, 0.3, targets[:4]),
                (base, memory, 0.3, targets.float()),
                (base, memory, 0.3, targets + 99),
            )
        ]
        return found

    common = results()
    for module in ("mixture", "token_log_prob"):  # the latter is also the name of a function
        monkeypatch.setattr(sys.modules[f"memdec.ops.{module}"], "plain_rows", lambda tensor: None)
    for got, wanted in zip(common, results(), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert_same(got, wanted)
        else:
            assert got == wanted
    assert any(isinstance(one, str) for one in common)
