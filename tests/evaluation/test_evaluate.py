"""The whole evaluation on tiny models, each figure against a loop that computes it from full softmaxes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from memdec.errors import MemdecError
from memdec.evaluation.evaluate import evaluate, pieces_of
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.report import render_report
from memdec.pipeline.embed import model_fingerprint
from memdec.readable import number
from memdec.stores.manifest import Manifest

ALPHA, CONTEXT = 0.35, 48  # as tests/evaluation/conftest.py has it
STRIDE = 24


@pytest.fixture(scope="module")
def result(tiny_run):
    return evaluate(
        tiny_run.base,
        tiny_run.memory,
        tiny_run.corpus,
        compare=("base", "memory"),
        context=CONTEXT,
        stride=STRIDE,
        dtype="float32",
        device="cpu",
        held_out_prompts=2,
        prompts=["The court granted"],
        new_tokens=6,
        shown_tokens=100,
        notes=["A note."],
    )


def probabilities(model, tokens: list[int]) -> torch.Tensor:
    """p(token | the window that scores it) of tokens[1:], float64, by one plain forward a window."""
    found = []
    for window in range(math.ceil(max(0, len(tokens) - CONTEXT) / STRIDE) + 1):
        start = window * STRIDE
        stop = min(start + CONTEXT, len(tokens))
        first = 1 if window == 0 else start - STRIDE + CONTEXT  # the first position that no earlier window scored
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[start : stop - 1]])).logits[0].double()
        found += [logits[p - 1 - start].softmax(-1)[tokens[p]] for p in range(first, stop)]
    return torch.stack(found)


def test_perplexities_are_those_of_full_softmaxes(result, tiny_run):
    tokens = load_held_out(tiny_run.corpus, tiny_run.tokenizer).tokens.tolist()
    base = probabilities(tiny_run.base_model, tokens)
    memory = probabilities(tiny_run.memory_model, tokens)
    assert len(base) == len(tokens) - 1 == result.text["scored"]["sliding window"]
    truth = {"base": base, "memory": memory, "base+memory": ALPHA * memory + (1 - ALPHA) * base}
    for method, found in truth.items():
        expected = math.exp(-float(found.log().mean()))
        assert result.measure(method).perplexity == pytest.approx(expected, rel=1e-4), method
    gain = float((truth["base+memory"].log() - base.log()).mean())
    assert result.measure("base+memory").relative == pytest.approx(math.exp(-gain) - 1, rel=1e-3)


def test_per_document_figures_are_those_of_documents_alone(result, tiny_run):
    """Each document by itself, after end-of-text: the tokenizer has no beginning-of-text."""
    held_out = load_held_out(tiny_run.corpus, tiny_run.tokenizer)
    total = words = 0.0
    num_bytes = tokens = 0
    for index in range(held_out.num_documents):
        start, stop = held_out.document_starts[index : index + 2].tolist()
        ids = held_out.tokens[start : stop - 1].tolist()
        text = tiny_run.tokenizer.decode(ids)
        words += len(text.split(" ")) + text.count("\n")  # a newline stands only at the end, and adds an empty word
        num_bytes += len(text.encode())
        tokens += len(ids)
        stream = [0, *ids]
        for block in range(0, len(ids), CONTEXT):
            end = min(block + CONTEXT, len(ids))
            first = max(0, end - CONTEXT)
            with torch.no_grad():
                logits = tiny_run.base_model(input_ids=torch.tensor([stream[first:end]])).logits[0].double()
            total -= sum(float(logits[j - first].log_softmax(-1)[ids[j]]) for j in range(block, end))
    figures = result.measure("base").per_document
    assert figures["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(total / num_bytes), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-4)
    assert figures["token_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_the_curve_joins_base_and_memory_through_the_recommended_alpha(result):
    curve = dict(map(tuple, result.alpha_curve))
    assert curve[0.0] == pytest.approx(result.measure("base").perplexity)
    assert curve[1.0] == pytest.approx(result.measure("memory").perplexity)
    assert curve[ALPHA] == pytest.approx(result.measure("base+memory").perplexity)
    assert result.settings["alpha"] == ALPHA and "validation" in result.settings["alpha_source"]


def test_the_files_hold_the_figures_and_no_path_of_this_machine(result, tiny_run, tmp_path):
    paths = result.save(tmp_path / "evaluation")
    text = paths["json"].read_text()
    content = json.loads(text)
    assert content["format"] == "memdec.evaluation" and content["notes"] == ["A note."]
    assert content["measures"][0]["perplexity"] == result.measure("base").perplexity
    assert str(tiny_run.base.parent) not in text and str(tmp_path) not in text
    saved = load_file(paths["log_probs"])
    for name in ("base", "memory", "base+memory"):
        assert math.exp(-float(saved[name].double().nanmean())) == pytest.approx(
            result.measure(name).perplexity, rel=1e-5
        )
    page = paths["report"].read_text()
    assert number(result.measure("base+memory").perplexity) in page
    assert str(tiny_run.base.parent) not in page


def test_shown_tokens_spell_the_text_and_carry_its_probabilities(result, tiny_run):
    held_out = load_held_out(tiny_run.corpus, tiny_run.tokenizer)
    document = result.shown[0]
    ids = held_out.document(0) if hasattr(held_out, "document") else held_out.tokens
    count = len(document["tokens"])
    assert "".join(t["text"] for t in document["tokens"]) == tiny_run.tokenizer.decode(ids[:count])
    assert document["tokens"][0]["base"] is None  # the first token of the stream is predicted by nothing
    assert document["tokens"][5]["base"] == pytest.approx(float(result.log_probs["base"][4]), abs=1e-3)
    assert sum(len(d["tokens"]) for d in result.shown) == 100


def test_continuations_are_greedy_choices_of_base_and_of_mixture(result, tiny_run):
    assert len(result.generations) == 3
    entry = result.generations[0]
    assert entry["prompt"] == "The court granted" and "truth" not in entry
    ids = tiny_run.tokenizer("The court granted", add_special_tokens=False)["input_ids"]
    for name, alpha in (("base", 0.0), ("base+memory", ALPHA)):
        stream = list(ids)
        for _ in range(6):
            with torch.no_grad():
                base, memory = (
                    model(input_ids=torch.tensor([stream])).logits[0, -1].double().softmax(-1)
                    for model in (tiny_run.base_model, tiny_run.memory_model)
                )
            stream.append(int((alpha * memory + (1 - alpha) * base).argmax()))
            if stream[-1] == 0:
                break
        assert entry[name] == tiny_run.tokenizer.decode(stream[len(ids) :], skip_special_tokens=True), name
    assert all("truth" in entry for entry in result.generations[1:])


def test_only_the_corpus_that_the_memory_was_made_of_is_called_unseen(result, tiny_run, tmp_path):
    """The same words as a file: nothing says whether training had them, and the page does not say so either."""
    unseen = "neither the datastore nor the memory has seen"
    assert result.text["unseen"] and unseen in render_report(json.loads(result.to_json()))
    text = tmp_path / "text.txt"
    text.write_text(tiny_run.tokenizer.decode(load_held_out(tiny_run.corpus, tiny_run.tokenizer).tokens))
    found = evaluate(tiny_run.base, tiny_run.memory, text, compare=("memory",), context=CONTEXT, stride=STRIDE,
                     dtype="float32", device="cpu", per_document=False)  # fmt: skip
    assert not found.text["unseen"] and unseen not in render_report(json.loads(found.to_json()))


@pytest.fixture
def distributions_folder(tmp_path):
    """Only the manifest of a distributions artefact: k, T and λ are all that evaluation takes from it."""
    fields, folder = {"k": 20}, tmp_path / "distributions"
    manifest = Manifest.start(folder, format="memdec.distributions", version=1, fields=fields)
    manifest.results.update(temperature=30.0, knn_lm={"weight": 0.4})
    manifest.save(folder)
    return folder


@pytest.mark.parametrize("settings", ["from the distributions", "chosen"])
def test_knn_lm_is_a_brute_force_search_over_all_training_rows(tiny_run, distributions_folder, settings):
    """Keys by a hook, distances in float64; T and λ from the manifest, or as the datastore's validation rows decide."""
    result = evaluate(
        tiny_run.base,
        None,
        tiny_run.corpus,
        compare=("base", "knn-lm"),
        datastore=tiny_run.datastore,
        distributions=distributions_folder if settings == "from the distributions" else None,
        context=CONTEXT,
        stride=STRIDE,
        per_document=False,
        dtype="float32",
        device="cpu",
        shown_tokens=0,
    )
    knn = result.settings["knn"]
    assert 0 < knn["weight"] <= 1 and knn["temperature"] > 0 and knn["source"].startswith(settings)
    if settings != "chosen":
        assert (knn["k"], knn["temperature"], knn["weight"]) == (20, 30.0, 0.4)
    tokens = load_held_out(tiny_run.corpus, tiny_run.tokenizer).tokens.tolist()
    from memdec.stores.corpus import Corpus

    train = Corpus.open(tiny_run.corpus).split("train").tokens.tolist()
    stored, values = brute_keys(tiny_run.base_model, train, CONTEXT, CONTEXT - 1)
    queries, targets = brute_keys(tiny_run.base_model, tokens, CONTEXT, STRIDE)
    distances = torch.cdist(queries, stored).square()
    k = min(knn["k"], len(stored))
    nearest, ids = distances.topk(k, largest=False)
    weights = (-nearest / knn["temperature"]).softmax(-1)
    found = (weights * (values[ids] == targets[:, None])).sum(-1)
    base = result.log_probs["base"].double().exp()
    expected = (knn["weight"] * found + (1 - knn["weight"]) * base).log()
    # Keys are rounded to float16 after forwards in other batches, so the k-th neighbour may be another in a row or two.
    close = (result.log_probs["knn-lm"].double() - expected).abs() < 5e-3
    assert close.double().mean() > 0.99


