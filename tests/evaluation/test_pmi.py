"""Scores against full-sequence softmaxes taken by hand, statistics against enumeration, and a run that continues."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from fractions import Fraction

import pytest
import torch

from memdec.errors import MemdecError
from memdec.evaluation import pmi
from memdec.evaluation.pmi import (
    TokenScores,
    Words,
    contexts_of,
    continuation,
    difference_interval,
    evaluate_tasks,
    label_log_probs,
    mcnemar,
    measure_task,
    read_tokens,
    tune_alpha,
    wilson_interval,
    words_of,
)
from memdec.evaluation.tasks import TASKS, Example, Label, Task, TaskRows

ALPHA = 0.35
# In the tiny tokenizer " granted" is one token, and the others are of several; one begins as another does. The second
# label has no word of one token, which would outweigh what the others say about mixing tokens.
LABELS = (
    Label("yes", ("granted", "granted twice", "was granted")),
    Label("no", ("denied", "withdrew without delay")),
)
TASK = Task("motions", "Motions", "{text}\n The motion was", "\n The motion was", LABELS).check()
TEXTS = ["The court heard it", "A tenant forgot", "", "Every juror measured the northern boundary twice"]


@pytest.fixture(scope="module")
def words(tiny_tokenizer):
    return words_of(TASK, tiny_tokenizer)


def spelled(tokenizer, label: Label) -> list[list[int]]:
    return [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in label.words]


def by_hand(models, alpha: float, context: list[int], word: list[int]) -> float:
    """p(word | context): the whole sequence through both models, each token's probabilities mixed, multiplied."""
    probability = 1.0
    with torch.no_grad():
        both = [model(input_ids=torch.tensor([context + word])).logits[0].double().softmax(-1) for model in models]
    for place, token in enumerate(word, len(context) - 1):
        base, memory = (float(one[place, token]) for one in both)
        probability *= alpha * memory + (1 - alpha) * base
    return probability


def label_by_hand(models, alpha: float, context: list[int], found: list[list[int]]) -> float:
    """log of the summed probability of a label's words, none of which may begin with another."""
    apart = [w for w in found if not any(w != v and w[: len(v)] == v for v in found)]
    return math.log(sum(by_hand(models, alpha, context, word) for word in apart))


@pytest.fixture(scope="module")
def scored(words, tiny_run):
    prompts = [TASK.prompt({"text": text}) for text in TEXTS]
    contexts, cut = contexts_of(tiny_run.tokenizer, [TASK.premise, *prompts], 200)
    assert cut == 0
    passes = [
        read_tokens(model, contexts, words, batch_size=3) for model in (tiny_run.base_model, tiny_run.memory_model)
    ]
    return TokenScores(words, *passes, torch.arange(1, 5), torch.tensor([0, 1, 0, 1]), 2), contexts


def test_the_words_are_of_one_token_and_of_several(words, tiny_tokenizer):
    assert len({len(tokens) for tokens in words.tokens}) >= 3 and min(map(len, words.tokens)) == 1
    assert words.tokens == [ids for label in LABELS for ids in spelled(tiny_tokenizer, label)]
    # " granted twice" is part of what " granted" says.
    assert words.counted.tolist() == [True, False, True, True, True]
    # As few forwards as there are beginnings that no longer word has.
    beginnings = {tuple(tokens[:-1]) for tokens in words.tokens}
    needed = [b for b in beginnings if not any(b != other and other[: len(b)] == b for other in beginnings)]
    assert sorted(tuple(behind) for behind, _ in words.forwards) == sorted(needed)


@pytest.mark.parametrize("scoring", ["pmi", "lm"])
@pytest.mark.parametrize(("method", "alpha"), [("base", 0.0), ("memory", 1.0), ("base+memory", ALPHA)])
def test_scores_are_those_of_whole_sequences(method, alpha, scoring, scored, tiny_run):
    found, contexts = scored
    models = (tiny_run.base_model, tiny_run.memory_model)
    scores = found.scores(method, scoring, ALPHA)
    plain = found.scores(method, scoring, ALPHA, first_word_only=True)
    for row, context in enumerate(contexts[1:]):
        for number, label in enumerate(LABELS):
            wanted = spelled(tiny_run.tokenizer, label)
            for value, some in ((scores, wanted), (plain, wanted[:1])):
                expected = label_by_hand(models, alpha, context, some)
                if scoring == "pmi":
                    expected -= label_by_hand(models, alpha, contexts[0], some)
                assert float(value[row, number]) == pytest.approx(expected, abs=2e-4), (row, label.name)


