"""lm-evaluation-harness on a MemoryModel: what it counts is what full-sequence mixtures taken by hand give."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import sys
import warnings

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from memdec import MemoryModel
from memdec.errors import MemdecError
from memdec.evaluation import harness

ALPHA = 0.35
PAIRS = [
    ("The court", " granted the lease"),
    ("A tenant", " forgot"),
    ("The old judge recorded seven letters before noon.", " The clerk denied a motion"),
    ("The court", " denied"),
    ("", "One witness"),
]
TEXT = " ".join(f"{who} recorded the deposit under section 12." for who in ("The clerk", "One witness", "A tenant"))


@pytest.fixture(scope="module")
def model(tiny_run) -> MemoryModel:
    return MemoryModel(tiny_run.base_model, tiny_run.memory_model, ALPHA, tokenizer=tiny_run.tokenizer)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, 0, ("task", index, 1)) for index, one in enumerate(arguments)]


def mixture(model: MemoryModel, ids: list[int], alpha: float | None = None) -> torch.Tensor:
    """Probabilities (L, V) of what follows each token, float64: both models' softmaxes, mixed by hand."""
    alpha = model.alpha if alpha is None else alpha
    with torch.no_grad():
        base, memory = (
            one(input_ids=torch.tensor([ids])).logits[0, :, : model.config.vocab_size].double().softmax(-1)
            for one in (model.base, model.memory)
        )
    return alpha * memory + (1 - alpha) * base


def by_hand(model: MemoryModel, context: list[int], continuation: list[int], alpha: float | None = None):
    """Summed log-prob of the continuation, and whether each of its tokens is the likeliest."""
    rows = mixture(model, context + continuation, alpha)[len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    return float(rows.gather(1, tokens[:, None]).log().sum()), bool((rows.argmax(1) == tokens).all())


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
def test_log_likelihoods_are_those_of_whole_sequences(model, tiny_run, alpha, batch_size):
    model.alpha = alpha
    try:
        lm = harness.MemoryLM(model, batch_size=batch_size)
        found = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
        for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
            before = tokens_of(tiny_run.tokenizer, context) or [0]  # end-of-text, where there is no beginning-of-text
            after = tokens_of(tiny_run.tokenizer, continuation)
            expected = by_hand(model, before, after)
            assert score == pytest.approx(expected[0], abs=2e-4) and greedy == expected[1]
    finally:
        model.alpha = ALPHA


def test_what_the_mixture_writes_is_greedy(model, tiny_run):
    """Guards the flag above, which is False for most continuations one can think of."""
    prompt = tokens_of(tiny_run.tokenizer, "The court")
    ids = list(prompt)
    for _ in range(3):
        ids.append(int(mixture(model, ids)[-1].argmax()))
    lm = harness.MemoryLM(model)
    request = (None, prompt, ids[len(prompt) :])
    ((score, greedy),) = lm._loglikelihood_tokens([request], disable_tqdm=True)
    assert greedy and score == pytest.approx(by_hand(model, prompt, ids[len(prompt) :])[0], abs=2e-4)


def test_rolling_log_likelihoods_are_those_of_windows(model, tiny_run):
    """Windows of 16 that do not overlap, the first after end-of-text, the last filled up to its left."""
    lm = harness.MemoryLM(model, batch_size=2, max_length=16)
    ids = tokens_of(tiny_run.tokenizer, TEXT)
    assert len(ids) % 16 and len(ids) > 32
    stream, total = [0, *ids], 0.0
    for start in range(0, len(ids), 16):
        end = min(start + 16, len(ids))
        first = max(0, end - 16)
        total += by_hand(model, stream[first : start + 1], stream[start + 1 : end + 1])[0]
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)
    assert found == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("decoding", ["auto", "composite", "speculative"])
