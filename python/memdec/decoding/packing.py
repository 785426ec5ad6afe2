"""Linear maps of a few rows on the CPU, by oneDNN's packed products where they are faster than PyTorch's own.

To verify drafts, a model multiplies two to nine rows by each of its weights. That should cost what one row costs: the
reading of the weights. PyTorch's float32 product for a handful of rows may take two or three times as long, because it
rearranges the weights every time; oneDNN, which PyTorch brings along, multiplies by weights that were rearranged once.

While a text is decoded, the linear maps of a model without steps of our own (:mod:`memdec.decoding.stepping`) are those
of oneDNN. It keeps a second copy of the weights, as long as the model lives; ``MEMDEC_PACK=0`` in the environment does
without. A trial of the model's largest map decides whether packing pays on this machine.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

LOGGER = logging.getLogger(__name__)

MOST_ROWS = 16  # beyond, PyTorch's product is the faster one
LEAST_WEIGHTS = 1 << 16  # a smaller matrix lies in a cache: nothing is gained
GAIN = 0.85  # packing pays if it takes at most so much of the time
TRIAL_ROWS = (1, 5)
SAMPLE = 16


@dataclass
class Packed:
    """A weight as oneDNN wants it, and what tells whether the module's own has changed since."""

    weight: Tensor
    address: int
    version: int
    sample: Tensor

    def is_current(self, weight: Tensor) -> bool:
        """Whether `weight` is what was packed; of its values, those that were sampled are compared."""
        if (weight.data_ptr(), weight._version) != (self.address, self.version):
            return False
        return torch.equal(_sample(weight), self.sample)


_PACKED: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()
_PAYS: dict[torch.dtype, bool] = {}


@contextmanager
def packed_linears(*models: nn.Module) -> Iterator[None]:
    """Within it, linear maps of `models` that lie on the CPU multiply few rows by packed weights, where that pays."""
    packed: list[nn.Linear] = []
    try:
        with torch.no_grad():
            for model in models:
                found = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_pack(module)]
                if found and pays(max((module.weight for module in found), key=Tensor.numel)):
                    for module in found:
                        module.__dict__["forward"] = _forward(module)
                        packed.append(module)
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)


def pays(weight: Tensor) -> bool:
    """Whether packed products of weights such as this are faster; tried once for each dtype."""
    if os.environ.get("MEMDEC_PACK", "") == "0":
        return False
    if weight.dtype not in _PAYS:
        try:
            _PAYS[weight.dtype] = _trial(weight.detach())
        except (RuntimeError, AttributeError, NotImplementedError) as problem:  # this PyTorch has no such product
            LOGGER.debug("no packed weights: %s", problem)
            _PAYS[weight.dtype] = False
    return _PAYS[weight.dtype]


def _trial(weight: Tensor) -> bool:
    packed = _pack(weight)
    ours = theirs = 0.0
    for rows in TRIAL_ROWS:
        x = torch.ones(1, rows, weight.shape[1], dtype=weight.dtype)
        ours += _least_time(lambda x=x: _product(x, packed, None))  # type: ignore[misc]
        theirs += _least_time(lambda x=x: functional.linear(x, weight))  # type: ignore[misc]
    LOGGER.debug("packed weights take %.2f of the time, %s", ours / theirs, weight.dtype)
    return ours <= GAIN * theirs


def _least_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _can_pack(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__  # someone else has replaced it
        and module.weight.is_cpu
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.numel() >= LEAST_WEIGHTS
    )


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), module.bias
    known = _PACKED.get(module)
    if known is None or not known.is_current(weight):
        known = Packed(_pack(weight), weight.data_ptr(), weight._version, _sample(weight).clone())
        _PACKED[module] = known
    packed = known.weight

    def forward(x: Tensor) -> Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != weight.dtype:
            return functional.linear(x, weight, bias)
        return _product(x, packed, bias)

    return forward


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]