def test_mixing_whole_words_would_be_something_else(scored, words):
    """Guards the test above: on these words the two ways to mix differ by far more than its tolerance."""
    found, _ = scored
    ends = [label_log_probs(found.base, found.memory, alpha, words) for alpha in (0.0, 1.0)]
    sequences = torch.logaddexp(ends[0] + math.log1p(-ALPHA), ends[1] + math.log(ALPHA))
    tokens = label_log_probs(found.base, found.memory, ALPHA, words)
    assert float((sequences - tokens).abs().max()) > 0.01


def test_batches_and_padding_change_nothing(scored, words, tiny_run):
    found, contexts = scored
    for batch_size in (1, 64):
        again = read_tokens(tiny_run.base_model, contexts, words, batch_size=batch_size)
        torch.testing.assert_close(again, found.base, atol=2e-5, rtol=0)


def test_few_logits_at_a_time(scored, words, tiny_run, monkeypatch):
    monkeypatch.setattr(pmi, "LOGITS_BUDGET", 4 * 384 * 2)  # two rows of logits
    again = read_tokens(tiny_run.base_model, scored[1], words)
    torch.testing.assert_close(again, scored[0].base, atol=2e-5, rtol=0)


def test_columns_that_are_no_tokens_do_not_count(words, tiny_llama, scored):
    """A vocabulary padded to 400 columns, of which the tokenizer has 384."""
    wide, narrow = tiny_llama(vocab=400, seed=3), tiny_llama(vocab=384, seed=4)
    state = {k: v[:384] if v.shape[0] == 400 else v for k, v in wide.state_dict().items()}
    narrow.load_state_dict(state)
    contexts = scored[1]
    cut = read_tokens(wide, contexts, words, vocab_size=384)
    torch.testing.assert_close(cut, read_tokens(narrow, contexts, words), atol=2e-5, rtol=0)
    assert float((cut - read_tokens(wide, contexts, words)).abs().max()) > 1e-3


def test_a_model_that_gives_nan_is_named(words, scored, tiny_llama):
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(MemdecError, match="LlamaForCausalLM gave no number"):
        read_tokens(broken, scored[1], words)


@pytest.mark.parametrize("name", TASKS)
def test_words_of_the_nine_tasks_follow_their_prompts(name, tiny_tokenizer):
    """What is scored after a prompt are the tokens that the tokenizer gives prompt and word together."""
    task = TASKS[name]
    words = words_of(task, tiny_tokenizer)
    prompt = task.prompt(dict.fromkeys(task.fields, "The tenant withdrew a motion."))
    (context,), _ = contexts_of(tiny_tokenizer, [prompt], 1000)
    spelling = [word for label in task.labels for word in label.words]
    assert len(words.tokens) == len(spelling)
    for tokens, word in zip(words.tokens, spelling, strict=True):
        assert tiny_tokenizer.decode(context + tokens) == f"{prompt} {word}"
        assert tiny_tokenizer(f"{prompt} {word}", add_special_tokens=False)["input_ids"] == context + tokens
    assert sorted(set(words.label.tolist())) == list(range(len(task.labels)))


def test_where_the_tokenizer_joins_prompt_and_word(tiny_tokenizer):
    """ " granted" is one token; cut inside it, the second half cannot be what the whole adds to the first."""
    assert continuation(tiny_tokenizer, "The court", " granted") == tiny_tokenizer(" granted")["input_ids"]
    assert continuation(tiny_tokenizer, "The court gra", "nted") == tiny_tokenizer("nted")["input_ids"]


def test_two_labels_with_one_word(tiny_tokenizer):
    labels = (Label("a", ("denied", "no")), Label("b", ("no",)))
    with pytest.raises(MemdecError, match=r"motions: b and a both have the word 'no'"):
        words_of(Task("motions", "M", "{text} it is", " it is", labels), tiny_tokenizer)


