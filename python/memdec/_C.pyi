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
