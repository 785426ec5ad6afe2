"""The rivals of a memory that must be trained: from the same text, with the memory's settings, within its budget.

================ ============================================================================================
dapt             the base itself, all weights, by cross-entropy (domain-adaptive pretraining)
lora             the base with low-rank adapters of as many parameters as the memory has
second-model     the control: the memory's start trained by plain cross-entropy, mixed with the base as the memory is
lm-memory        the control: the memory's start taught by the base's own distribution (top-k), mixed the same way
================ ============================================================================================

Every one reads the windows that the memory read, in the memory's order, at most as many steps; the best of its
checkpoints on the validation text is kept, which for a model that overfits is early stopping. A rival whose step costs
more than the memory's stops where the memory's whole bill is spent: datastore, search and training together.

A training lies in ``OUT/NAME`` as `memdec train` leaves it, so that one that was stopped goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError
from memdec.evaluation.evaluate import read_log
from memdec.modeling.scoring import load_causal_lm
from memdec.modeling.structure import key_width, output_head
from memdec.pipeline.batches import steps_in_epoch
from memdec.pipeline.estimate import count_windows
from memdec.pipeline.lora import adapted_maps, matched_rank, parameters_per_rank
from memdec.pipeline.teachers import build_teacher
from memdec.pipeline.train import LOG_NAME, files_fingerprint, train_memory
from memdec.stores.corpus import Corpus
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.memory import MemoryCard, read_memory_card

LOGGER = logging.getLogger(__name__)

RIVALS = ("dapt", "lora", "second-model", "lm-memory")
# Of a memory's training settings, those that its rivals take over.
SHARED = (
    "batch_size",
    "gradient_accumulation",
    "context",
    "stride",
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "eval_every",
    "validation_tokens",
    "dtype",
    "gradient_checkpointing",
)


@dataclass(frozen=True)
class Budget:
    """What the memory cost to make, in floating-point operations; no rival may spend more.

    A forward costs 2 operations a weight of a linear map and token, a backward twice that (attention's own products
    are left out for all alike); the search multiplies every key with every other: 2·rows²·width.
    """

    steps: int
    datastore: float
    search: float
    training: float

    @property
    def total(self) -> float:
        """Everything from the text to the memory."""
        return self.datastore + self.search + self.training


@dataclass(frozen=True)
class Rival:
    """A trained rival, or the memory itself, seen in the same way.

    Attributes:
        method: one of `RIVALS`, or "memory".
        folder: the model, a plain transformers folder.
        trained_parameters: what its training changed.
        kept_bytes: what a user keeps on disk for it, beside the base or (dapt) instead of it.
        steps: optimiser steps taken.
        best_step: the checkpoint kept, the best on the validation text.
        seconds: of the steps, on this machine.
        flops: of the steps, and of what they were made from.
        settings: what differs from the memory's own training.
    """

    method: str
    folder: Path
    trained_parameters: int
    kept_bytes: int
    steps: int
    best_step: int
    seconds: float
    flops: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As JSON, without this machine's path."""
        return {**asdict(self), "folder": "/".join(self.folder.parts[-2:])}


def memory_budget(card: MemoryCard, base: Any, memory: Any, rows: int, key_width: int) -> Budget:
    """What the memory cost, by its card.

    Args:
        card: the memory's.
        base: the model that made the datastore.
        memory: the memory's model.
        rows: of the training text.
        key_width: numbers in a key.

    Raises:
        MemdecError: the card does not say how the memory was trained.
    """
    settings = training_settings(card)
    steps = int(card.provenance["total_steps"])
    tokens = rows_of(settings, steps, rows)
    return Budget(
        steps=steps,
        datastore=2.0 * matrix_parameters(base) * rows,
        search=2.0 * rows * rows * key_width,
        training=6.0 * matrix_parameters(memory) * tokens,
    )


def training_settings(card: MemoryCard) -> dict[str, Any]:
    """The settings of the memory's training that its rivals share.

    Raises:
        MemdecError: the card lacks them: the memory was not made by `memdec train` or `fit`.
    """
    found = card.provenance
    missing = [name for name in (*SHARED, "total_steps") if name not in found]
    if missing:
        raise MemdecError(
            f"The memory's card does not say how it was trained ({', '.join(missing[:3])}), so its rivals cannot be "
            "trained alike. Compare with a memory that memdec fit or memdec train made."
        )
    return {name: found[name] for name in SHARED}


def rows_of(settings: dict[str, Any], steps: int, rows: int) -> int:
    """Predictions that so many steps learn from: of every epoch's last step no more than there are."""
    per_step = int(settings["batch_size"]) * int(settings["gradient_accumulation"])
    windows, _ = count_windows(rows + 1, int(settings["context"]), settings["stride"])
    return round(steps / steps_in_epoch(windows, per_step) * rows)


def matrix_parameters(model: Any) -> int:
    """Weights of the model's linear maps, its output head among them: those that a token is multiplied with."""
    head: Any = output_head(model)
    return sum(int(module.weight.numel()) for _, module in adapted_maps(model)) + int(head.weight.numel())


