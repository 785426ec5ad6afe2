"""The ops as torch.library operators, for torch.compile, export and torch.func.vmap.

Eager calls do not come here: a registered operator costs 7 to 40 µs a call, the direct call into the extension about 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("memdec", "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define ``memdec::<schema>``: its kernel on CPU and CUDA, its shapes, and its gradient where it has one.

    Args:
        schema: as torch.library writes it, such as ``"token_log_prob(Tensor logits, Tensor targets) -> Tensor"``.
        kernel: computes it, on plain tensors.
        fake: gives empty outputs of the right shape, dtype and device.
        backward: (ctx, *gradients) -> a gradient or None for each input.
        setup_context: (ctx, inputs, output): saves what backward needs.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"memdec::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"memdec::{name}", backward, setup_context=setup_context, lib=LIBRARY)


_is_compiling = torch.compiler.is_compiling
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Private names, both in torch since 2.0. Without them every call takes the registered path, which is always right.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def is_traced(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through the registered operator: compiled, transformed, watched by a dispatch mode, or not
    on plain tensors in the memory of the CPU or of a CUDA device.

    Raises:
        NotImplementedError: forward-mode differentiation is under way and one of the tensors has a tangent.
    """
    if getattr(forward_ad, "_current_level", 0) >= 0:
        refuse_tangents(*tensors)
    if torch.compiler.is_compiling() or _transforms_active() or _dispatch_modes():
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda)):
            return True
    return False


def is_watched() -> bool:
    """Whether anything but the tensors themselves may make :func:`is_traced` say yes, or raise."""
    return bool(
        _is_compiling() or _transforms_active() or _dispatch_modes() or getattr(forward_ad, "_current_level", 0) >= 0
    )


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise for a tensor with a tangent (``torch.func.jvp``, ``make_dual``), which a kernel would drop unseen."""
    for tensor in tensors:
        if tensor is None:
            continue
        tangent = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
        if tangent is not None:
            raise NotImplementedError(
                "memdec's ops have no forward-mode derivative; use reverse mode: backward or torch.autograd.grad"
            )


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd is recording and one of the tensors asks for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_grad(op: str, instead: str, **tensors: torch.Tensor | None) -> None:
    """Raise where an op that has no gradient is given tensors that want one, rather than cut the graph unseen."""
    for name, tensor in tensors.items():
        if wants_grad(tensor):
            raise ValueError(
                f"{name}: got a tensor that requires grad, but {op} has no gradient; "
                f"call it under torch.no_grad(), detach {name}, or use {instead}"
            )
