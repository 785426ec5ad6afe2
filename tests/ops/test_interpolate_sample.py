"""interpolate_sample: the reference's tokens for the reference's seeds, and the right frequencies.

The reference itself is held against Philox's published vectors and transformers' warpers in test_reference; what the
whole family owes is in test_mixture.
"""

from __future__ import annotations

import math

import pytest
import torch

from memdec import build_info, ops
from memdec.ops import reference

WARPERS = {
    "coin": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 50},
    "large top_k": {"top_k": 3000},
    "top_k beyond V": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "top_p of 0": {"top_p": 0.0},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    "all but top_k": {"temperature": 1.3, "top_p": 0.95, "min_p": 0.001},
}
warpers = pytest.mark.parametrize("settings", WARPERS.values(), ids=WARPERS.keys())


def pair(rows, vocab, dtype, seed=0, scale=3.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(device, dtype) for _ in range(2)
    )


@warpers
@pytest.mark.parametrize(("rows", "vocab"), [(40, 7), (20, 4097), (3, 50257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_s_tokens(simd, device, dtype, rows, vocab, settings):
    """The same token as the reference in float64, but for scores within rounding of each other (float64: never).

    A float32 score errs by some 1e-6, and two best scores are closer than 1e-5 in one row of 10⁵: one row may differ.
    """
    base, memory = pair(rows, vocab, dtype, device=device)
    arguments = {"seed": 2**63 + 11, "offset": torch.arange(rows, device=device) * 2**33, **settings}
    wanted = reference.interpolate_sample(base.double(), memory.double(), 0.4, **arguments)
    got = ops.interpolate_sample(base, memory, 0.4, **arguments)
    assert int((got != wanted).sum()) <= (0 if dtype == torch.float64 else 1)


BLOCK = reference.DRAW_COLUMNS
HEAVY = [0.0, -2.5, 1.0, -math.inf, -7.0]  # added to all logits of a block of the vocabulary
in_two_steps = pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}], ids=["coin", "temperature"])


