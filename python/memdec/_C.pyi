# Every pointer is an int, 0 for null; on the CPU every op raises ValueError where an index is out of range. An op
# returns 0, or the bytes of workspace that it wants before it can run on CUDA.
from typing import Any

_Rows = tuple[int, int, int, int, int, int, int]
_Sparse = tuple[int, int, int, int]
_Launch = int | tuple[int, int, int, int]  # CPU threads, or CUDA: device, stream, workspace, its bytes

def build_info() -> dict[str, Any]: ...
def set_simd_level(name: str) -> None: ...
def token_log_prob(logits: _Rows, targets: int, log_prob: int, max: int, sum: int, launch: _Launch, /) -> int: ...
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
    grad_weight: int,
    launch: _Launch,
    /,
) -> int: ...
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
    launch: _Launch,
    /,
) -> int: ...
def scale_rows(rows: _Rows, factors: int, factors_stride: int, launch: _Launch, /) -> int: ...
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
    pairs: int,
    launch: _Launch,
    /,
) -> int: ...

# keys, counts, thresholds, capacity, keep
_TopkBuffers = tuple[int, int, int, int, int]

def topk_filter_prepare(
    stored: int, stored_stride: int, mean: int, rows: int, dim: int, centred: int, norms: int, launch: _Launch, /
) -> int: ...
def topk_filter_update(
    buffers: _TopkBuffers,
    products: int,
    products_stride: int,
    rows: int,
    columns: int,
    norms: int,
    first_id: int,
    excluded: int,
    launch: _Launch,
    /,
) -> int: ...
def topk_filter_refine(
    buffers: _TopkBuffers,
    queries: int,
    stored: int,
    stored_stride: int,
    rows: int,
    stored_rows: int,
    dim: int,
    first_id: int,
    launch: _Launch,
    /,
) -> int: ...
def topk_filter_select(
    buffers: _TopkBuffers, rows: int, k: int, distances: int, ids: int, launch: _Launch, /
) -> int: ...
def interpolate(base: _Rows, memory: _Rows, alpha: float, alphas: int, log_probs: int, launch: _Launch, /) -> int: ...
def interpolate_log_prob(
    base: _Rows, memory: _Rows, alpha: float, alphas: int, targets: int, log_prob: int, launch: _Launch, /
) -> int: ...
def interpolate_argmax(
    base: _Rows, memory: _Rows, alpha: float, alphas: int, tokens: int, launch: _Launch, /
) -> int: ...
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
    seeds_stride: int,
    offset: int,
    offsets: int,
    offsets_stride: int,
    tokens: int,
    launch: _Launch,
    /,
) -> int: ...
def verify_draft(
    base: _Rows,
    memory: _Rows,
    alpha: float,
    alphas: int,
    texts: int,
    drafted: int,
    draft_ids: int,
    lengths: int,
    greedy: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    seeds: int,
    seeds_stride: int,
    offset: int,
    offsets: int,
    offsets_stride: int,
    accepted: int,
    next: int,
    launch: _Launch,
    /,
) -> int: ...
def interpolate_sparse(
    base: _Rows, teacher: _Sparse, alpha: float, alphas: int, log_probs: int, launch: _Launch, /
) -> int: ...

# CUDA only
def linear_of_rows(
    dtype: int,
    rows: int,
    width: int,
    outputs: int,
    gated: bool,
    x: int,
    x_stride: int,
    norm: int,
    epsilon: float,
    weight: int,
    bias: int,
    residual: int,
    residual_stride: int,
    result: int,
    launch: _Launch,
    /,
) -> int: ...

# shape: layers, hidden, heads, key heads, width of a head, width of the MLP, vocabulary
def decode_step(
    dtype: int,
    texts: int,
    tokens: int,
    shape: tuple[int, ...],
    room: int,
    filled: int,
    layer: int,
    epsilon: float,
    scale: float,
    embedded: int,
    cos: int,
    sin: int,
    turns_stride: int,
    mask: int,
    mask_stride: int,
    norm: int,
    head: int,
    head_bias: int,
    logits: int,
    logits_stride: int,
    launch: _Launch,
    /,
) -> int: ...
