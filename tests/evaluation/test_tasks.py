"""The nine definitions, rows of the hub (faked: nothing is fetched) and of files, and every way to get them wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import datasets
import pytest

from memdec.errors import MemdecError
from memdec.evaluation.tasks import TASKS, Label, Task, load_from_hub, named_tasks, read_task_file

NINE = ["sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agnews", "yahoo"]
REVIEW = {"text": " a moving film ", "label": 1}
INFERENCE = {"premise": "The lease ended.", "hypothesis": "It was long", "idx": 3, "label": 1}

# What the datasets' cards say of their columns, a row of each; the prompt and the label that it must become.
ROWS = {
    "sst2": ({**REVIEW, "label_text": "positive"}, "a moving film It was", "positive"),
    "mr": (REVIEW, "a moving film It was", "positive"),
    "cr": ({**REVIEW, "label": 0, "label_text": "negative"}, "a moving film It was", "negative"),
    "rt": (REVIEW, "a moving film It was", "positive"),
    "hyp": (
        {"id": 7, "text": "Some news.", "label": "true"},
        "Some news.\n neutral or partisan? Answer:",
        "partisan",
    ),
    "cb": (
        INFERENCE,
        'question: Given that "The lease ended." Is "It was long" true, false, or neither?\n answer:',
        "contradiction",
    ),
    "rte": (INFERENCE, "The lease ended.\n question: It was long true or false?\n answer:", "not_entailment"),
    "agnews": ({"text": "Stocks fell.", "label": 2}, "Stocks fell. topic:", "Business"),
    "yahoo": (
        {"id": 0, "topic": 5, "question_title": "Who won?", "question_content": "", "best_answer": "Brazil."},
        "title: Who won? content:  answer: Brazil. topic:",
        "Sports",
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """hub(rows by split): stands in for load_dataset; the list it returns fills with what was asked for."""

    def install(splits: dict[str, list[dict]]) -> list[tuple]:
        asked: list[tuple] = []

        def load_dataset(path, name=None, *, split):
            asked.append((path, name, split))
            return datasets.Dataset.from_list(splits[split])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return install


def test_all_nine_are_there_and_named():
    assert list(TASKS) == NINE == list(ROWS)
    assert [task.name for task in named_tasks("cb, sst2")] == ["cb", "sst2"]
    for wrong in ("sst", "sst2,sst2", " , "):
        with pytest.raises(MemdecError, match="--tasks"):
            named_tasks(wrong)


@pytest.mark.parametrize("name", NINE)
def test_a_row_of_the_hub_becomes_a_prompt_and_a_label(name, hub):
    row, prompt, label = ROWS[name]
    task = TASKS[name]
    asked = hub({split: [row] * 10 for split in ("train", "validation", "test")})
    rows = load_from_hub(task)
    assert rows.test[0].prompt == prompt and task.labels[rows.test[0].label].name == label
    assert rows.validation[0] == rows.test[0]
    assert {(path, config) for path, config, _ in asked} == {(task.hub.dataset, task.hub.config)}
    # Test splits of SuperGLUE have no public labels.
    assert asked[0][2] == ("validation" if name in ("cb", "rte") else "test")
    assert len({split for _, _, split in asked}) == (1 if name == "mr" else 2)


@pytest.mark.parametrize("name", NINE)
def test_premises_end_as_prompts_do(name):
    """A premise that were no ending would ask for words in another place; CB's is Holtzman et al.'s own."""
    task = TASKS[name]
    if name != "cb":
        assert task.ending == task.premise
    assert task.premise[0].isspace() and not task.premise.endswith(" ")
    names = [label.name for label in task.labels]
    assert len(set(names)) == len(names) >= 2
    words = [word for label in task.labels for word in label.words]
    assert len(set(words)) == len(words)
    for number, label in enumerate(task.labels):
        assert task.label_of(number) == number == task.label_of(label.name)


@pytest.mark.parametrize(("value", "label"), [(False, 0), (True, 1), ("false", 0), ("true", 1), (0, 0), (1, 1)])
def test_labels_of_hyp_in_every_guise(value, label):
    assert TASKS["hyp"].label_of(value) == label


def test_unlabelled_rows_are_refused(hub):
    hub({"test": [{"text": "a", "label": -1}], "validation": [REVIEW]})
    with pytest.raises(MemdecError, match=r"SetFit/sst2, row 0: .*-1 is none of its labels: negative \(0\)"):
        load_from_hub(TASKS["sst2"])


def numbered(count: int) -> list[dict]:
    return [{"text": f"review {i}", "label": i % 2} for i in range(count)]


def test_limits_draw_by_seed_and_keep_the_order(hub):
    hub({"test": numbered(50), "validation": numbered(30)})
    whole = load_from_hub(TASKS["sst2"])
    assert [e.prompt for e in whole.test] == [f"review {i} It was" for i in range(50)] and len(whole.validation) == 30
    few = load_from_hub(TASKS["sst2"], limit=10, validation_limit=5, seed=3)
    again = load_from_hub(TASKS["sst2"], limit=10, validation_limit=5, seed=3)
    assert (few.test, few.validation) == (again.test, again.validation)
    assert (len(few.test), len(few.validation)) == (10, 5)
    places = [whole.test.index(example) for example in few.test]
    assert places == sorted(set(places)) and places != list(range(10))
    assert load_from_hub(TASKS["sst2"], limit=10, seed=4).test != few.test
    assert few.origin["dataset"] == "SetFit/sst2" and few.origin["rows"] == 50


def test_a_single_split_is_cut_into_two_that_share_no_row(hub):
    hub({"test": numbered(50)})
    rows = load_from_hub(TASKS["mr"], seed=1)
    assert (len(rows.test), len(rows.validation)) == (40, 10)
    both = {e.prompt for e in rows.test} | {e.prompt for e in rows.validation}
    assert len(both) == 50
    fewer = load_from_hub(TASKS["mr"], seed=1, validation_limit=3)
    assert fewer.test == rows.test and set(fewer.validation) < set(rows.validation)


def test_a_hub_that_does_not_answer(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(MemdecError, match=r"rte: aps/super_glue \(validation\).*Error: no route.*--task-file"):
        load_from_hub(TASKS["rte"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MemdecError, match=r"memdec\[corpus\].*--task-file"):
        load_from_hub(TASKS["rte"])
    with pytest.raises(MemdecError, match="names no dataset"):
        load_from_hub(replace(TASKS["rte"], hub=None))


def test_columns_that_changed(hub):
    hub({"test": [{"sentence": "a", "label": 1}], "validation": [REVIEW]})
    with pytest.raises(MemdecError, match="row 0: there is no text; it has sentence, label"):
        load_from_hub(TASKS["sst2"])
    hub({"test": [{"text": None, "label": 1}], "validation": [REVIEW]})
    with pytest.raises(MemdecError, match="text is None, wanted text"):
        load_from_hub(TASKS["sst2"])


# -- files -------------------------------------------------------------------------------------------------------------

OWN = {
    "task": "deeds",
    "template": "{deed}\n It is",
    "premise": "\n It is",
    "labels": {"lawful": ["lawful", "legal"], "unlawful": ["unlawful"]},
}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_file_with_rows_of_a_known_task(tmp_path):
    rows = [{**REVIEW, "split": split} for split in ("test", "validation", "test")]
    found = read_task_file(write(tmp_path / "rows.jsonl", {"task": "sst2"}, *rows))
    assert found.task == replace(TASKS["sst2"], hub=None)
    assert [len(found.test), len(found.validation)] == [2, 1]
    assert found.test[0].prompt == "a moving film It was" and found.test[0].label == 1
    assert found.origin["file"] == "rows.jsonl" and str(tmp_path) not in json.dumps(found.origin)


def test_a_file_that_defines_its_task_and_is_cut_by_seed(tmp_path):
    rows = [{"deed": f"Deed {i}.", "label": ("lawful", "unlawful")[i % 2]} for i in range(20)]
    path = write(tmp_path / "deeds.jsonl", OWN, "", *rows)
    found = read_task_file(path)
    assert [label.words for label in found.task.labels] == [("lawful", "legal"), ("unlawful",)]
    assert (len(found.test), len(found.validation)) == (16, 4)
    assert len({e.prompt for e in found.test} | {e.prompt for e in found.validation}) == 20
    assert read_task_file(path).validation == found.validation != read_task_file(path, seed=5).validation
    limited = read_task_file(path, limit=3, validation_limit=2)
    assert (len(limited.test), len(limited.validation)) == (3, 2) and set(limited.test) < set(found.test)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([REVIEW, REVIEW], "the first line tells the task"),
        ([{"task": "sst2"}], "the first line tells the task"),
        ([{"task": "sst2"}, "{"], "line 2: no JSON"),
        ([{"task": "sst2"}, "[1]"], r"line 2: wanted a JSON object, got \[1\]"),
        ([{"task": "sst2"}, {"label": 1}], "line 2: there is no text"),
        ([{"task": "sst2"}, {"text": "a", "label": "great"}], "line 2: .*'great' is none of its labels"),
        ([{"task": "sst2"}, {**REVIEW, "split": "train"}], "line 2: split is 'train'"),
        ([{"task": "sst2"}, {**REVIEW, "split": [1]}], r"line 2: split is \[1\]"),
        ([{"task": "sst2"}, {**REVIEW, "split": "test"}, REVIEW], "some rows have a split and some have none"),
        ([{"task": "sst2"}, REVIEW], "there are no validation rows"),
        ([{"task": "sst2"}, {**REVIEW, "split": "validation"}], "there are no test rows"),
        ([{"task": "deeds", "template": "{deed} is"}, REVIEW], "to define it, premise, labels must be there"),
        ([{**OWN, "metric": "f1"}, REVIEW], "metric, which no task has"),
        ([{**OWN, "labels": ["a", "b"]}, REVIEW], "labels is"),
        ([{**OWN, "labels": {"a": ["a"]}}, REVIEW], "two labels or more"),
        ([{**OWN, "labels": {"a": ["a"], "b": []}}, REVIEW], "two labels or more"),
        ([{**OWN, "template": "no field"}, REVIEW], "needs fields"),
        ([{**OWN, "template": "{0} is"}, REVIEW], "needs fields"),
        ([{**OWN, "template": "{deed is"}, REVIEW], "template cannot be used"),
        ([{**OWN, "template": "{deed} is "}, REVIEW], "template ends in a space"),
        ([{**OWN, "template": 3}, REVIEW], "are text"),
        ([{**OWN, "premise": " "}, REVIEW], "premise is empty"),
    ],
)
def test_files_that_are_wrong(lines, said, tmp_path):
    with pytest.raises(MemdecError, match=said):
        read_task_file(write(tmp_path / "rows.jsonl", *lines))


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(MemdecError, match="cannot be read"):
        read_task_file(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MemdecError, match="UTF-8"):
        read_task_file(tmp_path / "bytes.jsonl")


def test_braces_in_a_row_are_text():
    """What a row says is never a template of its own."""
    labels = (Label("a", ("x",)), Label("b", ("y",)))
    task = Task("t", "T", "{text} {{so}} it is", " it is", labels).check()
    assert task.prompt({"text": "{label} {0.__class__}"}) == "{label} {0.__class__} {so} it is"


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a\0b", "x" * 400, ".hidden", ""])
def test_a_name_that_would_leave_the_folder_is_refused(tmp_path, name):
    header = {"task": name, "template": "{text}", "premise": " So", "labels": {"a": ["a"], "b": ["b"]}}
    rows = [header, *({"text": str(i), "label": "a"} for i in range(4))]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(MemdecError, match="name has letters"):
        read_task_file(tmp_path / "task.jsonl")


def test_a_line_separator_within_a_string_is_no_end_of_line(tmp_path):
    rows = [{"task": "sst2"}, *({"text": f"good\u2028{i}", "label": 1} for i in range(4))]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "task.jsonl").write_text(text, encoding="utf-8")
    assert "good\u2028" in read_task_file(tmp_path / "task.jsonl").test[0].prompt
