"""verify_draft: what it lets through and adds has the mixture's law, by enumeration and by counting.

The law of a round is proved twice over a tree of small vocabularies, in which the logits of a position depend on the
tokens before it. A round ends after some tokens; continued by draws from the mixture to the full depth, each sequence
must have the mixture's probability. `reference.draft_law` gives the algorithm's probabilities, which are summed exactly
in float64; the kernel's rounds, with drafts drawn as its documentation says, are counted.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math

import pytest
import torch

from memdec import build_info, ops
from memdec.ops import reference

NAN, INF = math.nan, math.inf
ALPHAS = [0.0, 0.25, 0.5, 0.9, 1.0]
WARPERS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}
warpers = pytest.mark.parametrize("settings", WARPERS.values(), ids=WARPERS.keys())
VOCAB = {1: 9, 2: 6, 3: 4}  # of the tree, by γ
ON_HOST = build_info()["cuda"] == "host"
many_draws = pytest.mark.skipif(
    ON_HOST, reason="so many draws take minutes there, and the tests below compare its tokens with the reference's"
)


def some(texts, on_host=6):
    """How many texts: fewer where the CUDA kernels run on the CPU, which takes a thousand times as long."""
    return min(texts, on_host) if ON_HOST else texts


@functools.cache
def tree(gamma):
    """Logits (V^i, V) of both models after each beginning of i tokens, for i from 0 to γ; some are masked."""
    generator = torch.Generator().manual_seed(gamma)
    vocab = VOCAB[gamma]
    levels = []
    for i in range(gamma + 1):
        pair = []
        for _ in range(2):
            logits = 1.5 * torch.randn(vocab**i, vocab, generator=generator, dtype=torch.float64)
            logits[torch.rand(vocab**i, vocab, generator=generator) < 0.1] = -INF
            logits[:, 0] = logits[:, 0].clamp(min=-1)
            pair.append(logits)
        levels.append(tuple(pair))
    return levels


def target_law(gamma, alpha, settings):
    """p of each sequence of γ+1 tokens under the warped mixture, and of each token at each place of the tree."""
    whole, positions = torch.ones(1, dtype=torch.float64), []
    for base, memory in tree(gamma):
        probs = reference.warp(reference.interpolate(base, memory, alpha), **settings).softmax(-1)
        positions.append(probs)
        whole = (whole[:, None] * probs).reshape(-1)
    return whole, positions


def emitted_law(gamma, alpha, settings, *, bonus_from_base=False):
    """Probability of each sequence of γ+1 tokens: a round's, continued from the mixture."""
    vocab = VOCAB[gamma]
    _, target = target_law(gamma, alpha, settings)
    target = [place.tolist() for place in target]
    laws = [reference.draft_law(base[:, None], memory[:, None], alpha, **settings) for base, memory in tree(gamma)]
    drafts, accepts, rests = ([getattr(law, part)[:, 0] for law in laws] for part in ("draft", "accept", "rest"))
    falls = (drafts[gamma] * (1 - accepts[gamma])).sum(-1, keepdim=True)
    bonus = drafts[gamma] * accepts[gamma] + falls * rests[gamma]  # drafted and verified, as those before
    if bonus_from_base:
        bonus = torch.log_softmax(tree(gamma)[gamma][0], -1).exp()
    bonus = bonus.tolist()
    drafts, accepts, rests = ([level.tolist() for level in part] for part in (drafts, accepts, rests))
    emitted = []
    for sequence in itertools.product(range(vocab), repeat=gamma + 1):
        total, kept = 0.0, 1.0  # kept: the chance that all so far were drafted and stand
        places = [functools.reduce(lambda n, t: n * vocab + t, sequence[:i], 0) for i in range(gamma + 1)]
        for i, (at, token) in enumerate(zip(places[:gamma], sequence, strict=False)):
            draft, accept = drafts[i][at], accepts[i][at]
            falls = math.fsum(q * (1 - a) for q, a in zip(draft, accept, strict=True))
            after = math.prod(target[j][places[j]][sequence[j]] for j in range(i + 1, gamma + 1))
            total += kept * falls * rests[i][at][token] * after
            kept *= draft[token] * accept[token]
        emitted.append(total + kept * bonus[places[gamma]][sequence[gamma]])
    return torch.tensor(emitted, dtype=torch.float64)


