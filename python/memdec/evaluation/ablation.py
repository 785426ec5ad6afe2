"""A grid of memories that differ in a few settings, to see which of them matter.

    memdec fit MODEL CORPUS --out DIR --ablate beta=0,0.5,1 --ablate teacher=knn,lm

Every combination of the values is a run, a folder in ``DIR/runs`` with ``training`` and ``memory``. What runs share is
made once: the corpus, an adapted model for each setting of that, a datastore for each teacher's model, distributions
for each setting of the search. What is adapted is trained with the settings that the runs have in common, so that its
own teacher stays the same when, say, the memory's learning rate varies. A run that
has ended is a line of ``DIR/ablation.jsonl``; stopped, the same command goes on, and a larger grid takes over what a
smaller one has made. All memories are judged on the same test tokens, α tuned on validation text; their log-probs of
them are ``DIR/runs/NAME/test.safetensors``, the base's ``DIR/base-….safetensors``. ``DIR/ablation.html`` shows one plot
a setting.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.evaluation.charts import Bar, Line, bar_chart, line_chart
from memdec.evaluation.evaluate import environment
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.pages import page_template
from memdec.evaluation.perplexity import sliding_protocol
from memdec.modeling.scoring import choose_dtype, load_causal_lm, mixture_log_prob, perplexity, score_tokens
from memdec.modeling.sources import read_config
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.adapt import SHARED, adapt_model, choose_teacher
from memdec.pipeline.corpus import build_corpus
from memdec.pipeline.distributions import build_distributions
from memdec.pipeline.embed import build_datastore, default_device
from memdec.pipeline.fit import fit
from memdec.pipeline.progress import progress
from memdec.pipeline.teachers import build_teacher
from memdec.pipeline.train import Settings, files_fingerprint, model_name, train_memory
from memdec.readable import number
from memdec.stores.atomic import folder_lock, make_folder, write_file
from memdec.stores.corpus import Corpus
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.memory import read_memory_card
from memdec.stores.tensors import map_tensors, write_tensors

FORMAT = "memdec.ablation"
VERSION = 1
# The settings that may vary, how a value of the command line is read, and which stage it belongs to.
AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "beta": (float, "train"),
    "epochs": (int, "train"),
    "max_steps": (int, "train"),
    "learning_rate": (float, "train"),
    "batch_size": (int, "train"),
    "weight_decay": (float, "train"),
    "layers": (int, "train"),
    "seed": (int, "train"),
    "init": (str, "train"),
    "k": (int, "search"),
    "temperature": (float, "search"),
    "min_prob": (float, "search"),
    "teacher": (str, "teacher"),
    "teacher_model": (str, "teacher"),
    "adapt_epochs": (int, "teacher"),
    "top_k": (int, "teacher"),
}
CORPUS_OPTIONS = ("fractions", "text_field", "workers", "max_tokens", "validation", "test")
DATASTORE_OPTIONS = ("context", "stride", "layer", "device", "dtype")
SEARCH_OPTIONS = ("k", "temperature", "backend", "exclude_same_document", "min_prob", "codec", "memory_limit")
TRAIN_OPTIONS = (*Settings.__dataclass_fields__, "save_every", "tensorboard", "device")
STYLES = ("c-mixture", "c-knn", "c-memory", "c-base")
LONGEST_NAME = 200  # of the 255 bytes that file systems take, which a stage's own prefix shares


@dataclass(frozen=True)
class Run:
    """One memory of the grid.

    Attributes:
        settings: the values of the axes.
        alpha: tuned on the validation text.
        validation_perplexity: of base + memory.
        perplexity: of base + memory on the test text.
        memory_perplexity: of the memory alone there.
        base_perplexity: of the base alone there.
        best_step: the checkpoint that was kept.
        total_steps: optimiser steps.
        facts: versions, commit, number of tokens.
    """

    settings: dict[str, Any]
    alpha: float
    validation_perplexity: float
    perplexity: float
    memory_perplexity: float
    base_perplexity: float
    best_step: int
    total_steps: int
    facts: dict[str, Any] = field(default_factory=dict)


def parse_grid(parts: Sequence[str]) -> dict[str, list[Any]]:
    """``["beta=0,0.5", "teacher=knn,lm"]`` as a grid.

    Raises:
        MemdecError: no such setting, no value, or a value that is none.
    """
    grid: dict[str, list[Any]] = {}
    for part in parts:
        name, _, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in AXES or name in grid or not values.strip():
            known = ", ".join(axis.replace("_", "-") for axis in AXES)
            raise MemdecError(f"--ablate wants NAME=VALUE,VALUE, each name once, of {known}; got {part!r}.")
        read, _ = AXES[name]
        try:
            grid[name] = list(dict.fromkeys(read(value.strip()) for value in values.split(",") if value.strip()))
        except ValueError:
            raise MemdecError(f"--ablate {part}: wanted {name} to be of kind {read.__name__}.") from None
    return grid


def ablate(
    model: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]],
    *,
    say: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> list[Run]:
    """Make and measure a memory for every combination of the grid's values.

    Args:
        model: the base that all are mixed with.
        corpus: text, as :func:`memdec.pipeline.fit.fit` takes it.
        out: folder for everything.
        grid: values by setting, of `AXES`. Or several such grids of the same settings, the most important first: their
            runs are made in that order, each once.
        say: called with a line about each run.
        options: what all runs have in common, any option of ``fit``.

    Returns:
        The runs in the grid's order, those of earlier calls with the same options among them.

    Raises:
        MemdecError: a setting that cannot be; the runs before it stay.

    Example:
        >>> ablate("SmolLM2-135M", "manuals/", "grid", {"beta": [0.0, 0.5, 1.0]})   # doctest: +SKIP
    """
    grids = [grid] if isinstance(grid, Mapping) else list(grid)
    axes = list(grids[0])
    known = set(inspect.signature(fit).parameters) - {"model", "corpus", "out"}
    for name in [*axes, *options]:
        if name not in (AXES if name in axes else known):
            raise MemdecError(f"an ablation cannot vary {name}; it knows {', '.join(AXES)}.")
    if any(set(one) != set(axes) for one in grids):
        raise MemdecError(f"grids of one ablation vary the same settings; got {[list(one) for one in grids]}.")
    combinations: list[dict[str, Any]] = []
    for one in grids:
        for values in itertools.product(*(one[axis] for axis in axes)):
            combination = dict(zip(axes, values, strict=True))
            if combination not in combinations:
                combinations.append(combination)
    for combination in combinations:  # not after hours of training
        settings = {**options, **combination}
        Settings(**_chosen(settings, TRAIN_OPTIONS[:-3])).check()
        choose_teacher(settings)
    folder = make_folder(Path(out))
    with folder_lock(folder):
        text = build_corpus(os.fspath(corpus), os.fspath(model), folder / "corpus", seed=int(options.get("seed", 0)),
                            **_chosen(options, CORPUS_OPTIONS))  # fmt: skip
        judge = _Judge(model, folder, options)
        runs: list[Run] = []
        made: dict[Path, Any] = {}
        for index, combination in enumerate(combinations):
            say(f"Run {index + 1} of {len(combinations)}: {shown(combination)}")
            settings = {**options, **combination}
            teacher = _teacher(settings, options, model, text, folder, made)
            place = folder / "runs" / name_of(combination)
            memory = train_memory(
                settings.get("init") or model,
                text,
                teacher,
                place,
                base=model,
                **{"tensorboard": False, **_chosen(settings, TRAIN_OPTIONS)},
            )
            runs.append(judge.run(combination, memory))
            found = {axis: list(dict.fromkeys(run.settings[axis] for run in runs)) for axis in axes}
            _save(folder, runs, found, {name: options[name] for name in options if name not in axes}, model)
    return runs


def _chosen(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _teacher(
    settings: Mapping[str, Any],
    common: Mapping[str, Any],
    model: Any,
    text: Corpus,
    folder: Path,
    made: dict[Path, Any],
) -> DistributionStore:
    """The teacher's distributions for one combination; what another run has made is taken, what this call made out of
    `made`."""

    def once(name: str, make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        path = folder / name
        if path not in made:
            made[path] = make(*arguments, path, **named)
        return made[path]

    kind, epochs = choose_teacher(settings)
    taught_by = settings.get("teacher_model") or model
    called = slug(taught_by)  # what is made with it
    if epochs:
        shared = _chosen(common, SHARED)
        called = f"adapted-{name_of({'of': taught_by, 'epochs': epochs, **shared})}"
        others = {"tensorboard": False, **_chosen(common, ("save_every", "tensorboard", "device"))}
        taught_by = once(called, adapt_model, taught_by, text, epochs=epochs, **others, **shared)
    knn = None
    if kind in ("knn", "knn-lm"):
        datastore = once(f"datastore-{called}", build_datastore, os.fspath(taught_by), text,
                         **_chosen(settings, DATASTORE_OPTIONS))  # fmt: skip
        search = _chosen(settings, SEARCH_OPTIONS)
        knn = once(f"distributions-{name_of({'of': called, **search})}", build_distributions, datastore,
                   device=settings.get("device") or default_device(), **search)  # fmt: skip
        if kind == "knn":
            return cast(DistributionStore, knn)
    told = {"teacher": kind, **_chosen(settings, ("teacher_model", "top_k", "context", "stride"))}
    if epochs:
        told["of"] = called
    if kind == "knn-lm":
        told |= _chosen(settings, SEARCH_OPTIONS)
    named = _chosen(settings, ("top_k", "context", "stride", "codec", "device", "dtype"))
    taught = once(f"teacher-{name_of(told)}", build_teacher, kind, text, knn=knn, model=taught_by, **named)
    return cast(DistributionStore, taught)


class _Judge:
    """Scores the memories on the test text, each once, and the base once: what was scored is read again."""

    def __init__(self, model: Any, folder: Path, options: Mapping[str, Any]) -> None:
        self.dtype, self.device = options.get("dtype", "auto"), options.get("device") or default_device()
        held_out = load_held_out(folder / "corpus", load_tokenizer(model))
        limit = getattr(read_config(model).get_text_config(), "max_position_embeddings", None) or 1024
        context = min(1024, int(limit))
        self.protocol = sliding_protocol(held_out, context, max(1, context // 2))
        told = hashlib.sha256(f"{model_name(model)} {files_fingerprint(model)} {self.dtype}".encode()).hexdigest()
        self.base = self._scores(model, folder / f"base-{told[:12]}.safetensors", "base")
        used = str(choose_dtype(self.dtype, torch.device(self.device))).removeprefix("torch.")
        self.facts = {
            **environment(), "device": str(self.device), "dtype": used, "test_tokens": self.protocol.num_scored
        }  # fmt: skip

    def _scores(self, model: Any, path: Path, label: str) -> Tensor:
        """log p of every test token by the model, kept in `path`."""
        if not path.is_file():
            loaded = load_causal_lm(model, dtype=self.dtype, device=self.device)
            with progress(self.protocol.num_scored, unit="tokens", label=f"Scoring, {label}") as advance:
                found = score_tokens(
                    loaded, self.protocol.tokens, self.protocol.windows, batch_size=4, progress=advance
                )  # fmt: skip
            write_tensors(path, {"log_prob": found.float().numpy()})
        return torch.from_numpy(map_tensors(path)["log_prob"])

    def run(self, settings: dict[str, Any], memory: Path) -> Run:
        card = read_memory_card(memory)
        scores = self._scores(memory, memory.parent / "test.safetensors", "memory")
        return Run(
            settings=settings,
            alpha=card.alpha,
            validation_perplexity=float(card.provenance["figures"]["mixture_perplexity"]),
            perplexity=perplexity(mixture_log_prob(self.base, scores, card.alpha)),
            memory_perplexity=perplexity(scores),
            base_perplexity=perplexity(self.base),
            best_step=int(card.provenance["steps"]),
            total_steps=int(card.provenance["total_steps"]),
            facts=self.facts,
        )


def shown(settings: Mapping[str, Any]) -> str:
    """Settings for people."""
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items()) or "as it is"


def slug(value: Any) -> str:
    """A value as a part of a folder's name; of a path the last part only."""
    text = Path(value).name if isinstance(value, os.PathLike) or "/" in str(value) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)


