"""What a run of `memdec fit` would cost: tokens, FLOPs, bytes, hours, from the models' configurations alone.

    memdec fit MODEL TEXT --out DIR --dry-run --on h100            (no weights are loaded, nothing is written)

Notation: W weights in the matrices of a model's trunk (embeddings left out, which are looked up), d its width, L its
blocks, a the width of its attention (heads × width of a head), V columns of its output head, n rows of the datastore,
c context − 1 inputs of a window, t inputs read by the trunk (more than n where windows overlap).

============== ======================================================================================================
forward        t·(2·W + 4·L·a·c) for the trunk, the second term being attention over a whole window, as its kernels
               compute it; 2·V·d for each row that the output head is run on
adapted        with adapt_epochs: a training of the teacher's model, as below
datastore      a forward of the teacher's trunk; for the teachers lm and knn-lm a forward with the head besides
distributions  exact and flat: 2·n²·d and 2·m·n·d for the m validation rows that T is chosen on; ivfflat and ivfpq:
               2·lists·d a query to find the lists, then 2·d a row or d/8 table look-ups a row in 1/16 of them
training       3 × forward of trunk and head (the backward costs twice the forward; 4 × the trunk with gradient
               checkpointing); the evaluations are forwards of the memory, and one of the base
============== ======================================================================================================

On disk, in bytes: corpus 4 a token; datastore 2·d + 4 a row; distributions 3 a pair (4 where V > 65536) and 6 a row;
training keeps its start (4 a parameter), and while the next is written two checkpoints (12: float32 master and AdamW's
two moments) and two candidates (2 in bfloat16); memory 2. The search's index: 4·d a row for flat and ivfflat, d/8 for
ivfpq, and 8 for the lists' ids.

In memory, roughly: weights and what a forward of 8 windows keeps; `memory_limit`; for training 16 bytes a parameter
(master, gradient, moments) and 2 for the bfloat16 weights in use, 34·d a token and block for activations (Korthikanti
et al., arXiv 2205.05198, eq. 2, attention computed without keeping its scores), the head's workspace.

Hours are FLOPs over the device's peak times a *utilisation*, an assumption that is printed: an estimate may be wrong by
a factor of two. The counts of parameters, FLOPs and bytes are exact up to what the table leaves out (norms,
activation functions, the optimiser's own sums, file headers).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from memdec.errors import MemdecError
from memdec.modeling.sources import first_line, read_config
from memdec.modeling.structure import key_width, output_head, text_config, trunk
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.adapt import adaptation_steps, choose_teacher
from memdec.pipeline.batches import steps_in_epoch
from memdec.pipeline.distributions import check_search
from memdec.pipeline.documents import read_documents
from memdec.pipeline.embed import DEFAULT_CONTEXT
from memdec.pipeline.initialise import choose_blocks, cut_blocks
from memdec.pipeline.teachers import DEFAULT_TOP_K
from memdec.pipeline.train import Settings

FORMAT = "memdec.estimate"
VERSION = 1
PAIRS = 100  # tokens in a row of 1024 neighbours' distribution; 65 to 134 were measured
VALIDATION_ROWS = 8192  # that the datastore keeps
CHARACTERS_A_TOKEN = 4.0  # English, where there is no tokenizer to ask
COUNTED_CHARACTERS = 4_000_000  # that are tokenised before the rest is judged by its length
WORKSPACE = 256 << 20  # of the loss's chunk of logits, at most
EMBED_WINDOWS = 8  # windows of one forward when the datastore is made


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        label: its name for people.
        peak: FLOP/s of bfloat16 matrix products, dense, as its maker states them.
        float32: the same in float32 without TF32, in which the search multiplies.
        utilisation: share of either that is assumed to be reached.
    """

    label: str
    peak: float
    float32: float
    utilisation: float