@warpers
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_the_law_by_enumeration(gamma, alpha, settings):
    """Every sequence's probability, to 1e-12."""
    wanted, _ = target_law(gamma, alpha, settings)
    torch.testing.assert_close(emitted_law(gamma, alpha, settings), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [WARPERS["none"], WARPERS["top_p"]], ids=["none", "top_p"])
def test_enumeration_catches_a_bonus_from_the_base(settings):
    """The negative control: what the assistants of other libraries do."""
    wanted, _ = target_law(2, 0.5, settings)
    assert float((emitted_law(2, 0.5, settings, bonus_from_base=True) - wanted).abs().sum()) > 0.05


# ------------------------------------------------------------------------------------------------------------- counting


def chi_square(counts, probs, z=4.7534):
    """Pearson's statistic, and what it exceeds once in 10⁶ runs (Wilson–Hilferty); cells under 5 expected pooled."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert not counts[probs == 0].any(), "a sequence of probability 0 was drawn"
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(observed.numel() - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


def rounds(gamma, alpha, settings, texts, *, dtype=torch.float32, device="cpu", bonus_from_base=False):
    """Counts (V^(γ+1),) of the sequences that `texts` rounds end with, drafted as documented."""
    vocab = VOCAB[gamma]
    levels = [[x.to(device, dtype) for x in pair] for pair in tree(gamma)]
    seed = torch.arange(texts, device=device) * 7919 + 3
    at, drafts, base_rows, memory_rows = torch.zeros(texts, dtype=torch.int64, device=device), [], [], []
    for i, (base, memory) in enumerate(levels):
        base_rows.append(base[at])
        memory_rows.append(memory[at])
        if i < gamma:
            draft = ops.interpolate_sample(memory[at], memory[at], 1.0, seed=seed, offset=i + 100, **settings)
            drafts.append(draft)
            at = at * vocab + draft
    drafts = torch.stack(drafts, 1)
    base_rows, memory_rows = torch.stack(base_rows, 1), torch.stack(memory_rows, 1)
    verified = ops.verify_draft(base_rows, memory_rows, drafts, alpha, seed=seed, offset=100, **settings)
    n, token, drafts, base_rows = (x.cpu() for x in (*verified, drafts, base_rows))
    generator = torch.Generator().manual_seed(1)
    if bonus_from_base:
        other = torch.multinomial(base_rows[:, gamma].softmax(-1), 1, generator=generator)[:, 0]
        token = torch.where(n == gamma, other, token)
    _, target = target_law(gamma, alpha, settings)
    at = torch.zeros(texts, dtype=torch.int64)
    for i in range(gamma + 1):
        more = torch.multinomial(target[i][at], 1, generator=generator)[:, 0]
        drafted = drafts[:, min(i, gamma - 1)]
        at = at * vocab + torch.where(i < n, drafted, torch.where(i == n, token, more))
    return torch.bincount(at, minlength=vocab ** (gamma + 1))


@many_draws
@warpers
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_the_law_by_counting(device, gamma, alpha, settings):
    """χ² of 40,000 rounds against the mixture's law; false alarm 10⁻⁶ a case, 10⁻⁴ in all 90."""
    wanted, _ = target_law(gamma, alpha, settings)
    statistic, limit = chi_square(rounds(gamma, alpha, settings, 40_000, device=device), wanted)
    assert statistic < limit


def test_counting_catches_a_bonus_from_the_base():
    """The negative control, by more than ten times the limit."""
    wanted, _ = target_law(2, 0.5, {})
    statistic, limit = chi_square(rounds(2, 0.5, {}, 40_000, bonus_from_base=True), wanted)
    assert statistic > 10 * limit


