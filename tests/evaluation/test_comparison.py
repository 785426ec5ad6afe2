"""The comparison with every rival, on tiny models: its figures against forwards made here, window by window."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from memdec.errors import MemdecError
from memdec.evaluation.comparison import METHODS, compare
from memdec.evaluation.comparison_report import latex_table, markdown_table, render_comparison
from memdec.evaluation.rivals import RIVALS, matrix_parameters, rows_of
from memdec.pipeline.fit import fit
from memdec.stores.corpus import Corpus

CONTEXT, STRIDE = 48, 24
ALPHAS = [index / 100 for index in range(101)]
OPTIONS = {
    "context": CONTEXT,
    "stride": STRIDE,
    "latency_tokens": 0,
    "dtype": "float32",
    "validation_tokens": 10**6,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, make_text):
    """A memory that was fitted, a text outside its domain, and the comparison of everything."""
    root = tmp_path_factory.mktemp("comparison")
    (root / "text").mkdir()
    for index in range(24):
        (root / "text" / f"d{index:02d}.txt").write_text(make_text(10, index))
    (root / "general.txt").write_text("Numbers, 1 2 3 and 4, are not what the court reads before noon. " * 8)
    fit(tiny_model_dir, root / "text", root / "run", fractions=(0.6, 0.2, 0.2), context=CONTEXT, k=16, epochs=2,
        learning_rate=3e-3, dtype="float32", teacher="knn")  # fmt: skip
    result = compare(tiny_model_dir, root / "run" / "memory", root / "run" / "corpus", root / "out",
                     general=root / "general.txt", **OPTIONS)  # fmt: skip
    return SimpleNamespace(root=root, base=tiny_model_dir, result=result)


def log_probs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """float64 log-probs of every token but the first, each from the window that the protocol gives it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = torch.full((tokens.numel() - 1,), math.nan, dtype=torch.float64)
    start = 0
    while True:
        stop = min(start + CONTEXT, tokens.numel())
        with torch.no_grad():
            scores = model(input_ids=tokens[None, start : stop - 1].long()).logits[0].double().log_softmax(1)
        for row in range(start, stop - 1):
            if math.isnan(found[row]):
                found[row] = scores[row - start, tokens[row + 1]]
        if stop == tokens.numel():
            return found
        start += STRIDE


def perplexity(scores: torch.Tensor) -> float:
    return math.exp(-float(scores.mean()))


def mixed(base: torch.Tensor, memory: torch.Tensor, alpha: float) -> torch.Tensor:
    return (alpha * memory.exp() + (1 - alpha) * base.exp()).log()


def splits(run, name: str) -> torch.Tensor:
    return torch.as_tensor(Corpus.open(run.root / "run" / "corpus").split(name).tokens).clone()


def folder_of(run, name: str) -> Path:
    if name == "base":
        return run.base
    places = {"memory": "run/memory", "dapt": "out/rivals/dapt/alone", "second-model": "out/rivals/dapt/memory"}
    return run.root / places.get(name, f"out/rivals/{name}/memory")


@pytest.mark.parametrize("method", ["base", "dapt", "lora", "memory-alone"])
def test_models_alone_against_forwards_of_every_window(run, method):
    name = "memory" if method == "memory-alone" else method
    expected = perplexity(log_probs(folder_of(run, name), splits(run, "test")))
    assert run.result.entry(method).perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "pair"),
    [
        ("memory", ("base", "memory")),
        ("second-model", ("base", "second-model")),
        ("lm-memory", ("base", "lm-memory")),
        ("dapt+memory", ("dapt", "memory")),
    ],
)
def test_mixtures_are_tuned_on_validation_and_measured_on_test(run, method, pair):
    first, second = (folder_of(run, name) for name in pair)
    validation, test = splits(run, "validation"), splits(run, "test")
    on_validation = [log_probs(folder, validation) for folder in (first, second)]
    curve = {alpha: perplexity(mixed(*on_validation, alpha)) for alpha in ALPHAS}
    entry = run.result.entry(method)
    assert curve[entry.weight] == pytest.approx(min(curve.values()), rel=1e-5)
    expected = perplexity(mixed(log_probs(first, test), log_probs(second, test), entry.weight))
    assert entry.perplexity == pytest.approx(expected, rel=1e-4)


