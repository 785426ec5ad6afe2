"""memdec's tensor ops: the loss against sparse teachers, neighbour aggregation, and mixing in log space.

Every op takes float32, bfloat16 or float16 tensors (float64 too on the CPU), with any leading dimensions and rows
that may be strided; it accumulates in float32 (float64 for float64) and returns losses and log-probs in that type.
"""

from memdec.ops import reference
from memdec.ops.aggregate_neighbors import aggregate_neighbors
from memdec.ops.alignment_loss import alignment_loss
from memdec.ops.interpolate import interpolate
from memdec.ops.interpolate_argmax import interpolate_argmax
from memdec.ops.interpolate_log_prob import interpolate_log_prob
from memdec.ops.interpolate_sample import interpolate_sample
from memdec.ops.interpolate_sparse import interpolate_sparse
from memdec.ops.linear_alignment_loss import linear_alignment_loss
from memdec.ops.reference import AlignmentLoss, VerifiedDraft
from memdec.ops.token_log_prob import token_log_prob
from memdec.ops.verify_draft import verify_draft

__all__ = [
    "AlignmentLoss",
    "VerifiedDraft",
    "aggregate_neighbors",
    "alignment_loss",
    "interpolate",
    "interpolate_argmax",
    "interpolate_log_prob",
    "interpolate_sample",
    "interpolate_sparse",
    "linear_alignment_loss",
    "reference",
    "token_log_prob",
    "verify_draft",
]