def train_rivals(
    methods: Sequence[str],
    *,
    base: str | Path,
    init: str | Path,
    memory: str | Path,
    corpus: Corpus,
    distributions: DistributionStore,
    out: Path,
    learning_rates: dict[str, float] | None = None,
    top_k: int = 64,
    device: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, Rival], Budget]:
    """Train the rivals asked for, one after the other; those that are there already are taken as they are.

    Args:
        methods: of `RIVALS`; others are left to the caller.
        base: the model that the memory is mixed with.
        init: the model that the memory started from.
        memory: the memory's folder.
        corpus: whose training text all learn from.
        distributions: the memory's teacher.
        out: folder that gets one folder a rival.
        learning_rates: by method, where it is not to be the memory's own.
        top_k: tokens of the base's distribution that lm-memory learns.
        device: None is an accelerator if there is one.
        say: called with a line about each.

    Returns:
        The rivals by method, "memory" among them, and the memory's budget.

    Raises:
        MemdecError: `init` is not what the memory started from, the corpus not what it was trained on, or a training
            fails.
    """
    card = read_memory_card(memory)
    settings = training_settings(card)
    found = card.provenance
    if found.get("corpus") != corpus.manifest.checksum:
        raise MemdecError(
            f"The memory {memory} was trained on another corpus than {corpus.folder}, so nothing trained here would be "
            "comparable. Give --text the corpus folder beside the memory."
        )
    if found.get("init_fingerprint") != files_fingerprint(init):
        raise MemdecError(
            f"The memory {memory} did not start from {init} but from {found.get('init')}; the controls must start from "
            "the same weights. Say where they are with --init."
        )
    base_model = load_causal_lm(base)
    memory_model = load_causal_lm(memory)
    memory_parameters = sum(parameter.numel() for parameter in memory_model.parameters())
    rows = corpus.split("train").num_rows
    budget = memory_budget(card, base_model, memory_model, rows, key_width=key_width(base_model))
    rivals = {"memory": finished("memory", Path(memory).resolve().parent, memory_parameters, budget.total, {})}
    weights = {"base": matrix_parameters(base_model), "memory": matrix_parameters(memory_model)}
    rank = matched_rank(base_model, memory_parameters)
    adapter_parameters = rank * parameters_per_rank(base_model)
    base_parameters = sum(parameter.numel() for parameter in base_model.parameters())
    del base_model, memory_model
    shared: dict[str, Any] = {**settings, "beta": 0.0, "device": device, "tensorboard": False}
    cut: dict[str, Any] = {"init": init, "base": base, "layers": found.get("layers")}
    per_step = rows_of(settings, budget.steps, rows) / budget.steps
    plans: dict[str, dict[str, Any]] = {
        "dapt": {"init": base, "judge": "alone"},
        "lora": {"init": base, "judge": "alone", "lora_rank": rank},
        "second-model": dict(cut),
        "lm-memory": {**cut, "beta": found.get("beta", 0.5)},
    }
    # Operations of a step: backward and forward; of LoRA no gradient of the frozen weights; asking the teacher once.
    step_flops = {
        "dapt": 6.0 * weights["base"] * per_step,
        "lora": (4.0 * weights["base"] + 6.0 * adapter_parameters) * per_step,
        "second-model": 6.0 * weights["memory"] * per_step,
        "lm-memory": 6.0 * weights["memory"] * per_step,
    }
    teacher_flops = {"lm-memory": 2.0 * weights["base"] * rows}
    trained = {"dapt": base_parameters, "lora": adapter_parameters}
    for method in RIVALS:
        if method not in methods:
            continue
        affordable = int((budget.total - teacher_flops.get(method, 0.0)) // step_flops[method])
        steps = max(1, min(budget.steps, affordable))
        options = {**shared, **plans[method], "max_steps": steps}
        if learning_rates and method in learning_rates:
            options["learning_rate"] = learning_rates[method]
        folder = out / method
        say(f"Training {method}: {steps} steps, learning rate {options['learning_rate']:g}")
        teacher = distributions
        if method == "lm-memory":
            teacher = build_teacher("lm", corpus, folder / "teacher", model=str(base), top_k=top_k, device=device,
                                    context=settings["context"], stride=settings["stride"])  # fmt: skip
        start = options.pop("init")
        train_memory(start, corpus, teacher, folder, **options)
        flops = teacher_flops.get(method, 0.0) + steps * step_flops[method]
        told = ("learning_rate", "beta", "lora_rank", "judge")
        differs = {str(name): options[name] for name in told if name in options}
        rivals[method] = finished(method, folder, trained.get(method, memory_parameters), flops, differs)
    return rivals, budget


def finished(method: str, folder: Path, trained: int, flops: float, settings: dict[str, Any]) -> Rival:
    """A training that has ended, read from its folder; `folder` holds ``memory`` and ``training``."""
    card = read_memory_card(folder / "memory")
    steps = int(card.provenance.get("total_steps", 0))
    logged = [float(row["seconds"]) for row in read_log(folder / "training" / LOG_NAME) if "seconds" in row]
    seconds = sum(logged) * steps / max(len(logged), 1)  # long trainings log every few steps
    kept = sum(file.stat().st_size for file in (folder / "memory").glob("*.safetensors"))
    if "lora_rank" in settings:
        kept = 2 * trained  # the adapters as bfloat16, not the merged weights that lie here
    return Rival(method, folder / "memory", trained, kept, steps, int(card.provenance.get("steps", 0)), seconds, flops,
                 settings)  # fmt: skip