@warpers
def test_a_text_does_not_depend_on_how_much_is_drafted_at_a_time(device, on_cuda, settings):
    """Three tokens by rounds of 2 and more drafts, and by rounds of none: the same, for 2,000 seeds.

    In float64 on the CPU. On CUDA a position has the same bits whatever stands beside it, so float32 will do.
    """
    texts, vocab = some(2000, on_host=8), VOCAB[2]
    dtype = torch.float32 if on_cuda else torch.float64
    table = [torch.cat(rows).to(device, dtype) for rows in zip(*tree(2), strict=True)]  # of both models, all levels
    sizes = torch.tensor([len(base) for base, _ in tree(2)], device=device)
    starts = sizes.cumsum(0) - sizes
    seed = torch.arange(texts, device=device) * 31
    made = []
    for drafted in (0, 1, 2):
        at, made_here = (torch.zeros(texts, dtype=torch.int64, device=device) for _ in range(2))
        while int(made_here.min()) < 3:
            lengths = (2 - made_here).clamp(0, drafted)
            place, drafts, base_rows, memory_rows = at, [], [], []
            for i in range(drafted + 1):
                level = (made_here + i).clamp(max=2)
                rows = [logits[starts[level] + place % sizes[level]] for logits in table]
                base_rows.append(rows[0])
                memory_rows.append(rows[1])
                if i < drafted:
                    offset = made_here + i
                    drafts.append(ops.interpolate_sample(rows[1], rows[1], 1.0, seed=seed, offset=offset, **settings))
                    place = place * vocab + drafts[-1]
            none = torch.zeros(texts, 0, dtype=torch.int64, device=device)
            drafts = torch.stack(drafts, 1) if drafts else none
            n, token = ops.verify_draft(
                torch.stack(base_rows, 1),
                torch.stack(memory_rows, 1),
                drafts,
                0.5,
                draft_lengths=lengths,
                seed=seed,
                offset=made_here,
                **settings,
            )
            open_rows = made_here < 3
            for i in range(drafted):
                at = torch.where(open_rows & (i < n), at * vocab + drafts[:, i], at)
            at = torch.where(open_rows, at * vocab + token, at)
            made_here = torch.where(open_rows, made_here + n + 1, made_here)
        made.append(at)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@many_draws
def test_acceptance_is_what_the_formula_says(device):
    """a = α + (1−α)·Σ min(p_mem, p_base), over 100,000 texts; 6 standard deviations, a false alarm in 5·10⁸ runs."""
    texts, alpha = 100_000, 0.4
    base, memory = (1.5 * torch.randn(2, 30, generator=torch.Generator().manual_seed(3))).to(device).unbind()
    seed = torch.arange(texts, device=device)
    expand = lambda x: x.expand(texts, 2, -1)  # noqa: E731
    draft = ops.interpolate_sample(expand(memory)[:, 0], expand(memory)[:, 0], 1.0, seed=seed)[:, None]
    n = ops.verify_draft(expand(base), expand(memory), draft, alpha, seed=seed).num_accepted
    overlap = torch.minimum(base.softmax(0), memory.softmax(0)).sum()
    a = float(alpha + (1 - alpha) * overlap)
    assert abs(float(n.double().mean()) - a) < 6 * math.sqrt(a * (1 - a) / texts)


# ----------------------------------------------------------------------------------------------- the reference's tokens


