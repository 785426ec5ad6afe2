"""The nine zero-shot tasks of the Memory Decoder paper: prompts, labels, and where their rows come from.

A task is a template that ends where an answer word belongs, the words that stand for each label, and a *domain
premise*: the end of the prompt alone, which says how likely each word is before anything was read.

    "a moving film It was" ──▶ great / terrible         premise: " It was"

Templates, premises and label words follow kNN-Prompt (Shi et al. 2022, arXiv 2205.13792; repository
swj0419/kNN_prompt), whose nine tasks the paper takes, and those follow Holtzman et al. 2021 ("Surface Form
Competition", arXiv 2104.08315; repository peterwestuw/surface-form-competition). Its long lists of label words for
sentiment and topics are not in its repository in full; the shorter ones here are our own.

Rows come from the hub by ``datasets``, or from a local ``.jsonl`` file (:func:`read_task_file`).

    >>> task = TASKS["sst2"]
    >>> task.prompt({"text": "a moving film"})
    'a moving film It was'
    >>> [label.words[0] for label in task.labels]
    ['terrible', 'great']
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError

# Of a split that serves for both, this share is set apart to tune α on.
VALIDATION_SHARE = 0.2
# So many validation rows are taken at most: what α is tuned on need not be large.
VALIDATION_LIMIT = 500


@dataclass(frozen=True)
class Label:
    """One answer.

    Attributes:
        name: how reports call it.
        words: what stands for it after the prompt, the plainest first; a space goes before each.
        values: what a row may hold for it besides the name.
    """

    name: str
    words: tuple[str, ...]
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Hub:
    """Where ``datasets.load_dataset`` finds a task's rows.

    Attributes:
        dataset: hub id.
        config: of the dataset; None where it has one only.
        test: the split that is scored.
        validation: the split that α is tuned on; None sets a share of the test split apart.
        columns: the column of each field of the template.
        label: the column of the label.
    """

    dataset: str
    config: str | None
    test: str
    validation: str | None
    columns: Mapping[str, str]
    label: str = "label"


@dataclass(frozen=True)
class Task:
    """A task that is scored by the words that follow a prompt.

    Attributes:
        name: for the command line and JSON.
        title: for tables.
        template: the prompt, with fields as in ``str.format``; ends where a label's word follows.
        premise: the domain premise, which has no fields.
        labels: in the order of their numbers.
        hub: where the rows are; None where only a file has them.
        source: whose template it is.
    """

    name: str
    title: str
    template: str
    premise: str
    labels: tuple[Label, ...]
    hub: Hub | None = None
    source: str = ""

    @property
    def fields(self) -> list[str]:
        """Names of the fields of the template, in their order."""
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

    @property
    def ending(self) -> str:
        """What every prompt ends with: the template after its last field."""
        parts = list(string.Formatter().parse(self.template))
        return parts[-1][0] if parts and parts[-1][1] is None else ""

    def prompt(self, fields: Mapping[str, str]) -> str:
        """The template with its fields filled in, white space around them removed."""
        return self.template.format(**{name: fields[name].strip() for name in self.fields})

    def label_of(self, value: Any) -> int:
        """The number of the label that a row calls `value`: by name, by number, or by another of its values.

        Raises:
            MemdecError: no label is called so.
        """
        for number, label in enumerate(self.labels):
            if value == label.name or value in label.values or value == number:
                return number
        raise MemdecError(
            f"task {self.name}: {value!r} is none of its labels: "
            f"{', '.join(f'{label.name} ({number})' for number, label in enumerate(self.labels))}."
        )

    def check(self) -> Task:
        """The task itself, after its parts were found to fit together.

        Raises:
            MemdecError: the template or a label cannot be used; the message says why.
        """
        if not self.fields or not all(name.isidentifier() for name in self.fields):
            raise MemdecError(f"task {self.name}: the template {self.template!r} needs fields such as {{text}}.")
        if not self.premise.strip():
            raise MemdecError(
                f"task {self.name}: the premise is empty; it is the end of the prompt, such as ' It was'."
            )
        for what, text in (("template", self.template), ("premise", self.premise)):
            if text.endswith(" "):
                raise MemdecError(
                    f"task {self.name}: the {what} ends in a space. Leave it out: the words bring theirs."
                )
        if len(self.labels) < 2 or any(
            not label.words or not all(map(str.strip, label.words)) for label in self.labels
        ):
            raise MemdecError(f"task {self.name}: wanted two labels or more, and a word or more for each of them.")
        return self


@dataclass(frozen=True)
class Example:
    """One row: its prompt and the number of its label."""

    prompt: str
    label: int


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows to score.

    Attributes:
        task: what they are rows of.
        test: what accuracy is measured on.
        validation: what α is tuned on; none of it is in ``test``.
        origin: JSON: dataset and splits, or the file and its checksum, and how many rows there were.
    """

    task: Task
    test: Sequence[Example]
    validation: Sequence[Example]
    origin: dict[str, Any] = field(default_factory=dict)


