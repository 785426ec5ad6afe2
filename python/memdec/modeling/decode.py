"""What a ``generate`` did, as ``MemoryModel.last_decode`` tells it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decode:
    """What the last ``generate`` did.

    Attributes:
        mode: how it decoded: "composite" is transformers' loop over forwards of the mixture, "parallel" one step of
            each model a token, "speculative" drafts by the memory that the base verifies.
        tokens: number of tokens made, over all returned rows; padding behind a row's end is not counted.
        seconds: wall time by part; "total" is all of it. The engine adds "prefill", "draft" (steps of the memory),
            "verify" (forwards of the base) and "choose" (verification, stopping, caches).
        rounds: forwards of the base after the prompt; 0 for "composite", and so are the next three.
        row_rounds: the same, each counted once for every row that was still going.
        drafted: tokens drafted, over all rows.
        accepted: those of them that stood.
        acceptance: share of the drafts looked at that stood; None without drafts.
        cost_ratio: c, a step of the memory over a step of the base.
        reason: why it was "composite" though something else was asked for or could be chosen.
    """

    mode: str
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    acceptance: float | None = None
    cost_ratio: float | None = None
    reason: str | None = None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that a forward of the base brought a row, on average."""
        return self.tokens / self.row_rounds if self.row_rounds else None
