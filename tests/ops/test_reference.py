"""The reference ops against truths that share no code: loops in Python floats, published vectors, transformers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from memdec import SparseDistributions
from memdec.ops import reference


def softmax(row):
    top = max(row)
    weights = [math.exp(z - top) for z in row]
    return [w / math.fsum(weights) for w in weights]


def random_teacher(rows, vocab, generator, density=0.4, mass=1.0):
    dense = torch.rand(rows, vocab, generator=generator) * (torch.rand(rows, vocab, generator=generator) < density)
    return SparseDistributions.from_dense(dense / dense.sum(1, keepdim=True).clamp(min=1e-9) * mass)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def test_token_log_prob_by_hand(generator):
    logits = 3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3])
    wanted = [math.log(softmax(row)[y]) for row, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(reference.token_log_prob(logits, targets), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mass", [1.0, 0.8])
def test_alignment_loss_by_hand(generator, beta, mass):
    """Sums of q·log(q/p) and −log p over Python floats; the gradient against the closed form of DESIGN section 2."""
    rows, vocab = 5, 8
    logits = (2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([1, -100, 7, 0, 2])
    q = random_teacher(rows, vocab, generator, mass=mass)
    dense = q.to_dense(torch.float64).tolist()
    kl = ce = 0.0
    wanted_grad = torch.zeros(rows, vocab, dtype=torch.float64)
    for i, (row, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        if y < 0:
            continue
        p = softmax(row)
        kl += math.fsum(w * math.log(w / p[v]) for v, w in enumerate(dense[i]) if w > 0)
        ce -= math.log(p[y])
        m = math.fsum(dense[i])
        for v in range(vocab):
            wanted_grad[i, v] = (beta * m + 1 - beta) * p[v] - beta * dense[i][v] - (1 - beta) * (v == y)
    loss = reference.alignment_loss(logits, labels, q, beta=beta)
    assert float(loss.kl) == pytest.approx(kl / 4) and float(loss.ce) == pytest.approx(ce / 4)
    assert float(loss.total.detach()) == pytest.approx((beta * kl + (1 - beta) * ce) / 4)
    loss.total.backward()
    torch.testing.assert_close(logits.grad, wanted_grad / 4)


def test_alignment_loss_reductions_and_edges(generator):
    logits = torch.randn(3, 6, generator=generator)
    logits[1] = math.nan  # its row is ignored
    logits = logits.requires_grad_()
    empty = SparseDistributions(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0), 6)
    labels = torch.tensor([2, -100, 5])
    each = reference.alignment_loss(logits, labels, empty, reduction="none")
    assert each.total.shape == (3,) and each.total[1] == 0 and torch.equal(each.kl, torch.zeros(3))
    torch.testing.assert_close(each.total.detach(), 0.5 * each.ce)
    mean, total = (reference.alignment_loss(logits, labels, empty, reduction=r).total for r in ("mean", "sum"))
    torch.testing.assert_close(total, each.total.sum())
    torch.testing.assert_close(mean, each.total.sum() / 2)
    mean.backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[1].any()
    nothing = reference.alignment_loss(logits, torch.full((3,), -100), empty)
    assert float(nothing.total.detach()) == 0


def test_linear_alignment_loss_is_the_loss_of_the_product(generator):
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    labels, q = torch.tensor([0, 1, 2, 3]), random_teacher(4, 6, generator)
    logits = torch.tensor(
        [[sum(h * w for h, w in zip(a, b, strict=True)) + 1 for b in weight.tolist()] for a in hidden.tolist()]
    )
    wanted = reference.alignment_loss(logits.double(), labels, q)
    got = reference.linear_alignment_loss(hidden, weight, labels, q, bias=bias)
    torch.testing.assert_close(got.total, wanted.total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("min_prob", "max_tokens"), [(0.0, None), (0.05, None), (0.0, 3), (0.02, 4)])
def test_aggregate_neighbors_by_hand(min_prob, max_tokens):
    """A dictionary of token → weight a row, cut and sorted in plain Python."""
    rng = random.Random(11)
    rows, k, vocab, temperature = 6, 12, 9, 2.5
    distances = [[rng.choice([0.5, 1.0, rng.random() * 20]) for _ in range(k)] for _ in range(rows)]
    token_ids = [[rng.choice([-1, *range(vocab)]) for _ in range(k)] for _ in range(rows)]
    distances[2][3], token_ids[4] = math.inf, [-1] * k
    q = reference.aggregate_neighbors(
        torch.tensor(distances, dtype=torch.float64),
        torch.tensor(token_ids),
        temperature=temperature,
        vocab_size=vocab,
        min_prob=min_prob,
        max_tokens=max_tokens,
    ).validate()
    for i in range(rows):
        weights: dict[int, float] = {}
        for d, v in zip(distances[i], token_ids[i], strict=True):
            if v >= 0 and d < math.inf:
                weights[v] = weights.get(v, 0.0) + math.exp(-d / temperature)
        total = math.fsum(weights.values())
        probs = sorted(((w / total, -v) for v, w in weights.items()), reverse=True)
        kept = sorted((-v, w) for w, v in probs[:max_tokens] if w >= min_prob)
        got = q.select([i])
        assert got.token_ids.tolist() == [v for v, _ in kept]
        assert got.probs.tolist() == pytest.approx([w for _, w in kept])
        assert float(got.residual) == pytest.approx(1 - math.fsum(w for _, w in kept) if weights else 0, abs=1e-6)


def test_aggregate_neighbors_is_not_moved_by_a_common_distance():
    near = torch.tensor([[1.0, 2.0, 3.0]])
    tokens = torch.tensor([[4, 2, 4]])
    a = reference.aggregate_neighbors(near, tokens, temperature=1.0, vocab_size=5)
    b = reference.aggregate_neighbors(near + 4096, tokens, temperature=1.0, vocab_size=5)
    assert torch.equal(a.probs, b.probs)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.4, 1.0])
def test_interpolate_by_hand(generator, alpha):
    base, memory = (4 * torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = torch.tensor(
        [
            [math.log(alpha * m + (1 - alpha) * b) for b, m in zip(softmax(x), softmax(y), strict=True)]
            for x, y in zip(base.tolist(), memory.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    got = reference.interpolate(base, memory, alpha)
    torch.testing.assert_close(got, wanted)
    targets = torch.tensor([0, 3, 6])
    torch.testing.assert_close(
        reference.interpolate_log_prob(base, memory, targets, alpha), wanted[torch.arange(3), targets]
    )
    assert torch.equal(reference.interpolate_argmax(base, memory, alpha), wanted.argmax(-1))


def test_interpolate_edges():
    nan, inf = math.nan, math.inf
    good, masked, broken = [0.0, 1.0, 2.0], [-inf, 0.0, -inf], [nan, 0.0, 0.0]
    base = torch.tensor([good, good, masked, [-inf] * 3, broken])
    memory = torch.tensor([broken, masked, masked, good, good])
    alpha = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0])
    got = reference.interpolate(base, memory, alpha)
    torch.testing.assert_close(got[0], torch.log_softmax(base[0], -1))
    torch.testing.assert_close(got[1].exp(), torch.tensor([0.0450, 0.6224, 0.3326]), rtol=0, atol=1e-4)
    assert got[2].tolist() == [-inf, 0.0, -inf]
    assert got[3].isnan().all()
    torch.testing.assert_close(got[4], torch.log_softmax(memory[4], -1))
    assert reference.interpolate_argmax(base, memory, alpha).tolist() == [2, 1, 1, -1, 2]
    assert reference.interpolate_argmax(base, memory, 0.5).tolist() == [-1, 1, 1, -1, -1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_interpolate_sparse_by_hand(generator, alpha, mass):
    base = 2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    q = random_teacher(5, 6, generator, mass=mass)
    got = reference.interpolate_sparse(base, q, alpha)
    for i, row in enumerate(base.tolist()):
        p, dense = softmax(row), q.to_dense(torch.float64)[i].tolist()
        m = math.fsum(dense) if mass < 1 else 1.0
        mixed = [alpha * (w + (1 - m) * x) + (1 - alpha) * x for w, x in zip(dense, p, strict=True)]
        wanted = [math.log(x) if x > 0 else -math.inf for x in mixed]
        assert got[i].tolist() == pytest.approx(wanted, rel=1e-6)
        assert math.fsum(got[i].exp().tolist()) == pytest.approx(1, abs=1e-6)


def test_interpolate_sparse_edges():
    q = SparseDistributions.from_dense(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    nan = torch.full((2, 3), math.nan)
    whole = reference.interpolate_sparse(nan, q, 1.0)
    torch.testing.assert_close(whole[0].exp(), torch.tensor([0.5, 0.5, 0.0]))
    assert whole[1].isnan().all()  # no teacher: the base is used, and is NaN
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    torch.testing.assert_close(reference.interpolate_sparse(logits, q, 0.7)[1], torch.log_softmax(logits[1], -1))


# ------------------------------------------------------------------------------------------------------------- sampling


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, wanted):
    """The three published test vectors of philox4x32-10 (Random123's kat_vectors)."""
    got = reference.philox(tuple(torch.tensor(w) for w in words(counter)), tuple(torch.tensor(w) for w in words(key)))
    assert [int(w) for w in got] == words(wanted)


def test_draws_are_laid_out_as_documented():
    seed, offset = 0x299F31D0A4093822, (0x03707344 << 32) | 0x13198A2E
    seeds, offsets = torch.tensor([seed]), torch.tensor([offset])
    row = reference.draws(seeds, offsets, 7, 10)[0].tolist()
    for v in range(10):
        counter = tuple(torch.tensor(c) for c in (v // 4, 7, 0x13198A2E, 0x03707344))
        block = reference.philox(counter, (torch.tensor(0xA4093822), torch.tensor(0x299F31D0)))
        assert row[v] == int(block[v % 4])


def test_gumbel_is_finite_and_exact_in_both_tails():
    """−log(−log1p(−u)) in float32 at the smallest and largest draws, against doubles."""
    draws = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    exact = []
    for k in draws.tolist():
        rest = (2**33 - (2 * k + 1)) / 2**33  # 1 − u, exact in a double
        exponential = -math.log(rest) if k >= 2**31 else -math.log1p(-(2 * k + 1) / 2**33)
        exact.append(-math.log(exponential))
    torch.testing.assert_close(reference.gumbel(draws).double(), torch.tensor(exact).double(), rtol=1e-6, atol=1e-6)
    assert float(reference.gumbel(draws)[0]) == pytest.approx(33 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_k": 50},
        {"top_p": 0.0},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_warp_is_what_transformers_does(generator, settings):
    """Same tokens left, same scores, with logits in steps of ½ so that ties stand at every border."""
    process = pytest.importorskip("transformers.generation.logits_process")
    chain = {
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    scores = torch.log_softmax((4 * torch.randn(200, 12, generator=generator)).round() / 2, -1)
    wanted = scores
    for name, warper in chain.items():
        if name in settings:
            wanted = warper(settings[name])(None, wanted)
    assert torch.equal(reference.warp(scores, **settings), wanted)


def chi_square(counts, probs):
    """Pearson's statistic, and what it exceeds once in 10⁶ runs (Wilson–Hilferty); tokens under 5 expected pooled."""
    total = counts.sum()
    expected = probs.double() * total
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert not observed[expected == 0].any(), "a token of probability 0 was drawn"
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = observed.numel() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.15}, {"temperature": 0.8, "top_p": 0.9}],
)
def test_samples_follow_the_warped_mixture(generator, settings):
    """χ² of 40,000 rows of one pair of logits against the warped probabilities; false alarm 10⁻⁶ a case."""
    vocab, rows, alpha = 11, 40_000, 0.35
    base, memory = (2 * torch.randn(1, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    mixture = torch.log(alpha * memory.softmax(-1) + (1 - alpha) * base.softmax(-1))
    probs = reference.warp(mixture, **settings).softmax(-1)[0]
    tokens = reference.interpolate_sample(base.expand(rows, -1), memory.expand(rows, -1), alpha, seed=123, **settings)
    statistic, limit = chi_square(torch.bincount(tokens, minlength=vocab), probs)
    assert statistic < limit


def in_two_steps(monkeypatch, columns, vocab=11, rows=40_000):
    """χ² and its limit, of 40,000 draws with blocks of so many tokens; the masses of blocks of four are 9 : 90 : 1."""
    monkeypatch.setattr(reference, "DRAW_COLUMNS", columns)
    probs = torch.tensor([2.5, 2.0, 2.2, 2.3, 60.0, 0.0, 20.0, 10.0, 0.7, 0.0, 0.3], dtype=torch.float64)[:vocab]
    logits = probs.log()[None].expand(rows, -1)
    tokens = reference.interpolate_sample(logits, logits, 0.5, seed=321)
    return chi_square(torch.bincount(tokens, minlength=vocab), probs / probs.sum())


@pytest.mark.parametrize("columns", [1, 2, 4, 5, 10, 11, 12])
def test_a_draw_in_two_steps_has_the_same_law(monkeypatch, columns):
    """Blocks of a token, of some (a last one that is shorter), of all; false alarm 10⁻⁶ a case."""
    statistic, limit = in_two_steps(monkeypatch, columns)
    assert statistic < limit


def test_the_two_steps_need_noise_of_two_streams(monkeypatch):
    """The negative control, by more than ten times the limit: a block drawn by the noise of its own first tokens."""
    monkeypatch.setattr(reference, "BLOCK_STREAM", reference.NOISE_STREAM)
    statistic, limit = in_two_steps(monkeypatch, 4)
    assert statistic > 10 * limit


def test_a_block_is_drawn_by_the_whole_of_its_mass(monkeypatch):
    """The negative control, by more than ten times the limit: a block drawn by its likeliest token."""
    monkeypatch.setattr(torch.Tensor, "logsumexp", torch.Tensor.amax)
    statistic, limit = in_two_steps(monkeypatch, 4)
    assert statistic > 10 * limit


def test_the_two_steps_by_hand(monkeypatch):
    """A row's token from the definition, word for word."""
    monkeypatch.setattr(reference, "DRAW_COLUMNS", 3)
    row = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7, 1.1, -0.5], dtype=torch.float64)
    for seed in range(50):
        keys = torch.tensor([seed]), torch.tensor([0])
        of_block, of_token = (
            reference.gumbel(reference.draws(*keys, stream, 7)[0], torch.float64).tolist() for stream in (4, 0)
        )
        block = max(range(3), key=lambda s: math.log(sum(map(math.exp, row[3 * s : 3 * s + 3]))) + of_block[s])
        token = max(range(3 * block, min(3 * block + 3, 7)), key=lambda v: float(row[v]) + of_token[v])
        assert int(reference.interpolate_sample(row[None], row[None], 0.5, seed=seed)) == token


def test_batched_draws_are_the_same_as_alone(generator):
    base, memory = (torch.randn(5, 40, generator=generator) for _ in range(2))
    seeds, offsets = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2**40, 7, 8, -1])
    together = reference.interpolate_sample(base, memory, 0.5, seed=seeds, offset=offsets)
    for i in range(5):
        alone = reference.interpolate_sample(
            base[i : i + 1], memory[i : i + 1], 0.5, seed=int(seeds[i]), offset=int(offsets[i])
        )
        assert int(alone) == int(together[i])


