"""The pipeline on a real GPU, tiny: stages, training, evaluation, decoding, against what the CPU makes of the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memdec import MemoryModel, build_info
from memdec.evaluation.comparison import compare
from memdec.evaluation.evaluate import evaluate
from memdec.modeling.scoring import perplexity, score_tokens
from memdec.pipeline import search, train
from memdec.pipeline.distributions import build_distributions
from memdec.pipeline.fit import fit
from memdec.pipeline.initialise import initialise
from memdec.pipeline.teachers import build_teacher
from memdec.pipeline.train import train_memory
from memdec.stores.corpus import Corpus
from memdec.stores.datastore import Datastore
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.windows import windows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or build_info()["cuda"] != "on",
    reason="needs a GPU, and a memdec with CUDA kernels",
)

CONTEXT = 48
# float16 codes: an 8-bit code that falls on the other side of a boundary is 5% more.
FIT: dict[str, Any] = {
    "fractions": (0.6, 0.2, 0.2), "context": CONTEXT, "k": 16, "temperature": 5.0, "codec": "float16", "max_steps": 8,
    "learning_rate": 3e-3, "eval_every": 4, "dtype": "float32", "tensorboard": False, "teacher": "knn",
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "max_steps": 6, "eval_every": 6, "save_every": 2, "batch_size": 4, "learning_rate": 3e-3, "tensorboard": False,
    "device": "cuda",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, make_text: Callable[[int, int], str]
) -> SimpleNamespace:
    """The whole job on both devices: `cpu` and `cuda` are folders that `fit` made."""
    root = tmp_path_factory.mktemp("gpu-pipeline")
    (root / "text").mkdir()
    for index in range(24):
        (root / "text" / f"d{index:02d}.txt").write_text(make_text(10, index))
    for device in ("cpu", "cuda"):
        fit(tiny_model_dir, root / "text", root / device, device=device, **FIT)
    return SimpleNamespace(root=root, base=tiny_model_dir, cpu=root / "cpu", cuda=root / "cuda")


def apart(one: DistributionStore, other: DistributionStore) -> torch.Tensor:
    """Total variation distance of each row of two stores: 0 for the same distribution, 1 for disjoint ones."""
    assert one.num_rows == other.num_rows
    rows = torch.arange(one.num_rows)
    return (one.rows(rows).to_dense() - other.rows(rows).to_dense()).abs().sum(1) / 2


def test_fit_on_the_gpu_makes_the_cpu_s_distributions(run: SimpleNamespace) -> None:
    """Keys that round to another float16 move distances a little, and may exchange neighbours that are all but tied."""
    keys = [Datastore.open(folder / "datastore") for folder in (run.cpu, run.cuda)]
    assert keys[1].manifest.fields["device"] == "cuda"
    here, there = (store.keys(0, store.num_rows).float() for store in keys)
    torch.testing.assert_close(there, here, rtol=5e-3, atol=5e-3)
    assert torch.equal(keys[0].values(0, keys[0].num_rows), keys[1].values(0, keys[1].num_rows))
    found = apart(*(DistributionStore.open(folder / "distributions") for folder in (run.cpu, run.cuda)))
    assert float(found.mean()) < 0.01 and float((found > 0.05).double().mean()) < 0.05
    figures = [json.loads((folder / "training" / "training.json").read_text()) for folder in (run.cpu, run.cuda)]
    for name in ("base_perplexity", "memory_perplexity", "mixture_perplexity"):
        mine, other = (found["results"][name] for found in figures)
        assert other == pytest.approx(mine, rel=0.02), name


def test_of_the_same_keys_the_gpu_finds_the_same_neighbours(run: SimpleNamespace, monkeypatch: Any) -> None:
    """With the keys copied to the device once, and with keys that do not fit there and are sent block by block."""
    store = Datastore.open(run.cpu / "datastore")
    given = {name: FIT[name] for name in ("k", "temperature", "codec")}
    wanted = DistributionStore.open(run.cpu / "distributions")
    assert search.keys_on_device(store, "cuda") is not store
    made = build_distributions(store, run.root / "resident", device="cuda", **given)
    assert float(apart(made, wanted).mean()) < 1e-4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    assert search.keys_on_device(store, "cuda") is store
    made = build_distributions(store, run.root / "streamed", device="cuda", **given)
    assert float(apart(made, wanted).mean()) < 1e-4


def test_a_language_model_teaches_on_the_gpu(run: SimpleNamespace) -> None:
    corpus, knn = Corpus.open(run.cpu / "corpus"), DistributionStore.open(run.cpu / "distributions")
    made = [
        build_teacher("knn-lm", corpus, run.root / f"teacher-{device}", model=run.base, knn=knn, codec="float16",
                      weight=0.5, top_k=20, device=device, dtype="float32")
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert float(apart(*made).mean()) < 0.01


def test_fit_adapts_its_teacher_on_the_gpu(run: SimpleNamespace, tmp_path: Path) -> None:
    """The recipe of a whole copy: a model fine-tuned on the text makes the keys and is mixed into the teacher."""
    fit(run.base, run.root / "text", tmp_path, device="cuda", **FIT | {"teacher": "knn-lm", "adapt_epochs": 1})
    figures = json.loads((tmp_path / "training" / "training.json").read_text())["results"]
    assert (tmp_path / "adapted" / "memory").is_dir()
    assert 1 < figures["mixture_perplexity"] < figures["base_perplexity"]


def test_a_cut_start_is_mended_on_the_gpu(tiny_gpt2: Callable[..., Any]) -> None:
    tokens = torch.randint(384, (2048,), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model = initialise(tiny_gpt2(layers=5), layers=3, calibration=tokens, context=64, device=device)
        scores = score_tokens(model, tokens[:512], windows(512, 64))
        assert not scores.is_cuda and next(model.parameters()).device.type == device
        found.append(perplexity(scores))
    assert found[1] == pytest.approx(found[0], rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("bfloat16", {"gradient_checkpointing": True}), ("bfloat16", {"lora_rank": 4})],
    ids=["float32", "bfloat16, activations computed twice", "lora"],
)
def test_a_training_that_was_stopped_goes_on(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: Any, dtype: str, options: dict[str, Any]
) -> None:
    """From the checkpoint, on the device; sums on a GPU are in no fixed order, so the same but for rounding."""
    if "lora_rank" in options:
        pytest.importorskip("peft")
    parts = (run.base, run.cpu / "corpus", run.cpu / "distributions")
    settings = {**TRAIN, **options, "dtype": dtype}
    train_memory(*parts, tmp_path / "whole", **settings)
    step = train.one_step

    def stopped(at: Any, *rest: Any) -> Any:
        if at.step == 4:
            raise RuntimeError("stopped here")
        return step(at, *rest)

    monkeypatch.setattr(train, "one_step", stopped)
    with pytest.raises(RuntimeError, match="stopped here"):
        train_memory(*parts, tmp_path / "stopped", **settings)
    monkeypatch.setattr(train, "one_step", step)
    assert (tmp_path / "stopped" / "training" / "checkpoint-00000004").is_dir()
    train_memory(*parts, tmp_path / "stopped", **settings)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training" / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for mine, other in zip(*logs, strict=True):
        for name in ("loss", "gradient_norm", "memory_perplexity"):
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=0.03), (mine["step"], name)


def test_evaluation_gives_the_cpu_s_perplexities(run: SimpleNamespace) -> None:
    here, there = (
        evaluate(run.base, run.cpu / "memory", run.cpu / "corpus", datastore=run.cpu / "datastore", alpha=0.4,
                 context=CONTEXT, stride=24, dtype="float32", device=device, held_out_prompts=1, new_tokens=4)
        for device in ("cpu", "cuda")
    )  # fmt: skip
    assert there.environment["device"] == "cuda:0" and there.environment["device_name"]
    for method, tolerance in {"base": 1e-3, "memory": 1e-3, "base+memory": 1e-3, "knn-lm": 0.02}.items():
        mine, other = here.measure(method), there.measure(method)
        assert other.perplexity == pytest.approx(mine.perplexity, rel=tolerance), method
        assert mine.per_document is not None and other.per_document is not None
        wanted = mine.per_document["token_perplexity"]
        assert other.per_document["token_perplexity"] == pytest.approx(wanted, rel=tolerance), method
    assert there.generations


def test_a_comparison_trains_scores_and_times(run: SimpleNamespace) -> None:
    """In the GPU's own number type, as a user would run it."""
    result = compare(run.base, run.cuda / "memory", run.cuda / "corpus", run.root / "comparison",
                     methods=("base", "knn-lm", "second-model", "memory"), context=CONTEXT, stride=24,
                     validation_tokens=400, general_tokens=400, latency_tokens=4, latency_prompts=1, latency_repeats=1,
                     device="cuda")  # fmt: skip
    assert result.environment["device"] == "cuda:0" and result.alpha_zero_is_base
    for row in result.entries:
        assert row.perplexity > 1 and row.latency is not None and not row.latency.note, row.method


def test_decoding_on_the_gpu(run: SimpleNamespace) -> None:
    """Greedily every way writes the composite's text; the mixture is the CPU's; draws follow a generator of the GPU."""
    here, there = (
        MemoryModel.from_pretrained(run.base, run.cpu / "memory", alpha=0.4, dtype="float32", device=device)
        for device in ("cpu", "cuda")
    )
    ids = torch.tensor([here.tokenizer("The court granted the lease", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(there(ids.cuda()).logits.cpu(), here(ids).logits, rtol=1e-3, atol=1e-3)

    def text(model: Any, **options: Any) -> list[int]:
        prompt = ids.to(model.device)
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, **options)
        assert made.device == prompt.device
        return made[0].tolist()

    greedy = text(there, decoding="composite", do_sample=False)
    assert len(greedy) > ids.shape[1]
    for decoding in ("parallel", "speculative", "auto"):
        assert text(there, decoding=decoding, do_sample=False) == greedy, decoding
        assert there.last_decode is not None and there.last_decode.reason is None
    assert text(there, decoding="auto", do_sample=True, top_k=20, top_p=0.9)
    drawn = [
        text(there, decoding="composite", do_sample=True, generator=torch.Generator("cuda").manual_seed(3))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
