"""The comparison that the paper makes, on one's own domain: every rival from the same text, tuned on the same
validation text, scored on the same tokens, with what it costs and what it forgets.

    memdec evaluate --base M --memory RUN/memory --text RUN/corpus --compare base,rag,knn-lm,dapt,lora,memory

Each method gives one log-prob a token on three texts: *test* for the table, *validation* to tune what is mixed, and
*general* text outside the domain for what was forgotten. The weight of a mixture is the one of the validation text,
found by the same sliding window as the test; it is never tuned on the test. Decoding is timed in the same run, turn
about.

============= =====================================================================================================
rag           in-context retrieval, :mod:`memdec.evaluation.rag`; passage length and number tuned on validation text
knn-lm        :mod:`memdec.evaluation.knn_lm`; T and λ tuned on validation text, the datastore searched for each token.
              Where the run's datastore holds another model's keys, or there is none, ``OUT/rivals/knn-lm`` gets the
              base's own
memory        two rows: the memory alone, and base + memory; of a memory whose teacher was adapted two more: the adapted
              model alone, and mixed with the base as a memory is
dapt+memory   the memory mixed with the base that DAPT has trained
others        :mod:`memdec.evaluation.rivals`
============= =====================================================================================================
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.evaluation.evaluate import check_ours, environment, folder_bytes, json_text, knn_settings, short_name
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.knn_lm import KnnSettings, is_made_by, knn_log_prob, tune_knn
from memdec.evaluation.latency import (
    Decoder,
    LatencyFigure,
    knn_decoder,
    measure,
    memory_decoder,
    plain_decoder,
    rag_decoder,
)
from memdec.evaluation.perplexity import HeldOutText, Protocol, join_documents, relative_interval, sliding_protocol
from memdec.evaluation.rag import RagSettings, Retriever, load_bm25s, rag_log_prob, tune_rag
from memdec.evaluation.rivals import RIVALS, Budget, Rival, adapted_teacher, train_rivals, training_settings
from memdec.modeling.scoring import load_causal_lm, mixture_log_prob, perplexity, score_tokens, tune_alpha
from memdec.modeling.tokenizers import compare as compare_tokenizers
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.embed import build_datastore, default_device
from memdec.pipeline.lora import load_peft
from memdec.pipeline.progress import progress
from memdec.stores.atomic import make_folder, write_file
from memdec.stores.corpus import Corpus
from memdec.stores.datastore import Datastore
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.manifest import MANIFEST_NAME
from memdec.stores.memory import read_memory_card

FORMAT = "memdec.comparison"
VERSION = 1
# What may be compared, in the order of the table.
METHODS = ("base", "rag", "knn-lm", "dapt", "lora", "second-model", "lm-memory", "memory", "dapt+memory")
LABELS = {
    "base": "base",
    "rag": "in-context RAG",
    "knn-lm": "kNN-LM",
    "dapt": "DAPT",
    "lora": "LoRA",
    "second-model": "base + second model",
    "lm-memory": "base + LM-taught memory",
    "adapted-alone": "adapted teacher",
    "adapted": "base + adapted teacher",
    "memory-alone": "memory alone",
    "memory": "base + memory",
    "dapt+memory": "DAPT + memory",
}
# Which trained model stands alone in a row, and which two are mixed: (first, second) has α of the second.
ALONE = {"base": "base", "dapt": "dapt", "lora": "lora", "adapted-alone": "adapted", "memory-alone": "memory"}
MIXED = {
    "second-model": ("base", "second-model"),
    "lm-memory": ("base", "lm-memory"),
    "adapted": ("base", "adapted"),
    "memory": ("base", "memory"),
    "dapt+memory": ("dapt", "memory"),
}
TEXTS = ("test", "validation", "general")


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        method: a key of `LABELS`.
        label: its name for people.
        perplexity: of the test text.
        relative: perplexity / base perplexity − 1.
        interval: 95% paired bootstrap interval of `relative`, over documents; None for the base and short texts.
        memory_relative: perplexity of base + memory / this one − 1; None for base + memory, and where it was left out.
        memory_interval: 95% paired bootstrap interval of that.
        validation_perplexity: of the validation text, where what is mixed was tuned; None for the retrievers.
        weight: α or λ of what is mixed with the base, None for what stands alone.
        general_perplexity: of the text outside the domain.
        general_relative: over the base's, − 1.
        latency: of decoding, None where it was not timed.
        kept_bytes: what a user keeps on disk beside the base; for dapt, which replaces it, the whole model.
        trained_parameters: what training changed; 0 for the retrievers.
        training_seconds: of the optimiser's steps.
        training_flops: all that was spent to make it.
        settings: what else it was set to.
    """

    method: str
    label: str
    perplexity: float
    relative: float
    interval: tuple[float, float] | None
    memory_relative: float | None
    memory_interval: tuple[float, float] | None
    validation_perplexity: float | None
    weight: float | None
    general_perplexity: float
    general_relative: float
    latency: LatencyFigure | None
    kept_bytes: int
    trained_parameters: int
    training_seconds: float
    training_flops: float
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseEntry:
    """The same memory on one base, which nothing was trained for.

    Attributes:
        base: its name.
        parameters: how many it has.
        perplexity: of the base alone, test text.
        with_memory: of base + memory, the weight tuned on validation text for this base.
        relative: with_memory / perplexity − 1.
        interval: 95% paired bootstrap interval of `relative`; None of a text too short.
        weight: that α.
        recommended_weight: the memory's own α, tuned for the base that it was trained with.
        with_recommended: of base + memory at that α.
        general_perplexity: of the base alone, text outside the domain.
        general_with_memory: of base + memory there.
    """

    base: str
    parameters: int
    perplexity: float
    with_memory: float
    relative: float
    interval: tuple[float, float] | None
    weight: float
    recommended_weight: float
    with_recommended: float
    general_perplexity: float
    general_with_memory: float