# -- the nine ----------------------------------------------------------------------------------------------------------

SHI = "kNN-Prompt (Shi et al. 2022)"
HOLTZMAN = "Surface Form Competition (Holtzman et al. 2021), as in kNN-Prompt (Shi et al. 2022)"

SENTIMENT = (
    Label("negative", ("terrible", "bad", "awful", "horrible", "poor", "boring", "disappointing", "worse"), (0, "neg")),
    Label(
        "positive", ("great", "good", "excellent", "wonderful", "amazing", "enjoyable", "perfect", "better"), (1, "pos")
    ),
)
TRUE = ("true", "yes", "accurate", "correct", "faithful")
FALSE = ("false", "no", "incorrect", "wrong", "untrue", "unfaithful")


def _sentiment(name: str, title: str, hub: Hub) -> Task:
    return Task(name, title, "{text} It was", " It was", SENTIMENT, hub, SHI)


_NINE = (
    _sentiment("sst2", "SST-2", Hub("SetFit/sst2", None, "test", "validation", {"text": "text"})),
    _sentiment("mr", "MR", Hub("mattymchen/mr", None, "test", None, {"text": "text"})),
    _sentiment("cr", "CR", Hub("SetFit/SentEval-CR", None, "test", "train", {"text": "text"})),
    _sentiment(
        "rt",
        "RT",
        Hub("cornell-movie-review-data/rotten_tomatoes", None, "test", "validation", {"text": "text"}),
    ),
    Task(
        "hyp",
        "HYP",
        "{text}\n neutral or partisan? Answer:",
        "\n neutral or partisan? Answer:",
        (
            Label("neutral", ("neutral", "fair", "objective"), (0, "false", "False")),
            Label("partisan", ("partisan", "biased", "unfair"), (1, "true", "True")),
        ),
        Hub("jonathanli/hyperpartisan-longformer-split", None, "test", "validation", {"text": "text"}),
        SHI,
    ),
    Task(
        "cb",
        "CB",
        'question: Given that "{premise}" Is "{hypothesis}" true, false, or neither?\n answer:',
        " the answer is:",
        (
            Label("entailment", TRUE, (0,)),
            Label("contradiction", FALSE, (1,)),
            Label("neutral", ("neither",), (2,)),
        ),
        # The labels of SuperGLUE's test splits are not public: its validation split is the test here.
        Hub("aps/super_glue", "cb", "validation", "train", {"premise": "premise", "hypothesis": "hypothesis"}),
        HOLTZMAN,
    ),
    Task(
        "rte",
        "RTE",
        "{premise}\n question: {hypothesis} true or false?\n answer:",
        " true or false?\n answer:",
        (Label("entailment", TRUE, (0,)), Label("not_entailment", FALSE, (1,))),
        Hub("aps/super_glue", "rte", "validation", "train", {"premise": "premise", "hypothesis": "hypothesis"}),
        HOLTZMAN,
    ),
    Task(
        "agnews",
        "AGNews",
        "{text} topic:",
        " topic:",
        (
            Label("World", ("world", "politics", "government", "international", "war"), (0,)),
            Label("Sports", ("sports", "sport", "football", "baseball", "basketball"), (1,)),
            Label("Business", ("business", "economy", "finance", "market", "trade"), (2,)),
            Label("Sci/Tech", ("science", "technology", "computer", "software", "space"), (3,)),
        ),
        Hub("fancyzhx/ag_news", None, "test", "train", {"text": "text"}),
        SHI,
    ),
    Task(
        "yahoo",
        "Yahoo",
        "title: {title} content: {content} answer: {answer} topic:",
        " topic:",
        (
            Label("Society & Culture", ("society", "culture", "religion", "philosophy", "community"), (0,)),
            Label("Science & Mathematics", ("science", "mathematics", "physics", "chemistry", "biology"), (1,)),
            Label("Health", ("health", "medicine", "disease", "diet", "fitness"), (2,)),
            Label("Education & Reference", ("education", "school", "college", "reference", "homework"), (3,)),
            Label("Computers & Internet", ("computer", "internet", "software", "programming", "technology"), (4,)),
            Label("Sports", ("sports", "sport", "football", "soccer", "baseball"), (5,)),
            Label("Business & Finance", ("business", "finance", "money", "investment", "tax"), (6,)),
            Label("Entertainment & Music", ("entertainment", "music", "movie", "film", "song"), (7,)),
            Label("Family & Relationships", ("family", "relationships", "marriage", "dating", "love"), (8,)),
            Label("Politics & Government", ("politics", "government", "law", "election", "military"), (9,)),
        ),
        Hub(
            "community-datasets/yahoo_answers_topics",
            None,
            "test",
            "train",
            {"title": "question_title", "content": "question_content", "answer": "best_answer"},
            "topic",
        ),
        SHI,
    ),
)
TASKS: dict[str, Task] = {task.name: task.check() for task in _NINE}


