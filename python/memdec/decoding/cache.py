"""Caches that take tokens back: memory is set aside once, tokens are written into it, what is forgotten is not counted.

In a :func:`rollback_cache` all rows have one length, and a crop is a shorter one. In a :func:`slot_cache` each row
writes where a tensor says and a mask hides the rest, so that nothing of it changes in Python: a CUDA graph can be
replayed.
"""

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

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens behind those that count; where, :meth:`lazy_initialization` must have said."""
        stop = self.length + tokens
        if stop > self.room:
            room = max(stop, 2 * self.room)
            self.stores = [
                torch.cat([old, old.new_zeros(*old.shape[:2], room - old.shape[2], old.shape[3])], 2)
                for old in self.stores
            ]
            self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends, and gives all that is there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[-2])
        start, self.length = self.length, self.length + key_states.shape[-2]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start : self.length] = states
        self.keys, self.values = (store[:, :, : self.length] for store in self.stores)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens that count."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a negative number, as transformers has it."""
        if self.is_initialized:
            self.length -= abs(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self.stores = [store[indices] for store in self.stores]


def begin_without_prompt(cache: Cache, like: Tensor, rows: int, heads: int, dim: int) -> None:
    """Sets the memory of the layers aside where no prompt has; of the dtype and device of `like`."""
    for layer in cache.layers:
        if not layer.is_initialized:
            none = like.new_empty(rows, heads, 0, dim)
            layer.lazy_initialization(none, none)


def can_roll_back(model: Any) -> bool:
    """Whether every layer of the model's own cache is a plain list of keys and values, without windows or states."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def rollback_cache(model: Any, room: int) -> Cache:
    """An empty cache for a model that :func:`can_roll_back`."""
    return Cache(layers=[RollbackLayer(room) for _ in DynamicCache(config=model.config).layers])


class Slots:
    """Where the tokens that a model reads next go, the same for all of its layers.

    Attributes:
        at: (B, n) int64; None: a prompt, which goes to the first slots and attends to itself alone.
    """

    def __init__(self) -> None:
        self.at: Tensor | None = None


class SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values (B, heads, room, dim) at addresses that stay; a mask must hide the slots that do not count.

    (transformers' StaticLayer writes all rows to the same place, and counts what it wrote.)

    Args:
        room: tokens that there is memory for.
        slots: where tokens go.
    """

    def __init__(self, room: int, slots: Slots) -> None:
        super().__init__()
        self.room = room
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Sets the memory aside, now that heads, width, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes, and gives the whole room; of a prompt, what came in."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            if self.slots.at is None:
                store[:, :, : states.shape[2]] = states
            else:
                store.scatter_(2, self.slots.at[:, None, :, None].expand_as(states), states)
        if self.slots.at is None:
            return key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """0: how much counts is known on the device only, and asked for a prompt alone."""
        return 0

    def clear(self, where: Tensor) -> None:
        """Zeros in the slots that a mask (B, room) names."""
        if self.is_initialized:
            for store in (self.keys, self.values):
                store.masked_fill_(where[:, None, :, None], 0.0)

    def copy_from(self, other: SlotLayer) -> None:
        """Takes over what a layer of less room holds."""
        if other.is_initialized:
            if not self.is_initialized:
                self.lazy_initialization(other.keys, other.values)
            self.keys[:, :, : other.room] = other.keys
            self.values[:, :, : other.room] = other.values


def wipe(cache: Cache) -> None:
    """Zeros in all layers of a :func:`slot_cache`, in few kernels: a NaN behind a mask would still be a NaN."""
    stores = [store for layer in cache.layers if layer.is_initialized for store in (layer.keys, layer.values)]
    if stores:
        torch._foreach_zero_(stores)


def slot_cache(model: Any, room: int) -> tuple[Cache, Slots]:
    """An empty cache at fixed addresses for a model that :func:`can_roll_back`, and what says where tokens go."""
    slots = Slots()
    return Cache(layers=[SlotLayer(room, slots) for _ in DynamicCache(config=model.config).layers]), slots