def test_long_prompts_lose_their_beginning_but_not_the_first_token(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(pad=True)
    tokenizer.bos_token = "<|pad|>"
    bos = tokenizer.bos_token_id
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The court", "The lease " * 20)]
    assert contexts_of(tokenizer, ["The court", "The lease " * 20], 8) == ([plain[0], plain[1][-8:]], 1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", bos)]
    )
    assert tokenizer("The court")["input_ids"][0] == bos
    expected = [[bos, *plain[0]], [bos, *plain[1][-7:]]]
    assert contexts_of(tokenizer, ["The court", "The lease " * 20], 8) == (expected, 1)
    with pytest.raises(MemdecError, match="empty"):
        contexts_of(tokenizer, ["The court", ""], 8)
    with pytest.raises(MemdecError, match="leaves it none"):
        contexts_of(tokenizer, ["The court"], 1)


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (0, 5), (3, 7), (6, 6), (9, 2)])
def test_mcnemar_counts_the_ways_of_fair_coins(wins, losses):
    """All 2^n ways in which n discordant rows can fall, those at least as unequal as the one seen."""
    count = wins + losses
    ways = sum(abs(count - 2 * sum(coins)) >= abs(wins - losses) for coins in itertools.product((0, 1), repeat=count))
    assert mcnemar(wins, losses) == pytest.approx(float(Fraction(ways, 2**count)), rel=1e-12)


