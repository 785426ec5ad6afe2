"""Weights trained in float32 behind a model that computes in bfloat16.

    master (float32) ──round──▶ parameters (bfloat16) ──forward, backward──▶ gradients (bfloat16)
       ▲                                                                        │ added up in float32,
       └──────────────────────────────  AdamW  ◀────────────────────────────────┘ one micro-batch after another

All parameters lie in two flat float32 buffers (one with weight decay: matrices; one without: norms and biases), so that
the optimiser, the norm, the sum over processes and a checkpoint each deal with two tensors. On a CPU with bfloat16
instructions this is several times as fast as float32 parameters under autocast, which converts every weight and its
gradient in each step; and updates smaller than bfloat16's step are not lost, as they would be without the master.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUPS = ("decayed", "plain")


class MasterWeights:
    """Float32 master copy of a model's parameters with its gradients and AdamW's moments.

    The model's own parameters become views of the master (float32) or rounded copies of it (any other dtype); their
    gradients move into the master's as soon as autograd has them, and take no memory afterwards.

    Args:
        model: float32 parameters; all that require gradients are trained.
        dtype: what the model computes in from now on.
        weight_decay: AdamW's decay, on tensors of two or more dimensions.
        betas: AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies: list[tuple[Tensor, Tensor]] = []  # (parameter, its place in the master)
        self.flat: dict[str, nn.Parameter] = {}
        groups = []
        for name in GROUPS:
            members = [p for p in trained if (p.ndim >= 2) == (name == "decayed")]
            if not members:
                continue
            flat = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in members]))
            flat.grad = torch.zeros_like(flat)
            self.flat[name] = flat
            groups.append({"params": [flat], "weight_decay": weight_decay if name == "decayed" else 0.0})
            start = 0
            for parameter in members:
                stop = start + parameter.numel()
                place = flat.data[start:stop].view(parameter.shape)
                parameter.data = place if dtype == torch.float32 else place.to(dtype)
                if dtype != torch.float32:
                    self._copies.append((parameter, place))
                hook = collect_into(flat.grad[start:stop])
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                start = stop
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        device = trained[0].device
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cpu", "cuda"))

    @property
    def gradients(self) -> list[Tensor]:
        """The flat float32 gradients."""
        return [flat.grad for flat in self.flat.values() if flat.grad is not None]

    def gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient: float32 scalar."""
        norms: list[Tensor] = [torch.linalg.vector_norm(grad) for grad in self.gradients]
        return torch.stack(norms).square().sum().sqrt()

    def step(self, learning_rate: float, scale: Tensor) -> None:
        """One AdamW step on the gradient times `scale`, after which the model has the new weights and no gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for grad in self.gradients:
            grad.mul_(scale)
        self.optimizer.step()
        for grad in self.gradients:
            grad.zero_()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master into the model's parameters."""
        for parameter, place in self._copies:
            parameter.copy_(place)

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on: the master and the moments, float32, by name."""
        tensors: dict[str, Tensor] = {}
        for name, flat in self.flat.items():
            tensors[f"{name}.weight"] = flat.data
            moments = self.optimizer.state[flat]
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = moments[moment] if moments else torch.zeros_like(flat.data)
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take up what :meth:`state` gave after `steps` optimiser steps.

        Raises:
            ValueError: the tensors are of another model.
        """
        for name, flat in self.flat.items():
            for part in ("weight", "exp_avg", "exp_avg_sq"):
                found = tensors.get(f"{name}.{part}")
                if found is None or found.shape != flat.shape:
                    shape = None if found is None else tuple(found.shape)
                    raise ValueError(f"{name}.{part}: got {shape}, wanted {tuple(flat.shape)}")
            flat.data.copy_(tensors[f"{name}.weight"])
            device = flat.device
            self.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=device if device.type == "cuda" else "cpu"),
                "exp_avg": tensors[f"{name}.exp_avg"].to(device, copy=True),
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(device, copy=True),
            }
        self.publish()


def collect_into(place: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to `place` (flat, float32) and frees it."""

    def collect(parameter: Tensor) -> None:
        if parameter.grad is not None:
            place.add_(parameter.grad.reshape(-1))
            parameter.grad = None

    return collect