def pair_of_unequal_blocks(rows, vocab, dtype, device="cpu"):
    """Logits whose blocks have very unequal masses, each fourth of five none at all."""
    heavy = torch.tensor(HEAVY)[torch.arange(vocab) // BLOCK % len(HEAVY)]
    return tuple((x + heavy).to(device, dtype) for x in pair(rows, vocab, torch.float64, seed=vocab, scale=2.0))


@in_two_steps
@pytest.mark.parametrize("vocab", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 5 * BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_s_tokens_across_blocks(simd, device, dtype, vocab, settings):
    """Blocks that end with the vocabulary, before it and behind it; of the float32 tokens one may differ, as above."""
    base, memory = pair_of_unequal_blocks(24, vocab, dtype, device)
    arguments = {"seed": 17, "offset": torch.arange(24, device=device), **settings}
    wanted = reference.interpolate_sample(base.double(), memory.double(), 0.4, **arguments)
    got = ops.interpolate_sample(base, memory, 0.4, **arguments)
    assert int((got != wanted).sum()) <= (0 if dtype == torch.float64 else 1)
    blocks = (got // BLOCK).unique().tolist()
    assert 3 not in blocks and (vocab < 2 * BLOCK or len(blocks) > 1)


@in_two_steps
def test_more_blocks_than_lanes(device, settings):
    """90 blocks: on CUDA a lane of a warp has two or three. Two rows each for a part of them, and for all."""
    parts = torch.tensor([0, 32, 64, 0], device=device), torch.tensor([32, 64, 90, 90], device=device)
    first, last = (part.repeat(2)[:, None] for part in parts)
    vocab = 90 * BLOCK - 7
    base, memory = pair(8, vocab, torch.bfloat16, device=device)
    block = torch.arange(vocab, device=device) // BLOCK
    base, memory = (x.masked_fill((block < first) | (block >= last), -math.inf) for x in (base, memory))
    wanted = reference.interpolate_sample(base.double(), memory.double(), 0.4, seed=3, **settings)
    got = ops.interpolate_sample(base, memory, 0.4, seed=3, **settings)
    assert int((got != wanted).sum()) <= 1
    assert ((got // BLOCK >= first[:, 0]) & (got // BLOCK < last[:, 0])).all()


@in_two_steps
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_a_block_that_is_not_drawn_breaks_its_row(simd, device, fill, settings):
    """A NaN or a +inf in the last block, of e⁻⁵⁰ of the mass; and rows of nothing but −inf, with a block or without."""
    logits = pair(4, 2 * BLOCK + 1, torch.float32, device=device)[0]
    logits[:, -1] = -50
    logits[1, -1], logits[2], logits[3, :-1] = fill, -math.inf, -math.inf
    tokens = ops.interpolate_sample(logits, logits, 0.5, seed=1, **settings)
    assert 0 <= int(tokens[0]) < 2 * BLOCK and tokens[1:].tolist() == [-1, -1, 2 * BLOCK]


@warpers
def test_ties_at_every_border(simd, device, settings):
    """Whole logits, some 6 values: k-th scores, nucleus borders and minima all fall on ties, as in the reference."""
    base, memory = (x.round() for x in pair(32, 200, torch.float64, scale=1.0, device=device))
    settings = {**settings, "top_k": min(settings.get("top_k", 0), 30)}
    for dtype in (torch.float32,) if device == "cuda" else (torch.float64, torch.float32):
        wanted = reference.interpolate_sample(base, base if dtype == torch.float32 else memory, 0.4, seed=9, **settings)
        got = ops.interpolate_sample(
            base.to(dtype), (base if dtype == torch.float32 else memory).to(dtype), 0.4, seed=9, **settings
        )
        assert int((got != wanted).sum()) <= (0 if dtype == torch.float64 else 1)


many_draws = pytest.mark.skipif(
    build_info()["cuda"] == "host",
    reason="so many draws take minutes there, and the tests above compare its tokens with the reference's",
)


def chi_square(counts, probs):
    """Pearson's statistic, and what it exceeds once in 10⁶ runs (Wilson–Hilferty); tokens under 5 expected pooled."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert not observed[expected == 0].any(), "a token of probability 0 was drawn"
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(observed.numel() - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


@many_draws
@warpers
@pytest.mark.parametrize("varied", ["row", "seed", "offset"])
def test_frequencies(device, settings, varied):
    """χ² of 100,000 draws from one pair of rows against the warped mixture; false alarm 10⁻⁶ a case, 3·10⁻⁵ in all.

    The draws differ by the row index that an int seed mixes in, by the seed, or by the offset alone.
    """
    rows, vocab, alpha = 100_000, 50, 0.35
    base, memory = pair(1, vocab, torch.float32, scale=1.5, device=device)
    settings = {**settings, "top_k": min(settings.get("top_k", 0), 12)}
    log_p = reference.interpolate(base.double(), memory.double(), alpha)
    probs = reference.warp(log_p, **settings).softmax(-1)[0]
    count = torch.arange(rows, device=device)
    same = torch.full_like(count, 5)
    streams = {"row": {"seed": 1}, "seed": {"seed": count}, "offset": {"seed": same, "offset": count}}
    tokens = ops.interpolate_sample(
        base.expand(rows, -1), memory.expand(rows, -1), alpha, **streams[varied], **settings
    )
    statistic, limit = chi_square(torch.bincount(tokens, minlength=vocab), probs)
    assert statistic < limit


@many_draws
@in_two_steps
def test_frequencies_across_blocks(device, settings):
    """χ² of 60,000 draws over cells of tokens in each of the blocks; false alarm 10⁻⁶ a case.

    A block's cells are its first and its last token, which have a share of its mass to be seen, and four of its others:
    of the first block's draws the noise of its first tokens, and that of blocks, comes from draws of one number.
    """
    rows, vocab, alpha = 60_000, 4 * BLOCK + 3, 0.35
    base, memory = pair_of_unequal_blocks(1, vocab, torch.float32, device)
    token = torch.arange(vocab, device=device)
    is_first, is_last = token % BLOCK == 0, (token % BLOCK == BLOCK - 1) | (token == vocab - 1)
    for logits in (base, memory):
        logits[:, is_first | is_last] += math.log(BLOCK / 2)
    cell = token // BLOCK * 6 + torch.where(is_first, 4, torch.where(is_last, 5, token % 4))
    log_p = reference.interpolate(base.double(), memory.double(), alpha)
    probs = reference.warp(log_p, **settings).softmax(-1)[0]
    tokens = ops.interpolate_sample(base.expand(rows, -1), memory.expand(rows, -1), alpha, seed=1, **settings)
    cells = torch.zeros(30, dtype=torch.float64, device=device).index_add_(0, cell, probs)
    statistic, limit = chi_square(torch.bincount(cell[tokens], minlength=30), cells)
    assert statistic < limit


@many_draws
def test_coin_and_noise_are_independent(device):
    """χ² over (component, token) pairs: disjoint halves of the vocabulary tell which component was drawn from."""
    rows = 100_000
    base, memory = torch.full((2, 1, 8), -math.inf, device=device)
    base[0, :4] = torch.tensor([0.0, 1.0, 0.5, -1.0])
    memory[0, 4:] = torch.tensor([1.0, 0.0, 0.3, 0.2])
    probs = torch.cat([0.7 * base[0, :4].softmax(0), 0.3 * memory[0, 4:].softmax(0)])
    tokens = ops.interpolate_sample(base.expand(rows, -1), memory.expand(rows, -1), 0.3, seed=8)
    statistic, limit = chi_square(torch.bincount(tokens, minlength=8), probs)
    assert statistic < limit


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """The tail: a token of probability 2⁻²⁰ in a million rows: a Poisson count of mean 0.95, above 12 once in 10⁹ runs.

    And 4,000 tokens that hold 1% together: mean 1,000, beyond 6 standard deviations once in 5·10⁸ runs.
    """
    rows = 1_000_000
    one = torch.tensor([[20 * math.log(2), 0.0]])
    drawn = int(ops.interpolate_sample(one.expand(rows, -1), one.expand(rows, -1), 0.5, seed=4).sum())
    assert drawn <= 12
    rows = 100_000
    many = torch.zeros(1, 4001)
    many[0, 0] = math.log(4000 * 99)
    drawn = int((ops.interpolate_sample(many.expand(rows, -1), many.expand(rows, -1), 0.5, seed=4) > 0).sum())
    assert abs(drawn - rows / 100) < 6 * math.sqrt(rows / 100)


@warpers
def test_a_row_draws_in_a_batch_as_alone(device, settings):
    base, memory = pair(9, 20000, torch.float32, device=device)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, 9), device=device)
    batch = ops.interpolate_sample(base, memory, 0.4, seed=seeds, offset=offsets, **settings)
    for i in range(9):
        row = slice(i, i + 1)
        alone = ops.interpolate_sample(
            base[row], memory[row], 0.4, seed=int(seeds[i]), offset=int(offsets[i]), **settings
        )
        assert int(alone) == int(batch[i])


def test_scalar_tensors_are_numbers_and_64_bits_count(device):
    base, memory = (x.expand(30, -1) for x in pair(1, 500, torch.float32, device=device))
    draw = lambda seed, offset=0: ops.interpolate_sample(base, memory, 0.4, seed=seed, offset=offset)  # noqa: E731
    assert torch.equal(draw(7, 3), draw(torch.tensor(7, device=device), torch.tensor(3, device=device)))
    assert torch.equal(draw(2**64 - 1), draw(-1))
    assert draw(7).unique().numel() > 5  # one row after the other draws anew
    for other in (draw(8), draw(7 + 2**32), draw(7, 1), draw(7, 2**32)):
        assert not torch.equal(draw(7), other)


def test_arguments_that_cannot_be():
    base, memory = pair(2, 5, torch.float32)
    for settings, error, message in (
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, wanted a finite number above 0"),
        ({"temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"top_k": -1}, ValueError, "top_k: got -1, wanted at least 0"),
        ({"top_k": 2.0}, TypeError, "top_k: got float, wanted an int"),
        ({"top_p": 1.5}, ValueError, "top_p: got 1.5, wanted 0 to 1"),
        ({"min_p": -0.1}, ValueError, "min_p: got -0.1, wanted 0 to 1"),
        ({"seed": 1.0}, TypeError, "seed: got float, wanted an int or an int64 tensor"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616, wanted a number of 64 bits"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed: got shape \(3,\), wanted \(2,\)"),
        ({"offset": torch.zeros(2)}, TypeError, r"offset: got torch\.float32, wanted torch\.int64"),
    ):
        with pytest.raises(error, match=message):
            ops.interpolate_sample(base, memory, 0.4, **{"seed": 1, **settings})


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.9}])
def test_more_rows_than_have_scores_at_once(device, settings):
    """The CUDA kernels keep the scores of 256 rows in their workspace."""
    base, memory = pair(263, 33, torch.float32, device=device)
    wanted = reference.interpolate_sample(base.double(), memory.double(), 0.4, seed=2, **settings)
    assert int((ops.interpolate_sample(base, memory, 0.4, seed=2, **settings) != wanted).sum()) <= 1


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("vocab", [1, 7, 4097, 50257])
def test_hard_borders(device, hard_rows, vocab, temperature):
    """The reference's tokens, at α of 0, ½ and 1, of rows with many candidates and with few side by side.

    top_p of 1 − 10⁻⁷ ends where float32 has few digits: there as elsewhere one row may differ.
    """
    padded = hard_rows(vocab + 9).to(device)
    padded[:, 3 : 3 + vocab] = hard_rows(vocab)
    rows = padded[:, 3 : 3 + vocab]
    alpha = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.5, 0.5, 1.0, 0.0, 0.5], device=device)
    for cuts in (
        {"top_p": 1e-6},
        {"top_p": 0.35},
        {"top_p": 1 - 1e-7},
        {"top_k": 1},
        {"top_k": vocab // 2 + 1},
        {"top_k": max(vocab - 1, 1), "top_p": 0.6},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"min_p": 0.3},
    ):
        settings = {"temperature": temperature, **cuts}
        wanted = reference.interpolate_sample(rows.double(), rows.double(), alpha, seed=3, **settings)
        got = ops.interpolate_sample(rows, rows, alpha, seed=3, **settings)
        assert wanted[8] == -1 and got[8] == -1
        assert int((got != wanted).sum()) <= 1, cuts


def test_what_top_k_drops_among_neighbours_moves_the_border_of_top_p(device):
    """4000 tokens within a hair, of which top_k keeps the upper 800; then top_p keeps some of 100 likelier ones."""
    rows = torch.zeros(20, 5000, device=device)
    rows[:, :4000] = torch.arange(4000, device=device) % 5 * 2.0**-12
    rows[:, 4000:4100], rows[:, 4100], rows[:, 4101:] = math.log(8), math.log(800), -math.inf
    settings = {"top_k": 102, "top_p": 0.525}
    wanted = reference.interpolate_sample(rows.double(), rows.double(), 0.5, seed=5, **settings)
    assert torch.equal(ops.interpolate_sample(rows, rows, 0.5, seed=5, **settings), wanted)


def test_many_small_probabilities_add_up(device):
    """One token has e^9.02 times another's probability, a seventh of all; others are just below 2³² units."""
    rows = torch.zeros(4, 50257, device=device)
    rows[:, 7] = 9.02
    wanted = reference.interpolate_sample(rows.double(), rows.double(), 0.5, seed=5, top_p=0.9)
    assert torch.equal(ops.interpolate_sample(rows, rows, 0.5, seed=5, top_p=0.9), wanted)
    assert (wanted != 7).any()


def test_a_whole_vocabulary_of_equals(device):
    """151936 ties: every token is at the border, and which of them go is told by their ids."""
    flat = torch.zeros(1, 151936, device=device)
    for settings in ({"top_p": 0.5}, {"top_p": 1e-9}, {"top_k": 9}, {"top_k": 9, "top_p": 0.25}):
        wanted = reference.interpolate_sample(flat.double(), flat.double(), 0.5, seed=5, **settings)
        assert torch.equal(ops.interpolate_sample(flat, flat, 0.5, seed=5, **settings), wanted)


@warpers
def test_flat_and_peaked_rows(device, settings):
    """Flat rows tie everywhere and fill every list of candidates; peaked ones leave a single token."""
    flat = torch.zeros(4, 9000, device=device)
    arguments = {"seed": 5, **settings}
    wanted = reference.interpolate_sample(flat.double(), flat.double(), 0.5, **arguments)
    assert torch.equal(ops.interpolate_sample(flat, flat, 0.5, **arguments), wanted)
    flat[:, 8200] = 1e4
    assert ops.interpolate_sample(flat, flat, 0.5, **arguments).tolist() == [8200] * 4


def test_alpha_outside_0_to_1_on_cuda(device, on_cuda):
    """Nothing may wait for the device to check: such a row has no token, and the others have theirs."""
    if not on_cuda:
        pytest.skip("the CPU raises: see test_mixture")
    base, memory = pair(4, 9000, torch.float32, device=device)
    alpha = torch.tensor([0.5, -0.25, math.nan, 1.5], device=device)
    for settings in WARPERS.values():
        tokens = ops.interpolate_sample(base, memory, alpha, seed=1, **settings)
        assert tokens[0] >= 0 and tokens[1:].tolist() == [-1, -1, -1]
    assert ops.interpolate_argmax(base, memory, alpha)[1:].tolist() == [-1, -1, -1]
    assert ops.interpolate(base, memory, alpha).isnan().all(-1).tolist() == [False, True, True, True]


def test_numbers_at_the_edges(device):
    """Temperatures that float32 does not hold, and more tokens to keep than there can be."""
    z = torch.tensor([[0.0, 1.0, 3.0, -math.inf]], device=device)
    for temperature, wanted in ((1e-39, {2}), (1e-300, {2}), (1e44, {0, 1, 2})):
        tokens = {int(ops.interpolate_sample(z, z, 0.5, seed=seed, temperature=temperature)) for seed in range(20)}
        assert tokens == wanted, temperature
    all_kept = ops.interpolate_sample(z, z, 0.5, seed=1, top_k=2**63)
    assert all_kept == ops.interpolate_sample(z, z, 0.5, seed=1, top_k=4)


def test_seeds_whose_memory_was_freed_are_refused():
    z, freed = torch.randn(2, 9), torch.tensor([4, 5])
    freed.untyped_storage().resize_(0)
    for name in ("seed", "offset"):
        with pytest.raises(ValueError, match=f"{name}: the tensor's memory was freed"):
            ops.interpolate_sample(z, z, 0.5, **({"seed": 1} | {name: freed}))


def test_no_rows_in_the_reference():
    assert reference.interpolate_sample(torch.zeros(0, 9), torch.zeros(0, 9), 0.5, seed=0).shape == (0,)
