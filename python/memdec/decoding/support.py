"""What the engine takes over from transformers' loop, and the reason where it does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from memdec.decoding.cache import can_roll_back
from memdec.modeling.cache import GENERATION_CACHE

ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, LogitNormalization)
# Whose answer for a row is a matter of that row.
ROW_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
WANTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# `tokenizer` is that of stop strings, which arrive as criteria.
KNOWN_INPUTS = {"attention_mask", "position_ids", GENERATION_CACHE, "use_cache", "logits_to_keep", "tokenizer"}


@dataclass(frozen=True)
class Warpers:
    """What is done to the mixture before a draw, as ``ops.interpolate_sample`` takes it."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def none(self) -> bool:
        """Whether the mixture is drawn from as it is."""
        return self == Warpers()

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the ops."""
        return asdict(self)


def warpers_of(processors: Any) -> Warpers | None:
    """The four warpers in transformers' order; None where there is anything else, or another order.

    Everything else looks at the text so far, or is of the caller's own making: it would have to be applied to each
    position of a draft with the text of that position.
    """
    places = [ORDER.index(type(p)) if type(p) in ORDER else -1 for p in processors]
    if -1 in places or places != sorted(set(places)):
        return None
    found: dict[str, Any] = {}
    for processor in processors:
        if getattr(processor, "min_tokens_to_keep", 1) != 1 or getattr(processor, "filter_value", -1e9) > -1e8:
            return None
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if hasattr(processor, name):
                found[name] = getattr(processor, name)
    return Warpers(**found)


def why_not(
    model: Any, rows: int, processors: Any, criteria: Any, config: Any, streamer: Any, inputs: dict[str, Any]
) -> str | None:
    """Why transformers' own loop must decode this; None where the engine can."""
    if not model.memory_enabled:
        return "the memory is disabled"
    if config.return_dict_in_generate or any(getattr(config, name) for name in WANTED_OUTPUTS):
        return "more than the tokens is to be returned"
    if not inputs.get("use_cache", True):
        return "use_cache is off"
    if config.cache_implementation is not None or config.prefill_chunk_size is not None:
        return "a kind of cache or a chunked prefill was asked for"
    unknown = {name for name, value in inputs.items() if value is not None} - KNOWN_INPUTS
    if unknown:
        return f"further model inputs: {', '.join(sorted(unknown))}"
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
        return "prompts that are padded on the right"
    cache = inputs.get(GENERATION_CACHE)
    if cache is not None and int(cache.get_seq_length()) > 0:
        return "the text goes on from a cache"
    if warpers_of(processors) is None:
        return "logits processors other than temperature, top_k, top_p, min_p, in this order"
    if rows > 1 and streamer is not None:
        return "a streamer of several rows"
    others = [c for c in criteria if type(c) not in ROW_CRITERIA]
    if rows > 1 and others:
        return f"a stopping criterion of one's own ({type(others[0]).__name__}) and several rows"
    ends = any(isinstance(c, EosTokenCriteria) for c in criteria)
    if rows > 1 and not ends and any(not isinstance(c, MaxLengthCriteria) for c in criteria):
        return "several rows that can stop, but no end-of-text token to pad behind"
    for name, one in (("base", model.base), ("memory", model.memory)):
        if one._is_stateful or not can_roll_back(one):
            return f"the {name}'s cache cannot take tokens back (sliding windows, or a state)"
    return None


def tensors_of(one: Any) -> list[Tensor]:
    """The parameters and buffers of a model, a shared one as often as it is shared: in a quarter of the time that
    ``parameters()`` and ``buffers()`` take, since every text begins with it."""
    kinds = [kind for module in one.modules() for kind in (module._parameters, module._buffers)]
    return [tensor for kind in kinds for tensor in kind.values() if tensor is not None]


def rotates_by_length(one: Any) -> bool:
    """Whether a model's rotary embedding turns a position by what depends on the longest one beside it."""
    kinds = [str(getattr(module, "rope_type", "")) for module in one.modules()]
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def why_not_itself(one: Any) -> str | None:
    """What one of the models does beside what its weights and its class say; None where that is all."""
    if one.training:
        return "is in training mode"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "has hooks, as every module"
    for module in one.modules():
        if type(module).__module__.startswith("peft."):
            return "has an adapter, which may be switched"
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return "has hooks"
    return None
