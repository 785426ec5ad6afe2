"""Base, kNN-LM, memory and mixture on the same held-out tokens; everything that the report draws comes from here.

Two log-probs a token, one by the base and one by the memory, give the mixture at every α, so the α curve costs no
forward. The α of the table is the memory's own, tuned on validation text when it was trained; it is never tuned on
the text that is measured. The curve shows what other α would have given, and marks the one used.

    >>> result = evaluate("base/", "run/memory", "held-out.txt", datastore="run/datastore")   # doctest: +SKIP
    >>> result.measure("base+memory").perplexity                                               # doctest: +SKIP
    7.5
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memdec
from memdec.errors import MemdecError
from memdec.evaluation import overlap
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.knn_lm import KnnSettings, knn_log_prob, tune_knn
from memdec.evaluation.perplexity import (
    HeldOutText,
    Protocol,
    document_figures,
    document_protocol,
    prefix_token,
    relative_interval,
    sliding_protocol,
)
from memdec.modeling.scoring import load_causal_lm, mixture_log_prob, perplexity, score_tokens
from memdec.modeling.tokenizers import compare as compare_tokenizers
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.embed import default_device
from memdec.pipeline.progress import progress
from memdec.stores.atomic import make_folder, write_file

FORMAT = "memdec.evaluation"
VERSION = 1
METHODS = ("base", "knn-lm", "memory")
LABELS = {
    "base": "base",
    "knn-lm": "kNN-LM",
    "memory": "memory alone",
    "base+memory": "base + memory",
}
# Steps of the α curve.
CURVE_STEPS = 50


@dataclass(frozen=True)
class Measure:
    """One method on the held-out tokens.

    Attributes:
        method: "base", "knn-lm", "memory" or "base+memory".
        label: how tables and plots name it.
        perplexity: sliding window.
        relative: perplexity / base perplexity − 1.
        interval: 95% bootstrap interval of ``relative``; None for the base.
        per_document: the per-document protocol's figures; None when it was not run.
        copied_perplexity: over the tokens that stand word for word in the training text; None when unknown or none.
        novel_perplexity: over all other tokens; None when unknown or none.
        seconds: time to score the text by the sliding window, on this machine.
        parameters: of the models that the method runs.
        extra_bytes: on disk, beside the base.
    """

    method: str
    label: str
    perplexity: float
    relative: float
    interval: tuple[float, float] | None
    per_document: dict[str, float] | None
    copied_perplexity: float | None
    novel_perplexity: float | None
    seconds: float
    parameters: int
    extra_bytes: int


@dataclass
class EvaluationResult:
    """What was measured, on what, with what; ``to_json`` is the content of evaluation.json."""

    environment: dict[str, Any]
    models: dict[str, Any]
    text: dict[str, Any]
    settings: dict[str, Any]
    measures: list[Measure]
    alpha_curve: list[tuple[float, float]] = field(default_factory=list)  # (α, sliding-window perplexity)
    copied_share: float | None = None  # of the scored tokens
    shown: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log_probs: dict[str, Tensor] = field(default_factory=dict)  # sliding-window rows, by method; not in the JSON

    def measure(self, method: str) -> Measure:
        """The measure of ``method``.

        Raises:
            KeyError: the method was not part of the comparison.
        """
        for entry in self.measures:
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
            "text": self.text,
            "settings": self.settings,
            "measures": [asdict(entry) for entry in self.measures],
            "alpha_curve": self.alpha_curve,
            "copied_share": self.copied_share,
            "shown": self.shown,
            "generations": self.generations,
            "training": self.training,
            "notes": self.notes,
        }
        return json_text(content)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write evaluation.json, report.html and token_log_probs.safetensors to ``folder``; their paths by name."""
        from safetensors.torch import save

        from memdec.evaluation.report import render_report

        check_out(folder)
        folder = make_folder(folder)
        content = self.to_json()
        # The page is drawn from the JSON and nothing else, so that every figure in it can be found there.
        page = render_report(json.loads(content))
        paths = {
            "json": folder / "evaluation.json",
            "report": folder / "report.html",
            "log_probs": folder / "token_log_probs.safetensors",
        }
        write_file(paths["json"], content.encode("utf-8"))
        write_file(paths["report"], page.encode("utf-8"))
        write_file(paths["log_probs"], save({name: part.contiguous() for name, part in self.log_probs.items()}))
        return paths


