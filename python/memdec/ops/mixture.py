"""What the interpolate family shares: how two logit tensors and α reach the kernels, and the gradient's ingredients."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec.ops import checks
from memdec.ops.registration import is_watched
from memdec.ops.rows import Rows, plain_rows, rows


def described_pair(base_logits: Tensor, memory_logits: Tensor) -> tuple[Tensor, Tensor, Rows, Rows]:
    """Both tensors in one dtype (the wider, should they differ: a copy), and what the extension needs to read them.

    The tensors are returned because they own the memory that the descriptions point to.
    """
    if base_logits.dtype != memory_logits.dtype:
        dtype = torch.promote_types(base_logits.dtype, memory_logits.dtype)  # float32 for a bfloat16 and a float16
        base_logits, memory_logits = base_logits.to(dtype), memory_logits.to(dtype)
    base_logits, base = rows(base_logits, "base_logits")
    memory_logits, memory = rows(memory_logits, "memory_logits")
    return base_logits, memory_logits, base, memory


def plain_pair(base_logits: Tensor, memory_logits: Tensor, alpha: float | Tensor) -> tuple[Rows, Rows, float] | None:
    """Both descriptions and α, if the tensors are alike and of the common kind, α a float, and nobody traces the call.

    Then there is nothing to refuse or to copy, and ``checked``, ``is_traced`` and ``described_pair`` would find just
    this. For anything else None: what they cost does not matter there.
    """
    if is_watched() or type(alpha) is not float or not 0 <= alpha <= 1:
        return None
    base, memory = plain_rows(base_logits), plain_rows(memory_logits)
    if base is None or memory is None or base[1] != memory[1] or base_logits.shape != memory_logits.shape:
        return None
    if not (base_logits.is_cpu and memory_logits.is_cpu) and base_logits.device != memory_logits.device:
        return None
    return base, memory, alpha


def alpha_rows(alphas: Tensor | None, shape: torch.Size, device: torch.device) -> tuple[Tensor | None, int]:
    """α of each row as a contiguous float64 tensor on the device, and its address; (None, 0) where it is one number.

    The CPU kernels check the values; those of CUDA give NaN or token −1 for a row whose α is not in [0, 1]. With
    ``MEMDEC_DEBUG=1`` they are checked here, and the host waits for them.

    Raises:
        ValueError: an α outside [0, 1] that the host holds while the logits are on CUDA, or with ``MEMDEC_DEBUG=1``.
    """
    if alphas is None:
        return None, 0
    alphas = alphas.detach()
    if alphas.device != device:
        # A number in a tensor on the CPU: filled in on the device, because a copy would wait for it.
        alphas = torch.full((), checks.fraction("alpha", float(alphas)), dtype=torch.float64, device=device)
    alphas = alphas.to(torch.float64).expand(shape).contiguous()
    if checks.DEBUG and alphas.is_cuda:
        checks.fractions("alpha", alphas)
    return alphas, alphas.data_ptr()


def wide_dtype(base_logits: Tensor, memory_logits: Tensor) -> torch.dtype:
    """The dtype of the mixture's log-probs: float64 where either tensor is, else float32."""
    double = torch.float64 in (base_logits.dtype, memory_logits.dtype)
    return torch.float64 if double else torch.float32


def components(
    base_logits: Tensor, memory_logits: Tensor, alpha: float, alphas: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs of both components (…, V) and α (…, 1), all in the wide dtype: what the gradients are written with."""
    wide = wide_dtype(base_logits, memory_logits)
    if alphas is None:
        a = torch.full((1,), alpha, dtype=wide, device=base_logits.device)
    else:
        a = alphas.to(device=base_logits.device, dtype=wide)[..., None]
    return torch.log_softmax(base_logits.to(wide), -1), torch.log_softmax(memory_logits.to(wide), -1), a


def checked(base_logits: Tensor, memory_logits: Tensor, alpha: float | Tensor) -> tuple[float, Tensor | None]:
    """Check the three arguments that the family has in common; α comes back as (number, None) or (0.0, tensor)."""
    checks.logits_pair(base_logits, memory_logits)
    checks.kernels(base_logits=base_logits, memory_logits=memory_logits)
    return checks.alpha(alpha, base_logits)
