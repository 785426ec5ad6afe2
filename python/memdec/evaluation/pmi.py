"""Zero-shot classification by the words that follow a prompt: base, memory and mixture, by PMI and by plain LM scores.

    plain LM score    log P(y | prompt(x))
    PMI score         log P(y | prompt(x)) − log P(y | domain premise)
    P(y | context)  = Σ_w P(w | context) over the words w of the label y
    log P(w | context) = Σ_t log(α·p_mem(w_t | …) + (1−α)·p_base(w_t | …)) over the tokens of the word

The label with the highest score is the answer (domain-conditional PMI: Holtzman et al. 2021). The mixture is taken
token by token, as decoding takes it: mixing the probabilities of whole words would be another model. Two passes, one
by each model, give the log-prob of every token of every word after every context, and so each α without a further
forward. Words of one token share their context's forward; a word of k tokens needs one on context and k−1 tokens.

α is tuned on the validation rows of each task, for each kind of score, and never on the test rows; where several α are
equally accurate there, the one that gives the right labels the most probability (softmax of the scores) is taken.

    >>> task = tasks.read_task_file("reviews.jsonl")                                     # doctest: +SKIP
    >>> result = evaluate_tasks("base/", "run/memory", [task])                           # doctest: +SKIP
    >>> result.tasks[0].measure("base+memory", "pmi").accuracy                           # doctest: +SKIP
    0.81
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.evaluation.evaluate import check_ours, environment, json_text, short_name
from memdec.evaluation.tasks import Task, TaskRows
from memdec.modeling.memory_model import memory_folder
from memdec.modeling.scoring import LOGITS_BUDGET, load_causal_lm, mixture_log_prob, vocabulary_width
from memdec.modeling.structure import (
    head_is_plain,
    input_device,
    logits_from_hidden,
    output_head,
    text_config,
    trunk,
)
from memdec.modeling.tokenizers import compare as compare_tokenizers
from memdec.modeling.tokenizers import load_tokenizer, width
from memdec.pipeline.embed import default_device, model_fingerprint
from memdec.pipeline.progress import progress
from memdec.stores.atomic import make_folder, write_file
from memdec.stores.memory import CARD_NAME, read_memory_card

FORMAT = "memdec.tasks"
VERSION = 1
FILE_NAME = "tasks.json"
LOG_PROBS = "log_probs"  # the folder beside it
SCORINGS = ("pmi", "lm")
LABELS = {"base": "base", "memory": "memory alone", "base+memory": "base + memory"}
# Steps of the grid that α is chosen from.
ALPHA_STEPS = 50


# -- words -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The words of a task's labels as tokens, and how to read all of them with few forwards.

    Attributes:
        tokens: of each word, W of them, those of the first label first.
        label: int64 (W,): whose word it is.
        counted: bool (W,): False for a word that begins with the tokens of another of its label, whose probability
            holds its own.
        word: int64 (R,): the word that each of the R tokens to read belongs to.
        forwards: what has to stand behind a context, and what is read then: (place, token, number among the R), where
            place 0 is what follows the context itself.
    """

    tokens: list[list[int]]
    label: Tensor
    counted: Tensor
    word: Tensor
    forwards: list[tuple[list[int], list[tuple[int, int, int]]]]

    @property
    def longest(self) -> int:
        """The most tokens that stand behind a context."""
        return max(len(behind) for behind, _ in self.forwards)


