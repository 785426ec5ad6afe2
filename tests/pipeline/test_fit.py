"""fit: text in, memory out; killed with -9 at random moments it ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memdec import MemdecError
from memdec.pipeline.adapt import adapt_model, choose_teacher
from memdec.pipeline.corpus import build_corpus
from memdec.pipeline.fit import fit
from memdec.pipeline.teachers import build_teacher
from memdec.pipeline.train import train_memory
from memdec.stores.corpus import Corpus
from memdec.stores.memory import read_memory_card
from memdec.stores.verify import verify
from memdec.stores.windows import windows

KILLS = 10

OPTIONS: dict[str, Any] = {
    "context": 48, "k": 32, "epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "save_every": 4, "device": "cpu",
    "dtype": "float32", "tensorboard": False, "max_tokens": 6000,
}  # fmt: skip

# Imports everything once; each attempt is a child of its own, killed from here with SIGKILL. Prints one JSON line.
KILLER = """
import json, os, random, shutil, signal, sys, time, traceback
from memdec.pipeline.fit import fit
import transformers.models.llama.modeling_llama

model, text, out, kills, options = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5])

def start(folder):
    pid = os.fork()
    if pid == 0:
        try:
            import torch
            torch.set_num_threads(2)
            fit(model, text, folder, **options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid

def finish(pid):
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"an attempt that was not killed ended with status {status}")

def left(folder):
    '''The stage that a kill fell into.'''
    for stage in ("memory", "training", "teacher-knn-lm", "distributions", "datastore", "adapted", "corpus"):
        if os.path.isdir(os.path.join(folder, stage)):
            return stage
    return "nothing"

def killed_within(seconds, folder):
    '''Start an attempt and kill it at a random moment of the coming seconds; False if it got through before.'''
    pid = start(folder)
    end = time.monotonic() + draw.uniform(0, seconds)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                sys.exit(f"an attempt that was not killed ended with status {status}")
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stages.append(left(folder))
    return True

begun = time.monotonic()
finish(start(out + "/undisturbed"))
seconds = time.monotonic() - begun
draw = random.Random(0)
stages, finished = [], []
# Ten kills upon one folder; what got through is compared, and the remaining kills fall upon a new one.
while len(stages) < kills:
    folder = f"{out}/killed-{len(finished)}"
    if not killed_within(0.4 * seconds, folder):
        finished.append(folder)
if folder not in finished:
    finish(start(folder))
    finished.append(folder)
# And one kill upon each of some more, early, so that the stages before the training have theirs.
for number in range(4):
    folder = f"{out}/early-{number}"
    killed_within(0.5 * seconds, folder)
    finish(start(folder))
    finished.append(folder)
