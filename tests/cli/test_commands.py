"""Every command, from text to a memory in use, on a tiny model."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from memdec.stores.manifest import Manifest

SPLIT = ["--fractions", "0.7,0.15,0.15"]


def test_the_stages_alone_make_what_fit_makes(memdec, fitted, tiny_model_dir, text_dir, tmp_path, capsys):
    model, out = str(tiny_model_dir), tmp_path
    assert memdec("corpus", model, str(text_dir), "--out", str(out / "corpus"), *SPLIT) == 0
    said = capsys.readouterr().out
    assert "for train" in said and "for test" in said
    options = ["--context", "48", "--dtype", "float32"]
    assert memdec("datastore", model, str(out / "corpus"), "--out", str(out / "datastore"), *options) == 0
    assert memdec("distributions", str(out / "datastore"), "--out", str(out / "distributions"), "--k", "32",
                  "--device", "cpu") == 0  # fmt: skip
    training = ["--max-steps", "6", "--learning-rate", "0.003", "--dtype", "float32"]
    stages = [model, str(out / "corpus"), str(out / "distributions")]
    assert memdec("train", *stages, "--base", model, "--out", str(out), *training) == 0
    for part in ("corpus", "datastore", "distributions"):
        assert Manifest.load(out / part).checksum == Manifest.load(fitted / part).checksum, part
    weights = "model.safetensors"
    assert (out / "memory" / weights).read_bytes() == (fitted / "memory" / weights).read_bytes()


def test_evaluate_prints_the_table_and_writes_the_report(memdec, fitted, tiny_model_dir, tmp_path, capsys):
    status = memdec(
        "evaluate", "--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--text", str(fitted / "corpus"),
        "--datastore", str(fitted / "datastore"), "--context", "48", "--stride", "24", "--samples", "1",
        "--new-tokens", "4", "--prompt", "The court", "--out", str(tmp_path / "report"),
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert [m["method"] for m in content["measures"]] == ["base", "knn-lm", "memory", "base+memory"]
    for entry in content["measures"]:
        assert entry["label"] in printed and f"{entry['perplexity']:.2f}" in printed
    assert "alpha = " in printed and "report.html" in printed
    assert len(content["generations"]) == 2
    # Trained on this very kind of text, even six steps help; what fit chose on validation holds on the test split.
    assert content["measures"][3]["perplexity"] < content["measures"][0]["perplexity"]


def test_rates_are_read_for_all_rivals_or_one():
    from memdec.cli.use import parse_rates
    from memdec.errors import MemdecError
    from memdec.evaluation.rivals import RIVALS

    assert parse_rates(None) == parse_rates(" ") == {}
    assert parse_rates("lora=1e-3, dapt=5e-5/1e-4") == {"lora": (1e-3,), "dapt": (5e-5, 1e-4)}
    assert parse_rates("1e-4/3e-4/1e-4,lora=1e-3") == {**dict.fromkeys(RIVALS, (1e-4, 3e-4)), "lora": (1e-3,)}
    for wrong in ("lora", "lora=", "lora=2", "rag=1e-3", "1e-4/", "lora=1e-3;dapt=1e-3", "nan", "memory=1e-4"):
        with pytest.raises(MemdecError, match="--rates wants learning rates"):
            parse_rates(wrong)


def test_generate_streams_and_compares(memdec, fitted, tiny_model_dir, capsys, monkeypatch):
    common = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--max-new-tokens", "8"]
    assert memdec("generate", *common, "The court") == 0
    alone = capsys.readouterr().out
    assert alone.startswith("The court") and len(alone) > len("The court") + 4
    assert memdec("generate", *common, "The court", "--side-by-side") == 0
    both = capsys.readouterr()
    assert both.out.count("The court") == 2 and both.out.endswith(alone)
    assert "the base alone" in both.err and "base + memory (alpha =" in both.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("The court"))
    assert memdec("generate", *common, "-") == 0
    assert capsys.readouterr().out == alone
    drawn = []
    for seed in ("1", "1", "2"):
        assert memdec("generate", *common, "The court", "--temperature", "1.5", "--seed", seed) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_decoding_writes_the_same(memdec, fitted, tiny_model_dir, capsys):
    common = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--max-new-tokens", "8", "The court"]
    texts = []
    for how in (["composite"], ["parallel"], ["speculative"], ["speculative", "--draft-tokens", "2"], ["auto"]):
        assert memdec("generate", *common, "--dtype", "float32", "--decoding", *how) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert memdec("generate", *common, "--draft-tokens", "2") == 1
    assert "--draft-tokens goes with --decoding speculative" in capsys.readouterr().err


def test_bench_decode_prints_a_table_and_writes_json(memdec, fitted, tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "speed.json"
    pair = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--text", str(fitted / "corpus")]
    small = ["--samples", "2", "--prompt-tokens", "8", "--new-tokens", "32", "--repeats", "3", "--dtype", "float32"]
    small.append("--no-compile")  # that takes a minute, however small the model
    assert memdec("bench-decode", *pair, *small, "--draft-tokens", "1,3", "--out", str(out)) == 0
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    names = [timing["name"] for timing in content["timings"]]
    assert {"base alone", "base alone, our steps", "composite (transformers)", "parallel", "auto"} <= set(names)
    assert all(name in printed for name in names) and "a round" in printed
    timings = dict(zip(names, content["timings"], strict=True))
    assert all(timing["seconds_per_token"] > 0 for timing in content["timings"] if not timing["note"])
    assert timings["speculative, 3 drafts"]["predicted"] > 0 and content["verify"]["1"] == 1.0
    assert 0 < timings["speculative, 3 drafts"]["acceptance"] <= 1
    assert "then:" in printed and timings["base alone"]["predicted"] is None
    for timing in content["timings"]:
        if not timing["note"]:
            assert 0 < timing["first_seconds"] < 32 * timing["seconds_per_token"]
    assert min(timings[name]["next_to_best_base"] for name in names if name.startswith("base")) == 1
    for wrong in ("0", "2,x", "2,,3", " "):
        assert memdec("bench-decode", *pair, "--draft-tokens", wrong) == 1
        assert f"--draft-tokens: got '{wrong}'" in capsys.readouterr().err


def test_bench_decode_with_more_drafts_than_tokens(memdec, tmp_path, capsys, fitted, tiny_model_dir):
    """No forward reads more than the tokens that are written, for which there are positions."""
    out = tmp_path / "new" / "speed.json"
    pair = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--text", str(fitted / "corpus")]
    small = ["--samples", "1", "--prompt-tokens", "248", "--new-tokens", "8", "--repeats", "1", "--dtype", "float32"]
    assert memdec("bench-decode", *pair, *small, "--no-compile", "--draft-tokens", "12", "--out", str(out)) == 0
    content = json.loads(out.read_text())
    assert list(content["verify"]) == [str(n) for n in range(1, 9)]
    assert [t["predicted"] for t in content["timings"] if t["name"].startswith("speculative")] == [None]
    capsys.readouterr()
    shapes = ["--shapes", "qwen2.5-0.5b,qwen2.5-0.5b"]
    assert memdec("bench-decode", *shapes, "--dtype", "nonsense") == 1
    assert "--dtype nonsense" in capsys.readouterr().err
    assert memdec("bench-decode", *shapes, "--device", "nonsense") == 1
    assert "--device nonsense" in capsys.readouterr().err


def test_alpha_zero_is_the_base(memdec, fitted, tiny_model_dir, capsys):
    common = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--max-new-tokens", "8", "A tenant"]
    assert memdec("generate", *common, "--alpha", "0", "--side-by-side") == 0
    out = capsys.readouterr().out.split("A tenant")
    assert out[1].strip() == out[2].strip() and len(out) == 3


def test_info_and_verify_of_the_run(memdec, fitted, capsys):
    assert memdec("info", str(fitted)) == 0
    printed = capsys.readouterr().out
    for word in ("memdec.corpus", "memdec.datastore", "memdec.distributions", "memdec.memory", "temperature", "alpha"):
        assert word in printed
    assert "not finished" not in printed
    assert memdec("verify", str(fitted)) == 0


def test_quiet_prints_only_results(fitted, tiny_model_dir):
    options = ["--base", str(tiny_model_dir), "--memory", str(fitted / "memory"), "--max-new-tokens", "3"]
    command = [sys.executable, "-m", "memdec", "generate", *options, "The court", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("The court")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set(memdec, fitted, threads, monkeypatch):
    import torch

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    assert memdec("info", str(fitted), "--threads", str(threads)) == 0
    assert torch.get_num_threads() == threads


def test_a_language_model_s_distributions_have_windows_of_their_own(memdec, capsys, tiny_model_dir, text_dir, tmp_path):
    """Training takes them over; where a datastore has the windows, another length is refused."""
    from memdec.stores.distribution_store import DistributionStore

    run = tmp_path / "run"
    assert memdec("corpus", str(tiny_model_dir), str(text_dir), "--out", str(run / "corpus"), *SPLIT) == 0
    teach = ["distributions", str(run / "corpus"), "--teacher", "lm", "--model", str(tiny_model_dir), "--top-k", "8"]
    assert memdec(*teach, "--context", "48", "--stride", "24", "--out", str(run / "teacher")) == 0
    fields = DistributionStore.open(run / "teacher").manifest.fields
    assert (fields["context"], fields["stride"]) == (48, 24)
    capsys.readouterr()
    assert memdec("distributions", str(run / "no-datastore"), "--context", "48", "--out", str(run / "knn")) == 1
    assert "leave out --context" in capsys.readouterr().err
