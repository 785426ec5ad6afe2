"""The estimate of a run: every count against a real tiny model, PyTorch's own FLOP counter, or the run's own files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memdec.errors import MemdecError
from memdec.pipeline import estimate as module
from memdec.pipeline.estimate import (
    DEVICES,
    Estimate,
    Shape,
    count_tokens,
    count_windows,
    estimate_fit,
    read_shape,
)
from memdec.stores.windows import windows

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 64}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def neox(**sizes: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, "vocab_size": 300, **sizes})).eval()


@pytest.fixture(params=["llama", "llama untied", "gpt2", "neox"])
def model(request, tiny_llama, tiny_gpt2):
    if request.param == "neox":
        return neox()
    if request.param == "gpt2":
        return tiny_gpt2(layers=3)
    return tiny_llama(tie_word_embeddings=request.param == "llama", head_dim=12)


def test_the_shape_is_the_models_own(model, tmp_path):
    shape = read_shape(saved(model, tmp_path / "model"))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vocabulary == model.get_output_embeddings().weight.shape[0]
    assert shape.width == 32 and shape.blocks == model.config.num_hidden_layers


def test_the_flops_of_a_forward_are_those_that_pytorch_counts(model, tmp_path):
    """The counter sees every matrix product that really runs, attention's among them."""
    shape = read_shape(saved(model, tmp_path / "model"))
    model.set_attn_implementation("eager")  # the counter does not know the processor's fused attention
    batch, length = 3, 16
    ids = torch.zeros(batch, length, dtype=torch.long)
    expected = shape.trunk_flops(batch * length, length) + shape.head_flops(batch * length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    forward = counter.get_total_flops()
    # The rotary angles are a product too, of one number each: nothing beside a block.
    assert expected == pytest.approx(forward, rel=0.005)
    # The backward costs twice the forward: the factor 3 of training.
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, use_cache=False).logits.sum().backward()
    assert 3 * expected == pytest.approx(counter.get_total_flops(), rel=0.005)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [  # the published counts of these models
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    ],
)
def test_published_counts(shape, parameters):
    assert read_shape("some/model", {"some/model": shape}).parameters == parameters


def test_a_cut_memory_counts_its_blocks_only(tiny_llama, tmp_path):
    whole = saved(tiny_llama(layers=5), tmp_path / "whole")
    cut = read_shape(whole, layers=2)
    assert cut.parameters == sum(parameter.numel() for parameter in tiny_llama(layers=2).parameters())
    assert (cut.blocks, read_shape(whole).blocks) == (2, 5)
    with pytest.raises(MemdecError, match="layers is 6; the model has 5 blocks"):
        read_shape(whole, layers=6)


def test_no_weights_are_needed(tiny_llama, tmp_path):
    folder = saved(tiny_llama(), tmp_path / "model")
    whole = read_shape(folder)
    (folder / "model.safetensors").unlink()
    assert read_shape(folder) == whole


def test_windows_are_counted_as_they_are_cut():
    draw = random.Random(0)
    for _ in range(300):
        tokens, context = draw.randint(2, 200), draw.randint(2, 60)
        stride = draw.choice([None, draw.randint(1, context - 1)])
        cut = windows(tokens, context, stride)
        inputs = sum(window.stop - window.start - 1 for window in cut)
        assert count_windows(tokens, context, stride) == (len(cut), inputs), (tokens, context, stride)
    with pytest.raises(MemdecError, match="stride 9"):
        count_windows(20, 9, 9)


# -- a whole run -------------------------------------------------------------------------------------------------------


def small(**options: Any) -> Estimate:
    return estimate_fit("m", None, tokens=1000, shapes={"m": GPT2}, **{"context": 11, **options})


def part(found: Estimate, name: str) -> Any:
    return next(entry for entry in found.parts if entry.name == name)


def test_the_formulas_by_hand():
    """GPT-2 of 3 blocks, 32 wide, 500 tokens: a block has 12·32² weights in matrices; 900 of 1000 tokens train."""
    trunk = 2 * 3 * 12 * 32**2 + 4 * 3 * 32 * 10  # a token's, in windows of 10 inputs
    head = 2 * 500 * 32
    found = small(epochs=2, batch_size=4, eval_every=5)
    assert found.tokens == {"train": 900, "validation": 50, "test": 50}
    assert part(found, "datastore").flops == (899 + 49) * trunk + 49 * head
    assert part(found, "distributions").flops == 2 * (899 + 49) * 899 * 32
    # 90 windows, 4 a step, so 23 steps an epoch; 46 steps with an evaluation at 0, 5, …, 45 and 46.
    assert (found.steps, found.tokens_trained) == (46, 2 * 899)
    assert part(found, "training").flops == 3 * 1798 * (trunk + head) + 11 * 49 * (trunk + head) + 49 * (trunk + head)
    # Gradient checkpointing runs the trunk's forward once more.
    again = part(small(epochs=2, batch_size=4, eval_every=5, gradient_checkpointing=True), "training")
    assert again.flops - part(found, "training").flops == 1798 * trunk
    assert again.memory < part(found, "training").memory
    # 10 of 23 steps read 40 of the 90 windows.
    assert small(max_steps=10, batch_size=4).tokens_trained == round(899 * 40 / 90)
    assert part(small(temperature=2.0), "distributions").flops == 2 * 899 * 899 * 32  # no T to choose
    device = DEVICES["h100"]
    faster = small(epochs=2, batch_size=4, eval_every=5, on="h100", utilisation=0.5)
    assert part(faster, "training").seconds == part(found, "training").flops / (device.peak * 0.5)
    assert part(faster, "distributions").seconds == part(found, "distributions").flops / (device.float32 * 0.5)
    assert faster.flops == found.flops and faster.hours == sum(entry.seconds for entry in faster.parts) / 3600


