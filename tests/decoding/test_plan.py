"""The formula against its own sum, and what the estimates choose where the best γ is known."""

from __future__ import annotations

import pytest

from memdec.decoding.plan import LONGEST_DRAFT, Estimates, expected_tokens, speed_up


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