def test_mcnemar_of_many_rows():
    """The normal approximation with continuity correction is good to a few percent there."""
    z = (abs(5200 - 5000) - 1) / math.sqrt(10200)
    assert mcnemar(5200, 5000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_wilson_interval_is_the_published_one():
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for correct, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                      (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson_interval(correct, count) == pytest.approx((low, high), abs=6e-5)


def test_the_bootstrap_is_that_of_rows_drawn_one_by_one():
    """Quantiles of 4,000 resamples of 200 rows: their standard error is below 0.002, and 0.01 is five of them."""
    outcomes = torch.tensor([1.0] * 40 + [-1.0] * 25 + [0.0] * 135)
    drawn = torch.randint(200, (4000, 200), generator=torch.Generator().manual_seed(1))
    expected = outcomes[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert difference_interval(40, 25, 200, resamples=4000) == pytest.approx(expected, abs=0.01)


def two_words(base: list[list[float]], memory: list[list[float]], label: list[int], validation: int) -> TokenScores:
    """Rows of two labels of one token each, of given probabilities; the premise thinks both equally likely."""
    words = Words([[1], [2]], torch.tensor([0, 1]), torch.tensor([True, True]), torch.tensor([0, 1]), [])
    passes = [torch.tensor([[0.5, 0.5], *rows]).log() for rows in (base, memory)]
    return TokenScores(words, *passes, torch.arange(1, len(base) + 1), torch.tensor(label), validation)


def test_alpha_is_tuned_on_validation_rows_alone():
    """The validation row's label is right from α = 0.5 on (0.2 + 0.6α > 0.5); the test rows want the base."""
    found = two_words([[0.8, 0.2], [0.1, 0.9], [0.1, 0.9]], [[0.2, 0.8], [0.9, 0.1], [0.9, 0.1]], [1, 1, 1], 1)
    alpha, curve = tune_alpha(found, "pmi")
    assert [share for _, share in curve] == [0.0] * 26 + [1.0] * 25 and len(curve) == 51
    assert alpha == 1.0  # of the equals, the one that believes most in the right label
    measures, curves = measure_task(found, (0.2, "given"))
    assert curves["pmi"] == curve
    byname = {(m.method, m.alpha_source): m for m in measures if m.scoring == "pmi"}
    assert byname["base", ""].accuracy == 1.0 and byname["base", ""].validation_accuracy == 0.0
    tuned = byname["base+memory", "tuned on validation"]
    assert (tuned.accuracy, tuned.validation_accuracy, tuned.alpha) == (0.0, 1.0, 1.0)
    assert (tuned.wins, tuned.losses, tuned.difference, tuned.p_value) == (0, 2, -1.0, 0.5)
    assert byname["base+memory", "given"].alpha == 0.2 and byname["base+memory", "given"].accuracy == 1.0


def test_equally_good_alphas_are_told_apart_by_belief():
    """Every α is right; the base believes most in the right label, so that α is 0."""
    found = two_words([[0.1, 0.9], [0.1, 0.9]], [[0.4, 0.6], [0.4, 0.6]], [1, 1], 1)
    assert tune_alpha(found, "lm")[0] == 0.0


def test_pmi_heeds_what_the_premise_says_and_the_plain_score_does_not():
    """The word of label 0 is likely everywhere (0.9); a prompt that makes it less so (0.7) speaks for label 1."""
    found = two_words([[0.7, 0.3]] * 2, [[0.7, 0.3]] * 2, [1, 1], 1)
    found.base[0] = found.memory[0] = torch.tensor([0.9, 0.1]).log()
    assert found.scores("base", "lm", 0.0).argmax(1).tolist() == [0, 0]
    scores = found.scores("base", "pmi", 0.0)
    assert scores.argmax(1).tolist() == [1, 1]
    assert scores[0].tolist() == pytest.approx([math.log(0.7 / 0.9), math.log(0.3 / 0.1)], rel=1e-6)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> TaskRows:
    prompts = [TASK.prompt({"text": f"{text} {i}."}) for i, text in enumerate(TEXTS * 5)]
    examples = [Example(prompt, (i * 7 // 3) % 2) for i, prompt in enumerate(prompts)]
    return TaskRows(TASK, examples[8:], examples[:8], {"file": "motions.jsonl"})


def test_a_run_measures_what_loops_measure(rows, tiny_run, tmp_path):
    result = evaluate_tasks(
        tiny_run.base, tiny_run.memory, [rows], dtype="float32", device="cpu", out=tmp_path, batch_size=4
    )
    models = (tiny_run.base_model, tiny_run.memory_model)
    tokenizer = tiny_run.tokenizer
    names = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TASK.premise,)]
    wanted = [spelled(tokenizer, label) for label in LABELS]

    def accuracy(examples, alpha: float, scoring: str) -> float:
        premise = [label_by_hand(models, alpha, names[0], some) if scoring == "pmi" else 0.0 for some in wanted]
        right = 0
        for example in examples:
            context = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
            scores = [label_by_hand(models, alpha, context, some) - p for some, p in zip(wanted, premise, strict=True)]
            right += scores.index(max(scores)) == example.label
        return right / len(examples)

    (task,) = result.tasks
    for scoring in ("pmi", "lm"):
        assert task.measure("base", scoring).accuracy == accuracy(rows.test, 0.0, scoring)
        assert task.measure("memory", scoring).accuracy == accuracy(rows.test, 1.0, scoring)
        own = task.measure("base+memory", scoring, "recommended by the memory")
        assert own.alpha == tiny_run.alpha and own.accuracy == accuracy(rows.test, tiny_run.alpha, scoring)
        tuned = task.measure("base+memory", scoring, "tuned on validation")
        assert tuned.accuracy == accuracy(rows.test, tuned.alpha, scoring)
        assert tuned.validation_accuracy == accuracy(rows.validation, tuned.alpha, scoring)
        curve = task.alpha_curves[scoring]
        assert tuned.validation_accuracy == max(share for _, share in curve)
        assert curve[10] == (0.2, accuracy(rows.validation, 0.2, scoring))
    labels = [example.label for example in rows.test]
    assert task.majority == max(labels.count(0), labels.count(1)) / len(labels)


def test_the_file_tells_all_and_no_path_of_this_machine(rows, tiny_run, tmp_path):
    result = evaluate_tasks(tiny_run.base, tiny_run.memory, [rows], dtype="float32", device="cpu", out=tmp_path)
    path = result.save(tmp_path)
    text = path.read_text()
    content = json.loads(text)
    assert content["format"] == "memdec.tasks" and content["environment"]["torch"] == torch.__version__
    assert str(tmp_path) not in text and str(tiny_run.base.parent) not in text
    (task,) = content["tasks"]
    assert task["task"]["template"] == TASK.template and task["rows"]["test"] == 12 and task["rows"]["validation"] == 8
    means = {(m["method"], m["scoring"], m["alpha_source"]): m["accuracy"] for m in content["averages"]}
    assert means["base", "pmi", ""] == task["measures"][0]["accuracy"] and len(means) == len(task["measures"]) == 8
    path.write_text("{}")
    with pytest.raises(MemdecError, match=r"tasks\.json that memdec did not write"):
        result.save(tmp_path)
    assert path.read_text() == "{}"


def test_a_stopped_run_continues_and_ends_the_same(rows, tiny_run, tmp_path, monkeypatch):
    def run(out, memory=tiny_run.memory, some=rows):
        return evaluate_tasks(tiny_run.base, memory, [some], dtype="float32", device="cpu", out=out).to_json()

    whole = run(tmp_path / "whole")
    real, calls = pmi.read_tokens, []

    def stops(model, *arguments, **named):
        if calls:
            raise KeyboardInterrupt
        calls.append(model)
        return real(model, *arguments, **named)

    monkeypatch.setattr(pmi, "read_tokens", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")

    def counted(model, *arguments, **named):
        calls.append(model)
        return real(model, *arguments, **named)

    monkeypatch.setattr(pmi, "read_tokens", counted)
    assert run(tmp_path / "cut") == whole and len(calls) == 2  # the base's pass was kept
    assert run(tmp_path / "cut") == whole and len(calls) == 2
    # Other rows, another model and a damaged file are read anew.
    other = TaskRows(TASK, rows.test[1:], rows.validation, rows.origin)
    assert run(tmp_path / "cut", some=other) != whole and len(calls) == 4
    assert run(tmp_path / "cut") == whole and len(calls) == 6
    second = tmp_path / "other-memory"
    shutil.copytree(tiny_run.base, second)
    run(tmp_path / "cut", memory=second)
    assert len(calls) == 7
    (tmp_path / "cut" / "log_probs" / "motions.base.safetensors").write_bytes(b"damaged")
    assert run(tmp_path / "cut") == whole and len(calls) == 9


def test_the_base_alone_and_loaded_models(rows, tiny_run):
    alone = evaluate_tasks(tiny_run.base, None, [rows], dtype="float32", device="cpu")
    assert [(m.method, m.scoring) for m in alone.tasks[0].measures] == [("base", "pmi"), ("base", "lm")]
    models = (tiny_run.base_model, tiny_run.memory_model)
    pair = evaluate_tasks(*models, [rows], tokenizer=tiny_run.tokenizer, device="cpu", alpha=0.2, first_word_only=True)
    assert pair.tasks[0].measure("base+memory", "pmi", "given").alpha == 0.2
    assert pair.models == {"base": "LlamaForCausalLM", "memory": "LlamaForCausalLM"}
    with pytest.raises(MemdecError, match="tokenizer"):
        evaluate_tasks(*models, [rows], device="cpu")


def test_two_runs_give_the_same_bytes(rows, tiny_run):
    first, second = (
        evaluate_tasks(tiny_run.base, tiny_run.memory, [rows], dtype="float32", device="cpu").to_json()
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 1.5}, "--alpha must be from 0"),
        ({"context": 3}, "--context 3"),
        ({"tasks": []}, "no task was given"),
    ],
)
def test_wrong_settings(change, said, rows, tiny_run):
    settings = {"tasks": [rows], **change}
    with pytest.raises(MemdecError, match=said):
        evaluate_tasks(tiny_run.base, tiny_run.memory, settings.pop("tasks"), device="cpu", **settings)
    with pytest.raises(MemdecError, match="each may come once"):
        evaluate_tasks(tiny_run.base, tiny_run.memory, [rows, rows], device="cpu")


def test_a_memory_of_another_tokenizer_is_refused(rows, tiny_run, tiny_llama, make_tokenizer, tmp_path):
    tiny_llama(seed=2).save_pretrained(tmp_path / "memory")
    make_tokenizer(seed=9).save_pretrained(tmp_path / "memory")
    with pytest.raises(MemdecError, match="different tokenizers"):
        evaluate_tasks(tiny_run.base, tmp_path / "memory", [rows], device="cpu")