def case(texts, gamma, vocab, dtype, seed=0, device="cpu"):
    """Logits, and drafts drawn from the memory."""
    generator = torch.Generator().manual_seed(seed)
    base, memory = (
        (3 * torch.randn(texts, gamma + 1, vocab, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    memory = (0.5 * base.double() + 0.8 * memory.double()).to(dtype)
    probs = memory[:, :-1].double().softmax(-1).reshape(-1, vocab)
    drafts = torch.multinomial(probs, 1, generator=generator).reshape(texts, gamma)
    return base.to(device), memory.to(device), drafts.to(device)


def truth(base, memory, drafts, alpha, **settings):
    """The reference in float64. On the CPU: it takes one position after the other, and would wait for a GPU at each."""
    here = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    alpha = alpha.cpu() if isinstance(alpha, torch.Tensor) else alpha
    verified = reference.verify_draft(base.double().cpu(), memory.double().cpu(), drafts.cpu(), alpha, **here)
    return reference.VerifiedDraft(*(x.to(base.device) for x in verified))


@warpers
@pytest.mark.parametrize(("texts", "gamma", "vocab"), [(40, 3, 7), (12, 2, 5000), (2, 4, 50257), (5, 0, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_s_tokens(simd, device, dtype, texts, gamma, vocab, settings):
    """As the reference in float64, but for scores within rounding of each other: one text may differ."""
    torch.manual_seed(5)
    texts = some(texts)
    base, memory, drafts = case(texts, gamma, vocab, dtype, device=device)
    for alpha in (0.0, 0.4, torch.rand(texts, gamma + 1).double().to(device), 1.0):
        arguments = {"seed": 2**63 + 11, "offset": torch.arange(texts, device=device) * 2**33, **settings}
        wanted = truth(base, memory, drafts, alpha, **arguments)
        got = ops.verify_draft(base, memory, drafts, alpha, **arguments)
        different = (got.num_accepted != wanted.num_accepted) | (got.next_token != wanted.next_token)
        assert int(different.sum()) <= (0 if dtype == torch.float64 else 1)


@warpers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_token_after_the_drafts_is_drawn_as_a_draft_is(simd, device, dtype, settings):
    """At α = 1 it always stands, and is interpolate_sample's, from three blocks of very unequal masses."""
    texts = some(60, on_host=12)
    base, memory, _ = case(texts, 0, 3 * reference.DRAW_COLUMNS - 1, dtype, device=device)
    memory[..., : reference.DRAW_COLUMNS] -= 4
    none = torch.zeros(texts, 0, dtype=torch.int64, device=device)
    drawing = {"seed": 7, "offset": torch.arange(texts, device=device), **settings}
    token = ops.verify_draft(base, memory, none, 1.0, **drawing).next_token
    assert torch.equal(token, ops.interpolate_sample(memory[:, 0], memory[:, 0], 1.0, **drawing))
    assert (token // reference.DRAW_COLUMNS).unique().numel() > 1


@warpers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_at_every_border(simd, device, dtype, settings):
    """Whole logits, some 8 values: k-th scores, nucleus borders and minima of both models fall on ties.

    At α = 0 the mixture is the base, with ties as exact in float32 as in the reference's float64.
    """
    texts = some(60, on_host=24)
    base, memory = ((x / 2).round().to(dtype) for x in case(texts, 1, 150, torch.float64, device=device, seed=2)[:2])
    drafts = ops.interpolate_sample(memory[:, 0], memory[:, 0], 1.0, seed=9, **settings)[:, None]
    wanted = truth(base, memory, drafts, 0.0, seed=9, **settings)
    got = ops.verify_draft(base, memory, drafts, 0.0, seed=9, **settings)
    different = (got.num_accepted != wanted.num_accepted) | (got.next_token != wanted.next_token)
    assert int(different.sum()) <= (0 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_greedy(simd, device, dtype):
    """Drafts stand as far as they are the mixture's likeliest tokens, and so is what follows."""
    base, memory, drafts = case(40, 4, 300, dtype, device=device)
    alpha = torch.rand(40, 5, device=device)
    likeliest = ops.interpolate_argmax(base, memory, alpha)
    for text in range(40):
        drafts[text, : text % 5] = likeliest[text, : text % 5]
    got = ops.verify_draft(base, memory, drafts, alpha, greedy=True, seed=0)
    wanted = (drafts == likeliest[:, :-1]).long().cumprod(1).sum(1)
    assert torch.equal(got.num_accepted, wanted)
    assert torch.equal(got.next_token, likeliest.gather(1, wanted[:, None])[:, 0])
    expected = truth(base, memory, drafts, alpha, greedy=True, seed=0)
    assert torch.equal(expected.num_accepted, got.num_accepted) and torch.equal(expected.next_token, got.next_token)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"top_p": 0.9}, {"greedy": True}])
def test_a_text_in_a_batch_as_alone_on_any_number_of_threads(device, on_cuda, settings):
    """Per-text lengths, seeds and offsets; what lies behind a length is not looked at, whatever it is."""
    torch.manual_seed(2)
    base, memory, drafts = case(9, 4, 20000, torch.float32, device=device)
    lengths = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1], device=device)
    behind = torch.arange(5, device=device)[None] > lengths[:, None]
    drafts[behind[:, 1:]] = -7
    base[behind], memory[behind] = NAN, NAN
    seeds = torch.randint(-(2**63), 2**63 - 1, (9,), device=device)
    offsets = torch.randint(-(2**63), 2**63 - 9, (9,), device=device)
    results = []
    for threads in (2,) if on_cuda else (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(
            ops.verify_draft(base, memory, drafts, 0.6, draft_lengths=lengths, seed=seeds, offset=offsets, **settings)
        )
    torch.set_num_threads(2)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    for i in range(9):
        n = int(lengths[i])
        alone = ops.verify_draft(
            base[i : i + 1, : n + 1],
            memory[i : i + 1, : n + 1],
            drafts[i : i + 1, :n],
            0.6,
            seed=int(seeds[i]),
            offset=int(offsets[i]),
            **settings,
        )
        assert (int(alone.num_accepted), int(alone.next_token)) == tuple(int(x[i]) for x in results[0])


# ------------------------------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"min_p": 0.01}, {"greedy": True}])
@pytest.mark.parametrize("fill", [NAN, INF, -INF])
def test_broken_rows(simd, device, fill, settings):
    """A row that cannot be drawn from ends the round with −1 where it is in use; at α of 0 or 1 the other may be so."""
    base, memory, drafts = case(some(64, on_host=12), 2, 5000, torch.float32, device=device)
    for alpha in (0.0, 0.5, 1.0):
        for broken, unused in (("base", 1.0), ("memory", 0.0)):
            rows = {"base": base.clone(), "memory": memory.clone()}
            if fill == -INF:
                rows[broken][:, 1] = fill
            else:
                rows[broken][:, 1, 4500] = fill
            n, token = ops.verify_draft(rows["base"], rows["memory"], drafts, alpha, seed=1, **settings)
            wanted = truth(rows["base"], rows["memory"], drafts, alpha, seed=1, **settings)
            assert int((n != wanted.num_accepted).sum() + (token != wanted.next_token).sum()) <= 1
            if alpha == unused:
                assert (token >= 0).all()
            elif not settings and alpha > 0:
                assert (n[token < 0] == 1).all()
            else:
                assert ((token == -1) == (n == 1)).all()


def test_equal_models_accept_everything(simd, device):
    """No mass in the residual: α does not matter, every draft stands (to rounding: float32's ratio is exactly 1)."""
    logits, _, drafts = case(some(200), 3, 700, torch.float32, device=device)
    for settings in ({}, {"temperature": 0.7}, {"top_k": 9}):
        drafts = torch.stack(
            [ops.interpolate_sample(logits[:, i], logits[:, i], 1.0, seed=4, offset=i, **settings) for i in range(3)], 1
        )
        n, token = ops.verify_draft(logits, logits, drafts, 0.3, seed=4, **settings)
        # The mixture of two equal rows is their softmax but for an ulp, which may cost one draft in 10⁶.
        assert int((n < 3).sum()) <= 1 and (token >= 0).all()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.01}])
def test_a_residual_without_mass(simd, device, settings):
    """Equal models and a draft that neither can give, which falls: then the token is drawn from the mixture.

    V = 20000 is three spans, and the draft of the second position falls.
    """
    base, _, drafts = case(some(12), 2, 20000, torch.float32, device=device)
    base[:, 1, 5] = -INF
    drafts[:, 0] = ops.interpolate_sample(base[:, 0], base[:, 0], 1.0, seed=6, **settings)
    drafts[:, 1] = 5
    wanted = truth(base, base, drafts, 0.3, seed=6, **settings)
    got = ops.verify_draft(base, base, drafts, 0.3, seed=6, **settings)
    assert int((got.num_accepted != wanted.num_accepted).sum() + (got.next_token != wanted.next_token).sum()) <= 1
    if settings:
        assert int((got.num_accepted == 1).sum()) >= len(drafts) - 1
    assert (got.next_token != 5).all() and got.next_token.unique().numel() > 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"min_p": 1e-6}])
