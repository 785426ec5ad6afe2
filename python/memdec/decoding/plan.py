"""How many tokens to draft at a time: what is expected of it, and the running estimates that it is chosen by.

Where tokens are drawn, a draft stands if its coin u < p(x) / q(x), and u is a function of seed and place: the coins of
the next places are known before anything is drafted. Below α a draft stands for certain (under warpers, nearly), and
the higher above it the less likely. So a round drafts through the places that are likely to stand, and ends where one
that is not is the place of the token after the drafts, which comes in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST_DRAFT = 8
LONGEST_RUN = 15  # where the coins are known; with the token before, as many as quick steps take
FIRST_DRAFT = 4
ROW_COST = 0.03  # of one more row in a base forward, before any was timed
MEMORY_OF_TIMES = 0.8  # weight of what was, in the running means of seconds
MEMORY_OF_TRIALS = 0.97  # and in that of accepted drafts, a trial at a time


def expected_tokens(acceptance: float, draft_tokens: int) -> float:
    """Tokens a round: (1 − aᵞ⁺¹) / (1 − a), the accepted ones and the one after."""
    if acceptance >= 1:
        return float(draft_tokens + 1)
    return (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)


def speed_up(acceptance: float, draft_tokens: int, verify: float, memory: float) -> float:
    """Over the base alone: tokens a round over v(γ+1) + (γ+1)·c.

    Args:
        acceptance: chance that a draft stands.
        draft_tokens: γ.
        verify: v(γ+1): cost of a base forward of γ+1 tokens, in forwards of one.
        memory: c: cost of a memory's step, in the same unit.
    """
    return expected_tokens(acceptance, draft_tokens) / (verify + (draft_tokens + 1) * memory)


@dataclass
class Estimates:
    """Running means over the rounds of one model, batch size, α and warpers."""

    accepted: float = 7.0  # of so many trials: worth ten trials at 0.7 before the first
    trials: float = 10.0
    # The same for each kind of coin: below α, in the lower half of what is above, in the upper half.
    stood: list[float] = field(default_factory=lambda: [10.0, 3.0, 1.5])
    tossed: list[float] = field(default_factory=lambda: [10.0, 5.0, 5.0])
    memory_seconds: float | None = None  # of one step
    base_seconds: dict[int, float] = field(default_factory=dict)  # of a forward, by its tokens

    @property
    def acceptance(self) -> float:
        """Chance that a draft stands."""
        return self.accepted / self.trials

    def add_times(self, tokens: int, memory: float, base: float) -> None:
        """A round of `tokens` memory steps in `memory` seconds and a base forward of as many tokens in `base`."""
        step = memory / tokens
        self.memory_seconds = _mean(self.memory_seconds, step)
        self.base_seconds[tokens] = _mean(self.base_seconds.get(tokens), base)

    def add_trials(self, accepted: int, trials: int) -> None:
        """So many drafts were looked at, and so many stood."""
        keep = MEMORY_OF_TRIALS**trials
        self.accepted = self.accepted * keep + accepted
        self.trials = self.trials * keep + trials

    def add_coin(self, kind: int, stood: bool) -> None:
        """A draft with a coin of this kind was looked at."""
        self.stood[kind] = self.stood[kind] * MEMORY_OF_TRIALS + stood
        self.tossed[kind] = self.tossed[kind] * MEMORY_OF_TRIALS + 1

    def base_cost(self, tokens: int) -> float:
        """Seconds of a base forward of so many tokens: measured, or on the line through the nearest two that were."""
        known = self.base_seconds
        if tokens in known:
            return known[tokens]
        nearest = sorted(known, key=lambda n: abs(n - tokens))[:2]
        first = nearest[0]
        if len(nearest) == 1:
            return known[first] * (1 + ROW_COST * (tokens - 1)) / (1 + ROW_COST * (first - 1))
        slope = max(0.0, (known[nearest[1]] - known[first]) / (nearest[1] - first))
        return max(known[first] + slope * (tokens - first), 0.5 * known[first])

    def draft_tokens(self, coins: Sequence[Sequence[int]] = (), alpha: float = 0.0) -> int:
        """The γ of the most tokens a second. A first round drafts, a second does not: then both costs are known.

        Args:
            coins: kinds of the next LONGEST_RUN ones of each row, where they are known.
            alpha: weight of the memory: the share of coins of the first kind.
        """
        if self.memory_seconds is None:
            return FIRST_DRAFT
        if 1 not in self.base_seconds:
            return 0
        step = self.memory_seconds
        longest = LONGEST_RUN if coins else LONGEST_DRAFT
        seconds = [self.base_cost(n) + n * step for n in range(1, longest + 2)]
        chances = [stood / tossed for stood, tossed in zip(self.stood, self.tossed, strict=True)]
        mean = alpha * chances[0] + (1 - alpha) * (chances[1] + chances[2]) / 2 if coins else self.acceptance
        rates = [expected_tokens(mean, gamma) / spent for gamma, spent in enumerate(seconds)]
        rate = max(rates)
        if not coins:
            return rates.index(rate)
        # A second spent on a round is not spent on others, which bring `rate` tokens a second at least.
        gains = [1 - rate * spent for spent in seconds]
        for row in coins:
            expected = 0.0
            reached = 1.0
            for gamma, kind in enumerate(row, 1):
                reached *= chances[kind]
                expected += reached
                gains[gamma] += expected / len(coins)
        return gains.index(max(gains))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY_OF_TIMES * old + (1 - MEMORY_OF_TIMES) * new