# The processor's two figures were measured on two cores with AVX-512 and bfloat16: SmolLM2-135M embedded 1,300 and
# trained on 350 tokens a second (3.2e11 FLOP/s each), exact search made 2.4e11 FLOP/s.
DEVICES = {
    "h100": Device("one NVIDIA H100 SXM", 989e12, 67e12, 0.4),
    "a100": Device("one NVIDIA A100", 312e12, 19.5e12, 0.4),
    "rtx4090": Device("one NVIDIA RTX 4090", 165e12, 82.6e12, 0.4),
    "cpu": Device("two processor cores with AVX-512 and bfloat16", 1.07e12, 0.8e12, 0.3),
}
LOOKUPS = 2e8  # of ivfpq's tables, a second and core; faiss runs on the processor
CORES = 2


@dataclass(frozen=True)
class Shape:
    """How large a model is, from its configuration.

    Attributes:
        parameters: all of them, tied ones once.
        matrices: W, weights in matrices of the trunk; of a mixture of experts all, though a token uses a few.
        blocks: L.
        width: d, also of a key.
        attention: a.
        vocabulary: V, columns of the output head.
        positions: the most tokens it reads; None where the configuration does not say.
    """

    parameters: int
    matrices: int
    blocks: int
    width: int
    attention: int
    vocabulary: int
    positions: int | None

    def trunk_flops(self, inputs: int, window: int) -> float:
        """FLOPs of the trunk's forward over `inputs` tokens in windows of `window`."""
        return inputs * (2.0 * self.matrices + 4.0 * self.blocks * self.attention * window)

    def head_flops(self, rows: int) -> float:
        """FLOPs of the output head on `rows` hidden states."""
        return 2.0 * rows * self.vocabulary * self.width


@dataclass(frozen=True)
class Part:
    """A stage's share of the cost.

    Attributes:
        name: of the stage.
        what: what it does, with its numbers.
        flops: floating-point operations.
        seconds: on the device that was asked for.
        disk: bytes that it leaves (a training: the most while it runs).
        memory: bytes at its peak, roughly.
    """

    name: str
    what: str
    flops: float
    seconds: float
    disk: int
    memory: int


