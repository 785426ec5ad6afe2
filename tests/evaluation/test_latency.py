"""What each decoder writes against a loop of full forwards, and the figures against a clock that the test turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from memdec import MemoryModel
from memdec.errors import MemdecError
from memdec.evaluation import latency
from memdec.evaluation.latency import knn_decoder, measure, memory_decoder, plain_decoder, rag_decoder
from memdec.evaluation.rag import Retriever
from memdec.modeling.keys import hidden_and_keys
from memdec.stores.corpus import Corpus
from memdec.stores.datastore import Datastore

TOKENS = 14


@pytest.fixture(scope="module")
def prompts(tiny_run) -> list[Tensor]:
    """Three beginnings of held-out text, (1, L)."""
    tokens = Corpus.open(tiny_run.corpus).split("test").tokens.long()
    return [tokens[None, start : start + length] for start, length in ((0, 21), (50, 1), (90, 34))]


def log_probs(model: Any, text: list[int]) -> Tensor:
    """log p of the next token, float64 (V,), by one forward over the whole text."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([text])).logits[0, -1].double().log_softmax(-1)


def written(prompt: Tensor, choose: Any, tokens: int = TOKENS) -> list[int]:
    """The tokens that `choose` adds to a prompt, each from all of the text before it."""
    text = prompt[0].tolist()
    for _ in range(tokens):
        text.append(int(choose(text)))
    return text[prompt.shape[1] :]