def words_of(task: Task, tokenizer: Any) -> Words:
    """The words of a task's labels in a tokenizer's tokens, as they follow its prompts.

    Raises:
        MemdecError: two labels have a word of the same tokens.
    """
    tokens: list[list[int]] = []
    owner: list[int] = []
    gap = "" if task.template[-1:].isspace() else " "
    for number, label in enumerate(task.labels):
        for word in label.words:
            found = continuation(tokenizer, task.ending or "a", gap + word)
            for other, ids in zip(owner, tokens, strict=True):
                if ids == found and other != number:
                    raise MemdecError(
                        f"task {task.name}: {label.name} and {task.labels[other].name} both have the word {word!r} (or "
                        "one of the same tokens), so they cannot be told apart."
                    )
            if found not in tokens:
                tokens.append(found)
                owner.append(number)
    counted = [
        not any(
            owner[i] == owner[j] and i != j and tokens[i][: len(tokens[j])] == tokens[j] for j in range(len(tokens))
        )
        for i in range(len(tokens))
    ]
    # Longest first: a word whose beginning stands in an earlier forward needs none of its own.
    forwards: list[tuple[list[int], list[tuple[int, int, int]]]] = []
    reads: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
        behind = tokens[i][:-1]
        read = next((read for ids, read in forwards if ids[: len(behind)] == behind), None)
        if read is None:
            read = []
            forwards.append((behind, read))
        for place, token in enumerate(tokens[i]):
            read.append((place, token, len(reads)))
            reads.append(i)
    return Words(tokens, torch.tensor(owner), torch.tensor(counted), torch.tensor(reads), forwards)


def continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens that `text` adds to `before`; those of `text` alone where the tokenizer joins the two."""

    def encode(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False)["input_ids"])

    head, whole = encode(before), encode(before + text)
    if len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    return encode(text)


def contexts_of(tokenizer: Any, texts: Sequence[str], most: int) -> tuple[list[list[int]], int]:
    """The texts as tokens, after the tokenizer's beginning-of-text token if it puts one there by itself.

    Args:
        tokenizer: of the models.
        texts: prompts and premises.
        most: tokens at most; a longer text loses its beginning.

    Returns:
        The token lists, and how many were cut.

    Raises:
        MemdecError: a text is empty, or there is no room for any.
    """
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    room = most - len(start)
    if room < 1:
        raise MemdecError(f"a prompt may have {most} tokens beside its longest word, which leaves it none.")
    found = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    if not all(found):
        raise MemdecError("a prompt is empty, so that nothing stands before the words of the labels.")
    return [start + ids[-room:] for ids in found], sum(len(ids) > room for ids in found)


@torch.no_grad()
def read_tokens(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    words: Words,
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:  # (C, R) float32
    """log p of every token of every word after every context, by one model.

    Args:
        model: a transformers causal LM.
        contexts: C token lists, none empty.
        words: what may follow.
        batch_size: texts a forward, the longest first; shorter ones are padded on the right, unseen by a causal model.
        vocab_size: number of logit columns that count (the tokenizer's width); None counts all.
        advance: is told how many forwards' rows were done.

    Raises:
        MemdecError: the model gave NaN.
    """
    found = torch.full((len(contexts), len(words.word)), math.nan)
    plain, head, body = head_is_plain(model), output_head(model), trunk(model)
    where = input_device(model)
    rows = max(1, LOGITS_BUDGET // (4 * vocabulary_width(model)))
    jobs = [(c, f) for c in range(len(contexts)) for f in range(len(words.forwards))]
    jobs.sort(key=lambda job: -len(contexts[job[0]]) - len(words.forwards[job[1]][0]))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            texts = [[*contexts[c], *words.forwards[f][0]] for c, f in batch]
            inputs = torch.zeros(len(batch), len(texts[0]), dtype=torch.long)
            places: dict[tuple[int, int], int] = {}  # (row, position) to the number of its logits
            reads = []  # (number of the logits, token, context, number among the R)
            for row, ((c, f), text) in enumerate(zip(batch, texts, strict=True)):
                inputs[row, : len(text)] = torch.tensor(text)
                for place, token, number in words.forwards[f][1]:
                    key = (row, len(contexts[c]) - 1 + place)
                    reads.append((places.setdefault(key, len(places)), token, c, number))
            hidden = body(input_ids=inputs.to(where), use_cache=False).last_hidden_state
            at = torch.tensor(list(places), device=hidden.device)
            chosen = hidden[at[:, 0], at[:, 1]]
            wanted = torch.tensor(reads)
            for start in range(0, len(chosen), rows):
                part = chosen[start : start + rows]
                logits = head(part) if plain else logits_from_hidden(model, part[None])[0]
                log_probs = torch.log_softmax(logits[:, :vocab_size].float(), -1)
                here = wanted[(wanted[:, 0] >= start) & (wanted[:, 0] < start + rows)]
                picked = log_probs[(here[:, 0] - start).to(log_probs.device), here[:, 1].to(log_probs.device)]
                found[here[:, 2], here[:, 3]] = picked.cpu()
            advance(len(batch))
    finally:
        model.train(was_training)
    if bool(found.isnan().any()):
        raise MemdecError(
            f"{type(model).__name__} gave no number (NaN) for a word of a label; its weights are broken or its dtype "
            "is too narrow. Try --dtype float32."
        )
    return found


def label_log_probs(
    base: Tensor,  # (C, R)
    memory: Tensor | None,  # (C, R); None with alpha 0
    alpha: float,
    words: Words,
    *,
    first_word_only: bool = False,
) -> Tensor:  # (C, labels) float64
    """log P(label | context) under the mixture: tokens mixed, multiplied to words, words summed to labels.

    Args:
        base: log-probs of the tokens under the base.
        memory: the same under the memory.
        alpha: weight of the memory.
        words: what the tokens spell.
        first_word_only: count a label's first word only.
    """
    mixed = base.double() if memory is None else mixture_log_prob(base, memory, alpha)
    of_words = torch.zeros(len(base), len(words.tokens), dtype=torch.float64).index_add_(1, words.word, mixed)
    columns = []
    for label in range(int(words.label.max()) + 1):
        mine = (words.label == label).nonzero()[:, 0]
        mine = mine[:1] if first_word_only else mine[words.counted[mine]]
        columns.append(of_words[:, mine].logsumexp(1))
    return torch.stack(columns, 1)


# -- one task ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenScores:
    """A task's rows, validation rows first, with the log-probs that every score is made of.

    Attributes:
        words: the labels' words.
        base: (C, R) float32, over the contexts: the premise, then the prompts.
        memory: the same; None without a memory.
        prompt: int64 (N,): the context of each row.
        label: int64 (N,): the right label of each row.
        validation: how many of the N rows are validation rows.
    """

    words: Words
    base: Tensor
    memory: Tensor | None
    prompt: Tensor
    label: Tensor
    validation: int

    def scores(self, method: str, scoring: str, alpha: float, *, first_word_only: bool = False) -> Tensor:
        """Scores (N, labels) float64 by `method` ("base", "memory", "base+memory") and `scoring` ("pmi", "lm")."""
        alpha = {"base": 0.0, "memory": 1.0}.get(method, alpha)
        found = label_log_probs(self.base, self.memory, alpha, self.words, first_word_only=first_word_only)
        return found[self.prompt] - found[0] if scoring == "pmi" else found[self.prompt]


@dataclass(frozen=True)
class TaskMeasure:
    """One method with one kind of score on the test rows of a task.

    Attributes:
        method: "base", "memory" or "base+memory".
        scoring: "pmi" or "lm".
        alpha: weight of the memory; None where there is none.
        alpha_source: "tuned on validation", "recommended by the memory" or "given"; "" where there is no α.
        accuracy: share of the test rows answered rightly.
        interval: 95% interval of it (Wilson).
        validation_accuracy: the same share of the validation rows.
        difference: accuracy − the base's with the same kind of score; None for the base.
        difference_interval: 95% bootstrap interval of it over test rows.
        wins: test rows that this method has right and the base wrong.
        losses: the other way round.
        p_value: of the exact McNemar test of wins against losses, two-sided.
    """

    method: str
    scoring: str
    alpha: float | None
    alpha_source: str
    accuracy: float
    interval: tuple[float, float]
    validation_accuracy: float
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    wins: int | None = None
    losses: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """What was found on one task; attributes as their names say.

    Attributes:
        task: name, title, template, premise, labels with their words, source.
        rows: where they are from, how many of each part were scored, how many prompts were cut.
        majority: share of the most frequent label of the test rows, which a constant answer would get.
        measures: every method and kind of score.
        alpha_curves: of each kind of score, pairs of α and the accuracy on the validation rows.
    """

    task: dict[str, Any]
    rows: dict[str, Any]
    majority: float
    measures: list[TaskMeasure]
    alpha_curves: dict[str, list[tuple[float, float]]]

    def measure(self, method: str, scoring: str = "pmi", alpha_source: str | None = None) -> TaskMeasure:
        """The first measure of a method and a kind of score (of a source of α, if given).

        Raises:
            KeyError: there is none.
        """
        for entry in self.measures:
            same = entry.method == method and entry.scoring == scoring
            if same and alpha_source in (None, entry.alpha_source):
                return entry
        raise KeyError(f"{method}, {scoring}")


def tune_alpha(
    found: TokenScores, scoring: str, *, first_word_only: bool = False
) -> tuple[float, list[tuple[float, float]]]:
    """The α of a grid with the best accuracy on the validation rows, and the curve of these accuracies.

    Of equals the one that gives the right labels the highest mean log softmax of the scores, then the smallest.
    """
    part = slice(0, found.validation)
    label = found.label[part]
    curve, ranked = [], []
    for step in range(ALPHA_STEPS + 1):
        alpha = step / ALPHA_STEPS
        scores = found.scores("base+memory", scoring, alpha, first_word_only=first_word_only)[part]
        accuracy = float((scores.argmax(1) == label).double().mean())
        belief = float(scores.log_softmax(1).gather(1, label[:, None]).mean())
        curve.append((alpha, accuracy))
        ranked.append((accuracy, belief, -alpha))
    return -max(ranked)[2], curve


def measure_task(
    found: TokenScores,
    further: tuple[float, str] | None = None,
    *,
    first_word_only: bool = False,
    seed: int = 0,
) -> tuple[list[TaskMeasure], dict[str, list[tuple[float, float]]]]:
    """Every method with every kind of score, each beside the base's.

    Args:
        found: log-probs of all rows.
        further: an α to measure beside the tuned one, and where it is from.
        first_word_only: count a label's first word only.
        seed: of the bootstrap.

    Returns:
        The measures, and of each kind of score the curve that α was chosen on.
    """
    measures: list[TaskMeasure] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for scoring in SCORINGS:
        methods: list[tuple[str, float | None, str]] = [("base", None, "")]
        if found.memory is not None:
            tuned, curves[scoring] = tune_alpha(found, scoring, first_word_only=first_word_only)
            methods += [("memory", None, ""), ("base+memory", tuned, "tuned on validation")]
            if further is not None:
                methods.append(("base+memory", *further))
        of_base: Tensor | None = None
        for method, alpha, source in methods:
            scores = found.scores(method, scoring, alpha or 0.0, first_word_only=first_word_only)
            answers = scores.argmax(1) == found.label
            before, right = answers[: found.validation], answers[found.validation :]
            correct, count = int(right.sum()), len(right)
            paired: dict[str, Any] = {}
            if of_base is None:
                of_base = right
            else:
                wins, losses = int((right & ~of_base).sum()), int((~right & of_base).sum())
                paired = {
                    "difference": (wins - losses) / count,
                    "difference_interval": difference_interval(wins, losses, count, seed=seed),
                    "wins": wins,
                    "losses": losses,
                    "p_value": mcnemar(wins, losses),
                }
            measures.append(
                TaskMeasure(
                    method,
                    scoring,
                    alpha,
                    source,
                    accuracy=correct / count,
                    interval=wilson_interval(correct, count),
                    validation_accuracy=float(before.double().mean()),
                    **paired,
                )
            )
    return measures, curves


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share; holds its level for few rows and near 0 and 1.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided McNemar test: the chance of wins and losses as unequal as these if both are equally likely.

    >>> mcnemar(5, 0)
    0.0625
    """
    count, least = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    logs = (
        math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) - count * math.log(2)
        for i in range(least + 1)
    )
    return min(1.0, round(2 * math.fsum(map(math.exp, logs)), 15))


