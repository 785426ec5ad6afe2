"""The choice of T and λ against what the text was drawn with, and against plain formulas."""

import math

import pytest
import torch

from memdec import MemdecError, ops
from memdec.pipeline.temperature import best_weight, choose_temperature, knn_lm_loss, target_probability


def draw(n, k, vocab, temperature, weight, seed, scale=1.0):
    """Rows whose targets come from the mixture itself, at a known T (in units of `scale`) and λ."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(n, k, generator=generator).sort(dim=1).values * 60
    tokens = torch.randint(vocab, (n, k), generator=generator)
    q = ops.aggregate_neighbors(distances, tokens, temperature=temperature, vocab_size=vocab).to_dense(torch.float64)
    base = torch.softmax(torch.randn(n, vocab, generator=generator, dtype=torch.float64) * 2, 1)
    targets = torch.multinomial(weight * q + (1 - weight) * base, 1, generator=generator)[:, 0]
    base_log_prob = base.gather(1, targets[:, None])[:, 0].log().float()
    return distances * scale, tokens, targets, base_log_prob


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_finds_what_the_text_was_drawn_with(scale):
    """6000 draws at T = 3, λ = 0.4. The standard error of λ is √(1 / (n·I)) ≈ 0.01, that of log T about 0.05 (from the
    curvature of the likelihood), so 5 of either are far from a false alarm."""
    arguments = draw(6000, 32, 40, 3.0, 0.4, 0, scale)
    temperature, weight, curve = choose_temperature(*arguments)
    assert abs(math.log(temperature / (3 * scale))) < 0.25
    assert abs(weight - 0.4) < 0.05
    best = min(point["perplexity"] for point in curve)
    mine = [point for point in curve if point["temperature"] == temperature]
    assert mine[0]["perplexity"] == best and mine[0]["weight"] == weight
    assert [p["temperature"] for p in curve] == sorted({p["temperature"] for p in curve})
    assert curve[0]["temperature"] < temperature < curve[-1]["temperature"]


def test_the_chosen_pair_is_no_worse_than_a_fine_grid():
    arguments = draw(800, 16, 10, 8.0, 0.6, 1)
    distances, tokens, targets, base = arguments
    temperature, weight, _ = choose_temperature(*arguments)
    q = target_probability(distances, tokens, targets, temperature)
    found = knn_lm_loss(q, base, weight)
    for other in [2 ** (i / 4) for i in range(-20, 40)]:
        q = target_probability(distances, tokens, targets, other)
        steps = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
        losses = -(steps * q + (1 - steps) * base.double().exp()).log().mean(1)
        assert found <= float(losses.min()) + 2e-5


def test_probability_of_the_target_is_that_of_the_aggregated_row():
    distances, tokens, targets, _ = draw(300, 20, 15, 5.0, 0.5, 2)
    distances[::7, 10:] = math.inf
    tokens[::5, :4] = -1
    distances[3], tokens[4] = math.inf, -1
    q = ops.aggregate_neighbors(distances, tokens, temperature=5.0, vocab_size=15)
    ours = target_probability(distances, tokens, targets, 5.0)
    torch.testing.assert_close(ours.float(), q.lookup(targets), rtol=2e-6, atol=0)
    assert ours[3] == ours[4] == 0


def test_weight_is_where_the_likelihood_peaks():
    p = torch.tensor([0.2, 0.5, 0.1, 0.3])
    q = torch.tensor([0.9, 0.0, 0.6, 0.1]).double()
    found = best_weight(q, p.log())
    losses = [knn_lm_loss(q, p.log(), step / 10000) for step in range(10000)]
    assert found == pytest.approx(losses.index(min(losses)) / 10000, abs=1e-4)
    assert best_weight(torch.zeros(4), p.log()) == 0
    assert best_weight(torch.ones(4), p.log()) == pytest.approx(1)


def test_a_target_that_neither_expects_does_not_make_it_infinite():
    temperature, weight, curve = choose_temperature(
        torch.tensor([[1.0, 2.0], [1.0, 2.0]]),
        torch.tensor([[3, 4], [3, 4]]),
        torch.tensor([3, 5]),
        torch.tensor([-1.0, -800.0]),
    )
    assert math.isfinite(temperature) and 0 <= weight <= 1
    assert all(math.isfinite(point["perplexity"]) for point in curve)


@pytest.mark.parametrize("distances", [[[0.0, 0.0]], [[7.0, 7.0]], [[5.0, math.inf]]])
def test_equal_distances(distances):
    temperature, weight, _ = choose_temperature(
        torch.tensor(distances), torch.tensor([[1, 2]]), torch.tensor([1]), torch.tensor([-3.0])
    )
    assert temperature > 0 and 0 < weight <= 1


def test_explains_what_cannot_be():
    with pytest.raises(MemdecError, match="no validation row has a neighbour"):
        choose_temperature(torch.full((2, 3), math.inf), torch.full((2, 3), -1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="neighbour_tokens"):
        choose_temperature(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="base_log_prob"):
        choose_temperature(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(3))
