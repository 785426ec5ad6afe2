"""The rivals of a memory that must be trained: from the same text, with the memory's settings, within its budget.

================ ============================================================================================
dapt             the base itself, all weights, by cross-entropy (domain-adaptive pretraining)
lora             the base with low-rank adapters of as many parameters as the memory has
second-model     the control: the memory's start trained by plain cross-entropy, mixed with the base as the memory is
lm-memory        the control: the memory's start taught by the base's own distribution (top-k), mixed the same way
================ ============================================================================================

Every one reads the windows that the memory read, in the memory's order, at most as many steps as went into the
memory, those of its adapted teacher among them; the best of its checkpoints on the validation text is kept, which for
a model that overfits is early stopping. With several learning rates it is trained once with each, the budget being
that of each. A rival whose step costs more than the memory's stops where the memory's whole bill is spent:
adaptation, datastore, search and training together.

A training lies in ``OUT/NAME`` as `memdec train` leaves it, so that one that was stopped goes on; with another learning
rate than the memory's in ``OUT/NAME-RATE``. Where the memory
started from the whole base, dapt and second-model are one training, judged twice: alone and mixed with the base. It is
``OUT/dapt``, with the model that was best alone in ``alone``, the one best mixed in ``memory``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from memdec.pipeline.train import BOTH, JUDGES, LOG_NAME, files_fingerprint, train_memory
from memdec.stores.corpus import Corpus
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.memory import MemoryCard, is_memory, read_memory_card

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
    "patience",
    "validation_tokens",
    "dtype",
    "gradient_checkpointing",
)


@dataclass(frozen=True)
class Budget:
    """What the memory cost to make, in floating-point operations; no rival may spend more.

    A forward costs 2 operations a weight of a linear map and token, a backward twice that (attention's own products
    are left out for all alike); the search multiplies every key with every other: 2·rows²·width.

    Attributes:
        steps: of the memory's training.
        datastore: operations for its keys.
        search: for its neighbours.
        training: for its steps.
        adaptation: for the steps of the model that taught it, if `fit` adapted that.
        adaptation_steps: those steps.
    """

    steps: int
    datastore: float
    search: float
    training: float
    adaptation: float = 0.0
    adaptation_steps: int = 0

    @property
    def total(self) -> float:
        """Everything from the text to the memory."""
        return self.adaptation + self.datastore + self.search + self.training

    @property
    def most_steps(self) -> int:
        """What a rival may take, whose step costs what the memory's does."""
        return self.steps + self.adaptation_steps