def named_tasks(names: str | Iterable[str]) -> list[Task]:
    """The tasks of a list such as ``"sst2,cb"``, in its order.

    Raises:
        MemdecError: a name is unknown or comes twice, or there is none.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if not wanted or unknown or len(set(wanted)) < len(wanted):
        what = f"unknown: {', '.join(unknown)}" if unknown else "one comes twice" if wanted else "none is named"
        raise MemdecError(f"--tasks ({what}): wanted some of {','.join(TASKS)}, with commas between.")
    return [TASKS[name] for name in wanted]


# -- rows --------------------------------------------------------------------------------------------------------------


def load_from_hub(
    task: Task, *, limit: int | None = None, validation_limit: int = VALIDATION_LIMIT, seed: int = 0
) -> TaskRows:
    """The rows of a task, by ``datasets.load_dataset``.

    Args:
        task: one that names a dataset.
        limit: so many rows of the test split, drawn by `seed`; None takes all, in their order.
        validation_limit: so many rows of the validation split at most, drawn by `seed`.
        seed: of the draws.

    Raises:
        MemdecError: the dataset cannot be had, or is not as the task says.
    """
    if task.hub is None:
        raise MemdecError(f"task {task.name} names no dataset. Give its rows in a file: --task-file FILE.")
    test = _split(task, task.hub.test)
    everything = list(range(len(test)))
    if task.hub.validation is None:
        cut, kept = _cut(len(test), seed)
        validation, places = test, _drawn(cut, validation_limit, seed)
    else:
        validation, kept = _split(task, task.hub.validation), everything
        places = _drawn(list(range(len(validation))), validation_limit, seed)
    chosen = _drawn(kept, limit, seed)
    hub = task.hub

    def examples(rows: Any, indices: list[int]) -> list[Example]:
        return [_example(task, rows[index], hub.columns, hub.label, f"{hub.dataset}, row {index}") for index in indices]

    origin = {
        "dataset": hub.dataset,
        "config": hub.config,
        "test": hub.test,
        "validation": hub.validation or f"{VALIDATION_SHARE:.0%} of {hub.test}",
        "rows": len(kept),
        "seed": seed,
    }
    return _checked(TaskRows(task, examples(test, chosen), examples(validation, places), origin))


def _split(task: Task, split: str) -> Any:
    """One split of the task's dataset, with a length and rows by number."""
    assert task.hub is not None
    try:
        import datasets
    except ImportError:
        raise MemdecError(
            f"task {task.name} comes from the hub, which needs the package datasets: pip install 'memdec[corpus]', "
            "or give the rows in a file: --task-file FILE."
        ) from None
    try:
        return datasets.load_dataset(task.hub.dataset, task.hub.config, split=split)
    except Exception as error:  # each loader of datasets raises its own
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise MemdecError(
            f"task {task.name}: {task.hub.dataset} ({split}) could not be loaded ({type(error).__name__}: {reason}). "
            "Check the network, or give the rows in a file: --task-file FILE."
        ) from error