def test_the_knn_lm_searches_every_key(run):
    """The definition of the kNN-LM, token by token over all keys, on the leading test tokens."""
    from memdec.modeling.keys import hidden_and_keys
    from memdec.stores.datastore import Datastore

    store = Datastore.open(run.root / "run" / "datastore")
    keys, values = store.keys(0, store.num_rows).double(), torch.as_tensor(store.values(0, store.num_rows)).long()
    settings = run.result.entry("knn-lm").settings
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32).eval()
    tokens = splits(run, "test")
    queries = hidden_and_keys(model, tokens[None, : CONTEXT - 1])[1][0].half().double()
    base = log_probs(run.base, tokens)[: CONTEXT - 1]
    scores = run.result.log_probs["knn-lm/test"][: CONTEXT - 1].double()
    for row in range(CONTEXT - 1):
        distances = (keys - queries[row]).square().sum(1)
        near = distances.topk(settings["k"], largest=False).indices
        weights = (-distances[near] / settings["temperature"]).softmax(0)
        q = float(weights[values[near] == int(tokens[row + 1])].sum())
        p = settings["weight"] * q + (1 - settings["weight"]) * float(base[row].exp())
        assert float(scores[row]) == pytest.approx(math.log(p), abs=2e-3)


def test_nothing_is_forgotten_at_alpha_zero(run):
    assert run.result.alpha_zero_is_base is True
    assert run.result.entry("base").general_relative == 0
    assert run.result.entry("dapt").general_relative != 0


def test_all_methods_are_there_on_the_same_tokens(run):
    result = run.result
    assert {entry.method for entry in result.entries} == {*METHODS, "memory-alone"}
    scored = {name: ~part.isnan() for name, part in result.log_probs.items() if name.endswith("/test")}
    assert len(scored) == len(result.entries)
    assert all(torch.equal(part, scored["base/test"]) for part in scored.values())
    assert int(scored["base/test"].sum()) == splits(run, "test").numel() - 1


def test_the_memory_against_each_row_is_paired(run):
    """The ratio by the definition, and an interval by drawing runs of tokens that both have read."""
    result = run.result
    ours = result.log_probs["memory/test"].double()
    assert result.entry("memory").memory_relative is None and result.entry("memory").memory_interval is None
    for entry in result.entries:
        if entry.method == "memory":
            continue
        theirs = result.log_probs[f"{entry.method}/test"].double()
        both = ~(ours.isnan() | theirs.isnan())
        gain = (ours - theirs)[both]
        assert entry.memory_relative == pytest.approx(math.exp(-float(gain.mean())) - 1, rel=1e-5, abs=1e-7)
        low, high = entry.memory_interval
        runs = [math.expm1(-float(part.mean())) for part in gain.split(256)]  # too few documents to draw these
        assert min(runs) - 1e-6 <= low <= entry.memory_relative <= high <= max(runs) + 1e-6
    base = result.entry("base")
    assert base.memory_interval == result.entry("memory").interval


def test_no_rival_spends_more_than_the_memory(run):
    result = run.result
    steps = result.budget["steps"]
    for name in RIVALS:
        rival = result.settings["rivals"][name]
        assert 0 < rival["steps"] <= steps
        assert rival["flops"] <= result.budget["total"]
    model = AutoModelForCausalLM.from_pretrained(run.base)
    rows = splits(run, "train").numel() - 1
    head = 384 * 32
    blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert matrix_parameters(model) == head + blocks
    assert result.budget["search"] == 2 * rows * rows * 32
    assert result.budget["training"] == pytest.approx(6 * (head + blocks) * 2 * rows)