@dataclass
class ComparisonResult:
    """The table with everything that it was made from; ``to_json`` is the content of comparison.json."""

    environment: dict[str, Any]
    models: dict[str, Any]
    texts: dict[str, Any]
    settings: dict[str, Any]
    budget: dict[str, float]
    entries: list[Entry]
    alpha_zero_is_base: bool  # on the general text, bit for bit
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # test perplexity over α, by method
    bases: list[BaseEntry] = field(default_factory=list)  # the memory's own and others of its tokenizer
    log_probs: dict[str, Tensor] = field(default_factory=dict)  # "method/text"; not in the JSON

    def entry(self, method: str) -> Entry:
        """The row of ``method``.

        Raises:
            KeyError: it was not compared.
        """
        for entry in self.entries:
            if entry.method == method:
                return entry
        raise KeyError(method)

    def to_json(self) -> str:
        """JSON text with sorted keys; numbers that are not finite become null."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "environment": self.environment,
            "models": self.models,
            "texts": self.texts,
            "settings": self.settings,
            "budget": self.budget,
            "entries": [asdict(entry) for entry in self.entries],
            "alpha_zero_is_base": self.alpha_zero_is_base,
            "curves": self.curves,
            "bases": [asdict(entry) for entry in self.bases],
        }
        return json_text(content)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write comparison.json, .html, .md, .tex, .svg and the log-probs to ``folder``; their paths by name."""
        from safetensors.torch import save

        from memdec.evaluation.charts import svg_file
        from memdec.evaluation.comparison_report import (
            latex_table,
            markdown_table,
            perplexity_chart,
            render_comparison,
        )

        check_comparison_out(folder)
        folder = make_folder(folder)
        content = self.to_json()
        parsed = json.loads(content)  # page and tables are drawn from the JSON and nothing else
        texts = {
            "json": ("comparison.json", content),
            "report": ("comparison.html", render_comparison(parsed)),
            "markdown": ("comparison.md", markdown_table(parsed)),
            "latex": ("comparison.tex", latex_table(parsed)),
            "plot": ("comparison.svg", svg_file(perplexity_chart(parsed))),
        }
        paths = {}
        for name, (file, text) in texts.items():
            paths[name] = folder / file
            write_file(paths[name], text.encode("utf-8"))
        paths["log_probs"] = folder / "comparison_log_probs.safetensors"
        write_file(paths["log_probs"], save({name: part.contiguous() for name, part in self.log_probs.items()}))
        return paths


