"""aggregate_neighbors: retrieved neighbours, with their distances and tokens, as next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.distributions import SparseDistributions
from memdec.ops import checks, launch
from memdec.ops.registration import is_traced, refuse_grad, register
from memdec.ops.rows import address, rows


def aggregate_neighbors(
    distances: Tensor,  # (N, k) any float dtype
    token_ids: Tensor,  # (N, k) int64 or int32
    *,
    temperature: float,
    vocab_size: int,
    min_prob: float = 0.0,
    max_tokens: int | None = None,
) -> SparseDistributions:
    """The kNN distribution of each row: q(v) ∝ Σ over the neighbours i of 1[v = tokenᵢ]·exp(−dᵢ/T).

    Nothing of width V is built. Weights are measured from the row's least distance, so that neither a common offset nor
    a small T makes them vanish. The result is deterministic: it depends neither on the number of threads nor, beyond
    the rounding of a float64 sum, on the order of the neighbours. On CUDA the host waits once, for the number of pairs,
    so that this op cannot be part of a CUDA graph; values that are wrong are found then, and raise as on the CPU.

    Args:
        distances: (N, k) float32, bfloat16, float16 or float64; squared L2 distances, or any score of which less is
            nearer. +inf is an absent neighbour. Rows may be strided.
        token_ids: (N, k) integers, the token that followed each neighbour, 0 to ``vocab_size`` − 1; −1 is an absent
            neighbour.
        temperature: T > 0, in the unit of the distances.
        vocab_size: V.
        min_prob: tokens below this probability are cut from the normalised row.
        max_tokens: at most so many tokens are kept, the most probable; of equals, those with the lower id. None: all.

    Returns:
        N rows. Nothing is renormalised after a cut: ``residual`` holds the mass that was cut from each row. A row
        without neighbours is empty, with residual 0. A token whose probability is 0 in float32 is not stored
        (on the CPU, below 1.2e-38).

    Raises:
        TypeError: a dtype that is not one of the above.
        ValueError: shapes that do not match, a token outside the vocabulary, a distance that is NaN or −inf, T ≤ 0,
            or a gradient that is asked for.

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> q = ops.aggregate_neighbors(
        ...     torch.tensor([[0.0, 0.0, 0.0, 9.0]]), torch.tensor([[5, 2, 5, -1]]), temperature=1.0, vocab_size=8
        ... )
        >>> q.token_ids.tolist(), q.probs.tolist()
        ([2, 5], [0.3333333432674408, 0.6666666865348816])
    """
    checks.floats("distances", distances)
    checks.kernels(distances=distances)
    checks.tensor("token_ids", token_ids)
    if token_ids.dtype not in checks.INTEGER_DTYPES:
        raise TypeError(f"token_ids: got {token_ids.dtype}, wanted int64 or int32")
    if distances.dim() != 2 or token_ids.shape != distances.shape:
        raise ValueError(
            f"token_ids: got shape {tuple(token_ids.shape)} beside distances of {tuple(distances.shape)}, "
            f"wanted two matrices (N, k)"
        )
    checks.same_device("token_ids", token_ids, "distances", distances)
    temperature = checks.positive("temperature", temperature)
    checks.count("vocab_size", vocab_size, 1)
    if vocab_size > checks.MAX_VOCABULARY:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at most {checks.MAX_VOCABULARY}")
    min_prob = checks.fraction("min_prob", min_prob)
    if max_tokens is not None:
        max_tokens = min(checks.count("max_tokens", max_tokens, 1), vocab_size)
    refuse_grad("aggregate_neighbors", "distances as they come from a search", distances=distances)
    forward = torch.ops.memdec.aggregate_neighbors if is_traced(distances, token_ids) else _forward
    indptr, ids, probs, residual = forward(distances, token_ids, temperature, vocab_size, min_prob, max_tokens)
    return SparseDistributions(indptr, ids, probs, vocab_size, residual)


def _forward(
    distances: Tensor, token_ids: Tensor, temperature: float, vocab_size: int, min_prob: float, max_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indptr, token_ids, probs, residual)."""
    num_rows, k = distances.shape
    device = distances.device
    indptr = torch.empty(num_rows + 1, dtype=torch.int64, device=device)
    if num_rows == 0 or k == 0:
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return indptr.zero_(), empty, empty.float(), torch.zeros(num_rows, device=device)
    if k > 2**31 - 1:
        raise ValueError(f"distances: got {k} neighbours a row, wanted fewer than 2**31")
    distances, described = rows(distances, "distances")
    if token_ids.dtype not in (torch.int64, torch.int32):
        token_ids = token_ids.int()
    if k > 1 and token_ids.stride(1) != 1:
        token_ids = token_ids.contiguous()
    most = num_rows * min(k, vocab_size, max_tokens or k)
    ids = torch.empty(most, dtype=torch.int32, device=device)
    probs = torch.empty(most, device=device)
    residual = torch.empty(num_rows, device=device)
    pairs = torch.empty(1, dtype=torch.int64, device="cpu")  # written before the call returns, on CUDA as well
    launch.run(
        _C.aggregate_neighbors,
        distances.device,
        described,
        address("token_ids", token_ids),
        token_ids.stride(0),
        token_ids.dtype == torch.int64,
        temperature,
        vocab_size,
        min_prob,
        max_tokens or 0,
        indptr.data_ptr(),
        ids.data_ptr(),
        probs.data_ptr(),
        residual.data_ptr(),
        pairs.data_ptr(),
    )
    nnz = int(pairs)
    ids, probs = ids[:nnz], probs[:nnz]
    if 2 * nnz < most:
        # What was not written was never touched and takes no memory, but a pickle or a pipe would carry all of it.
        ids, probs = ids.clone(), probs.clone()
    return indptr, ids, probs, residual


def _fake(
    distances: Tensor, token_ids: Tensor, temperature: float, vocab_size: int, min_prob: float, max_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = distances.shape[0]
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        distances.new_empty(num_rows + 1, dtype=torch.int64),
        distances.new_empty(nnz, dtype=torch.int32),
        distances.new_empty(nnz, dtype=torch.float32),
        distances.new_empty(num_rows, dtype=torch.float32),
    )


register(
    "aggregate_neighbors(Tensor distances, Tensor token_ids, float temperature, int vocab_size, float min_prob, "
    "int? max_tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