@pytest.mark.parametrize("first", ["base", "memory"])
def test_a_residual_in_one_part_of_the_vocabulary(simd, device, first, settings):
    """One model has the first 8192 tokens (a span), the other the last 40: what falls is replaced from the base."""
    texts = some(100, on_host=24)
    low, high, _ = case(texts, 1, 8232, torch.float32, device=device)
    low[..., 8192:], high[..., :8192] = -INF, -INF
    base, memory = (low, high) if first == "base" else (high, low)
    drafts = ops.interpolate_sample(memory[:, 0], memory[:, 0], 1.0, seed=6, **settings)[:, None]
    wanted = truth(base, memory, drafts, 0.5, seed=6, **settings)
    got = ops.verify_draft(base, memory, drafts, 0.5, seed=6, **settings)
    assert int((got.num_accepted != wanted.num_accepted).sum() + (got.next_token != wanted.next_token).sum()) <= 1
    falls = got.num_accepted == 0
    assert falls.any() and ((got.next_token[falls] < 8192) == (first == "base")).all()


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.6, 0.7])
def test_a_nucleus_that_ends_among_equals(simd, device, top_p):
    """Of nine equal tokens top_p drops the first so many, odd or even; the draft, token 0, falls and is replaced."""
    texts = some(60, on_host=20)
    base = torch.zeros(texts, 2, 9, device=device)
    memory, drafts = base.clone(), torch.zeros(texts, 1, dtype=torch.int64, device=device)
    memory[..., 0] = 5
    n, token = ops.verify_draft(base, memory, drafts, 0.0, seed=7, top_p=top_p)
    wanted = truth(base, memory, drafts, 0.0, seed=7, top_p=top_p)
    assert (n == 0).all() and torch.equal(token, wanted.next_token)
    assert int(token.min()) == math.floor((1 - top_p) * 9 + 1e-9)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_hard_borders(device, hard_rows, temperature):
    """Rows with many candidates and with few side by side, each model's its own; at α of 0 and 1 as exact as the rows.

    Drafts are drawn as documented, but for a row with a NaN, which ends its round.
    """
    rows = hard_rows(4097).to(device)
    base, memory = rows.reshape(3, 3, -1), rows.roll(4, 0).reshape(3, 3, -1)
    alpha = torch.tensor([0.0, 1.0, 0.0], device=device).expand(3, 3)
    for cuts in ({"top_p": 0.35}, {"top_p": 1 - 1e-7}, {"top_k": 2049}, {"top_k": 4000, "top_p": 0.6}, {"min_p": 0.3}):
        settings = {"temperature": temperature, **cuts}
        draw = functools.partial(ops.interpolate_sample, alpha=1.0, seed=3, **settings)
        drafts = torch.stack([draw(memory[:, i], memory[:, i], offset=i) for i in range(2)], 1).clamp(min=0)
        wanted = truth(base, memory, drafts, alpha, seed=3, **settings)
        got = ops.verify_draft(base, memory, drafts, alpha, seed=3, **settings)
        different = (got.num_accepted != wanted.num_accepted) | (got.next_token != wanted.next_token)
        assert int(different.sum()) <= 1, cuts


