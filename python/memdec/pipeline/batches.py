"""Training batches: which windows a step reads, and the labels and teacher rows that belong to them.

The order is a function of (seed, epoch) alone: no state of a generator is kept, so a run that was killed finds its
place from the number of the step. The windows of one step are the same however many processes share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdec.distributions import SparseDistributions
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.windows import Window


@dataclass(frozen=True)
class Batch:
    """What one forward and backward reads.

    Attributes:
        input_ids: int64 (B, L); shorter windows are padded on the right, which a causal model does not see.
        positions: int64 (n,), places in the flattened (B·L) of the rows that count, or None where all do.
        labels: int64 (n,), the token that came after each of them.
        teacher: their n teacher distributions.
    """

    input_ids: Tensor
    positions: Tensor | None
    labels: Tensor
    teacher: SparseDistributions

    @property
    def num_rows(self) -> int:
        """Rows that count in the loss."""
        return self.labels.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.input_ids.to(device), positions, self.labels.to(device), self.teacher.to(device))


def steps_in_epoch(num_windows: int, windows_per_step: int) -> int:
    """Steps that read each window once; the last may have fewer windows."""
    return -(-num_windows // windows_per_step)


def windows_of_step(step: int, num_windows: int, windows_per_step: int, seed: int) -> list[int]:
    """The numbers of the windows that step `step` (from 0) reads: each epoch is a permutation of its own, cut in
    pieces."""
    epoch, place = divmod(step, steps_in_epoch(num_windows, windows_per_step))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_windows, generator=generator)
    chosen: list[int] = order[place * windows_per_step : (place + 1) * windows_per_step].tolist()
    return chosen


def share(chosen: Sequence[int], rank: int, processes: int, batch_size: int) -> list[Sequence[int]]:
    """This process's part of a step's windows, in pieces of at most `batch_size`, one a forward."""
    mine = chosen[rank::processes]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def read_batch(tokens: Tensor, chosen: Sequence[Window], store: DistributionStore) -> Batch:
    """Read windows of the training text with their teacher rows, which are found by row id.

    Args:
        tokens: int32 (T,), the training text.
        chosen: at least one window of it.
        store: teacher distributions of all T − 1 rows.
    """
    length = max(window.stop - window.start for window in chosen) - 1
    input_ids = torch.zeros(len(chosen), length, dtype=torch.long)
    labels = torch.zeros(len(chosen), length, dtype=torch.long)
    rows = torch.full((len(chosen), length), -1, dtype=torch.long)
    for index, window in enumerate(chosen):
        count = window.stop - window.start - 1
        input_ids[index, :count] = tokens[window.start : window.stop - 1]
        labels[index, :count] = tokens[window.start + 1 : window.stop]
        rows[index, window.score_from - window.start : count] = torch.arange(window.score_from, window.stop - 1)
    counts = rows >= 0
    positions = None if bool(counts.all()) else counts.reshape(-1).nonzero().reshape(-1)
    return Batch(input_ids, positions, labels[counts], store.rows(rows[counts]))