@dataclass(frozen=True)
class Rival:
    """A trained rival, or the memory itself, seen in the same way.

    Attributes:
        method: one of `RIVALS`, "memory", or "adapted", the memory's own teacher.
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


def adapted_teacher(memory: str | Path) -> Path | None:
    """The model that `fit` adapted to teach this memory, which lies beside it; None where it adapted none."""
    folder = Path(memory).resolve().parent / "adapted" / "memory"
    return folder if is_memory(folder) else None


def memory_budget(
    card: MemoryCard, teacher: Any, memory: Any, rows: int, key_width: int, adapted: MemoryCard | None = None
) -> Budget:
    """What the memory cost, by its card.

    Args:
        card: the memory's.
        teacher: the model that made the datastore.
        memory: the memory's model.
        rows: of the training text.
        key_width: numbers in a key.
        adapted: the card of `teacher` where that was adapted for this memory.

    Raises:
        MemdecError: the card does not say how the memory was trained.
    """
    settings = training_settings(card)
    steps = int(card.provenance["total_steps"])
    tokens = rows_of(settings, steps, rows)
    adaptation, adaptation_steps = 0.0, 0
    if adapted is not None:
        adaptation_steps = int(adapted.provenance["total_steps"])
        read = rows_of(training_settings(adapted), adaptation_steps, rows)
        adaptation = 6.0 * matrix_parameters(teacher) * read
    return Budget(
        steps=steps,
        datastore=2.0 * matrix_parameters(teacher) * rows,
        search=2.0 * rows * rows * key_width,
        training=6.0 * matrix_parameters(memory) * tokens,
        adaptation=adaptation,
        adaptation_steps=adaptation_steps,
    )


def training_settings(card: MemoryCard) -> dict[str, Any]:
    """The settings of the memory's training that its rivals share.

    Raises:
        MemdecError: the card lacks them: the memory was not made by `memdec train` or `fit`.
    """
    found = {"patience": None, **card.provenance}  # of which memories made before it was there say nothing
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
    learning_rates: Mapping[str, Sequence[float]] | None = None,
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
        learning_rates: by method, where the memory's own is not to be the only one tried. Of several the one that is
            best on validation text is kept.
        top_k: tokens of the base's distribution that lm-memory learns.
        device: None is an accelerator if there is one.
        say: called with a line about each.

    Returns:
        The rivals by method, "memory" among them and "adapted" where its teacher was, and the memory's budget.

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
    adapted = adapted_teacher(memory)
    teacher_model = base_model if adapted is None else load_causal_lm(adapted)
    budget = memory_budget(card, teacher_model, memory_model, rows, key_width(teacher_model),
                           None if adapted is None else read_memory_card(adapted))  # fmt: skip
    say(f"The memory cost {described(budget)}; no rival may spend more")
    rivals = {"memory": finished("memory", Path(memory).resolve(), memory_parameters, budget.total, {})}
    if adapted is not None:
        size = sum(parameter.numel() for parameter in teacher_model.parameters())
        rivals["adapted"] = finished("adapted", adapted, size, budget.adaptation, {})
    weights = {"base": matrix_parameters(base_model), "memory": matrix_parameters(memory_model)}
    rank = matched_rank(base_model, memory_parameters)
    adapter_parameters = rank * parameters_per_rank(base_model)
    base_parameters = sum(parameter.numel() for parameter in base_model.parameters())
    del base_model, memory_model, teacher_model
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
    own = float(settings["learning_rate"])
    rates = {method: tuple((learning_rates or {}).get(method) or (own,)) for method in RIVALS}
    once = found.get("layers") is None and is_same_model(init, base) and rates["dapt"] == rates["second-model"]
    for method in RIVALS:
        if method not in methods:
            continue
        affordable = int((budget.total - teacher_flops.get(method, 0.0)) // step_flops[method])
        steps = max(1, min(budget.most_steps, affordable))
        options = {**shared, **plans[method], "max_steps": steps}
        told = ("beta", "lora_rank", "judge")
        differs = {name: options[name] for name in told if name in options}
        judge = str(options.get("judge", "mixture"))
        name, kept = method, "memory"
        if once and method in ("dapt", "second-model"):
            name, kept = "dapt", "alone" if method == "dapt" else "memory"
            options |= {"init": base, "judge": BOTH}
        teacher = distributions
        if method == "lm-memory":
            teacher = build_teacher("lm", corpus, out / method / "teacher", model=str(base), top_k=top_k, device=device,
                                    context=settings["context"], stride=settings["stride"])  # fmt: skip
        start = options.pop("init")
        made: dict[float, tuple[float, Path, float]] = {}  # by rate: perplexity of validation text, model, operations
        for rate in rates[method]:
            folder = out / (name if rate == own else f"{name}-{rate:g}")
            say(f"Training {method}: at most {steps} steps, {steps * step_flops[method]:.2e} operations, learning rate "
                f"{rate:g}")  # fmt: skip
            train_memory(start, corpus, teacher, folder, **{**options, "learning_rate": rate})
            left = read_memory_card(folder / kept).provenance
            spent = teacher_flops.get(method, 0.0) + int(left["total_steps"]) * step_flops[method]
            made[rate] = float(left["figures"][JUDGES[judge]]), folder / kept, spent
        best = min(made, key=lambda rate: made[rate][0])
        differs["learning_rate"] = best
        if len(made) > 1:
            differs["tried"] = {f"{rate:g}": value for rate, (value, _, _) in made.items()}
        _, model, spent = made[best]
        rivals[method] = finished(method, model, trained.get(method, memory_parameters), spent, differs)
    return rivals, budget


def is_same_model(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of the same weights."""
    fingerprint = files_fingerprint(one)
    return str(one) == str(other) or (fingerprint is not None and fingerprint == files_fingerprint(other))


def described(budget: Budget) -> str:
    """The memory's bill for people."""
    parts = {
        "adapting its teacher": budget.adaptation,
        "datastore": budget.datastore,
        "search": budget.search,
        "training": budget.training,
    }
    listed = ", ".join(f"{name} {flops:.1e}" for name, flops in parts.items() if flops)
    return f"{budget.total:.2e} operations ({listed})"


def finished(method: str, folder: Path, trained: int, flops: float, settings: dict[str, Any]) -> Rival:
    """A training that has ended, by the model that it left in `folder`, beside which ``training`` lies."""
    card = read_memory_card(folder)
    steps = int(card.provenance.get("total_steps", 0))
    logged = [float(row["seconds"]) for row in read_log(folder.parent / "training" / LOG_NAME) if "seconds" in row]
    seconds = sum(logged) * steps / max(len(logged), 1)  # long trainings log every few steps
    kept = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if "lora_rank" in settings:
        kept = 2 * trained  # the adapters as bfloat16, not the merged weights that lie here
    return Rival(method, folder, trained, kept, steps, int(card.provenance.get("steps", 0)), seconds, flops, settings)
