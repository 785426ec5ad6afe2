# Every pointer is an int, 0 for null; every function raises ValueError where an index is out of range.
from typing import Any

_Rows = tuple[int, int, int, int, int, int, int]
_Sparse = tuple[int, int, int, int]

def build_info() -> dict[str, Any]: ...
def set_simd_level(name: str) -> None: ...
def token_log_prob(logits: _Rows, targets: int, log_prob: int, max: int, sum: int, threads: int, /) -> None: ...
def alignment_loss(
    logits: _Rows,
    labels: int,
    ignore_index: int,
    teacher: _Sparse,
    beta: float,
    reduction: int,
    total: int,
    kl: int,
    ce: int,
    max: int,
    sum: int,
    grad: _Rows,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def alignment_gradient(
    logits: _Rows,
    labels: int,
    ignore_index: int,
    teacher: _Sparse,
    beta: float,
    reduction: int,
    max: int,
    sum: int,
    grad_total: int,
    grad: _Rows,
    threads: int,
    /,
) -> None: ...
def aggregate_neighbors(
    distances: _Rows,
    token_ids: int,
    token_ids_stride: int,
    wide_ids: bool,
    temperature: float,
    vocab_size: int,
    min_prob: float,
    max_tokens: int,
    out_indptr: int,
    out_ids: int,
    out_probs: int,
    residual: int,
    threads: int,
    /,
) -> None: ...

# keys, counts, thresholds, capacity, keep
_TopkBuffers = tuple[int, int, int, int, int]

def topk_filter_prepare(
    stored: int, stored_stride: int, mean: int, rows: int, dim: int, centred: int, norms: int, threads: int, /
) -> None: ...
def topk_filter_update(
    buffers: _TopkBuffers,
    products: int,
    products_stride: int,
    rows: int,
    columns: int,
    norms: int,
    first_id: int,
    excluded: int,
    threads: int,
    /,
) -> None: ...
def topk_filter_refine(
    buffers: _TopkBuffers,
    queries: int,
    stored: int,
    stored_stride: int,
    rows: int,
    stored_rows: int,
    dim: int,
    first_id: int,
    threads: int,
    /,
) -> None: ...
def topk_filter_select(buffers: _TopkBuffers, rows: int, k: int, distances: int, ids: int, threads: int, /) -> None: ...
def interpolate(base: _Rows, memory: _Rows, alpha: float, alphas: int, log_probs: int, threads: int, /) -> None: ...
def interpolate_log_prob(
    base: _Rows, memory: _Rows, alpha: float, alphas: int, targets: int, log_prob: int, threads: int, /
) -> None: ...
def interpolate_argmax(base: _Rows, memory: _Rows, alpha: float, alphas: int, tokens: int, threads: int, /) -> None: ...
def interpolate_sample(
    base: _Rows,
    memory: _Rows,
    alpha: float,
    alphas: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    seeds: int,
    offset: int,
    offsets: int,
    tokens: int,
    threads: int,
    /,
) -> None: ...
def interpolate_sparse(
    base: _Rows, teacher: _Sparse, alpha: float, alphas: int, log_probs: int, threads: int, /
) -> None: ...
