"""MemoryModel against a plain loop that knows nothing of it: full softmaxes of both models over unpadded texts.

The loop mixes probabilities in float64 without cache, mask, padding or our ops; generation in float32 must give exactly
its tokens. The tiny models' distributions are far from flat, so a tie within rounding does not happen with these seeds.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from memdec import MemdecError, MemoryModel
from memdec.modeling.cache import TwinCache
from memdec.modeling.configuration import MemoryModelConfig
from memdec.modeling.scoring import score_tokens
from memdec.modeling.tokenizers import fingerprint, width
from memdec.stores.memory import MemoryCard, read_memory_card, verify_memory, write_memory_card

VOCAB = 384  # the tiny tokenizer's; the models are padded beyond it, to different widths
ALPHA = 0.4
PROMPTS = [[17, 250, 31, 99, 8], [200, 45], [301, 7, 7]]
TOKENS = 8

Pair = tuple[Any, Any]


# -- the plain loop --------------------------------------------------------------------------------------------------


KNOWN: dict[tuple[Any, ...], Tensor] = {}  # many tests ask for the same rows; the keys keep their models alive


@torch.no_grad()
def probs_of(model: Any, ids: list[int]) -> Tensor:
    """p of the token after `ids` under one model, over the tokenizer's ids, (V,) float64."""
    key = (model, *ids)
    if key not in KNOWN:
        KNOWN[key] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCAB].double().softmax(-1)
    return KNOWN[key]


def mixed(pair: Pair, ids: list[int], alpha: float = ALPHA) -> Tensor:
    """p_mix of the token after `ids`, (V,) float64."""
    base, memory = (probs_of(model, ids) for model in pair)
    return alpha * memory + (1 - alpha) * base


def plain_greedy(
    pair: Pair, prompt: list[int], tokens: int = TOKENS, eos: int | None = None, alpha: float = ALPHA
) -> list[int]:
    made: list[int] = []
    while len(made) < tokens and (not made or made[-1] != eos):
        made.append(int(mixed(pair, prompt + made, alpha).argmax()))
    return made


def plain_beams(pair: Pair, prompt: list[int], beams: int, tokens: int = TOKENS) -> list[list[int]]:
    """The `beams` best of a beam search without end of text, best first."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens):
        grown = []
        for score, made in kept:
            log_probs = mixed(pair, prompt + made).log()
            best = log_probs.topk(beams)
            grown += [(score + float(v), [*made, int(i)]) for v, i in zip(best.values, best.indices, strict=True)]
        kept = sorted(grown, key=lambda item: -item[0])[:beams]
    return [made for _, made in kept]


def plain_sample(pair: Pair, prompts: list[list[int]], seed: int, temperature: float, top_k: int) -> list[list[int]]:
    """Batched multinomial draws from torch's global generator, as transformers draws them."""
    torch.manual_seed(seed)
    made: list[list[int]] = [[] for _ in prompts]
    for _ in range(TOKENS):
        rows = []
        for prompt, so_far in zip(prompts, made, strict=True):
            probs = mixed(pair, prompt + so_far) ** (1 / temperature)
            smallest = probs.topk(top_k).values[-1] if top_k else 0.0
            probs = torch.where(probs >= smallest, probs, 0.0)
            rows.append((probs / probs.sum()).float())
        for so_far, token in zip(made, torch.multinomial(torch.stack(rows), 1)[:, 0].tolist(), strict=True):
            so_far.append(token)
    return made


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded ids and their mask; the padding is a real token, so that only the mask can hide it."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[5] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    }


def new_tokens(output: Tensor, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return output[:, max(map(len, prompts)) :].tolist()


# -- the pairs -------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}


def make(family: str, vocab: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], "vocab_size": vocab})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make("llama", 400, seed=1), make("gpt2", 416, seed=2)


@pytest.fixture
def model(pair: Pair, tiny_tokenizer: Any) -> MemoryModel:
    return MemoryModel.from_pretrained(*pair, alpha=ALPHA, tokenizer=tiny_tokenizer)


ARCHITECTURES = [
    ("llama", "gpt2"),
    ("gpt2", "llama"),
    ("opt", "gpt_neox"),
    ("gemma3_text", "qwen2"),
    ("llama", "bloom"),
    ("mixtral", "gemma3_text"),
]