print(json.dumps({"seconds": seconds, "stages": stages, "finished": finished}))
"""


def content(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes; each log.jsonl without its clock's figures."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items()}
    for name in [name for name in found if name.endswith("training/log.jsonl")]:
        lines = [json.loads(line) for line in found[name].splitlines()]
        timeless = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
        found[name] = json.dumps(timeless).encode()
    return found


@pytest.mark.parametrize(
    "teacher", [{"teacher": "knn"}, {"adapt_epochs": 1, "teacher": "knn-lm"}], ids=["knn", "adapted"]
)
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    command = [sys.executable, "-c", KILLER, str(tiny_model_dir), str(tiny_corpus_dir), str(tmp_path / "runs"),
               str(KILLS), json.dumps(OPTIONS | teacher)]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert len(report["stages"]) >= KILLS
    undisturbed = content(tmp_path / "runs" / "undisturbed")
    assert "memory/model.safetensors" in undisturbed and "memory/README.md" in undisturbed
    assert ("adapted/memory/model.safetensors" in undisturbed) == ("adapt_epochs" in teacher)
    for folder in report["finished"]:
        killed = content(Path(folder))
        assert killed.keys() == undisturbed.keys()
        assert [name for name in killed if killed[name] != undisturbed[name]] == []
    assert verify(report["finished"][-1]) == []


def test_a_second_run_changes_nothing_and_says_so(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {**OPTIONS, "max_steps": 3}
    memory = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **run)
    before = content(tmp_path / "run")
    with caplog.at_level(logging.INFO, "memdec"):
        assert fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **run) == memory
    assert "nothing to do" in caplog.text
    assert 0 <= read_memory_card(memory).alpha <= 1
    refused: list[tuple[dict[str, Any], str]] = [
        ({"k": 16}, "k was 32, now 16"),
        ({"beta": 0.1}, "beta was 0.5, now 0.1"),
        ({"context": 32}, "context was 48, now 32"),
        ({"seed": 1}, "seed was 0, now 1"),
    ]
    for changed, named in refused:
        with pytest.raises(MemdecError, match=named):
            fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **{**run, **changed})
    assert content(tmp_path / "run") == before


def test_an_adapted_teacher_is_what_the_stages_alone_make(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path
) -> None:
    """The model fine-tuned by `train` with the teacher one-hot and β 0 is given as the teacher's model by hand."""
    run = {**OPTIONS, "epochs": 1, "teacher": "knn-lm"}
    memory = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **run, adapt_epochs=2)
    corpus = Corpus.open(tmp_path / "run" / "corpus")
    text = build_teacher("one-hot", corpus, tmp_path / "text", context=48)
    settings = {name: OPTIONS[name] for name in ("batch_size", "learning_rate", "device", "dtype", "tensorboard")}
    adapted = train_memory(tiny_model_dir, corpus, text, tmp_path / "adapted", beta=0.0, epochs=2, judge="alone",
                           **settings)  # fmt: skip
    by_hand = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "by-hand", **run, teacher_model=adapted)
    weights = "model.safetensors"
    assert (tmp_path / "run" / "adapted" / "memory" / weights).read_bytes() == (adapted / weights).read_bytes()
    assert (memory / weights).read_bytes() == (by_hand / weights).read_bytes()
    plain = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "plain", **run)
    assert (memory / weights).read_bytes() != (plain / weights).read_bytes()
    # It learned the text, its best checkpoint was kept, and its length is its own.
    found = read_memory_card(tmp_path / "run" / "adapted" / "memory").provenance
    assert found["figures"]["memory_perplexity"] < found["figures"]["base_perplexity"]
    rows = [json.loads(line) for line in (tmp_path / "run/adapted/training/log.jsonl").read_text().splitlines()]
    judged = [row["memory_perplexity"] for row in rows if "memory_perplexity" in row]
    assert found["figures"]["memory_perplexity"] == min(judged)
    assert found["total_steps"] == 2 * read_memory_card(memory).provenance["total_steps"]
    assert verify(tmp_path / "run") == []
    damaged = tmp_path / "run" / "adapted" / "memory" / weights
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert verify(tmp_path / "run") == [f"adapted/memory/{weights} is damaged: its checksum differs"]


@pytest.mark.parametrize(
    ("said", "teacher", "epochs"),
    [
        ({}, "knn-lm", 3),
        ({"layers": 4}, "knn", 0),
        ({"init": "small"}, "knn", 0),
        ({"teacher": "knn-lm"}, "knn-lm", 0),
        ({"teacher": "one-hot"}, "one-hot", 0),
        ({"teacher_model": "large"}, "knn", 0),
        ({"adapt_epochs": 0}, "knn", 0),
        ({"adapt_epochs": 2, "layers": 4}, "knn-lm", 2),
        ({"adapt_epochs": 2, "teacher": "knn"}, "knn", 2),
        ({"teacher": None, "adapt_epochs": None, "init": None, "layers": None, "teacher_model": None}, "knn-lm", 3),
    ],
)
def test_who_teaches_where_it_is_not_said(said: dict[str, Any], teacher: str, epochs: int) -> None:
    assert choose_teacher(said) == (teacher, epochs)


def test_a_whole_copy_has_an_adapted_teacher_and_a_smaller_memory_the_retriever(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path
) -> None:
    run = {**OPTIONS, "max_steps": 1}
    whole = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "whole", **run)
    told = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "told", **run, teacher="knn-lm", adapt_epochs=3)
    assert content(whole) == content(told)
    assert sorted(path.name for path in whole.parent.iterdir()) == sorted(path.name for path in told.parent.iterdir())
    small = fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "small", **run, layers=1)
    assert not (small.parent / "adapted").exists() and not (small.parent / "teacher-knn-lm").exists()
    with pytest.raises(MemdecError, match="whose teacher was not adapted"):  # before the adaptation
        fit(tiny_model_dir, tiny_corpus_dir, small.parent, **run)
    assert not (small.parent / "adapted").exists()