def difference_interval(
    wins: int, losses: int, count: int, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A 95% bootstrap interval of (wins − losses) / count over test rows drawn with replacement.

    What a resample holds of wins, losses and draws is multinomial, so it is drawn as such.
    """
    shares = [wins / count, losses / count, (count - wins - losses) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return float(low), float(high)


# -- all tasks ---------------------------------------------------------------------------------------------------------


@dataclass
class TasksResult:
    """All tasks of a run; ``to_json`` is the content of tasks.json."""

    environment: dict[str, Any]
    models: dict[str, Any]
    settings: dict[str, Any]
    tasks: list[TaskResult] = field(default_factory=list)

    def averages(self) -> list[dict[str, Any]]:
        """Mean accuracy over the tasks, of each method, kind of score and source of α."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for task in self.tasks:
            for entry in task.measures:
                found.setdefault((entry.method, entry.scoring, entry.alpha_source), []).append(entry.accuracy)
        return [
            {"method": method, "scoring": scoring, "alpha_source": source, "accuracy": math.fsum(shares) / len(shares)}
            for (method, scoring, source), shares in found.items()
        ]

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "environment": self.environment,
            "models": self.models,
            "settings": self.settings,
            "tasks": [asdict(task) for task in self.tasks],
            "averages": self.averages(),
        }
        return json_text(content)

    def save(self, folder: str | Path) -> Path:
        """Write tasks.json to `folder`; its path."""
        check_out(folder)
        path = make_folder(folder) / FILE_NAME
        write_file(path, self.to_json().encode("utf-8"))
        return path


