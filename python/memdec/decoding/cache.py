"""A cache that takes tokens back: memory is set aside once, tokens are written into it, a crop is a shorter length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class RollbackLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values (B, heads, room, dim) of which the first `length` tokens count.

    Args:
        room: tokens to set memory aside for; it grows where more come.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0
        self.stores: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Sets the memory aside, now that heads, width, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, not garbage: a NaN behind a mask would still be a NaN.
        self.stores = [x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends, and gives all that is there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.length, self.length + key_states.shape[-2]
        if stop > self.room:
            self.room = max(stop, 2 * self.room)
            self.stores = [
                torch.cat([old, old.new_zeros(*old.shape[:2], self.room - old.shape[2], old.shape[3])], 2)
                for old in self.stores
            ]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start:stop] = states
        self._cut(stop)
        return self.keys, self.values

    def _cut(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (store[:, :, :length] for store in self.stores)

    def get_seq_length(self) -> int:
        """Tokens that count."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a negative number, as transformers has it."""
        if self.is_initialized and tokens_to_remove:
            self._cut(self.length - abs(tokens_to_remove))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self.stores = [store[indices] for store in self.stores]
        self._cut(self.length)


def can_roll_back(model: Any) -> bool:
    """Whether every layer of the model's own cache is a plain list of keys and values, without windows or states."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def rollback_cache(model: Any, room: int) -> Cache:
    """An empty cache for a model that :func:`can_roll_back`."""
    return Cache(layers=[RollbackLayer(room) for _ in DynamicCache(config=model.config).layers])
