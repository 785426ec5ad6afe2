"""`memdec tasks` on a tiny pair and a task file: the table, the file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROWS = [{"text": f"The court {verb} it", "label": n % 2} for n, verb in enumerate(["granted", "denied"] * 8)]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"task": "sst2"}, *ROWS]))
    return path


def test_tasks_prints_the_table_and_writes_the_figures(memdec, fitted, tiny_model_dir, task_file, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    header = {"task": "own", "title": "Own", "template": "{text} so it is", "premise": " so it is"}
    header["labels"] = {"no": ["denied"], "yes": ["granted", "recorded"]}
    own.write_text("".join(json.dumps(row) + "\n" for row in [header, *ROWS]))
    options = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--dtype", "float32"]
    options += ["--task-file", str(task_file), "--task-file", str(own), "--out", str(tmp_path / "out")]
    assert memdec("tasks", *options, "--limit", "10") == 0
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [task["task"]["title"] for task in content["tasks"]] == ["SST-2", "Own"]
    for task in content["tasks"]:
        assert task["task"]["title"] in printed.out and task["rows"]["test"] == 10
        for entry in task["measures"]:
            if entry["scoring"] == "pmi" and entry["alpha_source"] != "recommended by the memory":
                assert f"{100 * entry['accuracy']:.1f}" in printed.out
    assert "mean" in printed.out and "tasks.json" in printed.out and "10 test rows" in printed.err
    written = (tmp_path / "out" / "tasks.json").read_bytes()
    assert memdec("tasks", *options, "--limit", "10") == 0
    assert (tmp_path / "out" / "tasks.json").read_bytes() == written


def test_tasks_of_the_base_alone(memdec, tiny_model_dir, task_file, tmp_path, capsys):
    options = ["--base", str(tiny_model_dir), "--task-file", str(task_file), "--out", str(tmp_path / "out")]
    assert memdec("--quiet", "tasks", *options, "--first-word-only") == 0
    printed = capsys.readouterr()
    table, _, path = printed.out.partition("Figures: ")
    assert "alpha" not in table and "SST-2" in table and "test rows" not in printed.err
    methods = [entry["method"] for entry in json.loads(Path(path.strip()).read_text())["tasks"][0]["measures"]]
    assert methods == ["base", "base"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "sst3"], "unknown: sst3"),
        (["--tasks", "sst2"], "--tasks and --task-file both give sst2"),
        (["--alpha", "2"], "--alpha must be from 0"),
        (["--context", "1"], "--context 1"),
        (["--memory", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_tasks_refuses(memdec, tiny_model_dir, task_file, tmp_path, capsys, options, said):
    common = ["--base", str(tiny_model_dir), "--task-file", str(task_file), "--out", str(tmp_path / "out")]
    assert memdec("tasks", *common, *options) == 1
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text and not (tmp_path / "out" / "tasks.json").exists()


def test_a_tasks_json_of_another_kind_stays(memdec, tiny_model_dir, task_file, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text("{}")
    common = ["--base", str(tiny_model_dir), "--task-file", str(task_file), "--out", str(tmp_path)]
    assert memdec("tasks", *common) == 1
    assert "memdec did not write" in capsys.readouterr().err and (tmp_path / "tasks.json").read_text() == "{}"