@pytest.mark.parametrize(("base", "memory"), ARCHITECTURES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_batched_left_padded_greedy(base: str, memory: str, cache: str | None, tiny_tokenizer: Any) -> None:
    pair = make(base, 400, seed=1), make(memory, 416, seed=2)
    model = MemoryModel.from_pretrained(*pair, alpha=ALPHA, tokenizer=tiny_tokenizer)
    output = model.generate(**padded(PROMPTS), max_new_tokens=TOKENS, do_sample=False, cache_implementation=cache)
    assert new_tokens(output) == [plain_greedy(pair, prompt) for prompt in PROMPTS]


def test_the_pair_disagrees_enough_to_tell(pair: Pair) -> None:
    """The tests below would pass with either model alone if the mixture did not differ from both."""
    for prompt in PROMPTS:
        assert plain_greedy(pair, prompt) != plain_greedy(pair, prompt, alpha=0.0)
        assert plain_greedy(pair, prompt) != plain_greedy(pair, prompt, alpha=1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("cache", [None, "static"])
def test_sampling(model: MemoryModel, pair: Pair, temperature: float, top_k: int, cache: str | None) -> None:
    torch.manual_seed(11)
    output = model.generate(
        **padded(PROMPTS),
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
        cache_implementation=cache,
        decoding="composite",
    )
    assert new_tokens(output) == plain_sample(pair, PROMPTS, 11, temperature, top_k)


def test_a_generator_of_ones_own(model: MemoryModel, pair: Pair) -> None:
    settings = {**padded(PROMPTS), "max_new_tokens": TOKENS, "do_sample": True, "top_k": 0, "decoding": "composite"}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(11)
    first = model.generate(**settings, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator was left alone
    assert new_tokens(first) == plain_sample(pair, PROMPTS, 11, 1.0, 0)
    assert not torch.equal(model.generate(**settings, generator=generator), first)  # and this one moved on


@pytest.mark.parametrize("cache", [None, "static"])
def test_beams(model: MemoryModel, pair: Pair, cache: str | None) -> None:
    output = model.generate(
        **padded(PROMPTS),
        max_new_tokens=TOKENS,
        num_beams=4,
        num_return_sequences=3,
        do_sample=False,
        cache_implementation=cache,
    )
    assert new_tokens(output) == [made for prompt in PROMPTS for made in plain_beams(pair, prompt, 4)[:3]]


class PlainMixture(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The plain loop as a model: no cache, every row alone and unpadded, so transformers' own search is the oracle."""

    config_class = MemoryModelConfig

    def __init__(self, pair: Pair) -> None:
        super().__init__(MemoryModelConfig(vocab_size=VOCAB))
        self.pair = [*pair]
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutputWithPast:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [
            mixed((self.pair[0], self.pair[1]), row[m.bool()].tolist()) for row, m in zip(input_ids, mask, strict=True)
        ]
        return CausalLMOutputWithPast(logits=torch.stack(rows).log().float()[:, None])


MODES: dict[str, dict[str, Any]] = {
    "beams that end": {"num_beams": 4, "num_return_sequences": 4, "do_sample": False, "length_penalty": 0.3},
    "beams that end early": {"num_beams": 3, "do_sample": False, "early_stopping": True},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 30, "num_return_sequences": 2},
    "nucleus": {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 1.3},
    "min-p, two a prompt": {"do_sample": True, "top_k": 0, "min_p": 0.05, "num_return_sequences": 2},
    "typical": {"do_sample": True, "top_k": 0, "typical_p": 0.7},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "forbidden words": {"do_sample": False, "bad_words_ids": [[146], [66], [7, 7]]},
}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_transformers(model: MemoryModel, pair: Pair, mode: str, cache: str | None) -> None:
    ends = sorted({made[4] for made in (plain_greedy(pair, prompt) for prompt in PROMPTS)})
    settings = {**padded(PROMPTS), **MODES[mode], "max_new_tokens": TOKENS, "eos_token_id": ends, "pad_token_id": 1}
    torch.manual_seed(21)
    expected = PlainMixture(pair).generate(**settings, use_cache=False)
    torch.manual_seed(21)
    made = model.generate(**settings, cache_implementation=cache, decoding="composite")
    assert made.tolist() == expected.tolist()


def test_a_base_that_is_partly_on_disk(pair: Pair, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Offloaded weights are on no device until accelerate's hooks fetch them."""
    pair[0].save_pretrained(tmp_path / "base")
    places = {"embed_tokens": "disk", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    spread = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=spread, offload_folder=tmp_path / "weights"
    )
    assert any(p.is_meta for p in base.parameters())
    model = MemoryModel.from_pretrained(base, pair[1], alpha=ALPHA, tokenizer=tiny_tokenizer)
    output = model.generate(**padded(PROMPTS), max_new_tokens=TOKENS, do_sample=False)
    assert new_tokens(output) == [plain_greedy(pair, prompt) for prompt in PROMPTS]
    with torch.no_grad():
        found = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    torch.testing.assert_close(found.double(), mixed(pair, PROMPTS[0]).log(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="offloaded"):
        model.to(torch.float16)


def test_several_samples_of_each_prompt(model: MemoryModel, pair: Pair) -> None:
    torch.manual_seed(5)
    output = model.generate(
        **padded(PROMPTS),
        max_new_tokens=TOKENS,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        decoding="composite",
    )
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    assert new_tokens(output) == plain_sample(pair, repeated, 5, 1.0, 0)


def test_end_of_text_stops_a_row_and_pads_it(model: MemoryModel, pair: Pair) -> None:
    free = [plain_greedy(pair, prompt) for prompt in PROMPTS]
    eos = free[0][3]
    output = model.generate(
        **padded(PROMPTS),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=1,
        decoding="composite",
    )
    expected = [plain_greedy(pair, prompt, eos=eos) for prompt in PROMPTS]
    assert min(map(len, expected)) < max(map(len, expected))
    length = max(map(len, expected))
    assert new_tokens(output) == [made + [1] * (length - len(made)) for made in expected]
    assert model.last_decode is not None
    assert (model.last_decode.mode, model.last_decode.tokens) == ("composite", sum(map(len, expected)))
    assert 0 < model.last_decode.seconds["total"] < 60


def test_assisted_generation(model: MemoryModel, pair: Pair, make_assistant: Any) -> None:
    """The mixture verifies another model's draft: its twin cache is cropped in every round."""
    ids = torch.tensor([PROMPTS[0]])
    for options in ({"assistant_model": make_assistant()}, {"prompt_lookup_num_tokens": 3}):
        output = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
        assert output[0, 5:].tolist() == plain_greedy(pair, PROMPTS[0], 12)


def test_assisted_generation_past_a_sliding_window(pair: Pair, make_assistant: Any, tiny_tokenizer: Any) -> None:
    """A window of four forgets what a crop must bring back, unless its layers were told to record."""
    sliding = make("gemma3_text", 400, seed=1)
    for models in ((sliding, pair[1]), (pair[1], sliding)):
        model = MemoryModel.from_pretrained(*models, alpha=ALPHA, tokenizer=tiny_tokenizer)
        output = model.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, assistant_model=make_assistant()
        )
        assert output[0, 5:].tolist() == plain_greedy(models, PROMPTS[0], 12)


@pytest.fixture
def make_assistant(pair: Pair) -> Callable[[], Any]:
    """A drafter that is often right and often wrong: the base itself, cut to the tokenizer's width."""

    def make_it() -> Any:
        assistant = make("llama", VOCAB, seed=1)
        state = {
            name: value[:VOCAB] if value.shape[:1] == (400,) else value for name, value in pair[0].state_dict().items()
        }
        assistant.load_state_dict(state)
        return assistant

    return make_it


@pytest.mark.parametrize("cache", [None, "static"])
def test_chunked_prefill(model: MemoryModel, pair: Pair, cache: str | None) -> None:
    output = model.generate(
        **padded(PROMPTS), max_new_tokens=TOKENS, do_sample=False, prefill_chunk_size=2, cache_implementation=cache
    )
    assert new_tokens(output) == [plain_greedy(pair, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_a_mask_and_without_a_cache(model: MemoryModel, pair: Pair, use_cache: bool) -> None:
    output = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=TOKENS, do_sample=False, use_cache=use_cache)
    assert output[0, 5:].tolist() == plain_greedy(pair, PROMPTS[0])


@pytest.mark.parametrize("static", [False, True])
def test_a_conversation_goes_on_from_its_cache(model: MemoryModel, pair: Pair, static: bool) -> None:
    cache = model.new_cache(40 if static else None)
    first = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, do_sample=False, past_key_values=cache)
    said = [*first[0].tolist(), 12, 13]
    second = model.generate(torch.tensor([said]), max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert second[0, len(said) :].tolist() == plain_greedy(pair, said, 4)
    assert cache.is_compileable is static
    assert cache.get_seq_length() == len(said) + 3 and cache.get_max_length() == (40 if static else -1)


def test_streaming_and_stopping(model: MemoryModel, pair: Pair, tiny_tokenizer: Any) -> None:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    def words_of(made: list[int]) -> list[str]:
        return [tiny_tokenizer.decode(token).strip() for token in made]

    prompt, word = next(
        ([start, 9, 40, 77, 5], word)
        for start in range(100)
        for word in words_of(plain_greedy(pair, [start, 9, 40, 77, 5]))
        if len(word) > 1 and word.isascii()
    )
    expected = plain_greedy(pair, prompt)
    streamer = Collect()
    ids = torch.tensor([prompt])
    model.generate(ids, max_new_tokens=TOKENS, do_sample=False, streamer=streamer)
    assert streamer.ended and streamer.pieces == [prompt, *[[token] for token in expected]]

    def after_three(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 5 + 3)

    stopped = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, stopping_criteria=[after_three])
    assert stopped[0, 5:].tolist() == expected[:3]
    until = words_of(expected).index(word) + 1
    stopped = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, stop_strings=[word], tokenizer=tiny_tokenizer)
    assert stopped[0, 5:].tolist() == expected[:until]


def test_scores_are_normalised_log_probs(model: MemoryModel, pair: Pair) -> None:
    output = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    made = output.sequences[0, 5:].tolist()
    for step, logits in enumerate(output.logits):
        expected = mixed(pair, PROMPTS[0] + made[:step]).log()
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(output.past_key_values, TwinCache) and len(output.hidden_states) == 3


def test_forward_is_the_mixture_on_either_side_of_the_padding(model: MemoryModel, pair: Pair) -> None:
    left = padded(PROMPTS)
    length = max(map(len, PROMPTS))
    right = {
        "input_ids": torch.tensor([p + [5] * (length - len(p)) for p in PROMPTS]),
        "attention_mask": torch.tensor([[1] * len(p) + [0] * (length - len(p)) for p in PROMPTS]),
    }
    with torch.no_grad():
        from_left, from_right = model(**left).logits, model(**right).logits
    assert from_left.dtype == torch.float32 and from_left.shape == (3, length, VOCAB)
    for row, prompt in enumerate(PROMPTS):
        for end in range(1, len(prompt) + 1):
            expected = mixed(pair, prompt[:end]).log()
            for found in (from_left[row, length - len(prompt) + end - 1], from_right[row, end - 1]):
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_forward_step_by_step_with_a_padded_mask(model: MemoryModel) -> None:
    batch = padded(PROMPTS)
    with torch.no_grad():
        whole = model(**batch).logits
        for cache in (None, model.new_cache(), model.new_cache(max_length=9)):
            past, steps = cache, []
            for start, stop in ((0, 2), (2, 3), (3, 5)):
                out = model(
                    batch["input_ids"][:, start:stop],
                    attention_mask=batch["attention_mask"][:, :stop],
                    past_key_values=past,
                )
                past = out.past_key_values
                steps.append(out.logits)
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])])
def test_logits_to_keep(model: MemoryModel, keep: int | Tensor) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        whole, some = model(ids).logits, model(ids, logits_to_keep=keep).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)