def test_what_the_host_cannot_check_on_cuda(device, on_cuda):
    """A draft, a length or an α out of range ends its text's round there, with −1; others have their tokens."""
    if not on_cuda:
        pytest.skip("the CPU raises: see test_arguments_that_cannot_be")
    base, memory, drafts = case(7, 2, 9000, torch.float32, device=device)
    memory = base.clone()  # every draft stands
    lengths = torch.tensor([2, 2, 2, 2, -1, 3, 1], device=device)
    alpha = torch.full((7, 3), 0.5, device=device)
    drafts[0, 1], drafts[1, 0], drafts[6, 1] = 9000, -1, 2**62
    alpha[2, 2], alpha[3, 0] = 1.5, NAN
    for settings in ({}, {"temperature": 0.8}, {"min_p": 1e-9}, {"greedy": True}):
        if settings == {"greedy": True}:
            likeliest = base[:, :-1].argmax(-1)
            drafts = torch.where((drafts >= 0) & (drafts < 9000), likeliest, drafts)
        n, token = ops.verify_draft(base, memory, drafts, alpha, draft_lengths=lengths, seed=3, **settings)
        assert n.tolist() == [1, 0, 2, 0, 0, 0, 1]
        assert (token == -1).tolist() == [True] * 6 + [False] and 0 <= int(token[6]) < 9000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_coin_below_alpha_stands_whatever_the_base_says(simd, device, dtype):
    """What is final before the base has run: with a base of NaN a round goes as far as its coins are below α.

    Also where α is a coin, which does not stand, and the next number up, for which it does.
    """
    texts, gamma = some(400, on_host=40), 5
    _, memory, drafts = case(texts, gamma, 300, dtype, device=device)
    seeds, offsets = (torch.randint(-(2**62), 2**62, (texts,)) for _ in range(2))
    coins = reference.acceptance_coins(seeds, offsets, gamma + 1)
    one = float(coins[0, 2])
    for alpha in (0.3, 0.5, 0.8, 1.0, one, math.nextafter(one, 1)):
        leading = (coins[:, :gamma] < alpha).long().cumprod(1).sum(1)
        broken = torch.full_like(memory, NAN)
        got = ops.verify_draft(
            broken, memory, drafts, alpha, seed=seeds.to(device), offset=offsets.to(device), greedy=False
        )
        assert torch.equal(got.num_accepted.cpu(), leading)
        whole = (coins < alpha).all(1)
        assert torch.equal(got.next_token.cpu() >= 0, whole)
        wanted = truth(broken, memory, drafts, alpha, seed=seeds, offset=offsets)
        assert torch.equal(got.num_accepted, wanted.num_accepted)


