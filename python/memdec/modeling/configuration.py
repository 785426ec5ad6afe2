"""The configuration of a composite: what its two models are, and the weight of the memory."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig


class MemoryModelConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """A base's and a memory's configuration side by side, as plain dictionaries, with what describes the pair.

    Attributes:
        base_config: the base's configuration; a copy, so that what is done to the composite cannot change the base.
        memory_config: the memory's configuration; a copy.
        alpha: weight of the memory in the mixture, from 0 to 1.
        vocab_size: number of ids that the mixture is over: the tokenizer's, without either model's padding.
        max_position_embeddings: length of text that both models can read.
        hidden_size, num_hidden_layers: the base's.
    """

    model_type = "memory_decoder"

    base_config: dict[str, Any] | None = None
    memory_config: dict[str, Any] | None = None
    alpha: float = 0.5
    vocab_size: int = 0
    max_position_embeddings: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None

    @classmethod
    def of(cls, base: Any, memory: Any, *, alpha: float, vocab_size: int) -> MemoryModelConfig:
        """The configuration of the composite of two loaded models."""
        text = base.config.get_text_config(decoder=True)
        other = memory.config.get_text_config(decoder=True)
        lengths = [getattr(config, "max_position_embeddings", None) for config in (text, other)]
        return cls(
            base_config=copy.deepcopy(base.config).to_dict(),
            memory_config=copy.deepcopy(memory.config).to_dict(),
            alpha=alpha,
            vocab_size=vocab_size,
            max_position_embeddings=min((length for length in lengths if length is not None), default=None),
            hidden_size=getattr(text, "hidden_size", None),
            num_hidden_layers=getattr(text, "num_hidden_layers", None),
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
        )