def test_loss(model: MemoryModel, pair: Pair) -> None:
    ids = torch.tensor([PROMPTS[0], [*PROMPTS[2], 5, 5]])
    labels = torch.tensor([PROMPTS[0], [*PROMPTS[2], -100, -100]])
    with torch.no_grad():
        out, counted = model(ids, labels=labels), model(ids, labels=labels, num_items_in_batch=2)
    asked = [-math.log(mixed(pair, p[:i])[p[i]]) for p in (PROMPTS[0], PROMPTS[2]) for i in range(1, len(p))]
    assert float(out.loss) == pytest.approx(sum(asked) / len(asked), rel=1e-5)
    assert float(counted.loss) == pytest.approx(sum(asked) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, labels=labels, logits_to_keep=1)
    assert model(ids, return_dict=False)[0].shape == (2, 5, VOCAB)


# -- α and the switch ------------------------------------------------------------------------------------------------


def test_alpha_of_zero_and_one_is_one_model_alone(model: MemoryModel, pair: Pair) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        for alpha, alone in zip((0.0, 1.0), pair, strict=True):
            model.alpha = alpha
            expected = alone(ids).logits[..., :VOCAB].log_softmax(-1)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_disabled_memory_is_the_base_and_is_not_run(
    model: MemoryModel, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = padded(PROMPTS)
    expected = [plain_greedy(pair, prompt, alpha=0.0) for prompt in PROMPTS]
    ids = torch.tensor([PROMPTS[0]])

    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("the memory was run")

    with torch.no_grad(), monkeypatch.context() as patch, model.disable_memory():
        patch.setattr(model.memory, "forward", must_not_run)
        assert torch.equal(model(ids).logits, pair[0](ids).logits[..., :VOCAB].log_softmax(-1))
        for cache in (None, "static"):
            output = model.generate(
                **batch, max_new_tokens=TOKENS, do_sample=False, num_beams=1, cache_implementation=cache
            )
            assert new_tokens(output) == expected
        with model.disable_memory():
            pass
        assert not model.memory_enabled
    assert model.memory_enabled
    assert new_tokens(model.generate(**batch, max_new_tokens=2, do_sample=False)) == [
        plain_greedy(pair, prompt, 2) for prompt in PROMPTS
    ]


def test_a_cache_that_the_memory_has_not_read_is_refused(model: MemoryModel) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with model.disable_memory():
        past = model(ids).past_key_values
    with pytest.raises(MemdecError, match="filled with the memory disabled"):
        model(ids, past_key_values=past)
    past = model(ids).past_key_values
    with model.disable_memory():
        model(ids, past_key_values=past)
    with pytest.raises(MemdecError, match="filled with the memory disabled"):
        model.generate(ids, past_key_values=past, max_new_tokens=1)
    with pytest.raises(MemdecError, match=r"got a DynamicCache.*new_cache"):
        model(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, "0.4", None, True])