def test_overlapping_windows_are_read_twice_and_scored_once():
    found, plain = small(stride=5, epochs=1), small(epochs=1)
    assert found.tokens_trained == plain.tokens_trained == 899
    assert part(found, "datastore").flops / part(plain, "datastore").flops == pytest.approx(2, rel=0.1)
    assert found.steps > 1.9 * plain.steps


@pytest.mark.parametrize(
    ("teacher", "names"),
    [
        ("knn", ["corpus", "datastore", "distributions", "training", "memory"]),
        ("lm", ["corpus", "teacher lm", "training", "memory"]),
        ("one-hot", ["corpus", "teacher one-hot", "training", "memory"]),
        ("knn-lm", ["corpus", "datastore", "distributions", "teacher knn-lm", "training", "memory"]),
    ],
)
def test_the_stages_of_a_teacher(teacher, names):
    found = small(teacher=teacher, top_k=7)
    assert [entry.name for entry in found.parts] == names
    if teacher == "lm":
        trunk = 2 * 3 * 12 * 32**2 + 4 * 3 * 32 * 10
        assert part(found, "teacher lm").flops == 899 * (trunk + 2 * 500 * 32)
        assert part(found, "teacher lm").disk == 899 * (7 * 3 + 6)


def test_an_adapted_teacher_costs_a_training_of_its_model():
    """The teacher is larger than the memory; adapting it is what training a memory of its size would cost."""
    shapes = {"m": GPT2, "t": {**GPT2, "n_layer": 5}}
    found = estimate_fit("m", None, tokens=1000, shapes=shapes, context=11, teacher_model="t", adapt_epochs=3,
                         teacher="knn-lm", epochs=1, beta=0.25)  # fmt: skip
    names = ["corpus", "adapted", "datastore", "distributions", "teacher knn-lm", "training", "memory"]
    assert [entry.name for entry in found.parts] == names
    alone = part(estimate_fit("t", None, tokens=1000, shapes=shapes, context=11, epochs=3), "training")
    adapted = part(found, "adapted")
    assert (adapted.flops, adapted.what) == (alone.flops, alone.what)
    assert adapted.disk == alone.disk + 899 * (3 + 6)  # the text as a teacher: a token and its probability a row
    assert 3 * found.steps == estimate_fit("t", None, tokens=1000, shapes=shapes, context=11, epochs=3).steps
    short = estimate_fit("m", None, tokens=1000, shapes=shapes, context=11, adapt_epochs=3, max_steps=2)
    assert part(short, "adapted").what == part(short, "training").what  # both end after two steps
    with pytest.raises(MemdecError, match="asks no model"):
        small(adapt_epochs=1, teacher="one-hot")


def test_an_index_looks_at_a_part_of_the_rows():
    shapes = {"m": {**GPT2, "n_embd": 64, "vocab_size": 70_000}}
    costs = {}
    for backend in ("exact", "flat", "ivfflat", "ivfpq"):
        found = estimate_fit("m", None, tokens=10**6, shapes=shapes, context=11, backend=backend)
        costs[backend] = part(found, "distributions")
    assert costs["exact"].flops == costs["flat"].flops > 8 * costs["ivfflat"].flops > 8 * costs["ivfpq"].flops
    rows = 899_999
    exact = rows * (100 * 4 + 6)  # ids of a vocabulary above 65536 take three bytes
    sizes = {backend: cost.disk - exact for backend, cost in costs.items()}
    assert sizes == {"exact": 0, "flat": rows * 4 * 64, "ivfflat": rows * (4 * 64 + 8), "ivfpq": rows * (8 + 8)}


def test_the_bytes_are_those_of_a_real_run(tiny_model_dir, tiny_corpus_dir, tmp_path):
    """A fit of the tiny model, its folders beside the estimate; only the tokens a row had to be told."""
    from memdec.pipeline.fit import fit
    from memdec.stores.distribution_store import DistributionStore

    options: dict[str, Any] = {"context": 32, "k": 16, "max_steps": 2, "fractions": (0.7, 0.15, 0.15), "device": "cpu"}
    out = tmp_path / "run"
    fit(tiny_model_dir, tiny_corpus_dir, out, dtype="float32", tensorboard=False, **options)
    store = DistributionStore.open(out / "distributions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIRS", round(store.nnz / store.num_rows))
        found = estimate_fit(tiny_model_dir, tiny_corpus_dir, dtype="float32", **options)
    counted = json.loads((out / "corpus" / "manifest.json").read_text())["results"]["tokens"]
    assert sum(found.tokens.values()) == sum(counted.values())
    for name, tolerance in (("corpus", 0.2), ("datastore", 0.15), ("distributions", 0.2), ("memory", 0.3)):
        files = [path for path in (out / name).rglob("*.safetensors") if path.stem != "documents"]
        size = sum(path.stat().st_size for path in files)
        # The shares of the documents are not exactly those of the tokens, and a file has a header.
        assert size == pytest.approx(part(found, name).disk, rel=tolerance), name
    steps = json.loads((out / "training" / "training.json").read_text())["results"]["step"]
    assert steps <= found.steps == 2