def test_a_common_offset_changes_nothing(simd, device):
    """Logits in steps of 2⁻⁹ are exact at 1e4 ± 16 in float32, so the results must agree bit for bit."""
    base, memory, drafts = case(some(30), 3, 5000, torch.float32, device=device)
    base, memory = ((x * 512).round() / 512 for x in (base, memory))
    for settings in ({}, {"temperature": 0.8}, {"top_k": 40}, {"greedy": True}):
        plain = ops.verify_draft(base, memory, drafts, 0.4, seed=1, **settings)
        moved = ops.verify_draft(base + 1e4, memory - 1e4, drafts, 0.4, seed=1, **settings)
        assert all(torch.equal(x, y) for x, y in zip(plain, moved, strict=True))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"top_k": 40}, {"greedy": True}])
def test_any_layout(device, settings):
    """Slices of padded vocabularies and of longer windows, each model's its own: as from a contiguous copy."""
    base, memory, drafts = case(6, 5, 1200, torch.bfloat16, device=device)
    cuts = (lambda x: x[..., 1:1101], lambda x: x[:, 1:], lambda x: x[::2, ::2], lambda x: x[:1].expand(4, -1, -1))
    for cut in cuts:
        b, m = cut(base), cut(memory)
        d = drafts[: b.shape[0], : b.shape[1] - 1].clamp(max=1000).t().contiguous().t()
        wanted = ops.verify_draft(b.contiguous(), m.contiguous(), d.contiguous(), 0.4, seed=1, **settings)
        for rows in ((b, m), (b.contiguous(), m)):
            got = ops.verify_draft(*rows, d, 0.4, seed=1, **settings)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_nothing_to_do_and_one_token(device):
    empty, no_drafts = torch.zeros(0, 3, 7, device=device), torch.zeros(0, 2, dtype=torch.int64, device=device)
    one, zeros = torch.zeros(2, 3, 1, device=device), torch.zeros(2, 2, dtype=torch.int64, device=device)
    for settings in ({}, {"temperature": 0.8}, {"top_p": 0.9}, {"greedy": True}):
        n, token = ops.verify_draft(empty, empty, no_drafts, 0.5, seed=1, **settings)
        assert n.shape == token.shape == (0,)
        n, token = ops.verify_draft(one, one, zeros, 0.5, seed=1, **settings)
        assert n.tolist() == [2, 2] and token.tolist() == [0, 0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"top_k": 2}, {"greedy": True}])
def test_more_positions_than_are_at_work_at_once(device, settings):
    """The CUDA kernels keep the scores of 128 positions: 43 texts have 129, and one of 67 more than it has warps."""
    base, memory, drafts = case(some(45, on_host=43), 2, 9, torch.float32, device=device)
    long = [x.reshape(1, -1, 9)[:, :67] for x in (base, memory)]
    for b, m, d in ((base, memory, drafts), (*long, long[1][:, :-1].argmax(-1))):
        wanted = truth(b, m, d, 0.6, seed=8, **settings)
        got = ops.verify_draft(b, m, d, 0.6, seed=8, **settings)
        assert int((got.num_accepted != wanted.num_accepted).sum() + (got.next_token != wanted.next_token).sum()) <= 1


