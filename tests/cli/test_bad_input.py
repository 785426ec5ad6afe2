"""Bad input and bad luck: one clear message, a status that is not 0, no traceback, and what was there stays.

Each case is a mishap that a user can have; the words it must say are those that name the cause or the way out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SPLIT = ["--fractions", "0.7,0.15,0.15"]
FIT = [*SPLIT, "--context", "48", "--k", "32", "--max-steps", "2", "--dtype", "float32"]


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its checksum."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def complaint(capsys) -> str:
    """What was said, after checking that it is one message and no traceback."""
    text = capsys.readouterr().err
    assert text.strip() and "Traceback" not in text
    assert "This is not a message that memdec knows" not in text
    return text


def fit(memdec, model, source, out, *options) -> int:
    return memdec("--quiet", "fit", str(model), str(source), "--out", str(out), *FIT, *options)


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no"),
        ({"empty.txt": b""}, "empty"),
        ({"a.txt": b" \n", "b.txt": b"\n\n"}, "empty"),
        ({"picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}, "not text"),
        ({"old.txt": "naïve".encode("latin-1") * 50}, "UTF-8"),
        ({"rows.jsonl": b'{"text": "one"}\n{"text": '}, "JSON"),
        ({"rows.jsonl": b'{"body": "no such field"}\n'}, "text"),
        ({"image.bin": b"\0\1\2"}, "no"),
    ],
)
def test_text_that_is_none(memdec, capsys, tiny_model_dir, tmp_path, files, said):
    source = tmp_path / "text"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    before = tree(source)
    assert fit(memdec, tiny_model_dir, source, tmp_path / "run") == 1
    assert said in complaint(capsys)
    assert tree(source) == before


def test_text_that_is_not_there(memdec, capsys, tiny_model_dir, tmp_path):
    assert fit(memdec, tiny_model_dir, tmp_path / "nothing.txt", tmp_path / "run") == 1
    assert "does not exist" in complaint(capsys)


def test_text_shorter_than_a_window(memdec, capsys, tiny_model_dir, tmp_path):
    (tmp_path / "short.txt").write_text("The court denied it.")
    assert fit(memdec, tiny_model_dir, tmp_path / "short.txt", tmp_path / "run") == 1
    assert complaint(capsys)


def test_more_neighbours_than_rows(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", "--k", "100000") == 1
    assert "k" in complaint(capsys) and not (tmp_path / "run" / "distributions" / "manifest.json").exists()


def test_fractions_that_are_none(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    for given in ("0.9,0.1", "a,b,c", "0.5,0.5,0.5"):
        assert (
            memdec("corpus", str(tiny_model_dir), str(text_dir), "--out", str(tmp_path / "c"), "--fractions", given)
            == 1
        )
        assert "fractions" in complaint(capsys)


# -- the models --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(memdec, capsys, text_dir, tmp_path):
    assert fit(memdec, tmp_path / "no-model", text_dir, tmp_path / "run") == 1
    assert "no-model" in complaint(capsys)


def test_a_model_without_a_tokenizer(memdec, capsys, tiny_llama, text_dir, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "bare")
    assert fit(memdec, tmp_path / "bare", text_dir, tmp_path / "run") == 1
    assert "tokenizer" in complaint(capsys)


def test_a_model_with_nan_in_its_hidden_states(memdec, capsys, tiny_llama, tiny_tokenizer, text_dir, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    assert fit(memdec, tmp_path / "broken", text_dir, tmp_path / "run") == 1
    assert "NaN" in complaint(capsys)
    assert not (tmp_path / "run" / "memory").exists()


def test_a_memory_with_another_tokenizer(memdec, capsys, fitted, make_tokenizer, tiny_llama, tmp_path):
    other = tmp_path / "other-model"
    tiny_llama().save_pretrained(other)
    make_tokenizer(seed=9).save_pretrained(other)  # as many tokens, but others
    before = tree(fitted / "memory")
    assert memdec("generate", "--base", str(other), "--memory", str(fitted / "memory"), "The court") == 1
    assert "token" in complaint(capsys)
    arguments = ["--base", str(other), "--memory", str(fitted / "memory"), "--text", str(fitted / "corpus")]
    assert memdec("evaluate", *arguments, "--out", str(tmp_path / "report")) == 1
    assert "token" in complaint(capsys) and not (tmp_path / "report").exists()
    assert tree(fitted / "memory") == before


# -- the artefacts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_copy(fitted, tmp_path):
    """A copy of a finished run that may be damaged."""
    return Path(shutil.copytree(fitted, tmp_path / "run"))


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("part", ["corpus", "datastore", "distributions", "memory"])
def test_a_flipped_byte_is_found(memdec, capsys, run_copy, part):
    path = shard_of(run_copy / part)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = tree(run_copy)
    assert memdec("verify", str(run_copy)) == 1
    assert f"{part}/{path.name}" in complaint(capsys)
    assert tree(run_copy) == before


@pytest.mark.parametrize("part", ["corpus", "datastore"])
def test_a_truncated_shard_is_refused(memdec, capsys, run_copy, tiny_model_dir, part):
    path = max((run_copy / part).glob("*.safetensors"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])
    arguments = ["--base", str(tiny_model_dir), "--text", str(run_copy / "corpus")]
    arguments += ["--datastore", str(run_copy / "datastore"), "--compare", "base,knn-lm", "--context", "48"]
    assert memdec("evaluate", *arguments, "--out", str(run_copy / "report")) == 1
    assert path.name in complaint(capsys)


@pytest.mark.parametrize("part", ["corpus", "datastore", "distributions", "memory"])
def test_an_artefact_of_another_version_is_refused(memdec, capsys, run_copy, part):
    path = run_copy / part / ("memory_config.json" if part == "memory" else "manifest.json")
    content = json.loads(path.read_text())
    content["version"] = 99
    path.write_text(json.dumps(content))
    assert memdec("verify", str(run_copy / part)) == 1
    assert complaint(capsys)


def test_other_parameters_than_before(memdec, capsys, run_copy, tiny_model_dir, text_dir):
    before = tree(run_copy)
    assert fit(memdec, tiny_model_dir, text_dir, run_copy, "--teacher", "knn", "--seed", "5") == 1
    assert "seed" in complaint(capsys)
    assert tree(run_copy) == before


def test_a_folder_with_someone_elses_files(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("irreplaceable")
    assert memdec("corpus", str(tiny_model_dir), str(text_dir), "--out", str(out)) == 1
    assert "thesis.tex" in complaint(capsys)
    assert tree(out) == {"thesis.tex": hashlib.sha256(b"irreplaceable").hexdigest()}


def test_the_wrong_kind_of_artefact(memdec, capsys, fitted, tiny_model_dir, tmp_path):
    assert memdec("distributions", str(fitted / "corpus"), "--out", str(tmp_path / "d")) == 1
    assert "memdec.datastore" in complaint(capsys)
    assert memdec("datastore", str(tiny_model_dir), str(tmp_path), "--out", str(tmp_path / "d")) == 1
    assert "memdec corpus" in complaint(capsys)


# -- the disk and other processes --------------------------------------------------------------------------------------


def mounted(folder: Path, *options: str) -> bool:
    """Mount a small file system in memory at ``folder``; False where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting needs root")