def check_comparison_out(folder: str | Path) -> None:
    """Raise ``MemdecError`` where a comparison would write over files that are no earlier comparison's."""
    check_ours(folder, ("comparison.json", "comparison.html"), FORMAT)


@dataclass
class _Setting:
    """What all methods share: models by name, texts, and how they are read."""

    tokenizer: Any
    corpus: Corpus
    protocols: dict[str, Protocol]
    context: int
    stride: int
    batch_size: int
    dtype: str
    device: str
    tell: Callable[[str], object]

    def score(self, source: Any, label: str) -> dict[str, Tensor]:
        """Log-probs of one model, a folder, hub id or loaded one, on every text."""
        model = self.load(source)
        return {name: self.score_text(model, protocol, f"{label}, {name}") for name, protocol in self.protocols.items()}

    def score_text(self, model: Any, protocol: Protocol, label: str) -> Tensor:
        with progress(protocol.num_scored, unit="tokens", label=f"Scoring {label}") as advance:
            return score_tokens(
                model, protocol.tokens, protocol.windows, batch_size=self.batch_size, vocab_size=len(self.tokenizer),
                progress=advance,
            )  # fmt: skip

    def load(self, source: Any) -> Any:
        return load_causal_lm(source, dtype=self.dtype, device=self.device)