def check_out(folder: str | Path) -> None:
    """Raise ``MemdecError`` where an evaluation would write over files that are no earlier evaluation's."""
    check_ours(folder, ("evaluation.json", "report.html"), FORMAT)


def check_ours(folder: str | Path, names: Sequence[str], of: str) -> None:
    """Raise ``MemdecError`` where one of the files `names` is there, and the first, JSON, is not of format `of`."""
    if Path(folder).is_file():
        raise MemdecError(f"--out {folder} is a file, and a folder was wanted. Choose another name.")
    try:
        found = [name for name in names if (Path(folder) / name).exists()]
    except (OSError, ValueError) as error:
        raise MemdecError(f"--out {str(folder)[:60]}…: no folder can be called so ({error}).") from None
    if not found:
        return
    try:
        ours = json.loads((Path(folder) / names[0]).read_bytes())["format"] == of
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise MemdecError(f"{folder} has a {found[-1]} that memdec did not write. Choose another folder with --out.")


def evaluate(
    base: str | Path,
    memory: str | Path | None,
    text: str | Path | HeldOutText,
    *,
    compare: Sequence[str] = METHODS,
    datastore: str | Path | None = None,
    distributions: str | Path | None = None,
    alpha: float | None = None,
    context: int = 1024,
    stride: int | None = 512,
    per_document: bool = True,
    max_tokens: int | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str | None = None,
    prompts: Sequence[str] = (),
    held_out_prompts: int = 0,
    new_tokens: int = 64,
    shown_tokens: int = 1200,
    training_log: str | Path | None = None,
    notes: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
) -> EvaluationResult:
    """Measure a base model, a memory, their mixture and the kNN-LM on the same tokens.

    Args:
        base: folder or hub id of the base model.
        memory: a memory's folder; None measures only what needs none.
        text: a corpus that memdec built (its test split is taken), a file or a folder of text, or documents loaded
            already.
        compare: any of "base", "knn-lm", "memory"; the base is always measured, "memory" gives memory and mixture.
        datastore: the datastore that the kNN-LM searches; needed for "knn-lm".
        distributions: the artefact that names k, T and λ; by default the ``distributions`` folder beside the
            datastore, and where there is none they are chosen on the datastore's validation rows.
        alpha: weight of the memory; None takes the memory's own, tuned on validation text.
        context: tokens in a window, of both protocols.
        stride: of the sliding window.
        per_document: whether to count per document too, which doubles the work.
        max_tokens: measure only the leading documents.
        batch_size: windows a forward.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: such as "cpu" or "cuda:0"; None is an accelerator if there is one, else the CPU.
        prompts: each is continued greedily, by base and by mixture.
        held_out_prompts: so many documents' beginnings are continued too, with the true continuation beside.
        new_tokens: length of each continuation.
        shown_tokens: so many tokens of held-out text appear in the report with their probabilities.
        training_log: the log.jsonl of training; by default the one in ``training`` beside the memory.
        notes: sentences that the report prints with the figures.
        say: called with a line about each step.

    Raises:
        MemdecError: something is missing or does not fit; the message says what to do.
    """
    tell = say or (lambda line: None)
    wanted = _check_methods(compare, memory, datastore)
    tokenizer = load_tokenizer(base)
    alpha_source = "given"
    card = None
    if "memory" in wanted:
        assert memory is not None
        from memdec.stores.memory import read_memory_card

        card = read_memory_card(memory)
        compare_tokenizers(
            tokenizer, load_tokenizer(memory), base_name=short_name(base), memory_name=short_name(memory)
        )
        if alpha is None:
            alpha, alpha_source = card.alpha, "recommended by the memory, tuned on validation text"
    if alpha is not None and not 0 <= alpha <= 1:
        raise MemdecError(f"--alpha must be from 0 (base alone) to 1 (memory alone), got {alpha}")

    held_out = text if isinstance(text, HeldOutText) else load_held_out(text, tokenizer)
    found_tokens = held_out.num_tokens
    if max_tokens is not None:
        held_out = held_out.first_tokens(max_tokens, context)
    device = device or default_device()
    base_model = load_causal_lm(base, dtype=dtype, device=device)
    context = _fitting_context(base_model, context)
    if stride is not None:
        stride = min(stride, context - 1)
    protocols = [sliding_protocol(held_out, context, stride)]
    if per_document:
        prefix = prefix_token(tokenizer.bos_token_id, int(held_out.tokens[-1]))
        protocols.append(document_protocol(held_out, prefix, context))
    tell(
        f"Measuring on {held_out.num_tokens:,} tokens in {held_out.num_documents:,} documents "
        f"(windows of {context}, stride {stride or context - 1})"
    )

    # One list of log-probs a protocol for every method; seconds are the sliding window's.
    log_probs: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    parameters: dict[str, int] = {"base": _parameters(base_model)}
    extra_bytes: dict[str, int] = {"base": 0}

    log_probs["base"], seconds["base"] = _score(base_model, protocols, batch_size, "base")
    knn: KnnSettings | None = None
    store: Any = None
    knn_scores: list[Tensor] = []
    if "knn-lm" in wanted:
        from memdec.stores.datastore import Datastore

        assert datastore is not None
        store = Datastore.open(datastore)
        knn = knn_settings(store, Path(datastore), distributions, device)
        tell(f"Searching {store.num_rows:,} keys (k = {knn.k}, T = {knn.temperature:g}, λ = {knn.weight:g})")
        for index, protocol in enumerate(protocols):
            with progress(protocol.num_scored, unit="tokens", label="Embedding held-out text") as advance:
                found = knn_log_prob(
                    base_model,
                    store,
                    protocol.tokens,
                    protocol.windows,
                    k=knn.k,
                    temperature=knn.temperature,
                    batch_size=batch_size,
                    progress=advance,
                )
            knn_scores.append(found.log_prob)
            if index == 0:  # the keys come out of the base's own forward
                seconds["knn-lm"] = seconds["base"] + found.search_seconds
        weight = knn.weight
        log_probs["knn-lm"] = [
            mixture_log_prob(ours, theirs, weight) for ours, theirs in zip(log_probs["base"], knn_scores, strict=True)
        ]
        parameters["knn-lm"] = parameters["base"]
        extra_bytes["knn-lm"] = folder_bytes(Path(datastore))
    curve: list[tuple[float, float]] = []
    memory_model: Any = None
    if "memory" in wanted:
        assert memory is not None and alpha is not None
        memory_model = load_causal_lm(memory, dtype=dtype, device=device)
        log_probs["memory"], seconds["memory"] = _score(memory_model, protocols, batch_size, "memory")
        log_probs["base+memory"] = [
            mixture_log_prob(ours, theirs, alpha)
            for ours, theirs in zip(log_probs["base"], log_probs["memory"], strict=True)
        ]
        seconds["base+memory"] = seconds["base"] + seconds["memory"]
        parameters["memory"] = _parameters(memory_model)
        parameters["base+memory"] = parameters["base"] + parameters["memory"]
        extra_bytes["memory"] = extra_bytes["base+memory"] = folder_bytes(Path(memory))
        points = sorted({index / CURVE_STEPS for index in range(CURVE_STEPS + 1)} | {round(alpha, 6)})
        curve = [
            (point, perplexity(mixture_log_prob(log_probs["base"][0], log_probs["memory"][0], point)))
            for point in points
        ]

    copied = _copied(text, held_out)
    measures = [
        _measure(method, log_probs, protocols, held_out, copied, seconds[method], parameters[method], extra)
        for method, extra in extra_bytes.items()
    ]
    measures.sort(key=lambda entry: list(LABELS).index(entry.method))
    result = EvaluationResult(
        environment=environment(base_model),
        models={
            "base": short_name(base),
            "memory": None if memory is None else short_name(memory),
            "datastore": None if datastore is None else short_name(datastore),
            "provenance": {} if card is None else card.provenance,
        },
        text={
            "source": "documents" if isinstance(text, HeldOutText) else short_name(text),
            "tokens": held_out.num_tokens,
            "tokens_found": found_tokens,
            "documents": held_out.num_documents,
            "unseen": _is_unseen(text, card, store),
            "scored": {protocol.name: protocol.num_scored for protocol in protocols},
            "words": sum(held_out.words),
            "bytes": sum(held_out.num_bytes),
        },
        settings={
            "context": context,
            "stride": stride or context - 1,
            "alpha": alpha,
            "alpha_source": alpha_source if alpha is not None else None,
            "knn": None if knn is None else asdict(knn),
            "batch_size": batch_size,
            "copied_run": overlap.RUN,
            "bootstrap_seed": 0,
        },
        measures=measures,
        alpha_curve=curve,
        copied_share=None if copied is None else float(copied.double().mean()),
        training=_training_rows(training_log, memory),
        notes=list(notes),
        log_probs={"tokens": held_out.tokens, **{name: parts[0].float() for name, parts in log_probs.items()}},
    )
    if shown_tokens > 0:
        result.shown = _shown(tokenizer, held_out, result.log_probs, shown_tokens)
    if memory_model is not None and (prompts or held_out_prompts):
        from memdec.evaluation.side_by_side import continue_prompts, prompts_of

        chosen = [(prompt, None) for prompt in prompts] + prompts_of(tokenizer, held_out, held_out_prompts, new_tokens)
        tell(f"Continuing {len(chosen)} prompts with the base and with base + memory")
        result.generations = continue_prompts(
            base_model, memory_model, tokenizer, float(alpha or 0), chosen, new_tokens
        )
    return result


