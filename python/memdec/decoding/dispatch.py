"""From transformers' prepared generation to the engine, or back with the reason why not."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from memdec.decoding import engine, graphs
from memdec.decoding.plan import FIRST_DRAFT, Estimates
from memdec.decoding.stepping import quick_steps
from memdec.decoding.support import warpers_of, why_not
from memdec.errors import MemdecError
from memdec.modeling.cache import GENERATION_CACHE
from memdec.modeling.decode import Decode

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What ``MemoryModel.generate`` was asked for beyond transformers' arguments.

    Attributes:
        decoding: "auto", "parallel" or "speculative".
        draft_tokens: γ of "speculative"; None is the default one.
        given: names of the model inputs that the caller gave.
    """

    decoding: str
    draft_tokens: int | None
    given: frozenset[str]


def run(
    model: Any,
    request: Request,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
    inputs: dict[str, Any],
    estimates: dict[Any, Estimates],
) -> tuple[Tensor, Decode] | str:
    """The continued rows with what was done, or why transformers' own loop has to do it."""
    reason = why_not(model, input_ids.shape[0], processors, criteria, config, streamer, inputs)
    own = request.given & {GENERATION_CACHE, "position_ids"}
    if own:
        names = ("a cache" if name == GENERATION_CACHE else name for name in sorted(own))
        reason = f"{', '.join(names)} was given"
    mask = inputs.get("attention_mask")
    if reason is None and mask is not None and mask.shape != input_ids.shape:
        reason = f"the attention mask {tuple(mask.shape)} has not the shape of the tokens {tuple(input_ids.shape)}"
    max_length = min(length for length in (criteria.max_length, config.max_length) if length is not None)
    short = _short_memory(model, max_length)
    ends = bool(short) and _has_position_table(model.memory)
    if reason is None and short and request.decoding == "auto" and not ends:
        reason = short
    if reason is not None:
        level = logging.INFO if request.decoding == "auto" else logging.WARNING
        if not model.memory_enabled:
            level = logging.DEBUG  # whoever disabled it knows
        LOGGER.log(level, "decoding=%r goes one token at a time, as composite: %s", request.decoding, reason)
        return reason
    if short:
        further = "decode with decoding='composite', which goes on beyond what the memory was made for"
        if ends:
            further = "disable the memory (its positions are a table, which ends there)"
        raise MemdecError(f"{short}; ask for fewer new tokens, shorten the prompt, or {further}.")
    uncaptured = graphs.why_not(model, input_ids.device)
    warpers = warpers_of(processors) if config.do_sample else None
    fixed = {"parallel": 0, "speculative": request.draft_tokens or FIRST_DRAFT}
    pad = config._pad_token_tensor
    claim = graphs.claimed(input_ids.device) if uncaptured is None else nullcontext(False)
    with claim as ours, quick_steps(model.base, model.memory):
        if not ours:
            uncaptured = uncaptured or "another text is being written by graphs on the device"
            LOGGER.log(logging.INFO if input_ids.is_cuda else logging.DEBUG, "without CUDA graphs: %s", uncaptured)
        key = (input_ids.shape[0], round(model.alpha, 2), warpers, ours)
        known = estimates.setdefault(key, Estimates())
        decode = graphs.decode if ours else engine.decode
        return decode(
            model,
            input_ids,
            inputs.get("attention_mask"),
            criteria=criteria,
            max_length=max_length,
            pad_token=None if pad is None else int(pad),
            warpers=warpers,
            draft_tokens=fixed.get(request.decoding, known),
            estimates=known,
            streamer=streamer,
        )


def _short_memory(model: Any, max_length: int) -> str | None:
    """Says so where the text may outgrow the memory's context, but not the base's."""
    base, memory = (
        getattr(one.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for one in (model.base, model.memory)
    )
    if memory is None or max_length <= memory or (base is not None and base <= memory):
        return None
    return f"the memory reads up to {memory} tokens (the base {base}), and the text may become {max_length} long"


def _has_position_table(one: Any) -> bool:
    """Whether a model has learned its positions, so that there are none beyond its context."""
    context = getattr(one.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = (part for part in one.modules() if isinstance(part, nn.Embedding))
    vocabulary = one.get_input_embeddings()
    return any(table is not vocabulary and table.num_embeddings in (context, (context or 0) + 2) for table in tables)
