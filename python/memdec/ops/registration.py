"""The ops as torch.library operators, for torch.compile, export and functorch.

Eager calls do not come here: a registered operator costs 7 to 40 µs a call, the direct call into the extension about 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("memdec", "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define ``memdec::<schema>``: its CPU kernel, its shapes, and its gradient where it has one.

    Args:
        schema: as torch.library writes it, such as ``"token_log_prob(Tensor logits, Tensor targets) -> Tensor"``.
        kernel: computes it, on plain tensors.
        fake: gives empty outputs of the right shape, dtype and device.
        backward: (ctx, *gradients) -> a gradient or None for each input.
        setup_context: (ctx, inputs, output): saves what backward needs.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"memdec::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"memdec::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether this call must go through the registered operator: compiled, transformed, or not on a plain tensor."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
    )