def compare(
    base: str | Path,
    memory: str | Path,
    corpus: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = METHODS,
    other_bases: Sequence[str | Path] = (),
    init: str | Path | None = None,
    datastore: str | Path | None = None,
    distributions: str | Path | None = None,
    general: str | Path | None = None,
    context: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    validation_tokens: int = 8192,
    general_tokens: int = 8192,
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    query_tokens: int = 32,
    every: int = 4,
    latency_tokens: int = 32,
    latency_prompts: int = 3,
    latency_repeats: int = 3,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str | None = None,
    say: Callable[[str], object] | None = None,
) -> ComparisonResult:
    """Train, tune, score and time the rivals of a memory; trainings that are there already are taken up.

    Args:
        base: folder or hub id of the base model.
        memory: the memory's folder, as `memdec fit` leaves it in RUN/memory.
        corpus: the corpus that the memory was trained on; its test split is scored.
        out: folder whose ``rivals`` gets a folder for each training.
        methods: of `METHODS`; the base is always there, and "memory" gives the memory alone too.
        other_bases: models with the same tokenizer that the memory is attached to as it is, for a table by base.
        init: what the memory started from; None is the base.
        datastore: for knn-lm; None is the ``datastore`` beside the memory where that is of the base's keys, else one
            that is made here.
        distributions: the memory's teacher; None is the ``distributions`` or ``teacher-NAME`` beside the memory.
        general: text outside the domain: file or folder; None is Python's own reference (``pydoc_data.topics``).
        context: tokens in a window.
        stride: of the sliding window.
        max_tokens: score only the leading test documents.
        validation_tokens: at most so many tokens of validation text tune the mixtures.
        general_tokens: at most so many tokens of general text are scored.
        learning_rates: by rival, where the memory's own is not to be the only one tried; the one that is best on
            validation text is kept.
        query_tokens: of RAG, the last tokens that are searched for.
        every: of RAG, tokens between two searches.
        latency_tokens: tokens written by each method in a timed run; 0 times nothing.
        latency_prompts: prompts, out of the validation text.
        latency_repeats: runs of each method on each prompt.
        batch_size: windows a forward.
        dtype: "auto", "float32", "bfloat16" or "float16", for scoring and decoding.
        device: such as "cpu" or "cuda:0"; None is an accelerator if there is one, else the CPU.
        say: called with a line about each step.

    Raises:
        MemdecError: something is missing or does not fit; the message says what to do.
    """
    tell = say or (lambda line: None)
    follow = {"memory-alone", "adapted-alone", "adapted"}  # with "memory"
    unknown = sorted(set(methods) - set(METHODS) - follow)
    if unknown:
        raise MemdecError(f"--compare knows {', '.join(METHODS)}; got {', '.join(unknown)}.")
    wanted = {"base", *methods} - follow
    if "dapt+memory" in wanted:
        wanted.add("dapt")
    run = Path(memory).resolve().parent
    if datastore is not None and "knn-lm" in wanted:
        _artefact("datastore", Path(datastore))
    taught = [run / "distributions", *sorted(run.glob("teacher-*"))]
    beside = next((folder for folder in taught if (folder / MANIFEST_NAME).is_file()), taught[0])
    teacher = DistributionStore.open(_artefact("distributions", Path(distributions or beside)))
    opened = Corpus.open(corpus)
    if opened.split("validation").num_tokens < 2 or opened.split("test").num_tokens < 2:
        raise MemdecError(
            f"{corpus} has no validation or no test text, and the rivals are tuned on the one and measured on the "
            "other. Build the corpus with other --fractions."
        )
    # What is not installed is said before hours of training.
    if "rag" in wanted:
        load_bm25s()
    if "lora" in wanted:
        load_peft()
    tokenizer = load_tokenizer(base)
    for other in other_bases:
        compare_tokenizers(
            load_tokenizer(other), tokenizer, base_name=short_name(other), memory_name=short_name(memory)
        )
    setting = _Setting(
        tokenizer=tokenizer,
        corpus=opened,
        protocols={},
        context=context,
        stride=stride,
        batch_size=batch_size,
        dtype=dtype,
        device=device or default_device(),
        tell=tell,
    )
    texts = _texts(setting, corpus, general, max_tokens, validation_tokens, general_tokens)
    rivals, budget = train_rivals(
        [method for method in RIVALS if method in wanted],
        base=base,
        init=base if init is None else init,
        memory=memory,
        corpus=opened,
        distributions=teacher,
        out=Path(out) / "rivals",
        learning_rates=learning_rates,
        device=device,
        say=tell,
    )
    if "memory" in wanted:
        wanted |= follow if "adapted" in rivals else {"memory-alone"}
    rows = [name for name in LABELS if name in wanted]
    base_model = setting.load(base)  # once, for all that follows
    scores = {"base": setting.score(base_model, "base")}
    if other_bases:
        scores["memory"] = setting.score(memory, LABELS["memory-alone"])
    needed = {name for row in rows for name in (ALONE.get(row), *MIXED.get(row, ())) if name and name != "base"}
    for name in sorted(needed - scores.keys()):
        scores[name] = setting.score(rivals[name].folder, LABELS.get(name, name))
    # Before decoding packs weights: the very model that was scored.
    alpha_zero_is_base = _alpha_zero_is_base(setting, base_model, memory, scores["base"]["general"])
    knn = None
    if "knn-lm" in wanted:
        knn = _knn(setting, base_model, base, memory, datastore, teacher, Path(out) / "rivals" / "knn-lm",
                   scores["base"])  # fmt: skip
    rag = _rag(setting, base_model, query_tokens, every) if "rag" in wanted else None

    found: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, float | None] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        weights[row] = None
        if row in ALONE:
            found[row] = scores[ALONE[row]]
        elif row in MIXED:
            first, second = (scores[name] for name in MIXED[row])
            alpha, _ = tune_alpha(first["validation"], second["validation"])
            weights[row] = alpha
            found[row] = {text: mixture_log_prob(first[text], second[text], alpha) for text in TEXTS}
            curves[row] = tune_alpha(first["test"], second["test"], step=0.02)[1]
        elif row == "knn-lm":
            assert knn is not None
            found[row], weights[row] = knn.log_probs, knn.settings.weight
        else:
            assert rag is not None
            found[row] = rag.log_probs
    latencies = {}
    if latency_tokens:
        tell(f"Timing {latency_tokens} tokens of each method, turn about")
        latencies = _latencies(
            setting, base_model, rivals, rows, weights, knn, rag, latency_tokens, latency_prompts, latency_repeats
        )
    bases = []
    if other_bases:
        bases.append(_base_entry(setting, base, base_model, scores["base"], scores["memory"], memory))
    for other in other_bases:
        model = setting.load(other)
        bases.append(
            _base_entry(setting, other, model, setting.score(model, short_name(other)), scores["memory"], memory)
        )
    entries = [_entry(setting, row, found, weights[row], rivals, budget, knn, rag, latencies.get(row)) for row in rows]
    return ComparisonResult(
        environment=environment(base_model),
        models={
            "base": short_name(base),
            "memory": short_name(memory),
            "init": short_name(base if init is None else init),
            "provenance": read_memory_card(memory).provenance,
        },
        texts=texts,
        settings={
            "context": context,
            "stride": stride,
            "batch_size": batch_size,
            "bootstrap_seed": 0,
            "latency": {"new_tokens": latency_tokens, "prompts": latency_prompts, "repeats": latency_repeats},
            "rivals": {name: rival.to_json() for name, rival in rivals.items()},
        },
        budget={**asdict(budget), "total": budget.total},
        entries=entries,
        alpha_zero_is_base=alpha_zero_is_base,
        curves=curves,
        bases=bases,
        log_probs={f"{row}/{text}": part.float() for row, parts in found.items() for text, part in parts.items()},
    )