def unusual_model(family: str, **settings: Any) -> Any:
    """A tiny model of a family whose cache cannot take tokens back."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family,
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def sliding_model() -> Any:
    """Its layers see the last eight tokens only."""
    return unusual_model("mistral", sliding_window=8)


def convolving_model() -> Any:
    """Its first layer keeps a state instead of keys and values."""
    return unusual_model("lfm2", layer_types=["conv", "full_attention"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding", "convolving"])
def test_a_model_alone(kind, tiny_run, tiny_gpt2, prompts):
    makers = {"gpt2": tiny_gpt2, "sliding": sliding_model, "convolving": convolving_model}
    model = makers[kind]() if kind in makers else tiny_run.base_model
    decode = plain_decoder(model)
    for prompt in prompts:
        found = decode(prompt, TOKENS)
        assert found.shape == (1, TOKENS)
        assert found[0].tolist() == written(prompt, lambda text: log_probs(model, text).argmax())


@pytest.mark.parametrize("decoding", ["composite", "parallel", "speculative", "auto"])
def test_base_and_memory(decoding, tiny_run, prompts):
    alpha = 0.45
    pair = MemoryModel.from_pretrained(tiny_run.base_model, tiny_run.memory_model, alpha=alpha)
    decode = memory_decoder(pair, decoding, 3 if decoding == "speculative" else None)

    def mixture(text: list[int]) -> Tensor:
        both = alpha * log_probs(tiny_run.memory_model, text).exp()
        return (both + (1 - alpha) * log_probs(tiny_run.base_model, text).exp()).argmax()

    for prompt in prompts:
        found = decode(prompt, TOKENS)
        assert found.shape == (1, TOKENS) and found[0].tolist() == written(prompt, mixture)
        assert pair.last_decode.mode == decoding or decoding == "auto"


def test_a_pair_that_cannot_be_decoded_so_is_not_measured_as_if(tiny_run, prompts):
    pair = MemoryModel.from_pretrained(sliding_model(), tiny_run.memory_model, alpha=0.4)
    with pytest.raises(MemdecError, match=r"not decoded as speculative: .+"):
        memory_decoder(pair, "speculative")(prompts[0], 4)
    assert memory_decoder(pair, "composite")(prompts[0], 4).shape == (1, 4)


@pytest.mark.parametrize("search", ["exact", "flat"])
def test_knn_lm(search, tiny_run, prompts, tmp_path):
    from memdec.pipeline.search import build_index

    datastore = Datastore.open(tiny_run.datastore)
    k, temperature, weight = 6, 20.0, 0.6
    index = None if search == "exact" else build_index(datastore, tmp_path / "index", backend="flat")
    decode = knn_decoder(tiny_run.base_model, datastore, k=k, temperature=temperature, weight=weight, index=index)
    keys = datastore.keys(0, datastore.num_rows).double()
    values = datastore.values(0, datastore.num_rows).long()

    def knn_lm(text: list[int]) -> Tensor:
        key = hidden_and_keys(tiny_run.base_model, torch.tensor([text]))[1][0, -1].half().double()
        nearest, rows = ((keys - key) ** 2).sum(1).topk(k, largest=False)
        q = torch.zeros(384, dtype=torch.float64)
        q.index_add_(0, values[rows], (-nearest / temperature).softmax(0))
        return (weight * q + (1 - weight) * log_probs(tiny_run.base_model, text).exp()).argmax()

    plain = plain_decoder(tiny_run.base_model)
    differing = 0
    for prompt in prompts:
        found = decode(prompt, TOKENS)
        assert found.shape == (1, TOKENS) and found[0].tolist() == written(prompt, knn_lm)
        differing += not torch.equal(found, plain(prompt, TOKENS))
    assert differing  # the neighbours have a say


def test_knn_lm_of_another_model_is_refused(tiny_run, tiny_llama):
    datastore = Datastore.open(tiny_run.datastore)
    with pytest.raises(MemdecError, match=r"keys have 16 numbers and the datastore's 32"):
        knn_decoder(tiny_llama(hidden=16), datastore, k=4, temperature=1.0, weight=0.5)


@pytest.mark.parametrize(
    ("every", "passages", "query", "most_inputs"), [(4, 1, 32, None), (4, 2, 8, None), (3, 1, 10, 36), (1, 1, 6, 33)]
)
def test_rag(every, passages, query, most_inputs, tiny_run, prompts, monkeypatch):
    retriever = Retriever.of_corpus(Corpus.open(tiny_run.corpus), tiny_run.tokenizer, passage_tokens=16)
    decode = rag_decoder(
        tiny_run.base_model,
        retriever,
        query_tokens=query,
        every=every,
        passages=passages,
        most_inputs=most_inputs,
    )
    made = []
    fresh = latency.reader_alone
    monkeypatch.setattr(latency, "reader_alone", lambda *arguments: made.append(1) or fresh(*arguments))
    starts, steps = set(), 0
    for prompt in prompts:
        length = prompt.shape[1]
        text = prompt[0].tolist()
        while len(text) < length + TOKENS:
            before = len(text)
            best = retriever.search(torch.tensor(text[-query:]), passages)
            prefix = [token for index in reversed(best) for token in retriever.passage(index).tolist()]
            start = max(0, len(prefix) + before + every - 1 - (most_inputs or 256))
            starts.add(start)
            steps += 1
            while len(text) < min(before + every, length + TOKENS):
                ids = prefix + text[start:]
                assert len(ids) <= (most_inputs or 256)
                text.append(int(log_probs(tiny_run.base_model, ids).argmax()))
        found = decode(prompt, TOKENS)
        assert found.shape == (1, TOKENS) and found[0].tolist() == text[length:]
    assert (len(starts) > 1) == (most_inputs is not None)
    assert len(prompts) <= len(made) <= steps
    if most_inputs is None:
        assert len(made) < steps  # what was read is kept where the same passages are found again


def test_rag_without_room_is_refused(tiny_run):
    retriever = Retriever.of_corpus(Corpus.open(tiny_run.corpus), tiny_run.tokenizer, passage_tokens=16)
    with pytest.raises(MemdecError, match="leave less than half of the 35 tokens"):
        rag_decoder(tiny_run.base_model, retriever, most_inputs=35)
    with pytest.raises(MemdecError, match="leave less than half of the 256 tokens"):  # the model's positions
        rag_decoder(tiny_run.base_model, retriever, passages=8)
    with pytest.raises(MemdecError, match="every must be at least 1"):
        rag_decoder(tiny_run.base_model, retriever, every=0)


class Clock:
    """A clock that decoders turn: each run takes the next of its seconds."""

    def __init__(self) -> None:
        self.now = 50.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def decoder(self, name: str, seconds: list[float], tokens: int | None = None) -> Any:
        left = list(seconds)

        def decode(prompt: Tensor, new_tokens: int) -> Tensor:
            self.calls.append((name, int(prompt[0, 0])))
            self.now += left.pop(0)
            return torch.zeros(1, new_tokens if tokens is None else tokens, dtype=torch.int64)

        return decode


def test_figures_are_medians_of_turns():
    """Two prompts, three repeats; the first run of each, a hundred seconds long, does not count."""
    clock = Clock()
    prompts = [torch.tensor([[7, 1]]), torch.tensor([[8]])]
    decoders = {
        "base": clock.decoder("base", [100, 1, 2, 1, 2, 1, 4]),
        "other": clock.decoder("other", [100, 2, 2, 3, 2, 1, 2]),
        "broken": clock.decoder("broken", [100, 1]),  # an IndexError at its third run
        "lazy": clock.decoder("lazy", [1], tokens=3),
    }
    lines: list[str] = []
    figures = measure(decoders, prompts, 4, 3, clock=clock, say=lines.append)
    assert figures["base"].ms_per_token == pytest.approx(1000 * 1.5 / 4)
    assert figures["base"].ratio == 1 and figures["base"].ratio_range == (1, 1)
    assert figures["other"].ms_per_token == pytest.approx(1000 * 2 / 4)
    # Ratios 2, 1, 3, 1, 1, 0.5: sorted 0.5, 1, 1, 1, 2, 3.
    assert figures["other"].ratio == pytest.approx(1)
    assert figures["other"].ratio_range == pytest.approx((1, 1.75))
    assert list(figures) == list(decoders)
    assert figures["broken"].ms_per_token is None and figures["broken"].ratio is None
    assert figures["broken"].note.startswith("IndexError")
    assert "wrote (1, 3) tokens instead of (1, 4)" in figures["lazy"].note
    turns = [call for call in clock.calls if call[0] in ("base", "other")]
    assert turns == [("base", 7), ("other", 7)] + 3 * [("base", 7), ("other", 7), ("base", 8), ("other", 8)]
    assert len(lines) == 4


def test_another_reference_and_what_cannot_be_compared():
    clock = Clock()
    prompts = [torch.tensor([[7]])]
    figures = measure(
        {"a": clock.decoder("a", [9, 2]), "b": clock.decoder("b", [9, 8])}, prompts, 2, 1, reference="b", clock=clock
    )
    assert figures["a"].ratio == 0.25 and figures["a"].ratio_range == (0.25, 0.25) and figures["b"].ratio == 1
    with pytest.raises(MemdecError, match="relative to 'base', which is not among a"):
        measure({"a": clock.decoder("a", [])}, prompts, 2)
    with pytest.raises(MemdecError, match="base cannot decode, so that nothing can be set against it: IndexError"):
        measure({"base": clock.decoder("base", [1, 1])}, prompts, 2, 2, clock=clock)
    for wrong in ({"prompts": []}, {"new_tokens": 0}, {"repeats": 0}):
        with pytest.raises(MemdecError, match="needs a prompt, a token and a repeat"):
            measure(**{"decoders": {"base": clock.decoder("base", [])}, "prompts": prompts, "new_tokens": 2, **wrong})


def test_a_real_run_of_all(tiny_run, prompts):
    """Real clock: all have figures, and the base is 1 against itself."""
    pair = MemoryModel.from_pretrained(tiny_run.base_model, tiny_run.memory_model, alpha=0.4)
    retriever = Retriever.of_corpus(Corpus.open(tiny_run.corpus), tiny_run.tokenizer, passage_tokens=16)
    decoders = {
        "base": plain_decoder(tiny_run.base_model),
        "base+memory": memory_decoder(pair, "speculative"),
        "knn-lm": knn_decoder(
            tiny_run.base_model, Datastore.open(tiny_run.datastore), k=8, temperature=10.0, weight=0.3
        ),
        "rag": rag_decoder(tiny_run.base_model, retriever),
    }
    figures = measure(decoders, prompts, 6, 2)
    for name, figure in figures.items():
        assert figure.note == "" and figure.ms_per_token > 0, name
        low, high = figure.ratio_range
        assert low <= figure.ratio <= high
    assert figures["base"].ratio == 1
