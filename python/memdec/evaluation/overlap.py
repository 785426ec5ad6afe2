"""How much of the held-out text stands word for word in the training text.

A held-out token is *copied* when it lies in a run of ``run`` tokens that also occurs in the training tokens. A
retriever, and anything that imitates one, shines on copied runs; what it does on the rest is the harder question, so
both are reported.

Runs are compared by a 64-bit multilinear hash (random odd multipliers modulo 2⁶⁴): with n training runs and m
held-out ones the chance of one false match is about n·m/2⁶³, one in a million for a million of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RUN = 16
# Hashes of the training runs take 8 bytes a token; beyond this the check would cost more memory than the search.
MOST_TRAIN_TOKENS = 100_000_000


def copied_tokens(held_out: Tensor, train: Tensor, run: int = RUN) -> Tensor:
    """Which tokens of ``held_out`` (int, (T,)) lie in a run of ``run`` tokens that occurs in ``train``; bool (T,)."""
    ours = _run_hashes(held_out, run)
    theirs = np.unique(_run_hashes(train, run))
    copied = np.zeros(int(held_out.numel()), dtype=bool)
    if ours.size and theirs.size:
        at = np.searchsorted(theirs, ours).clip(max=theirs.size - 1)
        for start in np.flatnonzero(theirs[at] == ours):
            copied[start : start + run] = True
    return torch.from_numpy(copied)


def _run_hashes(tokens: Tensor, run: int) -> NDArray[np.uint64]:
    """The hash of each run tokens[i : i + run], uint64 (T − run + 1,)."""
    ids = tokens.numpy().astype(np.uint64) + np.uint64(1)
    count = ids.size - run + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    multipliers = np.random.default_rng(0).integers(0, 2**63, size=run, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(run):
        total += ids[offset : offset + count] * multipliers[offset]
    return total
