"""The formula against its own sum, and what the estimates choose where the best γ is known."""

from __future__ import annotations

import random

import pytest

from memdec.decoding.plan import LONGEST_DRAFT, LONGEST_RUN, Estimates, expected_tokens, speed_up


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_is_the_sum_of_its_cases(a: float) -> None:
    """n drafts stand and one falls, or all stand: n + 1 tokens."""
    for gamma in range(6):
        cases = sum(a**n * (1 - a) * (n + 1) for n in range(gamma)) + a**gamma * (gamma + 1)
        assert expected_tokens(a, gamma) == pytest.approx(cases)


def test_speed_up() -> None:
    assert speed_up(1.0, 3, verify=1.0, memory=0.0) == 4
    assert speed_up(0.5, 1, verify=1.1, memory=0.2) == pytest.approx(1.5 / 1.5)
    assert speed_up(0.9, 0, verify=1.0, memory=0.3) == pytest.approx(1 / 1.3)


def learnt(acceptance: float, memory: float, row: float) -> Estimates:
    """Estimates after rounds in which a base forward of n tokens took 1 + row·(n − 1), as `draft_tokens` chose them."""
    estimates = Estimates()
    for _ in range(60):
        gamma = estimates.draft_tokens()
        estimates.add_times(gamma + 1, (gamma + 1) * memory, 1 + row * gamma)
        estimates.add_trials(round(100 * acceptance), 100)
    return estimates


@pytest.mark.parametrize("acceptance", [0.2, 0.7, 0.9])
@pytest.mark.parametrize("memory", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("row", [0.0, 0.1, 1.0])
def test_the_best_number_of_drafts_is_chosen(acceptance: float, memory: float, row: float) -> None:
    estimates = learnt(acceptance, memory, row)

    def gain(gamma: int) -> float:
        return speed_up(acceptance, gamma, 1 + row * gamma, memory)

    assert gain(estimates.draft_tokens()) == pytest.approx(max(map(gain, range(LONGEST_DRAFT + 1))), rel=1e-3)


def test_first_it_drafts_then_it_steps() -> None:
    estimates = Estimates()
    assert estimates.draft_tokens() == 4
    estimates.add_times(5, 0.5, 1.2)
    assert estimates.draft_tokens() == 0


CHEAP = {"memory": 0.19, "row": 0.03}


def test_a_run_of_certain_coins_is_drafted_to_its_end() -> None:
    """Where nothing else stands: the first coin above α is for the token after the drafts."""
    estimates = learnt(0.8, **CHEAP)
    for _ in range(500):
        estimates.add_coin(1, False)
        estimates.add_coin(2, False)
    for length in range(LONGEST_RUN + 1):
        coins = [0] * length + [1] * (LONGEST_RUN - length)
        assert estimates.draft_tokens([coins], 0.6) == length
    assert estimates.draft_tokens([[0] * 3 + [2] * 12, [0] * 9 + [2] * 6], 0.6) in (3, 9)
    for _ in range(500):
        estimates.add_coin(1, True)
    assert estimates.draft_tokens([[0, 1] * 3 + [2] * 9], 0.6) == 6


@pytest.mark.parametrize(("alpha", "least"), [(0.0, 1.01), (0.5, 1.05), (0.7, 1.15)])
def test_known_coins_gain_over_the_best_fixed_number(alpha: float, least: float) -> None:
    """20,000 places, acceptance 0.8; of the coins above α, the lower half stands more often than the upper by 0.3.

    The best fixed γ brings 1.62 tokens in the time of a forward. The spread of such a run is below 1%.
    """
    generator = random.Random(0)
    above = (0.8 - alpha) / (1 - alpha)
    chances = [1.0, min(1.0, above + 0.15), max(0.0, above - 0.15)]
    kinds = [0 if u < alpha else 1 if u < (1 + alpha) / 2 else 2 for u in (generator.random() for _ in range(20_000))]
    estimates, place, seconds = Estimates(), 0, 0.0
    while place < len(kinds) - LONGEST_RUN:
        ahead = kinds[place : place + LONGEST_RUN]
        gamma = estimates.draft_tokens([ahead], alpha)
        stood = 0
        while stood < gamma and generator.random() < chances[ahead[stood]]:
            estimates.add_coin(ahead[stood], True)
            stood += 1
        if stood < gamma:
            estimates.add_coin(ahead[stood], False)
        forward, steps = 1 + CHEAP["row"] * gamma, (gamma + 1) * CHEAP["memory"]
        estimates.add_times(gamma + 1, steps, forward)
        seconds += forward + steps
        place += stood + 1
    fixed = max(speed_up(0.8, gamma, 1 + CHEAP["row"] * gamma, CHEAP["memory"]) for gamma in range(9))
    assert place / seconds > least * fixed