def test_a_full_disk(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "-o", "size=48k"):
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "kept.txt").write_text("kept")
        assert fit(memdec, tiny_model_dir, text_dir, disk / "run") == 1
        text = complaint(capsys).lower()
        assert "full" in text or "space" in text
        assert (disk / "kept.txt").read_text() == "kept"
        assert not list(disk.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting needs root")
def test_a_read_only_disk(memdec, capsys, tiny_model_dir, text_dir, fitted, tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, "-o", "ro,size=1m"):
        pytest.skip("mounting is not allowed here")
    try:
        assert fit(memdec, tiny_model_dir, text_dir, disk / "run") == 1
        assert "read-only" in complaint(capsys).lower()
        arguments = ["--base", str(tiny_model_dir), "--text", str(fitted / "corpus"), "--context", "48"]
        assert memdec("--quiet", "evaluate", *arguments, "--out", str(disk / "report")) == 1
        assert "read-only" in complaint(capsys).lower()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "closed" / "run") == 1
    assert "ermission" in complaint(capsys)


def test_two_processes_and_one_folder(tiny_model_dir, text_dir, tmp_path):
    """The folder's lock is held here while a second process wants it; it says who holds it, and touches nothing."""
    from memdec.stores.atomic import folder_lock

    out = tmp_path / "corpus"
    with folder_lock(out):
        command = [sys.executable, "-m", "memdec", "corpus", str(tiny_model_dir), str(text_dir), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert str(os.getpid()) in done.stderr
        assert not (out / "manifest.json").exists()
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:77"], "--device cpu"),
        (["--device", "meta"], "--device cpu"),
        (["--device", "no-such"], "--device cpu"),
        (["--fractions", "nan,nan,nan"], "sum to 1"),
        (["--fractions", "1,0,0"], "--validation"),
        (["--temperature", "nan"], "temperature"),
        (["--backend", "no-such"], "backend"),
        (["--memory-limit", "much"], "memory_limit"),
        (["--init", "/no/such/model"], "/no/such/model"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(
    memdec, capsys, tiny_model_dir, text_dir, tmp_path, options, said
):
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", *options) == 1
    assert said in complaint(capsys)
    assert not (tmp_path / "run" / "datastore").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "model", "text", "--out", ""],
        ["corpus", "model", "", "--out", "run"],
        ["evaluate", "--base", "model", "--text="],
    ],
)
def test_an_empty_argument_is_not_this_folder(memdec, capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert memdec(*arguments) == 2
    assert "empty" in complaint(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["model", "model.embed_tokens"])
def test_a_layer_whose_input_is_no_key(memdec, capsys, tiny_model_dir, text_dir, tmp_path, layer):
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", "--layer", layer) == 1
    assert "--layer" in complaint(capsys)


def test_a_first_try_that_came_to_nothing_does_not_bar_the_second(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    """What the message advises can be done in the same folder; what has rows is still refused other parameters."""
    (tmp_path / "short.txt").write_text("a")
    assert (
        memdec("corpus", str(tiny_model_dir), str(tmp_path / "short.txt"), "--out", str(tmp_path / "run/corpus")) == 1
    )
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", "--layers", "99") == 1
    assert "wanted 1 to 2" in complaint(capsys)
    assert not (tmp_path / "run/datastore").exists()  # refused before what takes an hour
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", "--layers", "1") == 0
    assert fit(memdec, tiny_model_dir, text_dir, tmp_path / "run", "--layers", "2") == 1
    assert "layers was 1, now 2" in complaint(capsys)


def test_a_run_and_a_stage_are_no_models(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    run = tmp_path / "run"
    assert fit(memdec, tiny_model_dir, text_dir, run) == 0
    capsys.readouterr()
    evaluation = ["evaluate", "--text", str(run / "corpus"), "--out", str(tmp_path / "out")]
    for command, no_model in ((["generate", "The"], "is a stage's folder"), (evaluation, "memory_config.json")):
        for given, said in ((run, f"it made is {run / 'memory'}"), (run / "corpus", no_model)):
            assert memdec(command[0], "--base", str(tiny_model_dir), "--memory", str(given), *command[1:]) == 1
            assert said in complaint(capsys)


def test_an_unknown_way_to_decode_is_refused_before_loading(memdec, capsys, tiny_model_dir):
    assert memdec("generate", "--base", str(tiny_model_dir), "--memory", "none", "--decoding", "foo", "The") == 1
    assert "speculative" in complaint(capsys)


# -- what memdec made --------------------------------------------------------------------------------------------------


def test_what_memdec_made_is_no_text(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    """Output within the text's folder is not read as text, so that the same command goes on."""
    source = tmp_path / "text"
    shutil.copytree(text_dir, source)
    for _ in range(2):
        assert fit(memdec, tiny_model_dir, source, source / "run") == 0
    capsys.readouterr()
    assert memdec("corpus", str(tiny_model_dir), str(source / "run/memory"), "--out", str(tmp_path / "other")) == 1
    assert "holds" in complaint(capsys)


def test_a_stage_without_its_manifest_is_not_whole(memdec, capsys, fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    assert memdec("verify", str(run)) == 0
    for name, lost in (("datastore", "manifest.json"), ("memory", "memory_config.json")):
        (run / name / lost).unlink()
    assert memdec("verify", str(run)) == 1
    told = capsys.readouterr()
    assert "datastore/manifest.json is missing" in told.out + told.err
    assert "memory/memory_config.json is missing" in told.out + told.err


def test_tokens_beyond_the_vocabulary_are_damage(memdec, capsys, tiny_model_dir, fitted, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(fitted / "corpus", corpus)
    content = bytearray((corpus / "train.safetensors").read_bytes())
    content[-4096] ^= 0x40  # the third byte of a token
    content[-4094] ^= 0x40
    (corpus / "train.safetensors").write_bytes(content)
    assert memdec("datastore", str(tiny_model_dir), str(corpus), "--out", str(tmp_path / "d")) == 1
    assert "damaged" in complaint(capsys)


def test_a_number_that_is_none_in_a_card(memdec, capsys, fitted, tmp_path):
    memory = tmp_path / "memory"
    shutil.copytree(fitted / "memory", memory)
    card = memory / "memory_config.json"
    card.write_text(card.read_text().replace('"alpha": ', '"alpha": NaN, "was": ', 1))
    assert memdec("info", str(memory)) == 1
    assert "NaN" in complaint(capsys)


def test_an_evaluation_does_not_write_over_strangers(memdec, capsys, tiny_model_dir, fitted, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    asked = ["evaluate", "--base", str(tiny_model_dir), "--text", str(fitted / "corpus"), "--out", str(tmp_path)]
    assert memdec(*asked) == 1
    assert "report.html" in complaint(capsys) and (tmp_path / "report.html").read_text() == "mine"


# -- generate ----------------------------------------------------------------------------------------------------------


def generate(memdec, model, memory, *options) -> int:
    return memdec("--quiet", "generate", "--base", str(model), "--memory", str(memory), "--dtype", "float32", *options)


def test_prompts_and_options_that_cannot_be(memdec, capsys, tiny_model_dir, fitted):
    memory = fitted / "memory"
    for alpha in ("2", "nan"):
        assert generate(memdec, tiny_model_dir, memory, "the", "--alpha", alpha) == 1
        assert "from 0" in complaint(capsys)
    assert generate(memdec, tiny_model_dir, memory, "the", "--temperature", "1e-320") == 1
    assert "temperature" in complaint(capsys)
    assert generate(memdec, tiny_model_dir, memory, "the \udcff") == 1
    assert "UTF-8" in complaint(capsys)
    assert generate(memdec, tiny_model_dir, memory, "the court " * 400) == 1
    assert "positions" in complaint(capsys)


def test_weights_that_are_no_numbers_are_not_a_short_answer(
    memdec, capsys, tiny_llama, tiny_tokenizer, fitted, text_dir, tmp_path
):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    assert generate(memdec, tmp_path / "broken", fitted / "memory", "the", "--alpha", "0.5") == 1
    assert "NaN" in complaint(capsys)
    pair = ["--base", str(tmp_path / "broken"), "--memory", str(fitted / "memory"), "--dtype", "float32"]
    pair += ["--text", str(text_dir / "doc00.txt")]
    assert memdec("--quiet", "bench-decode", *pair, "--out", str(tmp_path / "speed")) == 1
    assert "The base's logits on the first prompt are NaN" in complaint(capsys)
    assert not (tmp_path / "speed").exists()
