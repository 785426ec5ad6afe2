"""Training: a small language model learns to imitate the retriever's next-token distributions.

    start ──▶ steps: windows + teacher rows ─▶ trunk ─▶ linear_alignment_loss ─▶ AdamW on float32 masters
                 └─ now and then: held-out perplexity of the mixture; the best so far is the candidate ──▶ memory

    memdec train MODEL --corpus DIR/corpus --distributions DIR/distributions --out DIR

In `out` there are then ``memory`` (a plain transformers folder with ``memory_config.json`` and a model card) and
``training``: ``training.json`` (parameters, results), ``log.jsonl`` (one line a step or evaluation), ``tensorboard``,
and while it runs ``start``, the newest ``checkpoint-STEP`` and the best candidate ``best-STEP``.

The loss of a step is the sum over its rows divided by their number, over all micro-batches and processes. Everything a
step does is a function of the parameters and the step's number, so a run killed at any moment goes on from its newest
checkpoint and ends with the same bytes (on the same machine with the same number of threads).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from memdec import __version__, ops
from memdec.errors import MemdecError
from memdec.modeling.scoring import choose_dtype, load_causal_lm, perplexity, score_tokens, tune_alpha
from memdec.modeling.structure import head_is_plain, output_head, trunk
from memdec.modeling.tokenizers import compare, fingerprint, load_tokenizer
from memdec.pipeline.batches import Batch, read_batch, share, steps_in_epoch, windows_of_step
from memdec.pipeline.checkpoints import (
    keep_only,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    save_model,
    write_folder,
)
from memdec.pipeline.embed import check_fits
from memdec.pipeline.initialise import initialise
from memdec.pipeline.lora import add_adapters, merged_tensors
from memdec.pipeline.master_weights import MasterWeights
from memdec.pipeline.processes import Processes, join_processes
from memdec.pipeline.progress import progress
from memdec.pipeline.record import Record
from memdec.stores.atomic import folder_lock, make_folder, remove_leftovers, writing
from memdec.stores.corpus import Corpus
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.memory import MemoryCard, is_memory, verify_memory, write_memory_card, write_model_card
from memdec.stores.tensors import map_tensors, write_tensors
from memdec.stores.windows import Window, windows

LOGGER = logging.getLogger(__name__)

FORMAT = "memdec.training"
RECORD_NAME = "training.json"
LOG_NAME = "log.jsonl"
SAVE_SECONDS = 300.0  # without save_every, work of at most this long is lost when a run is killed
SCHEDULES = ("cosine", "linear", "constant")
# What a checkpoint is judged by: the perplexity of the mixture with the base, or that of the trained model alone.
JUDGES = {"mixture": "mixture_perplexity", "alone": "memory_perplexity"}
BOTH = "both"


@dataclass(frozen=True)
class Settings:
    """How a memory is trained; :func:`train_memory` says what each means."""

    beta: float = 0.5
    layers: int | None = None
    epochs: int = 8
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    context: int | None = None
    stride: int | None = None
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    validation_tokens: int = 32768
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    judge: str = "mixture"
    lora_rank: int | None = None

    def check(self) -> None:
        """Raise ``MemdecError`` for a value that cannot be."""
        wanted = {
            "beta": (
                0 <= self.beta <= 1,
                "from 0 (plain fine-tuning) to 1 (the retriever alone)",
            ),
            "epochs": (self.epochs >= 1, "at least 1"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "at least 1, or none"),
            "batch_size": (self.batch_size >= 1, "at least 1 window"),
            "gradient_accumulation": (self.gradient_accumulation >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < 1, "above 0 and below 1"),
            "schedule": (self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES)),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "eval_every": (self.eval_every is None or self.eval_every >= 1, "at least 1 step, or none"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1 evaluation, or none to go on"),
            "validation_tokens": (self.validation_tokens >= 2, "at least 2"),
            "layers": (self.layers is None or self.layers >= 1, "at least 1, or none to keep all"),
            "judge": (self.judge in (*JUDGES, BOTH), "one of " + ", ".join((*JUDGES, BOTH))),
            "lora_rank": (self.lora_rank is None or self.lora_rank >= 1, "at least 1, or none to train all weights"),
        }
        for name, (fine, what) in wanted.items():
            if not fine:
                raise MemdecError(f"{name.replace('_', '-')} is {getattr(self, name)!r}; wanted {what}.")

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges that each keep a best checkpoint."""
        return tuple(JUDGES) if self.judge == BOTH else (self.judge,)