def test_sampling_edges():
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[nan, 0.0], [-inf, -inf], [inf, 0.0], [-inf, 0.0]])
    for settings in ({}, {"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        tokens = reference.interpolate_sample(rows, rows, 0.5, seed=1, **settings)
        assert tokens.tolist() == [-1, -1, -1, 1], settings


def test_errors_name_the_argument():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"alpha: got 1.5, wanted 0 to 1"):
        reference.interpolate(logits, logits, 1.5)
    with pytest.raises(ValueError, match="alpha: got values from"):
        reference.interpolate(logits, logits, torch.tensor([0.5, -0.1]))
    with pytest.raises(ValueError, match=r"alpha: got shape \(3,\).*broadcasts to \(2,\)"):
        reference.interpolate(logits, logits, torch.zeros(3))
    with pytest.raises(ValueError, match=r"memory_logits: got shape \(2, 2\), wanted \(2, 3\).*slice padded"):
        reference.interpolate(logits, logits[:, :2], 0.5)
    with pytest.raises(TypeError, match=r"base_logits: got torch.int64"):
        reference.interpolate(logits.long(), logits, 0.5)
    with pytest.raises(ValueError, match="targets: got ids from 0 to 3, wanted 0 to 2"):
        reference.token_log_prob(logits, torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="seed: got str"):
        reference.interpolate_sample(logits, logits, 0.5, seed="7")
    with pytest.raises(ValueError, match="temperature: got 0, wanted a finite number above 0"):
        reference.interpolate_sample(logits, logits, 0.5, seed=7, temperature=0)
