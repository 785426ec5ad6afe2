"""The twin cache: the keys and values of both models of a composite, in step with each other.

transformers' generation treats it as one cache: what it does to the batch (reorder for beams, repeat, select) or to the
length (crop, reset) happens to both halves, and what it asks about the length is answered by the base's half.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from memdec.errors import MemdecError

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(function: Callable[..., Any]) -> str:
    """What a function calls the cache that it takes: "cache" since transformers 5.24, before "past_key_values"."""
    return CACHE_NAMES[0] if CACHE_NAMES[0] in inspect.signature(function).parameters else CACHE_NAMES[1]


# What this transformers' generate calls it, and what outputs do.
GENERATION_CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)


class TwinCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A base's cache and a memory's cache of the same text.

    Args:
        base: the base's cache.
        memory: the memory's; None when the text was read with the memory disabled.
    """

    def __init__(self, base: Cache, memory: Cache | None) -> None:
        # Cache.__init__ makes layers of its own; here they belong to the two halves.
        self.base = base
        self.memory = memory

    @property
    def halves(self) -> list[Any]:
        """The caches there are: one or two."""
        return [self.base] if self.memory is None else [self.base, self.memory]

    @property
    def layers(self) -> list[Any]:
        """The layers of both halves, the base's first."""
        return [layer for half in self.halves for layer in half.layers]

    @property
    def offloading(self) -> bool:
        """Whether a half keeps its layers on the CPU between steps."""
        return any(half.offloading for half in self.halves)

    def __repr__(self) -> str:
        return f"TwinCache(base={self.base!r}, memory={self.memory!r})"

    def __len__(self) -> int:
        return len(self.base)

    def update(self, *arguments: Any, **named: Any) -> Any:
        """Never called by a composite: each of its models updates its own half."""
        raise MemdecError(
            "a TwinCache holds the caches of two models and cannot be given to one; give it to the MemoryModel, or "
            "give .base or .memory to the model that it belongs to."
        )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of tokens that have been read (an int, or a tensor for a static cache)."""
        return self.base.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Number of tokens that fit in both halves; −1 when nothing limits it."""
        lengths = [half.get_max_length(layer_idx) for half in self.halves]
        return min((length for length in lengths if length >= 0), default=-1)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
        """Length and offset of the keys that the base's layer sees."""
        return self.base.get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Empties both halves and keeps their memory."""
        for half in self.halves:
            half.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in both halves."""
        for half in self.halves:
            half.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of both halves; a negative number, as transformers wants it."""
        for half in self.halves:
            half.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of both halves."""
        for half in self.halves:
            half.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of both halves."""
        for half in self.halves:
            half.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Makes halves that forget (sliding windows) keep what a crop would need."""
        for half in self.halves:
            half.activate_past_recording()

    @property
    def batch_size(self) -> int:
        """Number of rows, −1 before the first forward."""
        return int(self.base.batch_size)

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile may trace through both halves: static ones."""
        return all(half.is_compileable for half in self.halves)

    @property
    def is_initialized(self) -> bool:
        """Whether both halves have their tensors."""
        return all(half.is_initialized for half in self.halves)

    @property
    def is_croppable(self) -> bool:
        """Whether a crop leaves no trace in either half."""
        return all(half.is_croppable for half in self.halves)

    @property
    def is_sliding(self) -> list[bool]:
        """For each of the base's layers, whether it sees a sliding window only."""
        return list(self.base.is_sliding)
