"""Next-token distributions that are sparse over the vocabulary: the one type that flows from search to loss.

A kNN distribution of k = 1024 neighbours gives mass to some 65 tokens of 50,257, so a batch of N of them is kept as
compressed sparse rows: row ``i`` is the slice ``indptr[i]:indptr[i+1]`` of ``token_ids`` and of ``probs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A row may exceed 1 by what rounding to float32, or to a lossy code on disk, can add.
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class SparseDistributions:
    """N distributions over ``vocab_size`` tokens, as compressed sparse rows.

    Args:
        indptr: int64 (N+1,), row ``i`` is the slice ``indptr[i]:indptr[i+1]`` of the two next tensors.
        token_ids: int32 (nnz,), ascending and unique within a row.
        probs: float32 (nnz,), probabilities; a row sums to 1 minus the mass that was cut. An empty row holds nothing.
        vocab_size: number of tokens V; every id is below it.
        residual: float32 (N,), the mass cut from each row by a threshold, or None where nothing was cut or counted.

    The constructor checks types and shapes; what would need to read the values (and so to wait for a device) is left to
    :meth:`validate`.

    Raises:
        TypeError: a tensor is not a tensor, or has the wrong dtype.
        ValueError: a tensor has the wrong shape or lies on another device.

    >>> q = SparseDistributions.from_dense(torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]))
    >>> q.token_ids.tolist(), q.indptr.tolist()
    ([1, 2, 0], [0, 2, 3])
    """

    indptr: Tensor
    token_ids: Tensor
    probs: Tensor
    vocab_size: int
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        _check_vector("indptr", self.indptr, torch.int64)
        _check_vector("token_ids", self.token_ids, torch.int32)
        _check_vector("probs", self.probs, torch.float32)
        if self.indptr.numel() == 0:
            raise ValueError("indptr: got 0 elements, wanted N + 1 (one element, 0, for no rows)")
        if self.probs.shape != self.token_ids.shape:
            raise ValueError(
                f"probs: got {self.probs.numel()} elements, wanted {self.token_ids.numel()}, one for each of token_ids"
            )
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int):
            raise TypeError(f"vocab_size: got {type(self.vocab_size).__name__}, wanted an int")
        if not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted 1 to 2**31 - 1")
        tensors = {"token_ids": self.token_ids, "probs": self.probs}
        if self.residual is not None:
            _check_vector("residual", self.residual, torch.float32)
            if self.residual.numel() != self.num_rows:
                raise ValueError(
                    f"residual: got {self.residual.numel()} elements, wanted {self.num_rows}, one for each row"
                )
            tensors["residual"] = self.residual
        for name, tensor in tensors.items():
            if tensor.device != self.indptr.device:
                raise ValueError(f"{name}: got device {tensor.device}, wanted {self.indptr.device}, that of indptr")

    def __repr__(self) -> str:
        return (
            f"SparseDistributions(num_rows={self.num_rows}, nnz={self.nnz}, vocab_size={self.vocab_size}, "
            f"residual={'no' if self.residual is None else 'yes'}, device='{self.device}')"
        )

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """Number of distributions N."""
        return self.indptr.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of stored pairs over all rows."""
        return self.token_ids.numel()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.indptr.device

    def row_lengths(self) -> Tensor:
        """Number of stored tokens in each row: int64 (N,)."""
        return self.indptr[1:] - self.indptr[:-1]

    def row_ids(self) -> Tensor:
        """The row of each stored pair: int64 (nnz,)."""
        rows = torch.arange(self.num_rows, device=self.device)
        return torch.repeat_interleave(rows, self.row_lengths(), output_size=self.nnz)

    def mass(self) -> Tensor:
        """The probability stored in each row, Σq: float32 (N,), summed in float64. 0 for an empty row."""
        total = torch.zeros(self.num_rows, dtype=torch.float64, device=self.device)
        return total.index_add_(0, self.row_ids(), self.probs.double()).float()

    def validate(self) -> SparseDistributions:
        """Read every value and raise where one cannot be; returns self, so that a constructor call can end in it.

        Raises:
            ValueError: ``indptr`` does not rise from 0 to nnz; an id is outside the vocabulary, repeated or out of
                order; a probability is negative or not finite; a row holds more than 1 (with its residual).
        """
        self._validate_structure()
        probs = self.probs
        _raise_at("probs", ~torch.isfinite(probs) | (probs < 0), "is negative or not finite at pair",
                  "wanted probabilities")  # fmt: skip
        mass = self.mass()
        if self.residual is not None:
            bad = ~torch.isfinite(self.residual) | (self.residual < 0)
            _raise_at("residual", bad, "is negative or not finite in row", "wanted the mass that was cut")
            mass = mass + self.residual
        _raise_at(
            "probs", mass > 1 + MASS_TOLERANCE, "with the residual sums to more than 1 in row", "wanted at most 1"
        )
        return self

    def _validate_structure(self) -> None:
        """The part of :meth:`validate` that says where a pair belongs."""
        indptr, token_ids = self.indptr, self.token_ids
        if int(indptr[0]) != 0 or int(indptr[-1]) != self.nnz:
            raise ValueError(
                f"indptr: got first {int(indptr[0])} and last {int(indptr[-1])}, wanted 0 and nnz = {self.nnz}"
            )
        lengths = self.row_lengths()
        _raise_at("indptr", lengths < 0, "falls after row", "wanted it never to fall")
        _raise_at("token_ids", (token_ids < 0) | (token_ids >= self.vocab_size), "is outside the vocabulary at pair",
                  f"wanted 0 to {self.vocab_size - 1}")  # fmt: skip
        rows = self.row_ids()
        unordered = (token_ids[1:] <= token_ids[:-1]) & (rows[1:] == rows[:-1])
        _raise_at("token_ids", unordered, "is repeated or falls after pair", "wanted ascending, unique ids in a row")

    def select(self, rows: Tensor | Sequence[int]) -> SparseDistributions:
        """The given rows, in the given order; a row may be asked for more than once.

        Args:
            rows: int64 (M,), row numbers, 0 to N−1.

        Raises:
            IndexError: a row number is out of range.
            ValueError: a row that is asked for does not lie within the stored pairs.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.device).reshape(-1)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.num_rows):
            raise IndexError(f"rows: got {int(rows.min())} to {int(rows.max())}, wanted 0 to {self.num_rows - 1}")
        begins, ends = self.indptr[rows], self.indptr[rows + 1]
        lengths = ends - begins
        _raise_at("indptr", (begins < 0) | (lengths < 0) | (ends > self.nnz), "leaves the stored pairs in selected row",
                  f"wanted it to rise from 0 to nnz = {self.nnz}")  # fmt: skip
        indptr = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths, 0, out=indptr[1:])
        # Pair j of the result is pair (j - its row's new start + its row's old start) of this one.
        shift = torch.repeat_interleave(begins - indptr[:-1], lengths)
        pairs = torch.arange(shift.numel(), device=self.device) + shift
        residual = None if self.residual is None else self.residual[rows]
        return SparseDistributions(indptr, self.token_ids[pairs], self.probs[pairs], self.vocab_size, residual)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseDistributions:
        """The same distributions on another device; self where they are there already."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        residual = None if self.residual is None else self.residual.to(device, non_blocking=non_blocking)
        return SparseDistributions(
            self.indptr.to(device, non_blocking=non_blocking),
            self.token_ids.to(device, non_blocking=non_blocking),
            self.probs.to(device, non_blocking=non_blocking),
            self.vocab_size,
            residual,
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (N, V) matrix of probabilities; what was cut stays cut. For tests and small batches: N·V elements.

        Raises:
            ValueError: ``indptr`` or ``token_ids`` are not as :meth:`validate` wants them.
        """
        self._validate_structure()
        dense = torch.zeros(self.num_rows, self.vocab_size, dtype=dtype, device=self.device)
        dense[self.row_ids(), self.token_ids.long()] = self.probs.to(dtype)
        return dense

    @classmethod
    def from_dense(cls, probs: Tensor, min_prob: float = 0.0) -> SparseDistributions:
        """Keep what is above 0 and at least ``min_prob`` of a dense (N, V) matrix; ``residual`` counts the rest.

        Args:
            probs: (N, V) any float dtype, rows that sum to at most 1.
            min_prob: probabilities below it are cut.

        Raises:
            ValueError: ``probs`` is not a matrix of floats.
        """
        if probs.dim() != 2 or not probs.is_floating_point():
            raise ValueError(f"probs: got {probs.dtype} of shape {tuple(probs.shape)}, wanted (N, V) of a float dtype")
        probs = probs.float()
        kept = (probs > 0) & (probs >= min_prob)
        indptr = torch.zeros(probs.shape[0] + 1, dtype=torch.int64, device=probs.device)
        torch.cumsum(kept.sum(1), 0, out=indptr[1:])
        token_ids = kept.nonzero()[:, 1].to(torch.int32)
        residual = probs.masked_fill(kept, 0).sum(1, dtype=torch.float64).float()
        return cls(indptr, token_ids, probs[kept], probs.shape[1], residual)

    @classmethod
    def cat(cls, parts: Sequence[SparseDistributions]) -> SparseDistributions:
        """The rows of all parts, one part after the other. ``residual`` is kept where every part has one.

        Raises:
            ValueError: no parts, or parts over different vocabularies.
        """
        if not parts:
            raise ValueError("parts: got none, wanted at least one SparseDistributions")
        sizes = sorted({part.vocab_size for part in parts})
        if len(sizes) > 1:
            raise ValueError(f"parts: got vocabularies of {sizes} tokens, wanted one and the same")
        lengths = torch.cat([part.row_lengths() for part in parts])
        indptr = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=indptr[1:])
        residuals = [part.residual for part in parts if part.residual is not None]
        residual = torch.cat(residuals) if len(residuals) == len(parts) else None
        token_ids = torch.cat([part.token_ids for part in parts])
        return cls(indptr, token_ids, torch.cat([part.probs for part in parts]), sizes[0], residual)

    def lookup(self, targets: Tensor) -> Tensor:
        """The probability that each row gives to its target: float32 (N,), 0 where the token is not stored.

        Args:
            targets: (N,) any integer dtype; an id that no row holds (−100, say) gives 0.

        Raises:
            ValueError: the number of targets is not the number of rows.
        """
        if targets.shape != (self.num_rows,):
            raise ValueError(f"targets: got shape {tuple(targets.shape)}, wanted ({self.num_rows},)")
        rows = self.row_ids()
        found = torch.where(self.token_ids == targets[rows], self.probs, torch.zeros_like(self.probs))
        return torch.zeros(self.num_rows, device=self.device).index_add_(0, rows, found)


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted {dtype}; convert it with .to({dtype})")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted one dimension")


def _raise_at(name: str, bad: Tensor, what: str, wanted: str) -> None:
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(f"{name}: {what} {where} ({int(bad.sum())} such), {wanted}")