def name_of(settings: Mapping[str, Any]) -> str:
    """A folder's name that tells the settings; what all runs have in common, each stage's own record checks. One too
    long for a file system ends in a digest of what does not fit."""
    name = "_".join(f"{name}={slug(settings[name])}" for name in sorted(settings)) or "only"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - 13]}-{digest}"


def _save(
    folder: Path, runs: Sequence[Run], grid: Mapping[str, Sequence[Any]], options: Mapping[str, Any], model: Any
) -> None:
    """ablation.jsonl, a line a run, and the page of this grid; the lines of other grids' runs stay."""
    lines = [json.dumps(asdict(run), sort_keys=True, default=str) for run in runs]
    mine = [json.loads(line)["settings"] for line in lines]
    path = folder / "ablation.jsonl"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in earlier if json.loads(line)["settings"] not in mine] + lines
    write_file(path, ("\n".join(lines) + "\n").encode())
    common = {name: str(value) for name, value in sorted(options.items())}
    write_file(folder / "ablation.html", render_ablation(runs, grid, slug(model), common).encode())


def render_ablation(
    runs: Sequence[Run], grid: Mapping[str, Sequence[Any]], model: str, common: Mapping[str, str]
) -> str:
    """The page: a table of the runs and a plot for every setting that has several values."""
    charts = [
        {"title": axis.replace("_", " "), "svg": axis_chart(runs, axis)}
        for axis, values in grid.items()
        if len(values) > 1
    ]
    best = min(runs, key=lambda run: run.validation_perplexity)
    page: str = page_template("ablation.html.jinja").render(
        axes=list(grid), runs=runs, charts=charts, best=best, model=model, common=common, number=number
    )
    return page


def axis_chart(runs: Sequence[Run], axis: str) -> str:
    """Test perplexity over one setting: a line for each combination of the others, or bars where it is no number."""
    others: dict[str, list[Run]] = {}
    for run in runs:
        rest = {name: value for name, value in run.settings.items() if name != axis}
        others.setdefault(shown(rest) if rest else "base + memory", []).append(run)
    values = [run.settings[axis] for run in runs]
    if all(isinstance(value, int | float) for value in values) and len(others) <= len(STYLES):
        lines = [
            Line(name, sorted((float(run.settings[axis]), run.perplexity) for run in group), style)
            for (name, group), style in zip(others.items(), STYLES, strict=False)
        ]
        base = runs[0].base_perplexity
        rules = [(base, f"base {number(base)}")] if base < 2 * max(run.perplexity for run in runs) else []
        return line_chart(lines, f"Perplexity over {axis}", axis.replace("_", " "), "test perplexity", rules=rules)
    bars = [Bar(shown(run.settings), run.perplexity, f"α {run.alpha:g}", "c-mixture") for run in runs]
    return bar_chart(bars, f"Perplexity by {axis}")