def test_dapt_and_the_second_model_are_one_training_judged_twice(run, tmp_path):
    """Each keeps, byte for byte, what a training of its own with its own judge keeps."""
    from memdec.pipeline.train import train_memory

    found = run.result.settings["rivals"]
    assert sorted(path.name for path in (run.root / "out" / "rivals").iterdir()) == ["dapt", "lm-memory", "lora"]
    corpus, shared = run.root / "run" / "corpus", {"epochs": 2, "learning_rate": 3e-3, "dtype": "float32", "beta": 0.0}
    for name, judge in (("dapt", "alone"), ("second-model", "mixture")):
        alone = train_memory(run.base, corpus, run.root / "run" / "distributions", tmp_path / name, judge=judge,
                             tensorboard=False, **shared)  # fmt: skip
        weights = [folder / "model.safetensors" for folder in (alone, folder_of(run, name))]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert found[name]["steps"] == run.result.budget["steps"]
    # With a rate of its own the second model is a training of its own.
    other = compare(run.base, run.root / "run" / "memory", corpus, tmp_path / "out", methods=["dapt", "second-model"],
                    learning_rates={"second-model": [1e-3]}, general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert {path.name for path in (tmp_path / "out" / "rivals").iterdir()} == {"dapt", "second-model-0.001"}
    assert other.settings["rivals"]["second-model"]["settings"]["learning_rate"] == 1e-3


def test_of_several_learning_rates_validation_text_chooses(run, tmp_path):
    """Each rate is a training of its own; what is kept is best on validation text, alone (dapt) or mixed."""
    from memdec.pipeline.train import train_memory

    corpus, own, other = run.root / "run" / "corpus", 3e-3, 1e-4
    result = compare(run.base, run.root / "run" / "memory", corpus, tmp_path / "out", methods=["dapt", "second-model"],
                     learning_rates={"dapt": [other, own], "second-model": [other, own]},
                     general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert {path.name for path in (tmp_path / "out" / "rivals").iterdir()} == {"dapt", "dapt-0.0001"}
    validation = splits(run, "validation")
    base = log_probs(run.base, validation)
    for name, kept in (("dapt", "alone"), ("second-model", "memory")):
        found = {}
        for rate in (own, other):
            made = train_memory(run.base, corpus, run.root / "run" / "distributions", tmp_path / f"{name}-{rate}",
                                judge={"alone": "alone", "memory": "mixture"}[kept], tensorboard=False, beta=0.0,
                                epochs=2, learning_rate=rate, dtype="float32")  # fmt: skip
            alone = log_probs(made, validation)
            mixtures = min(perplexity(mixed(base, alone, alpha)) for alpha in ALPHAS)
            found[f"{rate:g}"] = perplexity(alone) if kept == "alone" else mixtures
        rival = result.settings["rivals"][name]
        # Training scores other windows of the same text, so not the same figures to the last place.
        assert rival["settings"]["tried"] == pytest.approx(found, rel=0.05)
        best = min(found, key=found.get)
        assert rival["settings"]["learning_rate"] == float(best) == own
        assert rival["folder"] == f"dapt/{kept}"
    page = render_comparison(json.loads(result.to_json()))
    assert "validation perplexity by learning rate: 0.0001 " in page


def test_patience_ends_memory_teacher_and_rivals_alike_and_only_what_was_done_is_billed(run, tmp_path):
    """With a rate that changes nothing no evaluation is better than the first."""
    fit(run.base, run.root / "text", tmp_path / "run", fractions=(0.6, 0.2, 0.2), context=CONTEXT, epochs=2, top_k=8,
        learning_rate=1e-12, dtype="float32", teacher="lm", adapt_epochs=2, eval_every=4, patience=1)  # fmt: skip
    result = compare(run.base, tmp_path / "run" / "memory", tmp_path / "run" / "corpus", tmp_path / "out",
                     methods=["dapt", "memory"], general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    budget, rivals, whole = result.budget, result.settings["rivals"], run.result.budget
    assert budget["steps"] == budget["adaptation_steps"] == rivals["dapt"]["steps"] == 4 < whole["steps"]
    part = 4 / whole["steps"]
    assert budget["training"] == budget["adaptation"] == pytest.approx(part * whole["training"], rel=0.01)
    assert rivals["dapt"]["flops"] == pytest.approx(part * run.result.settings["rivals"]["dapt"]["flops"], rel=1e-3)


@pytest.fixture(scope="module")
def adapted_run(run, tmp_path_factory):
    """A memory whose teacher was adapted first, for two epochs more, and its comparison."""
    root = tmp_path_factory.mktemp("adapted")
    fit(run.base, run.root / "text", root / "run", fractions=(0.6, 0.2, 0.2), context=CONTEXT, k=16, epochs=2,
        learning_rate=3e-3, dtype="float32", teacher="knn-lm", adapt_epochs=2)  # fmt: skip
    said: list[str] = []
    methods = ["knn-lm", "dapt", "second-model", "memory"]
    result = compare(run.base, root / "run" / "memory", root / "run" / "corpus", root / "out", methods=methods,
                     general=run.root / "general.txt", say=said.append, **OPTIONS)  # fmt: skip
    return SimpleNamespace(root=root, result=result, said="\n".join(said))


def test_the_adaptation_is_in_the_bill(run, adapted_run):
    """Its steps and operations are the memory's too, so the rivals may spend them."""
    budget, plain = adapted_run.result.budget, run.result.budget
    assert budget["adaptation"] == budget["training"] == plain["training"]
    assert budget["adaptation_steps"] == budget["steps"] == plain["steps"]
    assert budget["total"] == pytest.approx(plain["total"] + budget["adaptation"])
    rivals = adapted_run.result.settings["rivals"]
    for name in ("dapt", "second-model"):
        each = rivals[name]["flops"] / rivals[name]["steps"]
        assert rivals[name]["steps"] == min(2 * budget["steps"], budget["total"] // each)
        assert rivals[name]["steps"] > budget["steps"] and rivals[name]["flops"] <= budget["total"]
    assert f"{budget['total']:.2e} operations (adapting its teacher {budget['adaptation']:.1e}" in adapted_run.said
    assert f"adaptation {budget['adaptation']:.1e}" in markdown_table(json.loads(adapted_run.result.to_json()))


def test_the_adapted_teacher_has_rows_of_its_own(run, adapted_run):
    result, folder = adapted_run.result, adapted_run.root / "run" / "adapted" / "memory"
    test, validation = splits(run, "test"), splits(run, "validation")
    assert result.entry("adapted-alone").perplexity == pytest.approx(perplexity(log_probs(folder, test)), rel=1e-4)
    pair = [log_probs(model, validation) for model in (run.base, folder)]
    curve = {alpha: perplexity(mixed(*pair, alpha)) for alpha in ALPHAS}
    assert curve[result.entry("adapted").weight] == pytest.approx(min(curve.values()), rel=1e-5)
    page = render_comparison(json.loads(result.to_json()))
    assert "base + adapted teacher" in page and "base + adapted teacher" not in render_comparison(
        json.loads(run.result.to_json())
    )


def test_the_knn_lm_of_an_adapted_run_searches_the_base_s_own_keys(run, adapted_run):
    """The run's datastore is the adapted model's; the rival's is made here, and is what `fit` with the base makes."""
    from memdec.stores.datastore import Datastore

    places = (adapted_run.root / "out" / "rivals" / "knn-lm", run.root / "run", adapted_run.root / "run")
    made, plain, of_teacher = (Datastore.open(place / "datastore").manifest.checksum for place in places)
    assert made == plain != of_teacher
    ours, theirs = adapted_run.result.entry("knn-lm"), run.result.entry("knn-lm")
    assert ours.settings["k"] == theirs.settings["k"]
    assert ours.settings["temperature"] == theirs.settings["temperature"]
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    assert "kNN-LM: k = 16, T = " in adapted_run.said
    # A second call embeds nothing anew; a datastore that is named is taken or refused, never replaced.
    stamps = {path: path.stat().st_mtime_ns for path in places[0].rglob("*.safetensors")}
    again = compare(run.base, adapted_run.root / "run" / "memory", adapted_run.root / "run" / "corpus",
                    adapted_run.root / "out", methods=["knn-lm"], general=run.root / "general.txt",
                    **OPTIONS)  # fmt: skip
    assert again.entry("knn-lm").perplexity == ours.perplexity
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    with pytest.raises(MemdecError, match="holds keys of another model"):
        compare(run.base, adapted_run.root / "run" / "memory", adapted_run.root / "run" / "corpus",
                adapted_run.root / "out", methods=["knn-lm"], datastore=adapted_run.root / "run" / "datastore",
                general=run.root / "general.txt", **OPTIONS)  # fmt: skip


def test_a_memory_without_a_datastore_is_compared_with_the_retriever_too(run, tmp_path):
    fit(run.base, run.root / "text", tmp_path / "run", fractions=(0.6, 0.2, 0.2), context=CONTEXT, epochs=1,
        max_steps=2, dtype="float32", teacher="lm", top_k=8)  # fmt: skip
    result = compare(run.base, tmp_path / "run" / "memory", tmp_path / "run" / "corpus", tmp_path / "out",
                     methods=["knn-lm"], general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert result.entry("knn-lm").settings["k"] == min(1024, splits(run, "train").numel() - 1)
    assert result.entry("knn-lm").perplexity < result.entry("base").perplexity


def test_a_dearer_rival_stops_earlier(run, tiny_llama, tmp_path, make_text, tiny_tokenizer):
    """A base of more blocks than its memory: DAPT of it costs more a step, and is given as many as the bill pays."""
    tiny_llama(layers=12).save_pretrained(tmp_path / "large")
    tiny_tokenizer.save_pretrained(tmp_path / "large")
    fit(tmp_path / "large", run.root / "text", tmp_path / "run", init=run.base, fractions=(0.6, 0.2, 0.2),
        context=CONTEXT, k=16, epochs=2, learning_rate=3e-3, dtype="float32")  # fmt: skip
    result = compare(tmp_path / "large", tmp_path / "run" / "memory", tmp_path / "run" / "corpus", tmp_path / "out",
                     methods=["dapt"], init=run.base, general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    rival = result.settings["rivals"]["dapt"]
    each = rival["flops"] / rival["steps"]
    assert rival["steps"] < result.budget["steps"]
    assert rival["flops"] <= result.budget["total"] < rival["flops"] + each


def test_two_runs_give_the_same_table(run, tmp_path):
    again = compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", tmp_path / "out",
                    general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert figures(again) == figures(run.result)


def figures(result) -> dict:
    """The JSON without what a clock measured."""
    content = json.loads(result.to_json())
    for part in [*content["entries"], *content["settings"]["rivals"].values()]:
        for name in ("seconds", "training_seconds"):
            part.pop(name, None)
    return content


def test_a_second_call_trains_nothing_anew(run):
    stamps = {path: path.stat().st_mtime_ns for path in (run.root / "out" / "rivals").rglob("model.safetensors")}
    compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", run.root / "out",
            methods=["dapt", "lora"], general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert len(stamps) == len(RIVALS)  # dapt and second-model are one training with two models
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_files(run, tmp_path):
    paths = run.result.save(tmp_path / "out")
    content = json.loads(paths["json"].read_text())
    page, markdown, latex = (paths[name].read_text() for name in ("report", "markdown", "latex"))
    assert page == render_comparison(content)
    assert markdown == markdown_table(content) and latex == latex_table(content)
    for entry in run.result.entries:
        assert entry.label in page and entry.label in markdown
        assert (
            f"{entry.perplexity:.2f}" in markdown
            or f"{entry.perplexity:,.0f}" in markdown
            or (f"{entry.perplexity:.1f}" in markdown)
        )
    picture = ElementTree.fromstring(paths["plot"].read_text())
    said = " ".join(picture.itertext())
    assert picture.tag.endswith("svg") and all(entry.label in said for entry in run.result.entries)
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(lines) == len(run.result.entries) + 1
    assert len({line.count("&") for line in lines}) == 1
    assert not any(mark in page for mark in ("http://", "https://", "src=")), "the page must stand alone"


def test_decoding_is_timed_for_every_row(run):
    options = {**OPTIONS, "latency_tokens": 3, "latency_prompts": 1, "latency_repeats": 1}
    result = compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", run.root / "out",
                     general=run.root / "general.txt", **options)  # fmt: skip
    ratios = {entry.method: entry.latency.ratio for entry in result.entries}
    assert ratios.pop("base") == 1.0
    assert all(ratio is not None and ratio > 0 for ratio in ratios.values()), ratios


def test_the_memory_on_other_bases(run, tmp_path, tiny_llama, tiny_tokenizer):
    """One of another size: its perplexity, and the mixture at the α that is best on validation text, by hand."""
    other = tmp_path / "other"
    tiny_llama(layers=3, seed=4).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    result = compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", tmp_path / "out",
                     methods=["base"], other_bases=[other], general=run.root / "general.txt", **OPTIONS)  # fmt: skip
    assert len(result.bases) == 2
    own, found = result.bases
    assert own.perplexity == result.entry("base").perplexity
    assert own.with_memory == pytest.approx(run.result.entry("memory").perplexity, rel=1e-6)
    memory = folder_of(run, "memory")
    validation = [log_probs(folder, splits(run, "validation")) for folder in (other, memory)]
    curve = {alpha: perplexity(mixed(*validation, alpha)) for alpha in ALPHAS}
    assert curve[found.weight] == pytest.approx(min(curve.values()), rel=1e-5)
    test = [log_probs(folder, splits(run, "test")) for folder in (other, memory)]
    assert found.perplexity == pytest.approx(perplexity(test[0]), rel=1e-4)
    assert found.with_memory == pytest.approx(perplexity(mixed(*test, found.weight)), rel=1e-4)
    assert found.with_recommended == pytest.approx(perplexity(mixed(*test, found.recommended_weight)), rel=1e-4)
    assert found.parameters == sum(p.numel() for p in tiny_llama(layers=3).parameters())
    assert "other" in result.save(tmp_path / "files")["report"].read_text()


def test_a_base_of_another_tokenizer_is_refused(run, tmp_path, tiny_llama, make_tokenizer):
    tiny_llama(seed=4).save_pretrained(tmp_path / "other")
    make_tokenizer(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(MemdecError, match="tokenizer"):
        compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", tmp_path / "out",
                methods=["base"], other_bases=[tmp_path / "other"], **OPTIONS)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["base", "nonsense"]}, "--compare knows"),
        ({"methods": ["dapt"], "init": "OTHER"}, "did not start from"),
        ({"methods": ["knn-lm"], "datastore": "NOWHERE"}, "no datastore"),
    ],
)
def test_refusals(run, tmp_path, tiny_llama, tiny_tokenizer, options, words):
    tiny_llama(seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    places = {"OTHER": tmp_path / "other", "NOWHERE": tmp_path / "nowhere"}
    options = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(MemdecError, match=words):
        compare(run.base, run.root / "run" / "memory", run.root / "run" / "corpus", tmp_path / "out",
                general=run.root / "general.txt", **{**OPTIONS, **options})  # fmt: skip
    assert not (tmp_path / "out" / "rivals").exists()


def test_another_corpus_is_refused(run, tmp_path, make_text):
    (tmp_path / "text").mkdir()
    for index in range(24):
        (tmp_path / "text" / f"d{index:02d}.txt").write_text(make_text(10, 100 + index))
    from memdec.pipeline.corpus import build_corpus

    build_corpus(tmp_path / "text", str(run.base), tmp_path / "corpus", fractions=(0.6, 0.2, 0.2))
    with pytest.raises(MemdecError, match="another corpus"):
        compare(run.base, run.root / "run" / "memory", tmp_path / "corpus", tmp_path / "out", methods=["dapt"],
                general=run.root / "general.txt", **OPTIONS)  # fmt: skip


def test_the_rows_of_a_number_of_steps():
    settings = {"batch_size": 2, "gradient_accumulation": 2, "context": 11, "stride": None}
    # 95 rows are ten windows of ten (the last of five), three steps an epoch.
    assert rows_of(settings, 3, 95) == 95
    assert rows_of(settings, 6, 95) == 190
    assert rows_of(settings, 1, 95) == round(95 / 3)