@dataclass(frozen=True)
class Estimate:
    """What a run would cost; ``to_json`` has all of it.

    Attributes:
        tokens: by split, and "counted": how their number was found.
        parameters: of base, teacher and memory.
        steps: optimiser steps.
        tokens_trained: tokens that training predicts, all epochs together.
        device: a key of `DEVICES`.
        utilisation: share of the device's peak that the hours assume.
        parts: the stages.
        assumptions: what the figures rest on, in words.
    """

    tokens: dict[str, int]
    parameters: dict[str, int]
    steps: int
    tokens_trained: int
    device: str
    utilisation: float
    parts: list[Part]
    assumptions: list[str]

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(part.flops for part in self.parts)

    @property
    def hours(self) -> float:
        """Of all stages, on the device."""
        return sum(part.seconds for part in self.parts) / 3600

    @property
    def disk(self) -> int:
        """Bytes on disk at the most, while training runs."""
        return sum(part.disk for part in self.parts)

    def to_json(self) -> str:
        """JSON text with the totals besides the attributes."""
        device = DEVICES[self.device]
        content = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "device": {"name": self.device, **asdict(device), "utilisation": self.utilisation},
            "total": {"flops": self.flops, "hours": self.hours, "disk": self.disk},
        }
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def estimate_fit(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    *,
    on: str = "cpu",
    utilisation: float | None = None,
    tokens: int | None = None,
    stated_tokens: int | None = None,
    shapes: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Estimate:
    """Estimate a run of :func:`memdec.pipeline.fit.fit` without its weights.

    Args:
        model: the base: a folder, a hub id (only its config.json is read) or a ``.gguf`` file.
        source: the text; counted where it lies on this machine and `tokens` does not say.
        on: one of `DEVICES`.
        utilisation: share of the device's peak that is reached; None is the device's.
        tokens: how long the text is.
        stated_tokens: the same, for a text that is not at hand.
        shapes: configurations of models that are not at hand, by name; see :mod:`memdec.pipeline.recipe`.
        options: those of :func:`~memdec.pipeline.fit.fit` that are not its defaults.

    Returns:
        The estimate, by stage.

    Raises:
        MemdecError: a configuration cannot be read, the length of the text is unknown, or an option cannot be.

    Example:
        >>> estimate_fit("openai-community/gpt2", None, tokens=10**6, on="h100").hours   # doctest: +SKIP
        0.03
    """
    if on not in DEVICES:
        raise MemdecError(f"--on is {on!r}; wanted one of {', '.join(DEVICES)}.")
    used = DEVICES[on].utilisation if utilisation is None else utilisation
    if not 0 < used <= 1:
        raise MemdecError(f"--utilisation is {used}; wanted a share of the device's peak, above 0 and at most 1.")
    known = shapes or {}
    teacher, adapt_epochs = choose_teacher(options)
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__ if name in options})
    settings.check()
    backend = str(options.get("backend", "exact")).lower()
    limit = check_search(options.get("temperature"), backend, options.get("memory_limit", "1GiB"))
    base = read_shape(model, known)
    taught_by = read_shape(options.get("teacher_model") or model, known)
    memory = read_shape(options.get("init") or model, known, settings.layers)
    assumptions = [
        f"{100 * used:g}% of {DEVICES[on].label}'s peak is reached: {DEVICES[on].peak:.3g} FLOP/s in bfloat16, and "
        f"{DEVICES[on].float32:.3g} in float32, in which the search multiplies"
    ]
    split, how = _splits(model, source, tokens, stated_tokens, options)
    assumptions.append(how)
    rows = max(split["train"] - 1, 1)
    context = settings.context or min(DEFAULT_CONTEXT, (taught_by.positions or DEFAULT_CONTEXT) + 1)
    for name, shape in (("the teacher", taught_by), ("the memory", memory)):
        if shape.positions is not None and context - 1 > shape.positions:
            raise MemdecError(
                f"A window of {context} tokens needs {context - 1} positions; {name} has {shape.positions}. "
                f"Use --context {shape.positions + 1} or less."
            )
    _, inputs = count_windows(split["train"], context, settings.stride)
    window = min(context, split["train"]) - 1
    number_bytes = 4 if settings.dtype == "float32" else 2
    if settings.dtype == "auto":
        assumptions.append("--dtype auto is bfloat16 there")
    if settings.patience is not None:
        assumptions.append("training goes on to the last step, which --patience may spare")
    rate, float32 = DEVICES[on].peak * used, DEVICES[on].float32 * used
    parts = [Part("corpus", f"{sum(split.values()):,} tokens, split by document", 0.0, 0.0, 4 * sum(split.values()), 0)]
    text = _Text(split["train"], max(split["validation"] - 1, 0), context, number_bytes)
    if adapt_epochs:
        number, _ = count_windows(split["train"], context, settings.stride)
        adapting = replace(settings, max_steps=adaptation_steps(settings, adapt_epochs, number))
        made = _train(taught_by, taught_by, adapting, text)
        disk = made.disk + rows * (_pair_bytes(taught_by, options) + 6)
        parts.append(Part("adapted", made.what, made.flops, made.flops / rate, disk, made.memory))

    # Datastore and search: what only the retriever needs.
    searched = teacher in ("knn", "knn-lm")
    forward_bytes = number_bytes * (taught_by.parameters + EMBED_WINDOWS * window * 16 * taught_by.width)
    kept = min(VALIDATION_ROWS, max(split["validation"] - 1, 0))
    if searched:
        flops = taught_by.trunk_flops(inputs + kept, window) + taught_by.head_flops(kept)
        parts.append(
            Part(
                "datastore",
                f"{rows:,} keys of {taught_by.width} numbers",
                flops,
                flops / rate,
                rows * (2 * taught_by.width + 4) + kept * (2 * taught_by.width + 16),
                forward_bytes,
            )
        )
    pairs = PAIRS
    if searched:
        k = min(options.get("k") or 1024, max(rows - 1, 1))
        pairs = min(PAIRS, k)
        queries = rows + (kept if options.get("temperature") is None else 0)
        flops, seconds, index, what = _search(backend, rows, queries, taught_by.width, float32)
        parts.append(
            Part(
                "distributions",
                f"{what} for {queries:,} rows, k = {k}",
                flops,
                seconds,
                index + rows * (pairs * _pair_bytes(memory, options) + 6),
                limit + index,
            )
        )
        assumptions.append(f"{pairs} tokens a row of the distributions (65 to 134 were measured for k = 1024)")
        if backend in ("ivfflat", "ivfpq"):
            assumptions.append(
                f"faiss runs on the processor, of which {CORES} cores are counted; ivfpq makes {LOOKUPS:.0e} table "
                "look-ups a second and core"
            )
    if teacher != "knn":
        flops, pairs = 0.0, 1
        if teacher != "one-hot":
            flops = taught_by.trunk_flops(inputs, window) + taught_by.head_flops(rows)
            pairs = min(int(options.get("top_k", DEFAULT_TOP_K)), taught_by.vocabulary)
        if teacher == "knn-lm":
            pairs += min(PAIRS, k)
        disk = rows * (pairs * _pair_bytes(memory, options) + 6)
        parts.append(
            Part(f"teacher {teacher}", f"at most {pairs} tokens a row", flops, flops / rate, disk, forward_bytes)
        )

    made = _train(base, memory, settings, text)
    parts.append(Part("training", made.what, made.flops, made.flops / rate, made.disk, made.memory))
    parts.append(Part("memory", f"{memory.parameters:,} parameters", 0.0, 0.0, number_bytes * memory.parameters, 0))
    parameters = {"base": base.parameters, "teacher": taught_by.parameters, "memory": memory.parameters}
    return Estimate(split, parameters, made.steps, made.tokens, on, used, parts, assumptions)