def test_alpha_is_checked(model: MemoryModel, value: Any) -> None:
    with pytest.raises(ValueError, match=r"alpha: got .*wanted a number from 0"):
        model.alpha = value
    assert model.alpha == ALPHA


def test_alpha_takes_effect_at_once(model: MemoryModel, pair: Pair) -> None:
    ids = torch.tensor([PROMPTS[0]])
    model.alpha = 0.9
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits[0, -1].double(), mixed(pair, PROMPTS[0], 0.9).log(), rtol=1e-5, atol=1e-5
        )


def test_other_decodings_are_said_to_be_missing(model: MemoryModel) -> None:
    with pytest.raises(MemdecError, match=r"decoding='lookahead' is not available.*composite"):
        model.generate(torch.tensor([PROMPTS[0]]), decoding="lookahead")
    output = model.generate(torch.tensor([PROMPTS[0]]), decoding="composite", max_new_tokens=1, do_sample=False)
    assert output.shape == (1, 6)


# -- the base stays as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attaching_changes_nothing_in_the_models(attention: str, tiny_tokenizer: Any) -> None:
    pair = make("llama", 400, seed=1), make("gpt2", 416, seed=2)
    for model in pair:
        model.set_attn_implementation(attention)
    before = [(json.dumps(m.config.to_dict(), sort_keys=True), m.generation_config.to_dict()) for m in pair]
    weights = [{name: value.clone() for name, value in m.state_dict().items()} for m in pair]
    for m in pair:  # as in a model whose weights were not loaded by transformers: it would take them for uninitialised
        for part in (*m.modules(), *m.parameters()):
            vars(part).pop("_is_hf_initialized", None)
    composite = MemoryModel.from_pretrained(*pair, alpha=ALPHA, tokenizer=tiny_tokenizer)
    composite.alpha = 0.7
    composite.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2)
    after = [(json.dumps(m.config.to_dict(), sort_keys=True), m.generation_config.to_dict()) for m in pair]
    assert after == before
    for m, kept in zip(pair, weights, strict=True):
        assert m.config._attn_implementation == attention
        assert all(torch.equal(value, kept[name]) for name, value in m.state_dict().items())