def test_keys_of_another_model_are_no_datastore_for_this_one(tiny_run):
    """The memory's shapes are the base's, so that a search would find something."""
    with pytest.raises(MemdecError, match="holds keys of another model"):
        evaluate(tiny_run.memory, None, tiny_run.corpus, compare=("knn-lm",), datastore=tiny_run.datastore,
                 context=CONTEXT, stride=STRIDE, dtype="float32", device="cpu")  # fmt: skip


def test_the_datastores_model_is_known_in_a_wider_number_type_too(tiny_llama):
    model = tiny_llama()
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    for wide in (model, copy.deepcopy(narrow).float()):
        assert model_fingerprint(wide, torch.bfloat16) == model_fingerprint(narrow)
    assert model_fingerprint(tiny_llama(seed=5), torch.bfloat16) != model_fingerprint(narrow)


def brute_keys(model, tokens: list[int], context: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys rounded to float16 as the datastore keeps them, values) of every row, window by window."""
    keys: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    try:
        done, start = 0, 0
        while done < len(tokens) - 1:
            stop = min(start + context, len(tokens))
            seen.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([tokens[start : stop - 1]]))
            keys.append(seen[0][done - start :])
            done, start = stop - 1, start + stride
    finally:
        handle.remove()
    return torch.cat(keys).half().double(), torch.tensor(tokens[1:])


def test_text_files_are_measured_too(tiny_run, tmp_path):
    (tmp_path / "held-out.txt").write_text("The court granted the lease before noon. A tenant denied a motion twice.\n")
    result = evaluate(tiny_run.base, tiny_run.memory, tmp_path / "held-out.txt", compare=("memory",), alpha=1.0)
    assert result.measure("base+memory").perplexity == pytest.approx(result.measure("memory").perplexity)
    assert result.copied_share is None and result.settings["alpha_source"] == "given"
    assert result.text["words"] == 14  # 13 words, and the empty one after the last newline


def test_max_tokens_measures_the_beginning(tiny_run):
    result = evaluate(tiny_run.base, None, tiny_run.corpus, compare=("base",), max_tokens=100, context=32, stride=16)
    assert result.text["tokens"] <= 100 < result.text["tokens_found"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": None}, "--memory DIR"),
        ({"compare": ("base", "knn-lm")}, "--datastore DIR"),
        ({"compare": ("base", "rag")}, "got rag"),
        ({"alpha": 1.5}, "from 0"),
        ({"context": 1}, "context"),
        ({"text": "nothing-here.txt"}, "does not exist"),
        ({"memory": "no-memory"}, "no-memory"),
    ],
)
def test_what_is_missing_or_wrong_is_said(change, said, tiny_run):
    options = {"memory": tiny_run.memory, "text": tiny_run.corpus, "compare": ("base", "memory"), **change}
    with pytest.raises(MemdecError, match=said):
        evaluate(tiny_run.base, options.pop("memory"), options.pop("text"), **options)


def test_another_tokenizers_corpus_is_refused(tiny_run, make_tokenizer, tiny_llama, tmp_path):
    make_tokenizer(seed=3).save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(MemdecError, match="another tokenizer"):
        evaluate(tmp_path, None, tiny_run.corpus, compare=("base",))
    with pytest.raises(MemdecError, match=r"same size|differ|other"):
        evaluate(tmp_path, tiny_run.memory, tiny_run.corpus, compare=("memory",))


def test_characters_spread_over_tokens_appear_whole(tiny_run):
    text = "naïve — “quoted” 日本"
    ids = tiny_run.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tiny_run.tokenizer, ids)
    assert len(pieces) == len(ids) > len(text) and "".join(pieces) == text and "\ufffd" not in "".join(pieces)
