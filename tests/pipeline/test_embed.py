"""The datastore stage: each key is what the model holds there, the bytes survive kills, and bad models are refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from memdec import MemdecError
from memdec.modeling.scoring import check_device
from memdec.ops import launch
from memdec.pipeline import embed
from memdec.pipeline.corpus import build_corpus
from memdec.pipeline.embed import build_datastore, default_device
from memdec.pipeline.processes import join_processes
from memdec.stores.corpus import Corpus
from memdec.stores.datastore import Datastore
from memdec.stores.verify import verify
from memdec.stores.windows import Window, windows


@pytest.fixture
def corpus(tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any) -> Corpus:
    return build_corpus(
        tiny_corpus_dir, tiny_tokenizer, tmp_path / "made-corpus", fractions=(0.8, 0.1, 0.1), max_tokens=2600
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def last_mlp_inputs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (L, d) and log-probs (L, V) of one sequence, run alone through the whole model."""
    block = model.model.layers[-1] if hasattr(model, "model") else model.transformer.h[-1]
    caught: list[torch.Tensor] = []
    handle = block.mlp.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0]))
    logits = model(input_ids=ids[None].long()).logits[0]
    handle.remove()
    return caught[0][0], log_softmax(logits.double(), -1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 16)])
def test_every_row_holds_the_models_own_state(
    tmp_path: Path,
    corpus: Corpus,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
    kind: str,
    context: int,
    stride: int | None,
) -> None:
    model = tiny_llama() if kind == "llama" else tiny_gpt2()
    store = build_datastore(
        model,
        corpus,
        tmp_path / "out",
        context=context,
        stride=stride,
        batch_size=3,
        shard_rows=500,
        validation_rows=200,
    )
    train, held_out = corpus.split("train"), corpus.split("validation")
    assert store.num_rows == train.num_tokens - 1
    assert len([s for s in store.manifest.shards if s.rows]) > 3
    assert torch.equal(store.values(0, store.num_rows), train.tokens[1:])
    for window in windows(train.num_tokens, context, stride)[::7]:
        keys, _ = last_mlp_inputs(model, train.tokens[window.start : window.stop - 1])
        found = store.keys(window.score_from, window.stop - 1)
        torch.testing.assert_close(found.float(), keys[window.score_from - window.start :], rtol=2e-3, atol=2e-3)
    validation = store.validation
    assert validation is not None
    assert validation.keys.shape == (200, store.dim)
    assert torch.equal(validation.values, held_out.tokens[validation.rows + 1])
    starts = {row: window for window in windows(held_out.num_tokens, context, stride) for row in
              range(window.score_from, window.stop - 1)}  # fmt: skip
    for index in range(0, 200, 23):
        row = int(validation.rows[index])
        window = starts[row]
        keys, log_probs = last_mlp_inputs(model, held_out.tokens[window.start : window.stop - 1])
        torch.testing.assert_close(validation.keys[index].float(), keys[row - window.start], rtol=2e-3, atol=2e-3)
        expected = float(log_probs[row - window.start, int(validation.values[index])])
        assert float(validation.base_log_prob[index]) == pytest.approx(expected, abs=1e-4)
    assert verify(tmp_path / "out") == []


def test_stopped_after_any_shard_gives_the_same_bytes(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(torch.bfloat16)  # rounding that depends on the batch would show
    settings: dict[str, Any] = {"context": 33, "batch_size": 4, "shard_rows": 400, "validation_rows": 200}
    build_datastore(model, corpus, tmp_path / "a", **settings)
    appended = embed.DatastoreWriter.append

    def append_once(writer: Any, keys: Any, values: Any) -> None:
        if writer.rows_done > rows_before:
            raise KeyboardInterrupt
        appended(writer, keys, values)

    monkeypatch.setattr(embed.DatastoreWriter, "append", append_once)
    rows_before, stops = 0, 0
    while True:
        try:
            build_datastore(model, corpus, tmp_path / "b", **settings)
            break
        except KeyboardInterrupt:
            stops += 1
            rows_before = sum(s["rows"] for s in json.loads((tmp_path / "b/manifest.json").read_text())["shards"])
    assert stops > 3
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


KILLED = """
import os, signal, sys
from memdec.pipeline.embed import build_datastore, default_device
from memdec.pipeline.processes import join_processes
from memdec.stores import atomic, datastore
import torch
torch.set_num_threads(2)
left = int(sys.argv[4])
replace = os.replace
def replace_or_die(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
build_datastore(sys.argv[1], sys.argv[2], sys.argv[3], context=33, batch_size=4, shard_rows=500, dtype="float32",
                device="cpu")
"""


@pytest.mark.slow
def test_killed_with_a_file_half_in_place(tmp_path: Path, corpus: Corpus, tiny_model_dir: Path) -> None:
    def run(out: str, die_at: int) -> int:
        arguments = [str(tiny_model_dir), str(corpus.folder), str(tmp_path / out), str(die_at)]
        return subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode

    assert run("b", 4) == -signal.SIGKILL  # a shard whose manifest entry is missing, or the other way round
    assert any(path.name.endswith(".tmp") for path in (tmp_path / "b").iterdir())
    build_datastore(tiny_model_dir, corpus, tmp_path / "a", context=33, batch_size=4, shard_rows=500, dtype="float32",
                    device="cpu")  # fmt: skip
    assert run("b", 10**6) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "b").values())