def _check_methods(compare: Sequence[str], memory: object, datastore: object) -> set[str]:
    """The methods wanted, after checking that what they need was given."""
    wanted = {"base", *compare}
    unknown = sorted(wanted - set(METHODS) - {"base+memory"})
    if unknown:
        raise MemdecError(f"--compare knows {', '.join(METHODS)}; got {', '.join(unknown)}.")
    if "base+memory" in wanted:
        wanted = (wanted - {"base+memory"}) | {"memory"}
    if "memory" in wanted and memory is None:
        raise MemdecError("To compare a memory, say which: --memory DIR (the folder `memory` that `memdec fit` makes).")
    if "knn-lm" in wanted and datastore is None:
        raise MemdecError(
            "The kNN-LM searches a datastore; say which: --datastore DIR, or leave knn-lm out of --compare."
        )
    return wanted


def _score(model: Any, protocols: list[Protocol], batch_size: int, label: str) -> tuple[list[Tensor], float]:
    """Log-probs by each protocol, and the seconds that the first took."""
    parts: list[Tensor] = []
    first_seconds = 0.0
    for index, protocol in enumerate(protocols):
        begun = time.perf_counter()
        with progress(protocol.num_scored, unit="tokens", label=f"Scoring, {label}, {protocol.name}") as advance:
            parts.append(
                score_tokens(model, protocol.tokens, protocol.windows, batch_size=batch_size, progress=advance)
            )
        if index == 0:
            first_seconds = time.perf_counter() - begun
    return parts, first_seconds