def read_task_file(
    path: str | Path, *, limit: int | None = None, validation_limit: int = VALIDATION_LIMIT, seed: int = 0
) -> TaskRows:
    """A task and its rows from a ``.jsonl`` file.

    The first line tells the task: ``{"task": "sst2"}`` for one of ours, or a new one with ``template``, ``premise``
    and ``labels`` (a label's name to its words). Each further line is a row: the template's fields, ``label``, and
    ``split`` ("test" or "validation"); where no row says a split, a fifth is set apart for validation by `seed`.

    Args:
        path: the file.
        limit: so many test rows, drawn by `seed`; None takes all.
        validation_limit: so many validation rows at most, drawn by `seed`.
        seed: of the draws.

    Raises:
        MemdecError: the file is not as described; the message names the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")  # not splitlines: JSON may hold other line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise MemdecError(f"--task-file {path}: cannot be read as UTF-8 text ({error}).") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MemdecError(f"{path}, line {number}: no JSON ({str(error)[:80]}).") from None
        if not isinstance(row, dict):
            raise MemdecError(f"{path}, line {number}: wanted a JSON object, got {line.strip()[:40]}.")
        rows.append((number, row))
    if len(rows) < 2 or "task" not in rows[0][1]:
        raise MemdecError(
            f'{path}: the first line tells the task ({{"task": "sst2"}}, or a new one with template, premise and '
            "labels), the others are its rows."
        )
    task = _task_of(rows[0][1], path)
    columns = {name: name for name in task.fields}
    parts: dict[str | None, list[Example]] = {"test": [], "validation": [], None: []}
    for number, row in rows[1:]:
        split = row.get("split")
        if not isinstance(split, str | None) or split not in parts:
            raise MemdecError(f"{path}, line {number}: split is {split!r}, wanted test or validation.")
        parts[split].append(_example(task, row, columns, "label", f"{path}, line {number}"))
    test, validation, unsaid = parts["test"], parts["validation"], parts[None]
    if unsaid and (test or validation):
        raise MemdecError(f"{path}: some rows have a split and some have none. Give all of them one, or none.")
    if unsaid:
        cut, kept = _cut(len(unsaid), seed)
        test, validation = [unsaid[i] for i in kept], [unsaid[i] for i in cut]
    origin = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "rows": len(test), "seed": seed}
    return _checked(TaskRows(task, _drawn(test, limit, seed), _drawn(validation, validation_limit, seed), origin))


def _task_of(header: dict[str, Any], path: Path) -> Task:
    """The task that a file's first line tells."""
    name = str(header["task"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name):  # files are called by it
        raise MemdecError(f"{path}: a task's name has letters, digits, _, - and dots, 80 at most; got {name[:90]!r}.")
    known = TASKS.get(name)
    unknown = header.keys() - {"task", "title", "template", "premise", "labels", "source"}
    if unknown:
        raise MemdecError(f"{path}: the first line has {', '.join(sorted(unknown))}, which no task has.")
    labels = header.get("labels")
    if labels is not None and not (
        isinstance(labels, dict)
        and all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in labels.values())
    ):
        raise MemdecError(f'{path}: labels is {labels!r}, wanted {{"name": ["word", …], …}}.')
    given: dict[str, Any] = {key: header[key] for key in ("title", "template", "premise", "source") if key in header}
    if any(not isinstance(value, str) for value in given.values()):
        raise MemdecError(f"{path}: title, template, premise and source of the first line are text.")
    if labels is not None:
        given["labels"] = tuple(Label(label, tuple(words)) for label, words in labels.items())
    if known is None:
        missing = [key for key in ("template", "premise", "labels") if key not in given]
        if missing:
            raise MemdecError(
                f"{path}: {name} is none of {', '.join(TASKS)}; to define it, {', '.join(missing)} must be there."
            )
        known = Task(name, name, "", "", ())
    try:
        return replace(known, hub=None, **given).check()
    except (ValueError, KeyError, IndexError, AttributeError) as error:  # braces that do not match
        raise MemdecError(f"{path}: the template cannot be used: {error}.") from None


def _example(task: Task, row: Mapping[str, Any], columns: Mapping[str, str], label: str, where: str) -> Example:
    """The example that a row is."""
    missing = [column for column in (*columns.values(), label) if column not in row]
    if missing:
        raise MemdecError(f"{where}: there is no {', '.join(missing)}; it has {', '.join(row)}.")
    fields = {name: row[column] for name, column in columns.items()}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise MemdecError(f"{where}: {name} is {value!r}, wanted text.")
    try:
        return Example(task.prompt(fields), task.label_of(row[label]))
    except MemdecError as error:
        raise MemdecError(f"{where}: {error}") from None


def _cut(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers below `count`, those for validation and those for the test; a function of count and seed alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    share = round(count * VALIDATION_SHARE)
    return sorted(order[:share]), sorted(order[share:])


def _drawn(rows: list[Any], limit: int | None, seed: int) -> list[Any]:
    """`limit` of the rows, drawn by `seed`, in their order; all of them where there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _checked(rows: TaskRows) -> TaskRows:
    if not rows.test or not rows.validation:
        part = "test" if not rows.test else "validation"
        raise MemdecError(f"task {rows.task.name}: there are no {part} rows; it needs some of both.")
    return rows