@pytest.mark.parametrize("as_tensors", [False, True])
def test_registered(device, as_tensors):
    """opcheck, and torch.compile gives what the direct call gives."""
    base, memory, drafts = case(3, 2, 50, torch.float32, device=device)
    alphas = torch.rand(3, 3, device=device) if as_tensors else None
    lengths = torch.tensor([2, 1, 0], device=device) if as_tensors else None
    seeds = torch.arange(3, device=device) if as_tensors else None
    arguments = (base, memory, drafts, 0.4, alphas, lengths, False, 0.9, 5, 1.0, 0.0, 3, seeds, 7, seeds)
    torch.library.opcheck(torch.ops.memdec.verify_draft.default, arguments)

    def call(b, m):
        return ops.verify_draft(b, m, drafts, 0.4, seed=3, top_k=5)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(base, memory)
    assert all(torch.equal(x, y) for x, y in zip(call(base, memory), compiled, strict=True))


def test_arguments_that_cannot_be():
    base, memory, drafts = case(2, 3, 5, torch.float32)
    good = {"base_logits": base, "memory_logits": memory, "draft_ids": drafts, "alpha": 0.4, "seed": 1}
    for change, error, message in (
        ({"base_logits": base[0]}, ValueError, r"memory_logits: got shape \(2, 4, 5\), wanted \(4, 5\)"),
        (
            {"base_logits": base[0], "memory_logits": memory[0]},
            ValueError,
            r"base_logits: got shape \(4, 5\), wanted \(B, γ\+1, V\)",
        ),
        ({"draft_ids": drafts[:, :2]}, ValueError, r"draft_ids: got shape \(2, 2\), wanted \(2, 3\)"),
        ({"draft_ids": drafts.float()}, TypeError, r"draft_ids: got torch\.float32"),
        ({"draft_ids": drafts * 0 + 5}, ValueError, "draft_ids holds 5 at position 0, wanted an index from 0 to 4"),
        ({"draft_ids": drafts * 0 - 1}, ValueError, "draft_ids holds -1 at position 0"),
        ({"draft_lengths": torch.tensor([3, 4])}, ValueError, "draft_lengths holds 4 at position 1, wanted"),
        ({"draft_lengths": torch.tensor([3])}, ValueError, r"draft_lengths: got shape \(1,\), wanted \(2,\)"),
        ({"alpha": 1.5}, ValueError, "alpha: got 1.5, wanted 0 to 1"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"top_k": -1}, ValueError, "top_k: got -1"),
        ({"top_p": 2.0}, ValueError, "top_p: got 2.0"),
        ({"seed": torch.zeros(3).long()}, ValueError, r"seed: got shape \(3,\), wanted \(2,\)"),
        ({"offset": 0.5}, TypeError, "offset: got float"),
    ):
        with pytest.raises(error, match=message):
            ops.verify_draft(**{**good, **change})


def test_debug_checks_values_as_the_cpu_does():
    """What MEMDEC_DEBUG=1 adds on CUDA has the CPU kernel's verdict and words, on tensors of any device."""
    base, memory, drafts = case(3, 3, 5, torch.float32)
    check = importlib.import_module("memdec.ops.verify_draft")._check_values
    lengths = torch.tensor([0, 2, 3])
    behind = drafts.masked_fill(torch.arange(3) >= lengths[:, None], -9)
    check(drafts, None, 5)
    check(behind, lengths, 5)
    for ids, given in ((drafts * 0 + 5, None), (behind, None), (drafts, lengths + 1), (drafts, lengths - 1)):
        with pytest.raises(ValueError) as on_cpu:
            ops.verify_draft(base, memory, ids, 0.4, draft_lengths=given, seed=1)
        with pytest.raises(ValueError) as checked:
            check(ids, given, 5)
        assert str(on_cpu.value) == f"verify_draft: {checked.value}"


def test_drafts_whose_memory_was_freed_are_refused():
    base, memory, drafts = case(2, 2, 9, torch.float32)
    for name in ("draft_ids", "draft_lengths"):
        freed = {"draft_ids": drafts.clone(), "draft_lengths": torch.tensor([1, 2])}[name]
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name}: the tensor's memory was freed"):
            ops.verify_draft(base, memory, alpha=0.5, seed=0, **({"draft_ids": drafts} | {name: freed}))