def test_generation_defaults_are_the_bases(tiny_tokenizer: Any) -> None:
    pair = make("llama", 400, seed=1), make("gpt2", 416, seed=2)
    pair[0].generation_config = GenerationConfig(eos_token_id=[3, 4], pad_token_id=9, bos_token_id=2, max_new_tokens=2)
    model = MemoryModel.from_pretrained(*pair, alpha=ALPHA, tokenizer=tiny_tokenizer)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([3, 4], 9)
    assert model.generation_config.bos_token_id == 2
    assert model.generate(torch.tensor([PROMPTS[0]]), do_sample=False).shape == (1, 7)
    model.generation_config.pad_token_id = 1
    assert pair[0].generation_config.pad_token_id == 9


def test_what_harnesses_ask_of_a_model(model: MemoryModel, pair: Pair) -> None:
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.config.vocab_size == VOCAB and model.config.max_position_embeddings == 64
    assert model.config.hidden_size == 32 and model.config.is_encoder_decoder is False
    assert model.num_parameters() == sum(m.num_parameters() for m in pair)
    model.tie_weights()
    assert model.to("cpu") is model and model.eval() is model and not model.training
    assert MemoryModel.can_generate() and json.loads(model.config.to_json_string())["model_type"] == "memory_decoder"
    assert model.get_input_embeddings() is pair[0].get_input_embeddings() and model.get_output_embeddings() is None
    with pytest.raises(MemdecError, match="cannot be changed"):
        model.resize_token_embeddings(500)
    with pytest.raises(ValueError, match="input_ids: wanted token ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_casting_reaches_both_models(tiny_tokenizer: Any) -> None:
    model = MemoryModel.from_pretrained(
        make("llama", 400, seed=1), make("gpt2", 416, seed=2), alpha=ALPHA, tokenizer=tiny_tokenizer
    ).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.alpha == ALPHA
    assert model(torch.tensor([PROMPTS[0]])).logits.dtype == torch.float32


def test_scoring_the_composite(model: MemoryModel, pair: Pair) -> None:
    class Window:
        start, stop, score_from = 0, 5, 1

    scores = score_tokens(model, torch.tensor(PROMPTS[0], dtype=torch.int32), [Window()])
    expected = [math.log(mixed(pair, PROMPTS[0][: i + 1])[PROMPTS[0][i + 1]]) for i in range(4)]
    assert math.isnan(scores[0])
    assert scores[1:].tolist() == pytest.approx(expected[1:], abs=1e-5)
    with model.disable_memory():
        alone = score_tokens(model, torch.tensor(PROMPTS[0], dtype=torch.int32), [Window()])
    assert float(alone[3]) == pytest.approx(math.log(mixed(pair, PROMPTS[0][:4], 0.0)[PROMPTS[0][4]]), abs=1e-5)


def test_a_compiled_step_with_a_static_cache(model: MemoryModel) -> None:
    """One graph without breaks, traced by dynamo; the eager backend keeps the test to what we are responsible for."""
    ids = torch.tensor([PROMPTS[0]])
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids).logits
        cache = model.new_cache(max_length=8)
        model(ids[:, :3], past_key_values=cache)
        for i in (3, 4):
            found = step(input_ids=ids[:, i : i + 1], position_ids=torch.tensor([[i]]), past_key_values=cache).logits
            torch.testing.assert_close(found[:, 0], expected[:, i], rtol=1e-4, atol=1e-4)


