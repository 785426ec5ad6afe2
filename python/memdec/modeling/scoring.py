"""Scoring: one log-prob a token, from which perplexities, α curves and tests of significance all follow.

Two passes, one by each model, give log p_base(x) and log p_mem(x) of every token of a text; any mixture of the two has
log p_mix = logaddexp(log α + log p_mem, log(1−α) + log p_base), so an α curve needs no further forward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from memdec.errors import MemdecError
from memdec.modeling.sources import first_line, locate
from memdec.modeling.structure import head_is_plain, input_device, logits_from_hidden, output_head, trunk
from memdec.ops import launch, token_log_prob

LOGGER = logging.getLogger(__name__)

# The logits of one chunk of positions, in bytes of float32.
DTYPES = ("float32", "bfloat16", "float16")  # that a command may ask for
LOGITS_BUDGET = 128 * 2**20


class ScoredWindow(Protocol):
    """A stretch of a text: inputs tokens[start : stop−1], labels tokens[start+1 : stop], rows from `score_from`."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def score_from(self) -> int: ...


def score_tokens(
    model: nn.Module,
    tokens: Tensor,  # (T,) int token ids
    windows: Sequence[ScoredWindow],
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:  # (T−1,) float32
    """log p(token r+1 | its window up to token r) for every row r that a window scores, NaN for the others.

    The output head runs on a chunk of scored positions at a time, so the logits of a whole window never exist.

    Args:
        model: a transformers causal LM in any dtype, or a MemoryModel.
        tokens: the text; row r belongs to token r+1.
        windows: stretches to score, as from ``memdec.stores.windows.windows``; at most one scores a row.
        batch_size: windows a forward; shorter ones are padded on the right, which a causal model does not see.
        device: where the inputs go; None takes the model's own.
        vocab_size: number of logit columns that count (the tokenizer's width); None counts all, padding included.
        progress: called with the number of rows scored since the last call.

    Returns:
        float32 log-probs on the CPU, in nats.

    Raises:
        MemdecError: the model gave NaN for a scored token, or a token id outside its vocabulary came.
    """
    where = torch.device(device) if device is not None else input_device(model)
    scores = torch.full((max(int(tokens.numel()) - 1, 0),), math.nan)
    # Longest first: windows of one length share a batch, and a batch that does not fit fails at once.
    order = sorted(windows, key=lambda window: window.start - window.stop)
    log_probs_of = chunked_log_prob(model, vocab_size)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = [window for window in order[first : first + batch_size] if window.stop - window.start > 1]
            if not batch:
                continue
            length = max(window.stop - window.start for window in batch) - 1
            inputs = torch.zeros(len(batch), length, dtype=torch.long)
            labels = torch.zeros(len(batch), length, dtype=torch.long)
            rows = torch.full((len(batch), length), -1, dtype=torch.long)
            for index, window in enumerate(batch):
                count = window.stop - window.start - 1
                inputs[index, :count] = tokens[window.start : window.stop - 1]
                labels[index, :count] = tokens[window.start + 1 : window.stop]
                rows[index, window.score_from - window.start : count] = torch.arange(window.score_from, window.stop - 1)
            scored = rows >= 0
            found = log_probs_of(inputs.to(where), labels.to(where), scored.to(where))
            scores[rows[scored]] = found.cpu()
            if progress is not None:
                progress(int(scored.sum()))
            if bool(found.isnan().any()):
                row = int(rows[scored][found.isnan().cpu()][0])
                raise MemdecError(
                    f"{type(model).__name__} gave no number (NaN) for token {row + 1} of the text; its weights are "
                    "broken or its dtype is too narrow. Try --dtype float32."
                )
    finally:
        model.train(was_training)
    return scores


def chunked_log_prob(model: nn.Module, vocab_size: int | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function from inputs, labels and a mask, all (B, L), to the log-probs of the masked labels, (n,) float32."""
    composite = getattr(model, "chunked_log_prob", None)
    if callable(composite):  # the log-probs of a mixture are no single head's
        return cast("Callable[[Tensor, Tensor, Tensor], Tensor]", composite())
    plain = head_is_plain(model)
    head, body = output_head(model), trunk(model)

    @torch.no_grad()
    def log_probs(inputs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
        chosen, targets = hidden[mask.to(hidden.device)], labels[mask].to(hidden.device)
        parts = []
        rows = max(1, LOGITS_BUDGET // (4 * vocabulary_width(model)))
        for part, target in zip(torch.split(chosen, rows), torch.split(targets, rows), strict=True):
            logits = head(part) if plain else logits_from_hidden(model, part[None])[0]
            parts.append(token_log_prob(logits[..., :vocab_size], target.to(logits.device)))
        return torch.cat(parts) if parts else torch.empty(0)

    return log_probs


def vocabulary_width(model: nn.Module) -> int:
    """Number of columns of the model's logits, padding included."""
    weight = cast(Tensor, output_head(model).weight)
    return int(weight.shape[0])


def mixture_log_prob(
    base: Tensor,  # (…,) log-probs under the base
    memory: Tensor,  # (…,) log-probs under the memory
    alpha: float,
) -> Tensor:  # (…,) float64
    """log(α·p_mem + (1−α)·p_base) a token, in float64; α of exactly 0 or 1 gives the one component used.

    Raises:
        ValueError: α outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}, wanted a number from 0 (base alone) to 1 (memory alone)")
    if alpha == 0.0:
        return base.double()
    if alpha == 1.0:
        return memory.double()
    return torch.logaddexp(memory.double() + math.log(alpha), base.double() + math.log1p(-alpha))


def tune_alpha(
    base: Tensor,  # (T,) log-probs under the base, NaN where not scored
    memory: Tensor,  # (T,) log-probs under the memory, NaN where not scored
    *,
    step: float = 0.01,
) -> tuple[float, list[tuple[float, float]]]:
    """The α of a grid over [0, 1] at which the mixture gives the text the most likelihood, and the whole curve.

    Args:
        base: log-probs of the tokens under the base; rows that are NaN in either are left out.
        memory: the same tokens under the memory.
        step: distance of the grid's points; 1/step is rounded to a whole number.

    Returns:
        The best α (the smallest of equals) and the curve: pairs of α and the mixture's perplexity.

    Raises:
        MemdecError: no token was scored by both.
    """
    both = ~(base.isnan() | memory.isnan())
    base, memory = base[both], memory[both]
    if base.numel() == 0:
        raise MemdecError(
            "no token was scored by both models, so alpha cannot be tuned; give a longer validation text."
        )
    points = round(1 / step)
    curve = [(i / points, perplexity(mixture_log_prob(base, memory, i / points))) for i in range(points + 1)]
    return min(curve, key=lambda point: point[1])[0], curve


def perplexity(log_probs: Tensor) -> float:
    """exp of the mean negative log-prob of the tokens scored (NaN = not scored), summed in float64.

    Raises:
        MemdecError: no token was scored.
    """
    scored = log_probs[~log_probs.isnan()].double()
    if scored.numel() == 0:
        raise MemdecError("no token was scored, so there is no perplexity; give a longer text.")
    mean = -float(scored.mean())
    return math.exp(mean) if mean < 700 else math.inf


def load_causal_lm(
    source: str | PathLike[str] | nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """A transformers causal LM in evaluation mode, from a folder, a hub id or a ``.gguf`` file.

    Args:
        source: path, hub id, or a loaded model, which is passed through. The quantised weights of a ``.gguf`` file
            become plain ones.
        dtype: "auto" is bfloat16 where the device computes in it natively (see :func:`native_bfloat16`), else float32;
            or a torch dtype or its name. A loaded model keeps its own.
        device: where the model goes; None is the CPU, and leaves a loaded model where it is.

    Raises:
        MemdecError: nothing is there, it has no weights, or it is no causal LM.
    """
    if isinstance(source, nn.Module):
        return source if device is None else source.to(device)
    check_device(device)
    folder, options = locate(source)
    chosen = choose_dtype(dtype, device)
    LOGGER.info("loading %s in %s", Path(source).name, chosen)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=chosen, output_loading_info=True, **options, **plain_weights(options)
        )
    except MemoryError:
        raise
    except Exception as error:  # a broken config.json makes transformers raise whatever it comes upon first
        raise MemdecError(
            f"{source} is no causal LM that transformers can load: {first_line(error)} "
            "A model is a folder with config.json and its weights (model.safetensors), a hub id, or a .gguf file."
        ) from error
    if info["missing_keys"]:  # transformers fills these with random numbers
        shown = ", ".join(sorted(info["missing_keys"])[:3])
        raise MemdecError(f"{source} lacks {len(info['missing_keys'])} of its model's weights ({shown}); get it whole.")
    if "gguf_file" in options:
        forget_quantisation(model)
    if device is not None:
        model = model.to(device)
    return model.eval()


def plain_weights(options: dict[str, str]) -> dict[str, Any]:
    """What tells ``from_pretrained`` to unpack the weights of a .gguf file; older transformers do so unasked."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if "gguf_file" in options and config is not None else {}


def forget_quantisation(model: Any) -> None:
    """Makes a model read from a quantised file a plain one: its weights already are, its configuration denies it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in vars(model):
            delattr(model, attribute)


def check_device(device: torch.device | str | None) -> None:
    """Raise ``MemdecError`` unless tensors can be put on `device`, and computed on by memdec's own ops."""
    if device is None:
        return
    try:
        usable = torch.empty(1, device=device).device.type != "meta"
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable, reason = False, first_line(error)
    if not usable:
        raise MemdecError(
            f"--device {device}: it cannot be used here ({reason.rstrip('.')}). "
            "Use --device cpu, or leave --device out."
        )
    if torch.device(device).type == "cuda" and not launch.HAS_CUDA:
        raise MemdecError(
            f"--device {device}: this build of memdec has no CUDA kernels. Install it from source where nvcc is on the "
            "PATH (pip install --config-settings=cmake.define.MEMDEC_CUDA=on .), or use --device cpu."
        )


def choose_dtype(dtype: str | torch.dtype, device: torch.device | str | None) -> torch.dtype:
    """The torch dtype that `dtype` ("auto", a name or a dtype) means on `device`.

    Raises:
        MemdecError: no floating-point dtype has that name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise MemdecError(f"--dtype {dtype}: wanted auto, {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, dtype)
    return found


def native_bfloat16(device: torch.device | str | None) -> bool:
    """Whether the device multiplies bfloat16 in hardware: elsewhere bfloat16 is slower than float32 and no better."""
    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if where.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