def _measure(
    method: str,
    log_probs: dict[str, list[Tensor]],
    protocols: list[Protocol],
    held_out: HeldOutText,
    copied: Tensor | None,
    seconds: float,
    parameters: int,
    extra_bytes: int,
) -> Measure:
    sliding = log_probs[method][0]
    reference = log_probs["base"][0]
    ours, base = perplexity(sliding), perplexity(reference)
    parts: dict[bool, float | None] = {True: None, False: None}
    if copied is not None:
        for which in parts:
            chosen = sliding[copied == which]
            parts[which] = perplexity(chosen) if chosen.numel() else None
    return Measure(
        method=method,
        label=LABELS[method],
        perplexity=ours,
        relative=ours / base - 1,
        interval=None if method == "base" else relative_interval(sliding, reference, protocols[0].document_of_row),
        per_document=document_figures(log_probs[method][1], held_out) if len(protocols) > 1 else None,
        copied_perplexity=parts[True],
        novel_perplexity=parts[False],
        seconds=seconds,
        parameters=parameters,
        extra_bytes=extra_bytes,
    )


def knn_settings(store: Any, folder: Path, distributions: str | Path | None, device: str = "cpu") -> KnnSettings:
    """k, T and λ out of a distributions artefact's manifest, else chosen on the datastore's validation rows, which
    `device` then searches for."""
    from memdec.stores.manifest import Manifest

    beside = Path(distributions) if distributions is not None else folder.resolve().parent / "distributions"
    if distributions is not None or (beside / "manifest.json").is_file():
        manifest = Manifest.load(beside, format="memdec.distributions")
        found = manifest.results
        if "temperature" in found and "knn_lm" in found:
            source = "from the distributions, chosen on validation text"
            k = min(int(manifest.fields["k"]), store.num_rows)
            return KnnSettings(k, float(found["temperature"]), float(found["knn_lm"]["weight"]), source)
    return tune_knn(store, device=device)