@pytest.mark.parametrize(
    ("teacher", "adapt", "stages"),
    [
        ("knn", 0, ["corpus", "datastore", "distributions", "training"]),
        ("one-hot", 0, ["corpus", "the teacher's distributions", "training"]),
        (
            "knn-lm",
            1,
            [
                "corpus",
                "adapting the model that teaches",
                "datastore",
                "distributions",
                "the teacher's distributions",
                "training",
            ],
        ),
    ],
)
def test_the_stages_are_counted(
    teacher: str, adapt: int, stages: list[str], tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level("INFO", logger="memdec.pipeline.fit"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **{**OPTIONS, "max_steps": 1}, teacher=teacher,
            adapt_epochs=adapt)  # fmt: skip
    told = [record.getMessage().split(" (")[0] for record in caplog.records if record.getMessage()[0].isdigit()]
    assert told == [f"{number} of {len(stages)}: {name}" for number, name in enumerate(stages, 1)]


@pytest.mark.parametrize(("share", "told"), [(0.1, True), (0.5, False)])
def test_few_documents_to_choose_by_are_told(
    share: float, told: bool, tiny_model_dir: Path, tmp_path: Path, make_text: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text").mkdir()
    for index in range(24):
        (tmp_path / "text" / f"{index}.txt").write_text(make_text(4, index))
    fit(tiny_model_dir, tmp_path / "text", tmp_path / "run", **{**OPTIONS, "max_steps": 1}, layers=1,
        fractions=(0.9 - share, share, 0.1))  # fmt: skip
    found = Corpus.open(tmp_path / "run" / "corpus").split("validation").num_documents
    assert (found < 8) == told
    assert any(f"on {found} document" in record.getMessage() for record in caplog.records) == told


@pytest.mark.parametrize(("max_steps", "steps"), [(2, 2), (1000, None)])
def test_max_steps_shortens_the_adaptation_and_never_prolongs_it(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path, max_steps: int, steps: int | None
) -> None:
    corpus = build_corpus(str(tiny_corpus_dir), str(tiny_model_dir), tmp_path / "tokens", max_tokens=2000)
    shared = {name: OPTIONS[name] for name in ("context", "batch_size", "learning_rate", "device", "dtype")}
    epoch = -(-len(windows(corpus.split("train").num_tokens, 48)) // shared["batch_size"])
    adapted = adapt_model(tiny_model_dir, corpus, tmp_path / "adapted", epochs=2, max_steps=max_steps, **shared)
    assert read_memory_card(adapted).provenance["total_steps"] == (steps or 2 * epoch)


def test_without_a_context_an_adapted_teacher_gets_the_datastore_s(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path
) -> None:
    """The tiny model has 256 positions, fewer than the windows that longer models get."""
    run = {**OPTIONS, "context": None, "max_steps": 1}
    fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **run, adapt_epochs=1)
    for part in ("adapted/memory", "memory"):
        assert read_memory_card(tmp_path / "run" / part).provenance["context"] == 257


def test_settings_that_cannot_be_are_refused_before_the_work(
    tiny_model_dir: Path, tiny_corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemdecError, match=r"k is 100000, but the training text has"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "run", **{**OPTIONS, "k": 100_000})
    assert not (tmp_path / "run" / "datastore").exists()
    with pytest.raises(MemdecError, match="schedule is 'magic'"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "other", **{**OPTIONS, "schedule": "magic"})
    assert not (tmp_path / "other").exists()
    with pytest.raises(MemdecError, match="the teacher one-hot asks no model"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "other", **OPTIONS, adapt_epochs=1, teacher="one-hot")
    with pytest.raises(MemdecError, match="adapt-epochs is -1"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "other", **OPTIONS, adapt_epochs=-1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MemdecError, match="runs in one process"):
        fit(tiny_model_dir, tiny_corpus_dir, tmp_path / "other", **OPTIONS)