def _artefact(name: str, folder: Path) -> Path:
    """``folder``, if an artefact is there."""
    if not (folder / MANIFEST_NAME).is_file():
        raise MemdecError(
            f"There is no {name} in {folder}. Say where it is with --{name}, or compare a memory that memdec fit made, "
            f"which lies beside its {name}."
        )
    return folder


def _texts(
    setting: _Setting,
    corpus: str | Path,
    general: str | Path | None,
    max_tokens: int | None,
    validation_tokens: int,
    general_tokens: int,
) -> dict[str, Any]:
    """Fill in the protocols; what the JSON says of the texts."""
    found = {
        "test": load_held_out(corpus, setting.tokenizer),
        "validation": load_held_out(corpus, setting.tokenizer, "validation"),
        "general": _general(setting.tokenizer) if general is None else load_held_out(general, setting.tokenizer),
    }
    most = {"test": max_tokens, "validation": validation_tokens, "general": general_tokens}
    facts: dict[str, Any] = {}
    for name, text in found.items():
        limit = most[name]
        cut = text if limit is None else text.first_tokens(limit, setting.context)
        setting.protocols[name] = sliding_protocol(cut, setting.context, setting.stride)
        facts[name] = {
            "tokens": cut.num_tokens,
            "scored": setting.protocols[name].num_scored,
            "documents": cut.num_documents,
            "tokens_found": text.num_tokens,
        }
    facts["test"]["source"] = facts["validation"]["source"] = short_name(corpus)
    facts["general"]["source"] = (
        "Python's own reference (pydoc_data.topics)" if general is None else short_name(general)
    )
    setting.tell(", ".join(f"{facts[name]['tokens']:,} tokens of {name} text" for name in TEXTS))
    return facts