def refuse(source: Any) -> None:
    raise MemdecError(f"no hub, so no {source}")


def test_tokens_are_counted(tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch):
    texts = ["The court denied it.", "A clerk, twice.", "The court denied it.", " \n"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    expected = sum(len(tiny_tokenizer(text)["input_ids"]) + 1 for text in texts[:2])
    assert count_tokens(tmp_path, tiny_model_dir) == (expected, "the tokens of the text were counted")
    # Of a long text the head only; these two documents are too like each other for the guess to be far off.
    monkeypatch.setattr(module, "COUNTED_CHARACTERS", 10)
    guess, how = count_tokens(tmp_path, tiny_model_dir)
    assert abs(guess - expected) <= 6 and "first 20 characters" in how
    monkeypatch.setattr(module, "load_tokenizer", refuse)
    guess, how = count_tokens(tmp_path, "none/such")
    assert guess == round(35 / 4) + 2 and "not at hand" in how


def test_where_the_number_of_tokens_comes_from(tmp_path, tiny_model_dir, tiny_corpus_dir, monkeypatch):
    shapes = {"m": GPT2}
    given = estimate_fit("m", tiny_corpus_dir, tokens=500, stated_tokens=9, shapes=shapes, context=11)
    assert sum(given.tokens.values()) == 500
    counted = estimate_fit(tiny_model_dir, tiny_corpus_dir, stated_tokens=9, context=11)
    assert sum(counted.tokens.values()) == count_tokens(tiny_corpus_dir, tiny_model_dir)[0]
    stated = estimate_fit("m", "hf:somewhere", stated_tokens=2000, shapes=shapes, context=11, max_tokens=1500)
    assert sum(stated.tokens.values()) == 1500 and "--max-tokens 1,500" in " ".join(stated.assumptions)
    monkeypatch.setattr(module, "load_tokenizer", refuse)
    # With texts of their own to validate and test on, all of the source trains.
    own = estimate_fit("m", None, tokens=900, shapes=shapes, context=11, validation="hf:v", test=str(tiny_corpus_dir))
    assert own.tokens["train"] == 900 and own.tokens["validation"] == 32769 and own.tokens["test"] > 1000
    with pytest.raises(MemdecError, match="--tokens"):
        estimate_fit("m", "hf:somewhere", shapes=shapes)


def test_the_json_has_everything():
    found = small(on="a100")
    content = json.loads(found.to_json())
    assert content["format"] == "memdec.estimate" and content["device"]["name"] == "a100"
    assert content["total"] == {"flops": found.flops, "hours": found.hours, "disk": found.disk}
    assert [entry["name"] for entry in content["parts"]] == [entry.name for entry in found.parts]
    assert "40% of one NVIDIA A100's peak" in content["assumptions"][0]
    assert found.to_json() == small(on="a100").to_json()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "abacus"}, "--on is 'abacus'; wanted one of h100"),
        ({"utilisation": 1.5}, "--utilisation is 1.5"),
        ({"schedule": "square"}, "schedule is 'square'"),
        ({"teacher": "parrot"}, "--teacher is 'parrot'"),
        ({"backend": "hnsw"}, "backend"),
        ({"context": 99}, "the teacher has 64. Use --context 65 or less"),
        ({"fractions": (0.0, -0.5, 0.5)}, "fractions"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(MemdecError) as raised:
        small(**options)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"model_type": "abacus"}, "knows no model_type 'abacus'"),
        ({"model_type": "gpt2", "n_layers": 3}, "a configuration of gpt2 has no n_layers. Did you mean n_layer?"),
        ({"model_type": "t5"}, "is of no causal LM"),
    ],
)
def test_shapes_that_are_none(shape, said):
    with pytest.raises(MemdecError) as raised:
        read_shape("m", {"m": shape})
    assert said in str(raised.value)


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MemdecError, match="does not exist"):
        read_shape(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MemdecError, match="no configuration that can be read"):
        read_shape(tmp_path / "empty")


def test_a_folder_goes_before_a_shape(tiny_llama, tmp_path):
    folder = saved(tiny_llama(), tmp_path / "model")
    assert read_shape(folder, {str(folder): GPT2}) == read_shape(folder) != read_shape("m", {"m": GPT2})


def test_operations_of_a_trunk():
    assert Shape(1, 2, 3, 4, 5, 6, None).trunk_flops(2, 10) == 2 * (2 * 2 + 4 * 3 * 5 * 10)