def train_memory(
    init: str | os.PathLike[str],
    corpus: Corpus | str | Path,
    distributions: DistributionStore | str | Path,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    beta: float = 0.5,
    layers: int | None = None,
    epochs: int = 8,
    max_steps: int | None = None,
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    context: int | None = None,
    stride: int | None = None,
    learning_rate: float = 1e-4,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    eval_every: int | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    validation_tokens: int = 32768,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
    judge: str = "mixture",
    lora_rank: int | None = None,
    tensorboard: bool = True,
) -> Path:
    """Train a memory on the teacher distributions of a corpus; a run that was stopped is continued.

    L = β·KL(q‖p) + (1−β)·CE, mean over the rows of a step (Cao et al., arXiv 2508.09874, section 3). Run it under
    ``torchrun`` or ``accelerate launch`` to share each step between several devices.

    Args:
        init: causal LM that the memory starts from: folder, hub id or ``.gguf`` file.
        corpus: corpus whose training text the distributions belong to, and whose validation text is the judge.
        distributions: teacher distributions, one row for each token of the training text but the first.
        out: folder; gets ``training`` and ``memory``.
        base: model that the memory will be mixed with, for choosing the best checkpoint and α; None is `init`.
        beta: weight of the KL term, 0 to 1.
        layers: blocks that the memory keeps; None keeps all. See :mod:`memdec.pipeline.initialise`.
        epochs: times that the training text is read.
        max_steps: number of optimiser steps; overrules `epochs`.
        batch_size: windows in one forward on one device.
        gradient_accumulation: forwards in one optimiser step.
        context: tokens in a window; None is that of the distributions.
        stride: how far windows are apart; None is that of the distributions.
        learning_rate: the highest, reached after the warm-up.
        schedule: "cosine", "linear" (both fall to 0) or "constant".
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: AdamW's, on matrices.
        max_grad_norm: longer gradients are scaled down to this norm.
        seed: of the order of the windows, and of dropout.
        eval_every: steps between two evaluations; None is an epoch, or a quarter of the run if that is less.
        patience: evaluations in a row without a better one after which training ends (early stopping); None goes on
            to the last step. The best checkpoint is kept either way.
        save_every: steps between two checkpoints; None saves at each evaluation, and at least every five minutes.
        validation_tokens: at most so many tokens of the validation text are scored.
        device: "cpu", "cuda", "cuda:1", …; None is the first accelerator, else the CPU.
        dtype: what is computed in: "auto" (bfloat16 where the device has it), "bfloat16" or "float32". Weights and
            moments are kept in float32 beside it.
        gradient_checkpointing: compute activations twice instead of keeping them.
        judge: what the best checkpoint is best by on the validation text: "mixture", the perplexity of base + memory,
            or "alone", that of the trained model without a base, as for the fine-tuned rivals of a memory. "both"
            keeps the best by the mixture in ``out/memory`` and the best alone in ``out/alone``.
        lora_rank: train low-rank adapters of this rank instead of all weights; see :mod:`memdec.pipeline.lora`.
        tensorboard: write the curves for TensorBoard too, if it is installed.

    Returns:
        The memory's folder, ``out/memory``.

    Raises:
        MemdecError: the parts do not fit (tokenizers, row counts, an earlier run's parameters), there is no validation
            text, the loss is no number any more, or the disk refuses.

    Example:
        >>> train_memory("SmolLM2-135M", "run/corpus", "run/distributions", "run")   # doctest: +SKIP
        PosixPath('run/memory')
    """
    settings = Settings(
        beta=beta,
        layers=layers,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        context=context,
        stride=stride,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        eval_every=eval_every,
        patience=patience,
        validation_tokens=validation_tokens,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        judge=judge,
        lora_rank=lora_rank,
    )
    settings.check()
    if save_every is not None and save_every < 1:
        raise MemdecError(f"save-every is {save_every}; wanted at least 1 step, or none.")
    opened = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    store = distributions if isinstance(distributions, DistributionStore) else DistributionStore.open(distributions)
    processes = join_processes(device)
    folder = make_folder(Path(out) / "training")
    with folder_lock(folder) if processes.first else nullcontext():
        return _train(init, init if base is None else base, opened, store, Path(out), settings, processes,
                      save_every=save_every, tensorboard=tensorboard)  # fmt: skip