def _general(tokenizer: Any) -> HeldOutText:
    """The reference of the Python that runs: on every machine, and no model of ours was trained for it."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    ids = [tokenizer(topics[name], add_special_tokens=False, verbose=False)["input_ids"] for name in names]
    return join_documents(ids, [topics[name] for name in names], names, int(tokenizer.eos_token_id))


@dataclass(frozen=True)
class _Knn:
    settings: KnnSettings
    folder: Path
    log_probs: dict[str, Tensor]


def _knn(
    setting: _Setting,
    model: Any,
    base: str | Path,
    memory: str | Path,
    datastore: str | Path | None,
    teacher: DistributionStore,
    out: Path,
    scores: dict[str, Tensor],
) -> _Knn:
    folder = Path(memory).resolve().parent / "datastore" if datastore is None else Path(datastore)
    has_own_keys = datastore is not None or (  # of what was asked for, the search itself sees to that
        (folder / MANIFEST_NAME).is_file()
        and adapted_teacher(memory) is None
        and is_made_by(model, Datastore.open(folder))
    )
    if has_own_keys:
        store = Datastore.open(folder)
        # A teacher of another datastore says nothing about this search.
        own = teacher.manifest.fields.get("datastore") == store.manifest.checksum
        settings = knn_settings(store, folder, teacher.folder if own else None, setting.device)
    else:
        folder = out / "datastore"
        setting.tell(f"The memory's teacher searched no keys of the base's; embedding the text with it for {folder}")
        windows = training_settings(read_memory_card(memory))
        store = build_datastore(os.fspath(base), setting.corpus, folder, context=windows["context"],
                                stride=windows["stride"], device=setting.device, dtype=setting.dtype)  # fmt: skip
        setting.tell("Choosing T and λ of the kNN-LM on validation text")
        settings = tune_knn(store, k=int(teacher.manifest.fields.get("k") or 1024), device=setting.device)
    setting.tell(f"kNN-LM: k = {settings.k}, T = {settings.temperature:g}, λ = {settings.weight:g} ({settings.source})")
    found: dict[str, Tensor] = {}
    for text, protocol in setting.protocols.items():
        with progress(protocol.num_scored, unit="tokens", label=f"Embedding {text} text") as advance:
            near = knn_log_prob(
                model,
                store,
                protocol.tokens,
                protocol.windows,
                k=settings.k,
                temperature=settings.temperature,
                batch_size=setting.batch_size,
                progress=advance,
            ).log_prob
        found[text] = mixture_log_prob(scores[text], near, settings.weight)
    return _Knn(settings, folder, found)


@dataclass(frozen=True)
class _Rag:
    settings: RagSettings
    retriever: Retriever
    log_probs: dict[str, Tensor]


def _rag(setting: _Setting, model: Any, query_tokens: int, every: int) -> _Rag:
    setting.tell("Choosing the passages of RAG on validation text")
    settings = tune_rag(
        model, setting.corpus, setting.tokenizer, context=setting.context, stride=setting.stride,
        query_tokens=query_tokens, every=every, batch_size=setting.batch_size,
        passage_lengths=[max(1, setting.context // part) for part in (16, 8, 4)],
    )  # fmt: skip
    retriever = Retriever.of_corpus(setting.corpus, setting.tokenizer, passage_tokens=settings.passage_tokens)
    found: dict[str, Tensor] = {}
    for text in ("test", "general"):
        protocol = setting.protocols[text]
        with progress(protocol.num_scored, unit="tokens", label=f"Scoring RAG, {text}") as advance:
            found[text] = rag_log_prob(
                model,
                retriever,
                protocol.tokens,
                protocol.windows,
                query_tokens=query_tokens,
                every=every,
                passages=settings.passages,
                most_inputs=setting.context - 1,
                batch_size=setting.batch_size,
                progress=advance,
            )
    return _Rag(settings, retriever, found)


def _latencies(
    setting: _Setting,
    base: Any,
    rivals: dict[str, Rival],
    rows: Sequence[str],
    weights: dict[str, float | None],
    knn: _Knn | None,
    rag: _Rag | None,
    new_tokens: int,
    prompts: int,
    repeats: int,
) -> dict[str, LatencyFigure]:
    """Decode latency by row: models of one shape and dtype take the same time, so DAPT and the merged LoRA are the
    base's own decoder with other weights, and are timed like any other."""
    from memdec.modeling.memory_model import MemoryModel

    models = {"base": base}

    def model_of(name: str) -> Any:
        if name not in models:
            models[name] = setting.load(rivals[name].folder)
        return models[name]

    decoders: dict[str, Decoder] = {}
    for row in rows:
        if row in ALONE:
            decoders[row] = plain_decoder(model_of(ALONE[row]))
        elif row in MIXED:
            first, second = (model_of(name) for name in MIXED[row])
            pair = MemoryModel.from_pretrained(first, second, alpha=weights[row])
            decoders[row] = memory_decoder(pair, "auto")
        elif row == "knn-lm" and knn is not None:
            decoders[row] = knn_decoder(
                base,
                Datastore.open(knn.folder),
                k=knn.settings.k,
                temperature=knn.settings.temperature,
                weight=knn.settings.weight,
            )
        elif row == "rag" and rag is not None:
            decoders[row] = rag_decoder(
                base,
                rag.retriever,
                query_tokens=rag.settings.query_tokens,
                every=rag.settings.every,
                passages=rag.settings.passages,
            )
    tokens = setting.protocols["validation"].tokens.long()
    length = min(48, max(1, int(tokens.numel()) - 1))
    places = torch.linspace(0, int(tokens.numel()) - length, prompts).long().tolist()
    chosen = [tokens[None, at : at + length].to(setting.device) for at in places]
    return measure(decoders, chosen, new_tokens, repeats)