# -- folders, cards and refusals -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, tiny_tokenizer: Any, pair: Pair) -> tuple[Path, Path]:
    """A base's folder and a memory's, whose card recommends α = 0.3."""
    for name, model in zip(("base", "memory"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    write_memory_card(tmp_path / "memory", MemoryCard(0.3, fingerprint(tiny_tokenizer), VOCAB, {"domain": "law"}))
    return tmp_path / "base", tmp_path / "memory"


def test_from_folders(folders: tuple[Path, Path], pair: Pair, tmp_path: Path) -> None:
    model = MemoryModel.from_pretrained(*folders, dtype="float32")
    assert model.alpha == 0.3 and model.config.vocab_size == VOCAB == width(model.tokenizer)
    ids = torch.tensor([PROMPTS[0]])
    output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert output[0, 5:].tolist() == plain_greedy(pair, PROMPTS[0], alpha=0.3)
    assert MemoryModel.from_pretrained(str(folders[0]), str(folders[1]), alpha=0.5).alpha == 0.5

    model.alpha = 0.6
    model.save_pretrained(tmp_path / "saved")
    card = read_memory_card(tmp_path / "saved")
    assert (card.alpha, card.vocab_size, card.provenance) == (0.6, VOCAB, {"domain": "law"})
    assert verify_memory(tmp_path / "saved") == []
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "gpt2"
    )  # the memory, not the base
    again = MemoryModel.from_pretrained(folders[0], tmp_path / "saved", dtype="float32")
    model.alpha = 0.6
    with torch.no_grad():
        assert again.alpha == 0.6 and torch.equal(again(ids).logits, model(ids).logits)


def test_a_loaded_base_with_a_memory_folder(folders: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    base = make("llama", 400, seed=1)
    assert MemoryModel.from_pretrained(base, folders[1], tokenizer=tiny_tokenizer).alpha == 0.3
    # Without the base's tokenizer only the widths can be compared, and 400 is not 416.
    with pytest.raises(MemdecError, match="a vocabulary of 400 and the memory one of 416"):
        MemoryModel.from_pretrained(base, folders[1])
    same = make("llama", 416, seed=1)
    assert MemoryModel.from_pretrained(same, folders[1]).config.vocab_size == VOCAB


def test_alpha_is_asked_for(pair: Pair, folders: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    with pytest.raises(MemdecError, match="recommends no alpha"):
        MemoryModel.from_pretrained(*pair, tokenizer=tiny_tokenizer)
    (folders[1] / "memory_config.json").unlink()
    with pytest.raises(MemdecError, match="recommends no alpha"):
        MemoryModel.from_pretrained(*folders)
    with pytest.raises(ValueError, match=r"alpha: got 2\.0"):
        MemoryModel.from_pretrained(*pair, 2.0, tokenizer=tiny_tokenizer)


def test_other_tokenizers_are_refused(
    folders: tuple[Path, Path], make_tokenizer: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base, memory = folders
    make_tokenizer(400).save_pretrained(base)
    with pytest.raises(MemdecError, match=r"the base \(.*base\) has 400 tokens, the memory \(.*memory\) 384"):
        MemoryModel.from_pretrained(base, memory)
    make_tokenizer(384, pad=True).save_pretrained(base)
    with pytest.raises(MemdecError, match="both have 384 tokens, but not the same ones"):
        MemoryModel.from_pretrained(base, memory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (memory / name).unlink()
    with pytest.raises(MemdecError, match="was made with another tokenizer"):
        MemoryModel.from_pretrained(base, memory)
    tiny_tokenizer.save_pretrained(base)
    assert MemoryModel.from_pretrained(base, memory).alpha == 0.3


def test_a_base_with_further_added_tokens(folders: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    """The mixture is over the base's tokens; the memory has rows for the new ones in its padding, or it is refused."""
    base, memory = folders
    chat = copy.deepcopy(tiny_tokenizer)
    chat.add_tokens([f"<|tool {i}|>" for i in range(10)])
    chat.save_pretrained(base)
    assert MemoryModel.from_pretrained(base, memory).config.vocab_size == 394
    make("gpt2", VOCAB, seed=2).save_pretrained(memory)
    with pytest.raises(MemdecError, match="the tokenizer has 394 ids, but the memory has a vocabulary of 384"):
        MemoryModel.from_pretrained(base, memory)


def test_loaded_models_of_other_width_are_refused(pair: Pair, make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(MemdecError, match="padded differently"):
        MemoryModel.from_pretrained(*pair, alpha=0.5)
    narrow = make("gpt2", 370, seed=2)
    with pytest.raises(MemdecError, match="the tokenizer has 384 ids, but the memory has a vocabulary of 370"):
        MemoryModel.from_pretrained(pair[0], narrow, alpha=0.5, tokenizer=make_tokenizer())
    assert MemoryModel.from_pretrained(pair[0], make("gpt2", 400, seed=2), alpha=0.5).config.vocab_size == 400


def test_saving_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = MemoryModel.from_pretrained(make("llama", VOCAB, seed=1), make("gpt2", VOCAB, seed=2), alpha=0.5)
    with pytest.raises(MemdecError, match=r"set model\.tokenizer"):
        model.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_missing_folders_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MemdecError, match="nowhere does not exist"):
        MemoryModel.from_pretrained(tmp_path / "nowhere", folders[1])
    with pytest.raises(MemdecError, match="nowhere does not exist"):
        MemoryModel.from_pretrained(folders[0], tmp_path / "nowhere")