def _train(
    init: str | os.PathLike[str],
    base: str | os.PathLike[str],
    corpus: Corpus,
    store: DistributionStore,
    out: Path,
    settings: Settings,
    processes: Processes,
    *,
    save_every: int | None,
    tensorboard: bool,
) -> Path:
    folder, memory = out / "training", out / "memory"
    plan = make_plan(corpus, store, settings, processes)
    tokenizer = check_tokenizers(init, base, corpus)
    fields = {
        **{name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "context": plan.context,
        "stride": plan.stride,
        "base": model_name(base),
        "base_fingerprint": files_fingerprint(base),
        "init": model_name(init),
        "init_fingerprint": files_fingerprint(init),
        "corpus": corpus.manifest.checksum,
        "distributions": store.manifest.checksum,
        "processes": processes.count,
        "compute_dtype": str(choose_dtype(settings.dtype, processes.device)).removeprefix("torch."),
    }
    record = None
    if processes.first:
        remove_leftovers_of_all_kinds(folder)
        record = Record.start(folder / RECORD_NAME, FORMAT, fields)
        if record.fresh and memory.exists():
            record.path.unlink()
            raise MemdecError(f"{memory} is there already, not from this training. Delete it or choose another --out.")
    finished = processes.agree(record is not None and record.complete)
    if finished:
        if processes.first:
            problems = verify_memory(memory) if is_memory(memory) else [f"{memory} is missing"]
            if problems:
                raise MemdecError(f"The training in {folder} is finished, but its memory is not whole: {problems[0]}. "
                                  f"Delete {folder} and {memory} to train again.")  # fmt: skip
            tidy(folder)  # which a kill may have cut short
            LOGGER.info("the memory in %s is finished; nothing to do", memory)
        return memory
    run = Run(folder, settings, plan, processes, save_every, corpus, store)
    if processes.first and not (folder / "start").exists():
        start = initialise(init, layers=settings.layers, calibration=plan.calibration, context=plan.context,
                           device=processes.device)  # fmt: skip
        check_fits(start, [corpus.split("train")], [*plan.windows[:1], *plan.held_out_windows[:1]])
        save_model(start, folder / "start")
        del start
    processes.wait()
    run.base_log_prob = base_log_probs(base, run)
    with torch.random.fork_rng([processes.device] if processes.device.type == "cuda" else []):
        steps(run, tensorboard=tensorboard)
    if processes.first and record is not None:
        results = finish_memory(run, tokenizer, corpus, memory, fields)
        record.finish(results)
        tidy(folder)
        LOGGER.info("memory in %s: held-out perplexity %.3f with the base (alpha %.2f), base alone %.3f", memory,
                    results["mixture_perplexity"], results["alpha"], results["base_perplexity"])  # fmt: skip
    processes.wait()
    return memory


@dataclass(frozen=True)
class Plan:
    """What follows from the parts: which windows, how many steps, which held-out text."""

    tokens: Tensor  # int32 (T,), the training text
    windows: list[Window]
    context: int
    stride: int | None
    windows_per_step: int
    total_steps: int
    eval_every: int
    held_out: Tensor  # int32, the part of the validation text that is scored
    held_out_windows: list[Window]

    @property
    def calibration(self) -> Tensor:
        """The head of the training text, to fit a cut memory on."""
        return self.tokens[: 16 * 1024]


def make_plan(corpus: Corpus, store: DistributionStore, settings: Settings, processes: Processes) -> Plan:
    """Check that corpus and distributions belong together, and lay out the work."""
    train, validation = corpus.split("train"), corpus.split("validation")
    if store.num_rows != train.num_rows or store.vocab_size != corpus.vocab_size:
        raise MemdecError(
            f"the distributions in {store.folder} have {store.num_rows} rows over {store.vocab_size} tokens, but the "
            f"training text in {corpus.folder} has {train.num_rows} rows over {corpus.vocab_size}: they do not belong "
            "together. Make the distributions from a datastore of this corpus."
        )
    if train.num_rows < 1:
        raise MemdecError(f"the training text in {corpus.folder} has fewer than two tokens; give more text.")
    if validation.num_rows < 1:
        raise MemdecError(
            f"the corpus in {corpus.folder} has no validation text, on which the best checkpoint and alpha are chosen; "
            "give more documents (a document is never split between training and validation)."
        )
    made_with = store.manifest.fields
    context = settings.context or int(made_with.get("context") or 1024)
    stride = settings.stride if settings.stride is not None or settings.context else made_with.get("stride")
    cut = windows(train.num_tokens, context, stride)
    per_step = settings.batch_size * settings.gradient_accumulation * processes.count
    epoch = steps_in_epoch(len(cut), per_step)
    total = settings.max_steps or settings.epochs * epoch
    eval_every = settings.eval_every or min(epoch, -(-total // 4))
    held_out = validation.tokens[: settings.validation_tokens + 1]
    return Plan(train.tokens, cut, context, stride, per_step, total, eval_every, held_out,
                windows(held_out.numel(), context))  # fmt: skip


def check_tokenizers(init: str | os.PathLike[str], base: str | os.PathLike[str], corpus: Corpus) -> Any:
    """The memory's tokenizer, once it is sure that base, memory and corpus speak of the same tokens."""
    tokenizer = load_tokenizer(init)
    if Path(base) != Path(init):
        compare(load_tokenizer(base), tokenizer, base_name=str(base), memory_name=str(init))
    found = fingerprint(tokenizer)
    if found != corpus.tokenizer_fingerprint:
        raise MemdecError(
            f"the corpus in {corpus.folder} was made with another tokenizer than that of {init} (fingerprints "
            f"{corpus.tokenizer_fingerprint[:12]} and {found[:12]}). Start the memory from a model of the same family, "
            "or make the corpus, datastore and distributions anew with this model's tokenizer."
        )
    return tokenizer


def model_name(source: str | os.PathLike[str]) -> str:
    """A model's name as artefacts record it: a hub id as it is, of a path the last part only."""
    return Path(source).name if Path(source).exists() else str(source)


def files_fingerprint(source: str | os.PathLike[str]) -> str | None:
    """Sha256 over names, sizes and beginnings of a local model's files: cheap, and other for other weights; None for a
    hub id, which says itself what it is."""
    path = Path(source)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin"), path / "config.json"]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()


@dataclass
class Run:
    """One training while it runs."""

    folder: Path
    settings: Settings
    plan: Plan
    processes: Processes
    save_every: int | None
    corpus: Corpus
    store: DistributionStore
    base_log_prob: Tensor = field(default_factory=lambda: torch.empty(0))
    step: int = 0  # optimiser steps done
    best: dict[str, dict[str, Any]] = field(default_factory=dict)  # the best evaluation so far, by judge
    log_bytes: int = 0  # length of log.jsonl
    saved: set[str] = field(default_factory=set)  # the newest checkpoint's folder, and the candidates it refers to

    @property
    def is_exhausted(self) -> bool:
        """Whether the last evaluations, as many as the patience, were all no better than one before them."""
        if self.settings.patience is None or not self.best:
            return False
        newest = max(int(best["step"]) for best in self.best.values())
        return (self.step - newest) // self.plan.eval_every >= self.settings.patience

    def candidates(self) -> set[str]:
        """The folders of the best evaluations so far."""
        return {f"best-{int(best['step']):08d}" for best in self.best.values()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {"best": self.best, "log_bytes": self.log_bytes}


def base_log_probs(base: str | os.PathLike[str], run: Run) -> Tensor:
    """log p_base of the held-out tokens, computed once and kept in the training folder."""
    path = run.folder / "base.safetensors"
    if run.processes.agree(path.exists()):
        return torch.from_numpy(map_tensors(path)["log_prob"])
    model = load_causal_lm(base, dtype=run.settings.dtype, device=run.processes.device)
    check_fits(model, [run.corpus.split("validation")], run.plan.held_out_windows[:1])
    scores = score_held_out(model, run, "Scoring with the base")
    if run.processes.first:
        write_tensors(path, {"log_prob": scores.numpy()})
    run.processes.wait()
    return scores


def score_held_out(model: nn.Module, run: Run, label: str) -> Tensor:
    """log p of the held-out tokens under `model`, the windows shared between the processes."""
    plan, processes = run.plan, run.processes
    mine = plan.held_out_windows[processes.rank :: processes.count]
    with progress(sum(window.num_rows for window in mine), "tokens", label) as advance:
        scores = score_tokens(model, plan.held_out, mine, batch_size=run.settings.batch_size,
                              device=processes.device, progress=advance)  # fmt: skip
    return processes.merge(scores)


class Student(nn.Module):
    """The memory with the loss on top: from a batch to the sums of total, KL and CE over its rows."""

    def __init__(self, model: Any, vocab_size: int, beta: float) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.beta = beta
        head = output_head(model)
        width = int(cast(Tensor, head.weight).shape[0])
        if width < vocab_size:
            raise MemdecError(
                f"the model predicts {width} tokens, but its tokenizer has {vocab_size}: resize its embeddings "
                "(model.resize_token_embeddings) before making a memory of it."
            )
        # A model that scales or caps its logits after the head, or whose head is no plain matrix, is run whole.
        self.fused = isinstance(head, nn.Linear) and head_is_plain(model)
        if not self.fused:
            LOGGER.info("%s changes its logits after the output head; the loss is not fused", type(model).__name__)

    def forward(self, batch: Batch) -> Any:
        """Total (differentiable), KL and CE, each summed over the batch's rows."""
        if self.fused:
            hidden = trunk(self.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            head = cast(nn.Linear, output_head(self.model))
            bias = None if head.bias is None else head.bias[: self.vocab_size]
            return ops.linear_alignment_loss(self._rows(hidden, batch), head.weight[: self.vocab_size], batch.labels,
                                             batch.teacher, bias=bias, beta=self.beta, reduction="sum")  # fmt: skip
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[..., : self.vocab_size]
        return ops.alignment_loss(self._rows(logits, batch), batch.labels, batch.teacher, beta=self.beta,
                                  reduction="sum")  # fmt: skip

    def _rows(self, states: Tensor, batch: Batch) -> Tensor:
        flat = states.flatten(0, 1)  # (B·L, …)
        return flat if batch.positions is None else flat[batch.positions]


def steps(run: Run, *, tensorboard: bool) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    settings, plan, processes = run.settings, run.plan, run.processes
    model = load_causal_lm(run.folder / "start", dtype=torch.float32, device=processes.device)
    if settings.lora_rank is not None:
        add_adapters(model, settings.lora_rank, settings.seed)
    if settings.gradient_checkpointing:
        # Newer transformers call it so, and the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    student = Student(model, run.corpus.vocab_size, settings.beta)
    weights = MasterWeights(model, choose_dtype(settings.dtype, processes.device), weight_decay=settings.weight_decay)
    checkpoint = load_checkpoint(run.folder)
    if checkpoint is not None:
        run.step, tensors, state = checkpoint
        try:
            weights.restore(tensors, run.step)
        except ValueError as error:
            raise MemdecError(
                f"the checkpoint in {run.folder} is of another model: {error}. Delete the folder."
            ) from None
        run.best, run.log_bytes = state["best"], int(state["log_bytes"])
        run.saved = {f"checkpoint-{run.step:08d}", *run.candidates()}
        del tensors, checkpoint
        LOGGER.info("continuing after step %d of %d", run.step, plan.total_steps)
    processes.wait()
    saved_at = time.monotonic()
    rows_per_step = plan.windows_per_step * (plan.context - 1)
    with (
        open_log(run, tensorboard) as log,
        deferred_interrupt() as interrupted,
        progress(plan.total_steps * rows_per_step, "tokens", "Training", done=run.step * rows_per_step) as advance,
    ):
        if run.step == 0 and not run.best:
            evaluate(run, model, log)
            if not run.save_every:
                save(run, weights)
        while run.step < plan.total_steps and not run.is_exhausted:
            began = time.monotonic()
            losses = one_step(run, student, weights)
            seconds = time.monotonic() - began
            run.step += 1
            advance(rows_per_step)
            # A million steps need no million lines.
            if run.step % max(1, plan.total_steps // 2000) == 0:
                rate = losses.pop("rows") / max(seconds, 1e-9)
                log({"step": run.step, **losses}, {"seconds": round(seconds, 4), "tokens_per_second": round(rate, 1)})
            evaluated = run.step % plan.eval_every == 0 or run.step == plan.total_steps
            if evaluated:
                evaluate(run, model, log)
            if run.save_every:
                due = run.step % run.save_every == 0
            else:
                due = evaluated or time.monotonic() - saved_at > SAVE_SECONDS
            stop = processes.agree(interrupted())
            if stop or processes.agree(due):
                save(run, weights)
                saved_at = time.monotonic()
            elif evaluated and processes.first:
                keep_only(run.folder, run.saved | run.candidates())
            if stop:
                LOGGER.warning("stopped after step %d; the same command continues from there", run.step)
                raise KeyboardInterrupt
        if run.step < plan.total_steps:
            LOGGER.info("no better evaluation in %d: training ends after step %d of %d", settings.patience, run.step,
                        plan.total_steps)  # fmt: skip


def one_step(run: Run, student: Student, weights: MasterWeights) -> dict[str, float]:
    """Forward, backward and update on the windows of the next step; its losses, per row, and what was done."""
    settings, plan, processes = run.settings, run.plan, run.processes
    chosen = windows_of_step(run.step, len(plan.windows), plan.windows_per_step, settings.seed)
    rows = sum(plan.windows[index].num_rows for index in chosen)
    # Dropout draws from a generator set anew each step, so a resumed run draws what the undisturbed one would.
    torch.manual_seed((settings.seed * 1_000_003 + run.step) * 4099 + processes.rank)
    student.model.train()
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
    for part in share(chosen, processes.rank, processes.count, settings.batch_size):
        batch = read_batch(plan.tokens, [plan.windows[index] for index in part], run.store).to(processes.device)
        loss = student(batch)
        # Divided by the rows of the whole step, not of this part: the sum over parts and processes is the mean.
        (loss.total / rows).backward()
        sums += torch.stack([loss.total.detach(), loss.kl.detach(), loss.ce.detach()])
    processes.add_up([sums, *weights.gradients])
    norm = weights.gradient_norm()
    total, kl, ce, gradient_norm = [*(sums / rows).tolist(), float(norm)]
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        raise MemdecError(
            f"the loss of step {run.step + 1} is {total:g} and its gradient's norm {gradient_norm:g}: training has "
            f"diverged, or the starting weights are broken. The checkpoint and the best candidate before it stay in "
            f"{run.folder}. Try a lower --learning-rate or --dtype float32, with another --out."
        )
    rate = learning_rate(run.step, plan.total_steps, settings)
    weights.step(rate, (settings.max_grad_norm / (norm + 1e-12)).clamp(max=1.0))
    return {"loss": total, "kl": kl, "ce": ce, "learning_rate": rate, "gradient_norm": gradient_norm, "rows": rows}


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """The rate of step `step` (from 0) of `total`: a linear rise, then a fall to 0 just after the last step."""
    rise = math.ceil(settings.warmup * total)
    if step < rise:
        return settings.learning_rate * (step + 1) / rise
    left = 1 - (step - rise) / max(1, total - rise)  # 1 … just above 0
    share_of_peak = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return settings.learning_rate * share_of_peak[settings.schedule]


def evaluate(run: Run, model: Any, log: Callable[..., None]) -> None:
    """Score the held-out text with the memory as it is, tune α, and keep the model if its mixture is the best yet."""
    memory = score_held_out(model, run, "Evaluating")
    alpha, _ = tune_alpha(run.base_log_prob, memory)
    found = {
        "step": run.step,
        "alpha": alpha,
        "mixture_perplexity": perplexity_of_mixture(run.base_log_prob, memory, alpha),
        "memory_perplexity": perplexity(memory),
        "base_perplexity": perplexity(run.base_log_prob),
    }
    better = [
        judge
        for judge in run.settings.judges
        if judge not in run.best or found[JUDGES[judge]] < run.best[judge][JUDGES[judge]]
    ]
    log({**found, "best": bool(better)}, {})
    LOGGER.info("step %d of %d: held-out perplexity %.3f mixed (alpha %.2f), memory alone %.3f, base alone %.3f",
                run.step, run.plan.total_steps, found["mixture_perplexity"], alpha, found["memory_perplexity"],
                found["base_perplexity"])  # fmt: skip
    if better:
        run.best.update(dict.fromkeys(better, found))
        if run.processes.first:
            tensors = None if run.settings.lora_rank is None else merged_tensors(model)
            save_model(model, run.folder / f"best-{run.step:08d}", tensors)


def perplexity_of_mixture(base: Tensor, memory: Tensor, alpha: float) -> float:
    """Perplexity of α·p_mem + (1−α)·p_base on the held-out tokens."""
    from memdec.modeling.scoring import mixture_log_prob

    return perplexity(mixture_log_prob(base, memory, alpha))


def save(run: Run, weights: MasterWeights) -> None:
    """Write a checkpoint; then those that it replaces may go."""
    if run.processes.first:
        save_checkpoint(run.folder, run.step, weights.state(), run.state())
        run.saved = {f"checkpoint-{run.step:08d}", *run.candidates()}
        keep_only(run.folder, run.saved)
    run.processes.wait()


@contextmanager
def open_log(run: Run, tensorboard: bool) -> Iterator[Callable[..., None]]:
    """``log.jsonl`` (and TensorBoard), cut back to where the checkpoint left it; yields log(figures, timings)."""
    if not run.processes.first:
        yield lambda figures, timings: None
        return
    writer = tensorboard_writer(run) if tensorboard else None
    path = run.folder / LOG_NAME
    with writing(path), open(path, "ab") as file:
        file.truncate(run.log_bytes)

        def log(figures: dict[str, Any], timings: dict[str, float]) -> None:
            file.write(json.dumps({**figures, **timings}).encode() + b"\n")
            file.flush()
            run.log_bytes = file.tell()
            if writer is not None:
                for name, value in {**figures, **timings}.items():
                    if name != "step" and not isinstance(value, bool):
                        writer.add_scalar(name, value, run.step)

        try:
            yield log
        finally:
            if writer is not None:
                writer.close()


def tensorboard_writer(run: Run) -> Any:
    """A TensorBoard writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        LOGGER.info("TensorBoard is not installed; the curves go to %s alone", LOG_NAME)
        return None
    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C (or SIGTERM) wait for the end of the step; a second one does not wait. Yields interrupted()."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish_memory(run: Run, tokenizer: Any, corpus: Corpus, memory: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Make the memory's folder of the best candidate, with tokenizer, card and configuration; the figures. With two
    judges that of the model alone comes first, so that whoever sees the memory sees both."""
    if run.settings.judge == BOTH:
        write_memory(run, tokenizer, corpus, memory.with_name("alone"), fields, run.best["alone"])
    best = run.best[run.settings.judges[0]]
    write_memory(run, tokenizer, corpus, memory, fields, best)
    return best


def write_memory(
    run: Run, tokenizer: Any, corpus: Corpus, memory: Path, fields: dict[str, Any], best: dict[str, Any]
) -> None:
    """The folder `memory` of the candidate whose figures are `best`."""
    figures = {
        "held-out perplexity, base": best["base_perplexity"],
        "held-out perplexity, memory alone": best["memory_perplexity"],
        "held-out perplexity, base + memory": best["mixture_perplexity"],
    }
    provenance = {
        **fields,
        "memdec": __version__,
        "steps": best["step"],
        "total_steps": run.step,  # those taken: fewer than planned where patience has ended it
        "held_out_tokens": run.plan.held_out.numel() - 1,
        "figures": best,
    }
    card = MemoryCard(best["alpha"], corpus.tokenizer_fingerprint, corpus.vocab_size, provenance)

    def fill(folder: Path) -> None:
        for file in sorted((run.folder / f"best-{best['step']:08d}").iterdir()):
            shutil.copyfile(file, folder / file.name)
        tokenizer.save_pretrained(folder)
        write_model_card(folder, card, title="Memory", figures=figures)
        write_memory_card(folder, card)

    write_folder(memory, fill)


def tidy(folder: Path) -> None:
    """Delete what only an unfinished training needs."""
    keep_only(folder, set())
    shutil.rmtree(folder / "start", ignore_errors=True)


def remove_leftovers_of_all_kinds(folder: Path) -> None:
    """Delete what a killed run left half written in `folder` and beside it."""
    remove_unfinished(folder)
    for name in ("memory", "alone"):
        remove_unfinished(folder.parent, of=name)
    remove_leftovers(folder)