def _is_unseen(text: object, card: Any, store: Any) -> bool:
    """Whether the text is the test split of the very corpus that memory and datastore were made of."""
    from memdec.stores.corpus import Corpus
    from memdec.stores.manifest import MANIFEST_NAME

    if not isinstance(text, str | Path) or not (Path(text) / MANIFEST_NAME).is_file():
        return False
    made_of = [] if card is None else [card.provenance.get("corpus")]
    made_of += [] if store is None else [store.manifest.fields.get("corpus")]
    return bool(made_of) and set(made_of) == {Corpus.open(text).manifest.checksum}


def _copied(text: object, held_out: HeldOutText) -> Tensor | None:
    """For each row, whether the predicted token is copied from the training split; None when that is unknown."""
    from memdec.stores.corpus import Corpus
    from memdec.stores.manifest import MANIFEST_NAME

    if not isinstance(text, str | Path) or not (Path(text) / MANIFEST_NAME).is_file():
        return None
    train = Corpus.open(text).split("train").tokens
    if train.numel() > overlap.MOST_TRAIN_TOKENS:
        return None
    return overlap.copied_tokens(held_out.tokens, train)[1:]


def _shown(tokenizer: Any, held_out: HeldOutText, log_probs: dict[str, Tensor], most: int) -> list[dict[str, Any]]:
    """The leading documents, token by token, with the log-probs that each method gave."""
    documents: list[dict[str, Any]] = []
    left = most
    methods = [name for name in log_probs if name != "tokens"]
    for index in range(held_out.num_documents):
        if left <= 0:
            break
        start, stop = int(held_out.document_starts[index]), int(held_out.document_starts[index + 1])
        if stop - start < 16 and index + 1 < held_out.num_documents:
            continue  # too short to show anything
        stop = min(stop, start + left)
        left -= stop - start
        pieces = pieces_of(tokenizer, held_out.tokens[start:stop].tolist())
        tokens = []
        for offset, piece in enumerate(pieces):
            row = start + offset - 1
            entry: dict[str, Any] = {"text": piece}
            for name in methods:
                value = float(log_probs[name][row]) if row >= 0 else math.nan
                entry[name] = None if math.isnan(value) else round(value, 4)
            tokens.append(entry)
        name = held_out.names[index] if index < len(held_out.names) else f"document {index}"
        documents.append({"name": name, "tokens": tokens})
    return documents


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character spread over tokens appears with the last of them."""
    pieces: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if now.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        before = now
    return pieces


def environment(model: Any = None) -> dict[str, Any]:
    """Versions, device, threads and commit: what a figure depends on besides models and text."""
    facts: dict[str, Any] = {
        "memdec": memdec.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    if model is not None:
        parameter = next(model.parameters())
        facts["device"] = str(parameter.device)
        facts["dtype"] = str(parameter.dtype).removeprefix("torch.")
        if parameter.is_cuda:
            facts["device_name"] = torch.cuda.get_device_name(parameter.device)
    return facts


def _commit() -> str | None:
    """The commit of memdec's own checkout, if it runs from one (not of a repository it is merely installed under)."""
    here = Path(__file__).resolve().parent
    for parent in here.parents:
        if (parent / ".git").exists():
            if not (parent / "python" / "memdec" / "__init__.py").is_file():
                return None
            try:
                found = subprocess.run(
                    ["git", "-C", str(parent), "rev-parse", "HEAD"],
                    capture_output=True,
                    text=True,
                    timeout=10,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError):
                return None
            return found.stdout.strip() or None
    return None


def _fitting_context(model: Any, context: int) -> int:
    """``context``, or the most positions that the model has where that is less."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(context, int(limit)) if limit else context


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def short_name(source: str | Path) -> str:
    """A model's or artefact's name without this machine's path: the last two parts of a path, or the hub id itself."""
    path = Path(source)
    return "/".join(path.resolve().parts[-2:]).lstrip("/") if path.exists() else str(source)


def _training_rows(training_log: str | Path | None, memory: str | Path | None) -> list[dict[str, Any]]:
    """The rows of the log named, else of the one in ``training`` beside the memory; [] where there is none."""
    path = Path(training_log) if training_log is not None else None
    if path is None and memory is not None:
        path = Path(memory).resolve().parent / "training" / "log.jsonl"
    return [] if path is None else read_log(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of training's log.jsonl; [] where there is none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed may leave half a line at the end
        if isinstance(row, dict):
            rows.append(row)
    return rows


def json_text(content: Any) -> str:
    """JSON with sorted keys, one value a line; numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same structure with every number that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
