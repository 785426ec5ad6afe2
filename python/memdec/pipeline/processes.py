"""Training shared between processes, one a device, as ``torchrun`` or ``accelerate launch`` start them.

The memory is small, so each process holds all of it and computes a part of every step; the float32 gradients are added
up once a step. Without a launcher there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from memdec.pipeline.embed import default_device


@dataclass(frozen=True)
class Processes:
    """Which of `count` processes this one is (`rank`, from 0), and the device it computes on."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def merge(self, scores: Tensor) -> Tensor:
        """One tensor of scores, (T,) with NaN for what a process did not score, from the processes' own."""
        if self.count == 1:
            return scores
        known = (~scores.isnan()).to(self.device, torch.float32)
        values = scores.nan_to_num(0.0).to(self.device)
        self.add_up([known, values])
        return values.masked_fill(known == 0, float("nan")).cpu()

    def agree(self, decision: bool) -> bool:
        """The first process's decision, in all of them: what is read from clocks and disks may differ."""
        if self.count == 1:
            return decision
        flag = torch.tensor([int(decision)], device=self.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag.item())

    def wait(self) -> None:
        """Let no process pass before all are here."""
        self.add_up([torch.zeros(1, device=self.device)])


def join_processes(device: torch.device | str | None) -> Processes:
    """This process among those that a launcher has started, or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # The first process may search layers for a cut memory, or write to a slow disk, while the others wait.
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu", timeout=timedelta(hours=2))
        return Processes(state.device, state.process_index, state.num_processes)
    return Processes(torch.device(default_device() if device is None else device))
