"""Training a memory: it learns, goes on with the same bytes from where it was killed, and steps as the formula says."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from memdec import MemdecError, SparseDistributions
from memdec.modeling.scoring import perplexity, score_tokens
from memdec.modeling.tokenizers import fingerprint
from memdec.ops import reference
from memdec.pipeline import train
from memdec.pipeline.batches import read_batch, share, steps_in_epoch, windows_of_step
from memdec.pipeline.checkpoints import load_checkpoint, write_folder
from memdec.pipeline.master_weights import MasterWeights
from memdec.pipeline.train import Settings, Student, learning_rate, train_memory
from memdec.stores.corpus import FORMAT, VERSION, Corpus, write_split
from memdec.stores.distribution_store import DistributionStore, DistributionWriter
from memdec.stores.manifest import Manifest
from memdec.stores.memory import read_memory_card, verify_memory
from memdec.stores.windows import windows

CONTEXT = 48
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3, "tensorboard": False, "device": "cpu"}


def sentences(count: int, seed: int) -> str:
    """Text with few choices, so that a tiny model learns it at once."""
    draw = random.Random(seed)
    words = [["the clerk", "a tenant", "every juror"], ["granted", "denied", "measured"], ["the lease", "an appeal"],
             ["before noon", "twice", "under section 12"]]  # fmt: skip
    return " ".join(" ".join(draw.choice(choices) for choices in words) + "." for _ in range(count))


def write_corpus(folder: Path, tokenizer: Any, *, validation: bool = True, repeats: int = 40) -> Corpus:
    """A corpus of tiny sentences, without the stage that reads files."""
    folder.mkdir(parents=True)
    manifest = Manifest(FORMAT, VERSION, {
        "vocab_size": len(tokenizer), "tokenizer_fingerprint": fingerprint(tokenizer), "eos_token_id": 0
    })  # fmt: skip
    for split, count, seed in (("train", repeats, 1), ("validation", 6 if validation else 0, 2), ("test", 0, 3)):
        documents = [tokenizer(sentences(3, seed * 1000 + i))["input_ids"] + [0] for i in range(count)]
        starts = torch.tensor([0, *map(len, documents)]).cumsum(0)
        tokens = torch.tensor([t for document in documents for t in document], dtype=torch.int32)
        written = write_split(folder, split, tokens.numpy(), starts.numpy(), [f"{i}.txt" for i in range(count)])
        manifest.add(folder, f"{split}.safetensors", written)
    manifest.finish(folder)
    return Corpus.open(folder)


def write_distributions(folder: Path, corpus: Corpus, seed: int = 0) -> DistributionStore:
    """Teacher rows with half of their mass on the token that comes and the rest on three drawn; every 11th empty."""
    tokens, vocab = corpus.split("train").tokens, corpus.vocab_size
    dense = torch.zeros(len(tokens) - 1, vocab)
    drawn = torch.randint(vocab, (len(dense), 3), generator=torch.Generator().manual_seed(seed))
    dense.scatter_add_(1, drawn, torch.full(drawn.shape, 0.5 / 3))
    dense.scatter_add_(1, tokens[1:, None].long(), torch.full((len(dense), 1), 0.5))
    dense[::11] = 0
    fields = {"context": CONTEXT, "stride": None}
    with DistributionWriter(folder, num_rows=len(dense), vocab_size=vocab, fields=fields) as writer:
        writer.append(SparseDistributions.from_dense(dense))
        return writer.finish()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Corpus, DistributionStore]:
    """A corpus of some 2,000 tokens and its teacher distributions."""
    folder = tmp_path_factory.mktemp("parts")
    corpus = write_corpus(folder / "corpus", tiny_tokenizer)
    return corpus, write_distributions(folder / "distributions", corpus)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def log_without_times(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


# --- what a memory is, and that it learns ----------------------------------------


def test_a_memory_learns_and_its_card_tells_the_truth(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    corpus, store = parts
    memory = train_memory(tiny_model_dir, corpus, store, tmp_path, **{**QUICK, "epochs": 10, "learning_rate": 1e-2})
    assert verify_memory(memory) == []
    card = read_memory_card(memory)
    figures = card.provenance["figures"]
    # Scored here anew from the saved files, by transformers' own loader.
    held_out = corpus.split("validation").tokens
    cut = windows(held_out.numel(), CONTEXT)
    scores = {}
    for name, folder in (("base", tiny_model_dir), ("memory", memory)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, card.provenance["compute_dtype"]))
        scores[name] = score_tokens(model, held_out, cut, batch_size=4)
    assert figures["base_perplexity"] == pytest.approx(perplexity(scores["base"]), rel=1e-6)
    assert figures["memory_perplexity"] == pytest.approx(perplexity(scores["memory"]), rel=1e-6)
    p = card.alpha * scores["memory"].double().exp() + (1 - card.alpha) * scores["base"].double().exp()
    assert figures["mixture_perplexity"] == pytest.approx(math.exp(-float(p.log().mean())), rel=1e-6)
    # A random model guesses worse than at random (384); these sentences leave few choices.
    assert figures["mixture_perplexity"] < 40
    assert str(tmp_path) not in "".join(
        data.decode(errors="replace") for name, data in content(memory).items() if not name.endswith(".safetensors")
    )
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == [
        "base.safetensors", "log.jsonl", "training.json"
    ]  # fmt: skip


def test_a_finished_training_is_left_alone_and_other_parameters_are_refused(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    run = {**QUICK, "max_steps": 2}
    memory = train_memory(tiny_model_dir, *parts, tmp_path, **run)
    before = content(tmp_path)
    assert train_memory(tiny_model_dir, *parts, tmp_path, **run) == memory
    with pytest.raises(MemdecError, match=r"beta was 0.5, now 0.25"):
        train_memory(tiny_model_dir, *parts, tmp_path, **{**run, "beta": 0.25})
    assert content(tmp_path) == before


def test_what_a_kill_at_the_very_end_left_is_deleted_by_the_next_run(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    run = {**QUICK, "max_steps": 2}
    train_memory(tiny_model_dir, *parts, tmp_path, **run)
    before = content(tmp_path)
    for name in ("start", "checkpoint-00000002", "best-00000002"):
        (tmp_path / "training" / name).mkdir()
        (tmp_path / "training" / name / "config.json").write_text("{}")
    train_memory(tiny_model_dir, *parts, tmp_path, **run)
    assert content(tmp_path) == before and not list((tmp_path / "training").glob("*-*"))


# --- exact resume ----------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_interrupted_at_every_kind_of_moment_ends_with_the_same_bytes(
    dtype: str, parts: tuple[Corpus, DistributionStore], tiny_gpt2: Callable[..., Any], tiny_tokenizer: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """GPT-2 has dropout, so the resumed run must also draw what the undisturbed one drew."""
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = {**QUICK, "dtype": dtype, "eval_every": 3, "save_every": 2, "max_steps": 9}
    train_memory(tmp_path / "model", *parts, tmp_path / "whole", **run)

    class Killed(BaseException):
        pass

    moments = [
        ("one_step", 1), ("one_step", 4), ("save_checkpoint", 1), ("save_model", 1), ("one_step", 2), ("keep_only", 1),
        ("write_folder", 1),
    ]  # fmt: skip
    happened = []
    for name, number in moments:
        with monkeypatch.context() as patch:
            calls = []
            original = getattr(train, name)

            def dying(*args: Any, name: str = name, original: Any = original, calls: Any = calls, **kw: Any) -> Any:
                calls.append(1)
                if len(calls) == number:  # noqa: B023
                    happened.append(name)
                    raise Killed
                return original(*args, **kw)

            patch.setattr(train, name, dying)
            with pytest.raises(Killed):
                train_memory(tmp_path / "model", *parts, tmp_path / "killed", **run)
    assert happened == [name for name, _ in moments]
    train_memory(tmp_path / "model", *parts, tmp_path / "killed", **run)
    whole, killed = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert whole.pop("training/log.jsonl") and killed.pop("training/log.jsonl")
    assert killed == whole
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    with pytest.raises(MemdecError, match="No space left"):
        write_folder(tmp_path / "x", fill)
    assert content(tmp_path) == {"x/a": b"old"}


def test_ctrl_c_ends_the_step_saves_and_goes_on_later(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    original = train.one_step

    def interrupted(run: Any, *rest: Any) -> Any:
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(run, *rest)

    monkeypatch.setattr(train, "one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_memory(tiny_model_dir, *parts, tmp_path, **QUICK)
    found = load_checkpoint(tmp_path / "training")
    assert found is not None and found[0] == 5


def test_save_every_is_when_checkpoints_are_written_and_the_best_candidate_stays(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations between two checkpoints keep the best of them, and the candidate that the last one refers to."""
    saved, held = [], []
    save_checkpoint, evaluate = train.save_checkpoint, train.evaluate

    def noted(folder: Path, step: int, *rest: Any) -> None:
        saved.append(step)
        save_checkpoint(folder, step, *rest)

    def looked(run: train.Run, *rest: Any) -> None:
        held.append(sorted(path.name for path in run.folder.glob("*-0*")))
        evaluate(run, *rest)

    monkeypatch.setattr(train, "save_checkpoint", noted)
    monkeypatch.setattr(train, "evaluate", looked)
    run = {**QUICK, "learning_rate": 1e-3, "max_steps": 10}
    memory = train_memory(tiny_model_dir, *parts, tmp_path / "rare", **run, eval_every=2, save_every=5)
    assert saved == [5, 10]
    assert held[0] == [] and held[1] == ["best-00000000"]
    assert all(len([name for name in names if name.startswith("best")]) <= 2 for names in held), held
    assert all(len([name for name in names if name.startswith("checkpoint")]) == (index > 2)
               for index, names in enumerate(held)), held  # fmt: skip
    saved.clear()
    often = train_memory(tiny_model_dir, *parts, tmp_path / "often", **run, eval_every=2)
    assert saved == [0, 2, 4, 6, 8, 10]
    assert (memory / "model.safetensors").read_bytes() == (often / "model.safetensors").read_bytes()


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_training_that_grows_no_better_wherever_it_was_interrupted(
    patience: int, parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The evaluations are made up: better, worse, better than the first, then worse for ever."""
    made_up = [9.0, 8.0, 8.5, 7.0] + [7.1] * 20

    def scored(run: train.Run, model: Any, log: Any) -> None:
        found = {"step": run.step, "alpha": 0.5, "mixture_perplexity": made_up[run.step // 2],
                 "memory_perplexity": 9.0, "base_perplexity": 9.0}  # fmt: skip
        better = not run.best or found["mixture_perplexity"] < run.best["mixture"]["mixture_perplexity"]
        log({**found, "best": better}, {})
        if better:
            run.best["mixture"] = found
            train.save_model(model, run.folder / f"best-{run.step:08d}")

    monkeypatch.setattr(train, "evaluate", scored)
    run = {**QUICK, "max_steps": 30, "eval_every": 2}
    memory = train_memory(tiny_model_dir, *parts, tmp_path / "whole", **run, patience=patience)
    best, last = {1: (2, 4), 3: (6, 12)}[patience]
    found = read_memory_card(memory).provenance
    assert (found["steps"], found["total_steps"], found["patience"]) == (best, last, patience)
    assert max(line["step"] for line in log_without_times(tmp_path / "whole")) == last

    endless = train_memory(tiny_model_dir, *parts, tmp_path / "endless", **run)
    assert read_memory_card(endless).provenance["total_steps"] == 30

    original, calls = train.one_step, []

    def dying(*args: Any) -> Any:
        calls.append(1)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "one_step", dying)
    for _ in range(10):
        try:
            again = train_memory(tiny_model_dir, *parts, tmp_path / "killed", **run, save_every=1, patience=patience)
            break
        except KeyboardInterrupt:
            pass
    assert len(calls) > last  # it was killed, and went on
    assert content(memory) == content(again)


# --- the arithmetic of a step ----------------------------------------


def gradient_of(model: Any, corpus: Corpus, store: DistributionStore, chosen: list[int], stride: int | None) -> Tensor:
    """The mean loss's gradient over the rows of some windows by plain PyTorch: one window at a time, dense teacher."""
    tokens = corpus.split("train").tokens.long()
    cut = windows(tokens.numel(), CONTEXT, stride)
    losses = []
    for index in chosen:
        window = cut[index]
        logits = model(tokens[None, window.start : window.stop - 1]).logits[0].double().log_softmax(-1)
        for row in range(window.score_from, window.stop - 1):
            log_p = logits[row - window.start]
            q = store.slice(row, row + 1).to_dense(torch.float64)[0]
            kl = (torch.special.xlogy(q, q) - q * log_p).sum()
            losses.append(0.5 * kl - 0.5 * log_p[tokens[row + 1]])
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


@pytest.mark.parametrize("stride", [None, 21])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(7, 1), (2, 4), (1, 7)])
def test_however_a_step_is_cut_its_gradient_is_the_mean_over_its_rows(
    parts: tuple[Corpus, DistributionStore], tiny_llama: Callable[..., Any], stride: int | None, batch_size: int,
    accumulation: int,
) -> None:  # fmt: skip
    """The last window is shorter than the others, so a mean of means would be another number."""
    corpus, store = parts
    tokens = corpus.split("train").tokens
    cut = windows(tokens.numel(), CONTEXT, stride)
    chosen = [3, len(cut) - 1, 0, 8, 5, 1, 2]
    assert cut[-1].num_rows not in (cut[0].num_rows, cut[1].num_rows)
    want = gradient_of(tiny_llama(), corpus, store, chosen, stride)
    model = tiny_llama()
    student = Student(model, corpus.vocab_size, 0.5)
    assert student.fused
    rows = sum(cut[index].num_rows for index in chosen)
    for part in share(chosen, 0, 1, batch_size):
        batch = read_batch(tokens, [cut[index] for index in part], store)
        (student(batch).total / rows).backward()
    got = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_model_that_caps_its_logits_is_trained_on_the_capped_ones(
    parts: tuple[Corpus, DistributionStore], tiny_tokenizer: Any
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    corpus, store = parts
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    tokens = corpus.split("train").tokens
    batch = read_batch(tokens, windows(tokens.numel(), CONTEXT)[:2], store)
    student = Student(model, corpus.vocab_size, 0.5)
    assert not student.fused
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)
    assert float(logits.detach().abs().max()) <= 2.0
    want = reference.alignment_loss(logits.double(), batch.labels, batch.teacher, reduction="sum")
    torch.testing.assert_close(student(batch).total.double(), want.total, rtol=1e-5, atol=0)