def check_out(folder: str | Path) -> None:
    """Raise ``MemdecError`` where tasks.json in `folder` is none of ours."""
    check_ours(folder, (FILE_NAME,), FORMAT)


def evaluate_tasks(
    base: str | Path | nn.Module,
    memory: str | Path | nn.Module | None,
    tasks: Sequence[TaskRows],
    *,
    alpha: float | None = None,
    tokenizer: Any = None,
    context: int = 1024,
    first_word_only: bool = False,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], object] | None = None,
) -> TasksResult:
    """Score tasks with a base, a memory and their mixture.

    Args:
        base: path, hub id or loaded model.
        memory: likewise; None measures the base alone.
        tasks: with their rows, from ``load_from_hub`` or ``read_task_file``.
        alpha: a weight of the memory to report beside the tuned one; None takes the memory's own, if it has one.
        tokenizer: of models that are given loaded.
        context: tokens of a prompt at most (the models' own limit where that is less); longer ones lose their
            beginning.
        first_word_only: let each label's first word alone stand for it, and not the sum over all its words.
        batch_size: prompts a forward.
        dtype: "auto", "float32", "bfloat16" or "float16", of what is loaded here.
        device: such as "cpu" or "cuda:0"; None is an accelerator if there is one.
        out: a folder that keeps the log-probs of what was scored: the same call then continues where it stopped.
        seed: of the bootstrap.
        say: called with a line about each step.

    Raises:
        MemdecError: something is missing or does not fit.
    """
    tell = say or (lambda line: None)
    if not tasks:
        raise MemdecError("no task was given; name some with --tasks or --task-file.")
    names = [rows.task.name for rows in tasks]
    if len(set(names)) < len(names):
        raise MemdecError(f"the tasks {', '.join(names)}: each may come once.")
    if out is not None:
        check_out(out)
    if tokenizer is None:
        if isinstance(base, nn.Module):
            raise MemdecError("the base is given loaded, so its tokenizer must be given too: tokenizer=….")
        tokenizer = load_tokenizer(base)
    source = "given"
    if memory is not None and not isinstance(memory, nn.Module):
        base_name = "the base" if isinstance(base, nn.Module) else short_name(base)
        compare_tokenizers(tokenizer, load_tokenizer(memory), base_name=base_name, memory_name=short_name(memory))
        folder = memory_folder(memory)
        if alpha is None and folder is not None and (folder / CARD_NAME).is_file():
            alpha, source = read_memory_card(folder).alpha, "recommended by the memory"
    if alpha is not None and not 0 <= alpha <= 1:
        raise MemdecError(f"--alpha must be from 0 (base alone) to 1 (memory alone), got {alpha}")
    if context < 8:
        raise MemdecError(f"--context {context}: a prompt needs 8 tokens or more.")
    prepared = [words_of(rows.task, tokenizer) for rows in tasks]  # what cannot be scored shows before models load

    device = device or default_device()
    models = {"base": load_causal_lm(base, dtype=dtype, device=device)}
    if memory is not None:
        models["memory"] = load_causal_lm(memory, dtype=dtype, device=device)
    for model in models.values():
        limit = getattr(text_config(model), "max_position_embeddings", None)
        context = min(context, int(limit)) if limit else context
    result = TasksResult(
        environment=environment(models["base"]),
        models={
            name: None if model is None else type(model).__name__ if isinstance(model, nn.Module) else short_name(model)
            for name, model in (("base", base), ("memory", memory))
        },
        settings={
            "alpha": alpha,
            "alpha_source": source if alpha is not None else None,
            "context": context,
            "words": "first" if first_word_only else "all",
            "batch_size": batch_size,
            "seed": seed,
        },
    )
    for rows, words in zip(tasks, prepared, strict=True):
        tell(f"{rows.task.title}: {len(rows.test):,} test rows, {len(rows.validation):,} to tune alpha on")
        examples = [*rows.validation, *rows.test]
        texts = [rows.task.premise, *dict.fromkeys(example.prompt for example in examples)]
        number = {text: index for index, text in enumerate(texts) if index}
        contexts, cut = contexts_of(tokenizer, texts, context - words.longest)
        passes = {
            name: _kept_or_read(model, name, rows.task, contexts, words, width(tokenizer), batch_size, out)
            for name, model in models.items()
        }
        found = TokenScores(
            words,
            passes["base"],
            passes.get("memory"),
            torch.tensor([number[example.prompt] for example in examples]),
            torch.tensor([example.label for example in examples]),
            len(rows.validation),
        )
        further = None if alpha is None else (alpha, source)
        measures, curves = measure_task(found, further, first_word_only=first_word_only, seed=seed)
        counts = torch.bincount(found.label[found.validation :])
        result.tasks.append(
            TaskResult(
                {key: value for key, value in asdict(rows.task).items() if key != "hub"},
                {**rows.origin, "test": len(rows.test), "validation": len(rows.validation), "cut_prompts": cut},
                float(counts.max() / counts.sum()),
                measures,
                curves,
            )
        )
    return result


def _kept_or_read(
    model: nn.Module,
    role: str,
    task: Task,
    contexts: list[list[int]],
    words: Words,
    vocab_size: int,
    batch_size: int,
    out: str | Path | None,
) -> Tensor:
    """The token log-probs that an earlier run left in `out`, if they are of the same model, prompts and words."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    asked = json.dumps([model_fingerprint(model), vocab_size, contexts, words.tokens])
    key = hashlib.sha256(asked.encode()).hexdigest()
    path = None if out is None else make_folder(Path(out) / LOG_PROBS) / f"{task.name}.{role}.safetensors"
    if path is not None and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() == {"key": key}:
                    return torch.as_tensor(file.get_tensor(LOG_PROBS))
        except SafetensorError:
            pass  # damaged: read anew
    with progress(len(contexts) * len(words.forwards), unit="prompts", label=f"{task.title}, {role}") as advance:
        found = read_tokens(model, contexts, words, batch_size=batch_size, vocab_size=vocab_size, advance=advance)
    if path is not None:
        write_file(path, save({LOG_PROBS: found}, metadata={"key": key}))
    return found