@dataclass(frozen=True)
class _Text:
    """What a training reads: tokens to train on, rows to validate on, tokens of a window, bytes of a number."""

    tokens: int
    validation_rows: int
    context: int
    number_bytes: int


@dataclass(frozen=True)
class _Training:
    what: str
    steps: int
    tokens: int
    flops: float
    disk: int
    memory: int


def _train(base: Shape, trained: Shape, settings: Settings, text: _Text) -> _Training:
    """The cost of training a model of the shape `trained`, with a base beside it in the evaluations."""
    number, inputs = count_windows(text.tokens, text.context, settings.stride)
    rows, window = max(text.tokens - 1, 1), min(text.context, text.tokens) - 1
    per_step = settings.batch_size * settings.gradient_accumulation
    epoch = steps_in_epoch(number, per_step)
    steps = settings.max_steps or settings.epochs * epoch
    full, rest = divmod(steps, epoch)
    share = full + min(rest * per_step, number) / number  # epochs, the last perhaps in part
    predicted = round(share * rows)
    scored = min(settings.validation_tokens, text.validation_rows)
    evaluations = 1 + -(-steps // (settings.eval_every or min(epoch, -(-steps // 4))))
    times = 4 if settings.gradient_checkpointing else 3
    flops = times * trained.trunk_flops(round(share * inputs), window) + 3 * trained.head_flops(predicted)
    flops += evaluations * (trained.trunk_flops(scored, window) + trained.head_flops(scored))
    flops += base.trunk_flops(scored, window) + base.head_flops(scored)
    return _Training(
        f"{steps:,} steps of {per_step} windows of {text.context}: {predicted:,} tokens",
        steps,
        predicted,
        flops,
        trained.parameters * (4 + 2 * 12 + 2 * text.number_bytes),
        _training_bytes(trained, settings, window, text.number_bytes),
    )


def _pair_bytes(memory: Shape, options: Mapping[str, Any]) -> int:
    return (2 if memory.vocabulary <= 65536 else 3) + (2 if options.get("codec") == "float16" else 1)


def _search(backend: str, rows: int, queries: int, width: int, rate: float) -> tuple[float, float, int, str]:
    """FLOPs, seconds, the index's bytes, and words for the search of `queries` rows among `rows`."""
    if backend in ("exact", "flat"):
        flops = 2.0 * queries * rows * width
        if backend == "flat":
            rate = DEVICES["cpu"].float32 * DEVICES["cpu"].utilisation
        return flops, flops / rate, 4 * width * rows if backend == "flat" else 0, f"{backend} search"
    # As memdec.pipeline.search.build_index chooses them.
    lists = max(1, min(int(4 * math.sqrt(rows)), rows // 39))
    looked_at = rows * min(lists, max(8, lists // 16)) / lists
    coarse = 2.0 * queries * lists * width
    on_processor = DEVICES["cpu"].float32 * DEVICES["cpu"].utilisation
    if backend == "ivfflat":
        flops = coarse + 2.0 * queries * looked_at * width
        return flops, flops / on_processor, (4 * width + 8) * rows, f"ivfflat search in {lists:,} lists"
    codes = max(m for m in range(1, max(1, width // 8) + 1) if width % m == 0)
    lookups = queries * looked_at * codes
    seconds = coarse / on_processor + lookups / (LOOKUPS * CORES)
    return coarse + lookups, seconds, (codes + 8) * rows, f"ivfpq search in {lists:,} lists, {codes} bytes a key"


def _training_bytes(memory: Shape, settings: Settings, window: int, number_bytes: int) -> int:
    """Memory of a training step, roughly."""
    states = memory.parameters * (16 if number_bytes == 4 else 18)
    tokens = settings.batch_size * window
    whole = 17 * number_bytes * memory.width * tokens  # of one block: 34·d bytes a token in two-byte numbers
    kept = memory.blocks * whole
    if settings.gradient_checkpointing:
        kept = memory.blocks * number_bytes * memory.width * tokens + whole
    head = min(WORKSPACE, 4 * tokens * memory.vocabulary) + 4 * memory.vocabulary * memory.width
    return states + kept + head


def count_windows(num_tokens: int, context: int, stride: int | None = None) -> tuple[int, int]:
    """How many windows :func:`memdec.stores.windows.windows` cuts, and how many inputs they have together.

    >>> count_windows(10, 4), count_windows(7, 4, stride=2)
    ((3, 9), (3, 8))
    """
    if context < 2 or (stride is not None and not 1 <= stride <= context - 1):
        raise MemdecError(
            f"context is {context} and stride {stride}; wanted a context of at least 2 tokens and a stride below it."
        )
    step = context - 1 if stride is None else stride
    number = 1 + max(0, -(-(num_tokens - context) // step))
    return number, (number - 1) * (context - 1) + num_tokens - (number - 1) * step - 1


def _splits(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    tokens: int | None,
    stated: int | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, int], str]:
    """Tokens by split, and how they were found."""
    field = str(options.get("text_field", "text"))
    if tokens is not None:
        found, how = tokens, "the text has as many tokens as --tokens says"
    elif source is not None and Path(source).expanduser().exists():
        found, how = count_tokens(source, model, field)
    elif stated is not None:
        found, how = stated, f"the text has as many tokens as the recipe says: {source} is not on this machine"
    else:
        raise MemdecError(
            f"{source} is not on this machine, so its length is unknown. Say it with --tokens, as in --tokens 1000000."
        )
    if found < 2:
        raise MemdecError(f"The text has {found} tokens; at least 2 are needed.")
    most = options.get("max_tokens")
    if most is not None and most < found:
        found, how = int(most), how + f", cut to --max-tokens {most:,}"
    fractions = dict(zip(("train", "validation", "test"), options.get("fractions", (0.9, 0.05, 0.05)), strict=True))
    own: dict[str, int] = {}
    for name in ("validation", "test"):
        given = options.get(name)
        if given is None:
            continue
        fractions[name] = 0.0  # nothing of the source is held out for it
        if Path(given).expanduser().exists():
            own[name] = count_tokens(given, model, field)[0]
        else:
            own[name] = int(options.get("validation_tokens", Settings.validation_tokens)) + 1
            how += f"; the {name} text is not at hand and counted as {own[name]:,} tokens"
    whole = sum(fractions.values())
    if not (whole > 0 and min(fractions.values()) >= 0):
        raise MemdecError(f"fractions are {tuple(fractions.values())}; wanted three numbers that sum to 1.")
    held_out = {name: round(found * share / whole) for name, share in fractions.items() if name != "train"}
    return {"train": found - sum(held_out.values()), **held_out, **own}, how


def count_tokens(
    source: str | os.PathLike[str], tokenizer: str | os.PathLike[str], text_field: str = "text"
) -> tuple[int, str]:
    """How many tokens a text on this machine has, its documents' ends among them, exact copies left out.

    All of a small text is tokenised; of a longer one the first four million characters, and the rest is judged by its
    length. Where the tokenizer cannot be had, four characters are a token.

    Returns:
        the number, and words for how it was found.
    """
    try:
        loaded = load_tokenizer(tokenizer)
    except MemdecError:
        loaded = None
    seen: set[bytes] = set()
    tokenised = characters = counted = 0
    for document in read_documents(os.fspath(source), text_field=text_field)():
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
        if digest in seen or not document.text.strip():
            continue
        seen.add(digest)
        characters += len(document.text)
        if loaded is not None and tokenised < COUNTED_CHARACTERS:
            tokenised += len(document.text)
            counted += len(loaded(document.text, add_special_tokens=False, verbose=False)["input_ids"])
    if loaded is None:
        return round(characters / CHARACTERS_A_TOKEN) + len(seen), (
            f"{CHARACTERS_A_TOKEN:g} characters a token, because the tokenizer of {tokenizer} is not at hand"
        )
    if tokenised == characters:
        return counted + len(seen), "the tokens of the text were counted"
    return round(counted * characters / tokenised) + len(seen), (
        f"the tokens of the text's first {tokenised:,} characters were counted, the rest judged by its length"
    )


def read_shape(
    model: str | os.PathLike[str], shapes: Mapping[str, Mapping[str, Any]] | None = None, layers: int | None = None
) -> Shape:
    """A model's size, from its configuration: its modules are made without any weights (on the device "meta").

    Args:
        model: folder, hub id or ``.gguf`` file.
        shapes: configurations by model, for those that are not on this machine.
        layers: blocks that are kept of it; None keeps all.

    Raises:
        MemdecError: there is no configuration, it is of no causal LM, or the model has fewer blocks than `layers`.
    """
    config = read_config(model, shapes)
    try:
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise MemdecError(
            f"The configuration of {model} is of no causal LM that can be made: {first_line(error)}"
        ) from error
    total = int(text_config(made).num_hidden_layers)
    if layers is not None and layers != total:
        cut_blocks(made, choose_blocks(total, layers))
    facts = text_config(made)
    body = trunk(made)
    looked_up = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
    heads = int(getattr(facts, "num_attention_heads", 0) or 0)
    width = key_width(made)
    head_width = getattr(facts, "head_dim", None) or (width // heads if heads else 0)
    return Shape(
        parameters=sum(parameter.numel() for parameter in made.parameters()),
        matrices=sum(p.numel() for p in body.parameters() if p.ndim >= 2 and id(p) not in looked_up),
        blocks=int(facts.num_hidden_layers),
        width=width,
        attention=heads * int(head_width),
        vocabulary=int(cast(Tensor, output_head(made).weight).shape[0]),
        positions=getattr(facts, "max_position_embeddings", None),
    )