def test_a_finished_datastore_is_left_and_other_parameters_are_refused(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any]
) -> None:
    build_datastore(tiny_llama(), corpus, tmp_path / "out", context=64)
    before = contents(tmp_path / "out")
    assert build_datastore(tiny_llama(), corpus, tmp_path / "out", context=64).num_rows > 0
    with pytest.raises(MemdecError, match="context was 64, now 32"):
        build_datastore(tiny_llama(), corpus, tmp_path / "out", context=32)
    with pytest.raises(MemdecError, match="model_fingerprint was"):
        build_datastore(tiny_llama(seed=1), corpus, tmp_path / "out", context=64)
    assert contents(tmp_path / "out") == before


def test_text_shorter_than_a_window(tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Callable[..., Any]) -> None:
    (tmp_path / "note.txt").write_text("The clerk withdrew seven letters before noon, without delay, in the hearing.")
    corpus = build_corpus(tmp_path / "note.txt", tiny_tokenizer, tmp_path / "corpus", fractions=(0.6, 0.2, 0.2))
    store = build_datastore(tiny_llama(), corpus, tmp_path / "out")  # a context of 1024, a model of 256 positions
    assert store.num_rows == corpus.split("train").num_tokens - 1
    assert store.validation is not None
    assert len(store.validation.values) == corpus.split("validation").num_tokens - 1


def test_without_validation_text_or_rows(tmp_path: Path, corpus: Corpus, tiny_tokenizer: Any, tiny_corpus_dir: Path,
                                         tiny_llama: Callable[..., Any]) -> None:  # fmt: skip
    assert build_datastore(tiny_llama(), corpus, tmp_path / "a", context=64, validation_rows=0).validation is None
    bare = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "bare", fractions=(1.0, 0.0, 0.0))
    assert build_datastore(tiny_llama(), bare, tmp_path / "b", context=64).validation is None


def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    with pytest.raises(MemdecError, match=r"needs 511 positions; the model has 256.*--context 257"):
        build_datastore(tiny_llama(), corpus, tmp_path / "out", context=512)
    with pytest.raises(MemdecError, match=r"token id \d+, the model only 64 embeddings"):
        build_datastore(tiny_llama(vocab=64), corpus, tmp_path / "out", context=64)
    with pytest.raises(MemdecError, match="batch_size"):
        build_datastore(tiny_llama(), corpus, tmp_path / "out", context=64, batch_size=0)
    other = tmp_path / "other"
    tiny_llama().save_pretrained(other)
    with pytest.raises(MemdecError, match="no tokenizer"):
        build_datastore(str(other), corpus, tmp_path / "out", context=64)
    make_tokenizer(seed=5).save_pretrained(other)
    with pytest.raises(MemdecError, match="made with another tokenizer than that of"):
        build_datastore(str(other), corpus, tmp_path / "out", context=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_hidden_states_that_cannot_be_stored(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any], value: float
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight[3] = value
    with pytest.raises(MemdecError, match=r"row 0 .*--layer" if value == 1e6 else r"NaN or infinite .*row 0 .*--dtype"):
        build_datastore(model, corpus, tmp_path / "out", context=64)
    with pytest.raises(MemdecError, match="not finished"):
        Datastore.open(tmp_path / "out")


def test_a_full_disk_leaves_what_was_there_and_work_goes_on(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"context": 33, "batch_size": 4, "shard_rows": 300}
    build_datastore(tiny_llama(), corpus, tmp_path / "a", **settings)
    fsync, files = os.fsync, 0

    def fill_up(descriptor: int) -> None:
        nonlocal files
        files += 1
        if files > 12:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(MemdecError, match="No space left"):
        patch.setattr(os, "fsync", fill_up)
        build_datastore(tiny_llama(), corpus, tmp_path / "b", **settings)
    assert any(path.name.startswith("shard-") for path in (tmp_path / "b").iterdir())
    build_datastore(tiny_llama(), corpus, tmp_path / "b", **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_batches_and_spread() -> None:
    cut = windows(100, 11)  # ten windows of 11 tokens, the last of 10
    assert [len(batch) for batch in embed.batches(cut, 4)] == [4, 4, 1, 1]
    assert [window for batch in embed.batches(cut, 4) for window in batch] == cut
    assert embed._spread(cut, 1000) == cut
    assert embed._spread(cut, 0) == []
    assert embed._spread(cut, 20) == [cut[0], cut[5]]
    assert embed._spread([Window(0, 5, 0)], 2) == [Window(0, 5, 0)]


def test_a_second_run_at_the_same_time_is_refused(
    tmp_path: Path, corpus: Corpus, tiny_llama: Callable[..., Any]
) -> None:
    from memdec.stores.atomic import folder_lock

    with folder_lock(tmp_path / "out"), pytest.raises(MemdecError, match="is being written by"):
        build_datastore(tiny_llama(), corpus, tmp_path / "out", context=64)


def test_the_gpu_is_the_default_only_where_this_build_has_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the CPU on a machine with a GPU must work without being told to keep off it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for kernels, gpu, wanted in [(False, True, "cpu"), (True, False, "cpu"), (True, True, "cuda")]:
        monkeypatch.setattr(launch, "HAS_CUDA", kernels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert default_device() == wanted
        assert join_processes(None).device.type == wanted
    monkeypatch.setattr(launch, "HAS_CUDA", False)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))  # as if it were on the GPU
    with pytest.raises(MemdecError, match="--device cuda: this build of memdec has no CUDA kernels"):
        check_device("cuda")
