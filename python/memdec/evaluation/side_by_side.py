"""The same prompt continued by the base alone and by base + memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from memdec.errors import MemdecError
from memdec.evaluation.perplexity import HeldOutText

LOGGER = logging.getLogger(__name__)

PROMPT_TOKENS = 48


def prompts_of(
    tokenizer: Any, held_out: HeldOutText, count: int, new_tokens: int, prompt_tokens: int = PROMPT_TOKENS
) -> list[tuple[str, str | None]]:
    """Beginnings of held-out documents with their true continuations.

    The documents are those spread evenly over the ones that are long enough for a prompt and a continuation.
    """
    starts = held_out.document_starts.tolist()
    long_enough = [(start, stop) for start, stop in pairwise(starts) if stop - 1 - start >= prompt_tokens + new_tokens]
    count = min(count, len(long_enough))
    chosen = [long_enough[(2 * index + 1) * len(long_enough) // (2 * count)] for index in range(count)]
    return [
        (
            decode(tokenizer, held_out.tokens[start : start + prompt_tokens].tolist()),
            decode(tokenizer, held_out.tokens[start + prompt_tokens : start + prompt_tokens + new_tokens].tolist()),
        )
        for start, _ in chosen
    ]


def continue_prompts(
    base: Any,
    memory: Any,
    tokenizer: Any,
    alpha: float,
    prompts: Sequence[tuple[str, str | None]],
    new_tokens: int = 64,
) -> list[dict[str, str]]:
    """Continue each prompt greedily with the base alone and with the mixture.

    Args:
        base: the loaded base model.
        memory: the loaded memory.
        tokenizer: of both.
        alpha: weight of the memory.
        prompts: (prompt, true continuation or None).
        new_tokens: the most tokens of a continuation.

    Returns:
        For each prompt: ``prompt``, ``base``, ``base+memory`` and, where known, ``truth``.
    """
    from memdec import MemoryModel

    model = MemoryModel.from_pretrained(base, memory, alpha=alpha, tokenizer=tokenizer)
    found = []
    for prompt, truth in prompts:
        inputs = encode(tokenizer, prompt, model.device)
        mixed = _continue(model, inputs, new_tokens)
        with model.disable_memory():
            alone = _continue(model, inputs, new_tokens)
        entry = {"prompt": prompt, "base": decode(tokenizer, alone), "base+memory": decode(tokenizer, mixed)}
        if truth is not None:
            entry["truth"] = truth
        found.append(entry)
    return found


def _continue(model: Any, inputs: dict[str, Any], new_tokens: int) -> list[int]:
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    ids: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def encode(tokenizer: Any, prompt: str, device: Any) -> dict[str, Any]:
    """The prompt as the corpus stages tokenise text: without special tokens."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MemdecError("The prompt gives no token. Give some text to continue.")
    input_ids = torch.tensor([ids], device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of tokens, end-of-text left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def refuse_nan(model: Any, inputs: dict[str, Any]) -> None:
    """Raise ``MemdecError`` where the models give no probabilities: decoding would end at once, without a word."""
    with torch.no_grad():
        log_probs = model(**inputs, use_cache=False, logits_to_keep=1).logits
    if bool(log_probs.isnan().any()):
        raise MemdecError(
            "The models give no probabilities (NaN). The weights of one are damaged or its number type overflows: "
            "check the models, or try --dtype float32."
        )


def new_tokens_that_fit(model: Any, prompt_tokens: int, wanted: int) -> int:
    """How many of ``wanted`` new tokens both models have positions for.

    Raises:
        MemdecError: the prompt alone fills them.
    """
    found = [
        getattr(part.config.get_text_config(), "max_position_embeddings", None) for part in (model.base, model.memory)
    ]
    positions = min((value for value in found if value is not None), default=prompt_tokens + wanted)
    if prompt_tokens >= positions:
        raise MemdecError(
            f"The prompt has {prompt_tokens} tokens, the models have positions for {positions}. Give a shorter prompt."
        )
    if prompt_tokens + wanted > positions:
        LOGGER.warning("writing %d tokens: the models have %d positions", positions - prompt_tokens, positions)
    return min(wanted, positions - prompt_tokens)


def stream(
    base: str | Path,
    memory: str | Path,
    prompt: str,
    *,
    alpha: float | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    side_by_side: bool,
    dtype: str,
    device: str | None,
    decoding: str = "auto",
    draft_tokens: int | None = None,
    heading: Callable[[str], object],
) -> None:
    """Write the continuation of ``prompt`` to standard output as it comes; first the base's, if ``side_by_side``."""
    from transformers import TextStreamer

    from memdec import MemoryModel
    from memdec.pipeline.embed import default_device

    model = MemoryModel.from_pretrained(base, memory, alpha=alpha, dtype=dtype, device=device or default_device())
    tokenizer = model.tokenizer
    inputs: dict[str, Any] = encode(tokenizer, prompt, model.device)
    room = new_tokens_that_fit(model, inputs["input_ids"].shape[1], max_new_tokens)
    refuse_nan(model, inputs)
    options: dict[str, Any] = {"max_new_tokens": room, "do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p, top_k=top_k)
    options.update(decoding=decoding, draft_tokens=draft_tokens)

    def write() -> None:
        torch.manual_seed(seed)
        sys.stdout.write(prompt)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            model.generate(**inputs, **options, streamer=streamer)
        sys.stdout.flush()

    if side_by_side:
        heading("── the base alone")
        with model.disable_memory():
            write()
        heading(f"── base + memory (alpha = {model.alpha:g})")
    write()