def _entry(
    setting: _Setting,
    row: str,
    found: dict[str, dict[str, Tensor]],
    weight: float | None,
    rivals: dict[str, Rival],
    budget: Budget,
    knn: _Knn | None,
    rag: _Rag | None,
    latency: LatencyFigure | None,
) -> Entry:
    ours, reference = found[row], found["base"]
    owners = setting.protocols["test"].document_of_row
    value, of_base = perplexity(ours["test"]), perplexity(reference["test"])
    memory = found["memory"]["test"] if "memory" in found and row != "memory" else None
    general, general_of_base = perplexity(ours["general"]), perplexity(reference["general"])
    parts = [rivals[name] for name in (ALONE.get(row), *MIXED.get(row, ())) if name in rivals]
    kept = sum(part.kept_bytes for part in parts)
    flops = sum(part.flops for part in parts)
    settings: dict[str, Any] = {key: value for part in parts for key, value in part.settings.items()}
    if row == "knn-lm" and knn is not None:
        kept, flops = folder_bytes(knn.folder), budget.datastore
        settings = asdict(knn.settings)
    if row == "rag" and rag is not None:
        kept = 4 * setting.corpus.split("train").num_tokens  # the text as tokens; the index is made from it
        settings = asdict(rag.settings)
    return Entry(
        method=row,
        label=LABELS[row],
        perplexity=value,
        relative=value / of_base - 1,
        interval=None if row == "base" else relative_interval(ours["test"], reference["test"], owners),
        memory_relative=None if memory is None else perplexity(memory) / value - 1,
        memory_interval=None if memory is None else relative_interval(memory, ours["test"], owners),
        validation_perplexity=perplexity(ours["validation"]) if "validation" in ours else None,
        weight=weight,
        general_perplexity=general,
        general_relative=general / general_of_base - 1,
        latency=latency,
        kept_bytes=kept,
        trained_parameters=sum(part.trained_parameters for part in parts),
        training_seconds=sum(part.seconds for part in parts),
        training_flops=flops,
        settings=settings,
    )


def _base_entry(
    setting: _Setting,
    base: str | Path,
    model: Any,
    scores: dict[str, Tensor],
    memory: dict[str, Tensor],
    folder: str | Path,
) -> BaseEntry:
    """The memory on one base, by the log-probs of both."""
    alpha, _ = tune_alpha(scores["validation"], memory["validation"])
    recommended = read_memory_card(folder).alpha
    mixed = {text: mixture_log_prob(scores[text], memory[text], alpha) for text in ("test", "general")}
    alone, together = perplexity(scores["test"]), perplexity(mixed["test"])
    return BaseEntry(
        base=short_name(base),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        perplexity=alone,
        with_memory=together,
        relative=together / alone - 1,
        interval=relative_interval(mixed["test"], scores["test"], setting.protocols["test"].document_of_row),
        weight=alpha,
        recommended_weight=recommended,
        with_recommended=perplexity(mixture_log_prob(scores["test"], memory["test"], recommended)),
        general_perplexity=perplexity(scores["general"]),
        general_with_memory=perplexity(mixed["general"]),
    )


def _alpha_zero_is_base(setting: _Setting, base: Any, memory: str | Path, general: Tensor) -> bool:
    """Whether base + memory at α = 0 gives the very log-probs of the base on the text outside the domain."""
    from memdec.modeling.memory_model import MemoryModel

    pair = MemoryModel.from_pretrained(base, setting.load(memory), alpha=0.0)
    ours = setting.score_text(pair, setting.protocols["general"], "base + memory at α = 0, general")
    return bool(torch.equal(ours.nan_to_num(nan=math.inf), general.nan_to_num(nan=math.inf)))