def test_a_padded_head_is_trained_on_the_tokenizers_width(
    parts: tuple[Corpus, DistributionStore], tiny_llama: Callable[..., Any]
) -> None:
    corpus, store = parts
    tokens = corpus.split("train").tokens
    batch = read_batch(tokens, windows(tokens.numel(), CONTEXT)[:1], store)
    model = tiny_llama(vocab=corpus.vocab_size + 16)
    student = Student(model, corpus.vocab_size, 0.5)
    logits = model(input_ids=batch.input_ids).logits[0, :, : corpus.vocab_size]
    want = reference.alignment_loss(logits.double(), batch.labels, batch.teacher, reduction="sum")
    torch.testing.assert_close(student(batch).total.double(), want.total, rtol=1e-5, atol=0)
    with pytest.raises(MemdecError, match=r"predicts 300 tokens, but its tokenizer has 384"):
        Student(tiny_llama(vocab=300), corpus.vocab_size, 0.5)


def test_every_epoch_reads_each_window_once_in_an_order_of_its_own() -> None:
    orders = []
    for epoch in range(3):
        per_epoch = steps_in_epoch(23, 4)
        order = [
            index for step in range(per_epoch) for index in windows_of_step(epoch * per_epoch + step, 23, 4, seed=5)
        ]
        assert sorted(order) == list(range(23))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    chosen = list(range(10))
    for processes in (1, 2, 3, 12):
        shared = [index for rank in range(processes) for part in share(chosen, rank, processes, 2) for index in part]
        assert sorted(shared) == chosen


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    settings = Settings(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    linear = Settings(learning_rate=1.0, warmup=0.0, schedule="linear")
    assert [learning_rate(step, 4, linear) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_masters_step_as_adamw_does_on_the_parameters_themselves(tiny_llama: Callable[..., Any]) -> None:
    plain, ours = tiny_llama(), tiny_llama()
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    rest = [p for p in plain.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    weights = MasterWeights(ours, torch.float32, weight_decay=0.3)
    ids = torch.arange(20)[None]
    for _ in range(3):
        for model in (plain, ours):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        weights.step(0.01, (0.5 / weights.gradient_norm()).clamp(max=1.0))
    for want, got in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_updates_below_bfloat16s_step_are_not_lost(tiny_llama: Callable[..., Any]) -> None:
    """1,000 steps of 1e-5 on weights of size 0.3, whose step in bfloat16 is 2e-3: 0.01 in all, if none is lost."""
    model = tiny_llama(layers=1, hidden=16)
    weights = MasterWeights(model, torch.bfloat16, weight_decay=0.0)
    name, parameter = next(iter(model.named_parameters()))
    assert parameter.dtype == torch.bfloat16, name
    before = parameter.detach().float().clone()
    for _ in range(1000):
        for grad in weights.gradients:
            grad.fill_(1.0)
        weights.step(1e-5, torch.tensor(1.0))
    moved = (before - parameter.detach().float()).mean()
    assert float(moved) == pytest.approx(0.01, rel=0.05)


# --- several processes ----------------------------------------

TWO = """
import sys, torch
from memdec.pipeline.train import train_memory
torch.set_num_threads(1)
model, corpus, distributions, out = sys.argv[1:]
train_memory(model, corpus, distributions, out, max_steps=3, batch_size=2, learning_rate=3e-3, device="cpu",
             dtype="float32", tensorboard=False)
"""


def test_two_processes_train_the_memory_that_one_trains(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same windows a step, shared by two processes that torchrun starts; only the order of sums differs."""
    corpus, store = parts
    run = {**QUICK, "max_steps": 3, "dtype": "float32"}
    alone = train_memory(tiny_model_dir, corpus, store, tmp_path / "one", **{**run, "batch_size": 4})
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(tmp_path / "two.py"), str(tiny_model_dir), str(corpus.folder), str(store.folder),
               str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(folder / "memory" / "model.safetensors") for folder in (alone.parent, tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


# --- bad input ----------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.read_batch

    def poisoned(*args: Any) -> Any:
        batch = original(*args)
        if (tmp_path / "training" / "checkpoint-00000002").exists():
            batch.teacher.probs.fill_(float("nan"))
        return batch

    monkeypatch.setattr(train, "read_batch", poisoned)
    with pytest.raises(MemdecError, match=r"loss of step 3 is nan"):
        train_memory(tiny_model_dir, *parts, tmp_path, **{**QUICK, "save_every": 2})
    found = load_checkpoint(tmp_path / "training")
    assert found is not None and found[0] == 2
    assert all(torch.isfinite(tensor).all() for tensor in found[1].values())
    assert not (tmp_path / "memory").exists()


def test_parts_that_do_not_fit_are_refused(
    parts: tuple[Corpus, DistributionStore], tiny_model_dir: Path, tiny_tokenizer: Any,
    make_tokenizer: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    corpus, store = parts
    other = write_corpus(tmp_path / "other", tiny_tokenizer, repeats=5)
    with pytest.raises(MemdecError, match="do not belong together"):
        train_memory(tiny_model_dir, other, store, tmp_path / "out", **QUICK)
    silent = write_corpus(tmp_path / "silent", tiny_tokenizer, validation=False)
    with pytest.raises(MemdecError, match="no validation text"):
        train_memory(tiny_model_dir, silent, store, tmp_path / "out", **QUICK)
    stranger = tmp_path / "stranger"
    tiny_llama(seed=1).save_pretrained(stranger)
    make_tokenizer(seed=9).save_pretrained(stranger)
    with pytest.raises(MemdecError, match="another tokenizer"):
        train_memory(stranger, corpus, store, tmp_path / "out", **QUICK)
    with pytest.raises(MemdecError, match="different tokenizers"):
        train_memory(tiny_model_dir, corpus, store, tmp_path / "out", base=stranger, **QUICK)
    with pytest.raises(MemdecError, match=r"beta is 1\.5"):
        train_memory(tiny_model_dir, corpus, store, tmp_path / "out", **{**QUICK, "beta": 1.5})
    (tmp_path / "taken" / "memory").mkdir(parents=True)
    with pytest.raises(MemdecError, match="is there already"):
        train_memory(tiny_model_dir, corpus, store, tmp_path / "taken", **QUICK)