def test_it_generates_what_the_mixture_writes(model, tiny_run, batch_size, decoding):
    """Prompts of different lengths are padded on the left; a stop string ends a text and is cut off."""
    tokenizer = tiny_run.tokenizer
    prompts = ["The court", "The old judge recorded seven letters before noon. A tenant", "One"]
    written = []
    for prompt in prompts:
        ids = tokens_of(tokenizer, prompt)
        start = len(ids)
        for _ in range(10):
            ids.append(int(mixture(model, ids)[-1].argmax()))
        written.append(tokenizer.decode(ids[start:]))
    stop = written[0][4:7]
    lm = harness.MemoryLM(model, batch_size=batch_size, decoding=decoding)
    options = {"until": [stop], "max_gen_toks": 10, "do_sample": False}
    found = lm.generate_until(instances("generate_until", *((p, dict(options)) for p in prompts)), disable_tqdm=True)
    assert found == [text.split(stop)[0] for text in written]
    assert found[0] != written[0]
    if batch_size == 1 and decoding != "auto":
        assert model.last_decode.mode == decoding


def test_padded_columns_are_no_tokens(tiny_run, tiny_llama):
    """A base with 400 columns for a tokenizer of 384 ids; what stands in the others must not take any probability."""
    wide = MemoryModel(tiny_llama(vocab=400, seed=8), tiny_run.memory_model, ALPHA, tokenizer=tiny_run.tokenizer)
    lm = harness.MemoryLM(wide)
    ((score, _),) = lm.loglikelihood(instances("loglikelihood", PAIRS[0]), disable_tqdm=True)
    context, continuation = (tokens_of(tiny_run.tokenizer, text) for text in PAIRS[0])
    total = 0.0
    ids = context + continuation
    with torch.no_grad():
        base = wide.base(input_ids=torch.tensor([ids])).logits[0, :, :384].double().softmax(-1)
        memory = wide.memory(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    for place in range(len(context), len(ids)):
        total += math.log(ALPHA * memory[place - 1, ids[place]] + (1 - ALPHA) * base[place - 1, ids[place]])
    assert score == pytest.approx(total, abs=2e-4)


def test_the_length_is_what_both_can_read(tiny_run, tiny_llama):
    short = tiny_llama(seed=5, max_position_embeddings=40)
    lm = harness.MemoryLM(MemoryModel(tiny_run.base_model, short, ALPHA, tokenizer=tiny_run.tokenizer))
    assert lm.max_length == 40
    assert harness.MemoryLM(lm.model, max_length=24).max_length == 24


def test_a_beginning_of_text_on_demand(tiny_run, tiny_llama, make_tokenizer):
    tokenizer = make_tokenizer(pad=True)
    tokenizer.bos_token = "<|pad|>"
    model = MemoryModel(tiny_llama(), tiny_llama(seed=5), ALPHA, tokenizer=tokenizer)
    bos = tokenizer.bos_token_id
    for wanted, before in ((None, []), (True, [bos]), (False, [])):
        lm = harness.MemoryLM(model, add_bos_token=wanted)
        assert lm.tok_encode("The court") == before + tokens_of(tokenizer, "The court")
        ((score, _),) = lm.loglikelihood(instances("loglikelihood", ("The court", " granted")), disable_tqdm=True)
        context = before + tokens_of(tokenizer, "The court")
        assert score == pytest.approx(by_hand(model, context, tokens_of(tokenizer, " granted"))[0], abs=2e-4)
    assert tokenizer("The court")["input_ids"][0] != bos  # the caller's own is as it was


def test_the_tokenizer_of_the_model_is_left_alone(model, tiny_run):
    assert tiny_run.tokenizer.pad_token is None
    lm = harness.MemoryLM(model)
    assert lm.tokenizer.pad_token_id == 0 and tiny_run.tokenizer.pad_token is None and model.tokenizer.pad_token is None


@pytest.fixture
def tiny_task(tmp_path):
    """A folder with a task of the harness, its rows in a file beside it: nothing is fetched."""
    rows = [
        {"text": "The court", "choices": ["granted the lease", "denied", "forgot his notes"], "label": 0},
        {"text": "A tenant withdrew", "choices": ["a motion", "the deposit twice", "noon"], "label": 1},
        {"text": "The clerk", "choices": ["recorded", "measured seven letters", "an appeal"], "label": 2},
        {"text": "One witness", "choices": ["questioned", "the lease", "at 3.50 a day"], "label": 0},
    ]
    folder = tmp_path / "harness-tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "deeds.yaml").write_text(
        f"""
task: deeds
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "rows.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder, rows


def accuracy(model: MemoryModel, rows: list[dict], alpha: float) -> float:
    tokenizer, right = model.tokenizer, 0
    for row in rows:
        context = tokens_of(tokenizer, row["text"])
        scores = [by_hand(model, context, tokens_of(tokenizer, " " + c), alpha)[0] for c in row["choices"]]
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


def test_a_whole_evaluation(model, tiny_run, tiny_task):
    folder, rows = tiny_task
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    quiet = {"task_manager": manager, "bootstrap_iters": 0}
    expected = accuracy(model, rows, ALPHA)
    found = harness.simple_evaluate(model, tasks=["deeds"], batch_size=2, **quiet)
    assert found["results"]["deeds"]["acc,none"] == expected
    assert found["config"]["memdec_alpha"] == ALPHA
    paths = harness.simple_evaluate(
        tiny_run.base, tiny_run.memory, tasks=["deeds"], device="cpu", dtype="float32", limit=4, **quiet
    )
    assert paths["results"]["deeds"]["acc,none"] == expected  # alpha is the memory's own, which is the same
    alone = harness.simple_evaluate(model.base, model.memory, alpha=0.0, tokenizer=tiny_run.tokenizer,
                                    tasks=["deeds"], **quiet)  # fmt: skip
    logs = [[r[0] for r in s["filtered_resps"]] for s in alone["samples"]["deeds"]]
    base = HFLM(model.base, tokenizer=tiny_run.tokenizer, backend="causal")
    import lm_eval

    theirs = lm_eval.simple_evaluate(base, tasks=["deeds"], **quiet)
    for ours, other in zip(logs, theirs["samples"]["deeds"], strict=True):
        assert ours == pytest.approx([r[0] for r in other["filtered_resps"]], abs=1e-4)


def test_the_name_memdec_with_arguments_as_the_shell_gives_them(model, tiny_run, tiny_task):
    import lm_eval

    folder, rows = tiny_task
    assert get_model("memdec") is harness.MemoryLM is harness.memory_lm()
    found = lm_eval.simple_evaluate(
        model="memdec",
        model_args=f"pretrained={tiny_run.base},memory={tiny_run.memory},alpha=0.9,dtype=float32",
        device="cpu",
        batch_size=2,
        tasks=["deeds"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["deeds"]["acc,none"] == accuracy(model, rows, 0.9)


def test_the_module_is_a_command(tiny_run, tiny_task, tmp_path, model, monkeypatch):
    folder, rows = tiny_task
    arguments = f"pretrained={tiny_run.base},memory={tiny_run.memory},alpha=0.9,dtype=float32"
    options = ["--model", "memdec", "--model_args", arguments, "--device", "cpu", "--tasks", "deeds"]
    options += ["--include_path", str(folder), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options])
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would change logging for other tests
    # Reading the thousands of tasks that come with it takes ten seconds.
    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **named: whole(*a, **{**named, "include_defaults": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the module was imported before
        runpy.run_module("memdec.evaluation.harness", run_name="__main__")
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["deeds"]["acc,none"] == accuracy(model, rows, 0.9)


def test_what_makes_no_sense_is_refused(model, tiny_run):
    with pytest.raises(MemdecError, match="does not take peft, revision"):
        harness.MemoryLM(str(tiny_run.base), str(tiny_run.memory), revision="main", peft="adapter")
    with pytest.raises(MemdecError, match="pretrained=BASE,memory=DIR"):
        harness.MemoryLM(str(tiny_run.base))
    with pytest.raises(MemdecError, match="leave both out"):
        harness.MemoryLM(model, alpha=0.2)
    with pytest.raises(MemdecError, match="loaded tokenizer"):
        harness.MemoryLM(str(tiny_run.base), str(tiny_run.memory), tokenizer="gpt2")
    with pytest.raises(MemdecError, match="tokenizer of this MemoryModel is not known"):
        harness.MemoryLM(MemoryModel(tiny_run.base_model, tiny_run.memory_model, ALPHA))


def test_without_the_harness_the_module_says_what_to_install(monkeypatch):
    """The module itself can be imported, as the documentation's tests do with every module."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    module = runpy.run_path(harness.__file__, run_name="without_the_harness")
    with pytest.raises(MemdecError, match=r"pip install 'memdec\[eval\]'"):
        module["simple_evaluate"]("base", "memory", tasks=["lambada_openai"])
