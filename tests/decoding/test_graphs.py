"""The rounds over fixed buffers, run on the CPU as they are: the same texts, and nothing that a capture forbids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from continuations import TOKENS, assert_same_texts, greedy, padded
from test_engine import HOW, how_to, prompts_of
from test_law import PROMPT, VOCAB, statistic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from memdec import MemdecError, MemoryModel
from memdec.decoding import engine, graphs
from memdec.decoding.bench import Alone
from memdec.decoding.fusing import FusedStep

# What waits for the device, has a size that depends on data, or copies from memory that is not pinned.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "masked_select", "unique", "equal", "item")


class AsInACapture(TorchDispatchMode):  # type: ignore[misc]
    """Refuses what cannot be captured, and copies from one device to another."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in FORBIDDEN or (
            name in ("index", "index_put_") and any(_is_mask(i) for i in args[1] if i is not None)
        ):
            raise AssertionError(f"{function} cannot be captured")
        return function(*args, **(kwargs or {}))


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


@pytest.fixture
def over_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graphs.Rounds]]:
    """Texts are decoded over fixed buffers, on the CPU; from the second call on each function is watched."""
    made: list[graphs.Rounds] = []
    run = graphs.Rounds.run

    def watched(self: graphs.Rounds, name: str, count: int) -> bool:
        if self not in made:
            made.append(self)
        before = addresses(self)
        if (name, count) in self.called:
            with AsInACapture():
                steady = run(self, name, count)
            assert addresses(self) == before
        else:
            steady = run(self, name, count)
        return steady

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.Rounds, "run", watched)
    yield made
    assert made, "the other engine was used"


def addresses(rounds: graphs.Rounds) -> dict[str, int]:
    """Where everything lies that outlives a round."""
    found = {name: value.data_ptr() for name, value in vars(rounds).items() if isinstance(value, Tensor)}
    for which in ("base", "memory"):
        for i, layer in enumerate(getattr(rounds, which).cache.layers):
            if layer.is_initialized:
                found |= {f"{which} {i} keys": layer.keys.data_ptr(), f"{which} {i} values": layer.values.data_ptr()}
    return found


@pytest.fixture(scope="module")
def model(make_pair: Callable[..., MemoryModel], tiny_tokenizer: Any) -> MemoryModel:
    return make_pair(close=0.35, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def strangers(make_pair: Callable[..., MemoryModel], tiny_tokenizer: Any) -> MemoryModel:
    return make_pair(tokenizer=tiny_tokenizer)


@how_to
@pytest.mark.parametrize("which", ["model", "strangers"])
def test_greedy_is_the_composite_s(
    which: str, how: dict[str, Any], over_buffers: Any, request: pytest.FixtureRequest
) -> None:
    """A batch of forty; it is decoded twice, so that the buffers of the first time are used again."""
    model = request.getfixturevalue(which)
    for start in range(2):
        prompts = prompts_of(40, seed=start)
        wanted = greedy(model, padded(prompts), decoding="composite")
        assert_same_texts(model, prompts, greedy(model, padded(prompts), **how), wanted)
    last = model.last_decode
    assert last.reason is None and last.tokens == 40 * TOKENS and "capture" in last.seconds
    if how.get("draft_tokens", 0) > 1 and which == "model":
        assert 0.2 < last.acceptance < 0.95 and last.tokens_per_round > 1.3
        assert 0 < last.accepted < last.drafted and 0 < last.rounds <= last.row_rounds


@how_to
def test_one_prompt_as_in_a_batch(model: MemoryModel, how: dict[str, Any], over_buffers: Any) -> None:
    prompts = [[7], *prompts_of(6, seed=3), [9]]
    together = greedy(model, padded(prompts), **how)
    alone = [greedy(model, {"input_ids": torch.tensor([p])}, **how)[0] for p in prompts]
    assert_same_texts(model, prompts, alone, together)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 50, "temperature": 0.9, "top_p": 0.95}])
def test_a_sampled_row_is_its_seed_s(
    model: MemoryModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, over_buffers: Any
) -> None:
    """What the other engine draws with the same seeds, in a batch and alone, with any γ."""
    prompts = prompts_of(6, seed=4)
    seeds = torch.arange(6) * 1234567 - 5
    monkeypatch.setattr(engine, "row_seeds", lambda rows, device: seeds)
    monkeypatch.setattr(graphs, "row_seeds", lambda rows, device: seeds)
    ask = {"max_new_tokens": TOKENS, "do_sample": True, **settings}
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICES", ())
        wanted = model.generate(**padded(prompts), **ask, **HOW["γ = 4"])[:, -TOKENS:].tolist()
        assert model.last_decode is not None and "capture" not in model.last_decode.seconds
    for how in HOW.values():
        assert model.generate(**padded(prompts), **ask, **how)[:, -TOKENS:].tolist() == wanted
    for i, prompt in enumerate(prompts):
        monkeypatch.setattr(graphs, "row_seeds", lambda rows, device, i=i: seeds[i : i + 1])
        alone = model.generate(torch.tensor([prompt]), **ask, **HOW["γ = 4"])
        assert alone[0, len(prompt) :].tolist() == wanted[i]


@how_to
def test_end_of_text_inside_a_draft(model: MemoryModel, how: dict[str, Any], over_buffers: Any) -> None:
    prompts = prompts_of(30, seed=6)
    free = greedy(model, padded(prompts), decoding="composite")
    ends = sorted({text[i % 17] for i, text in enumerate(free)})[::3]
    settings = {"eos_token_id": ends, "pad_token_id": 1}
    wanted = greedy(model, padded(prompts), decoding="composite", **settings)
    tokens = model.last_decode.tokens
    got = greedy(model, padded(prompts), **settings, **how)
    assert got == wanted and model.last_decode.tokens == tokens


@how_to
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6])
def test_max_new_tokens_inside_a_draft(model: MemoryModel, how: dict[str, Any], tokens: int, over_buffers: Any) -> None:
    prompts = prompts_of(8, seed=7)
    got = greedy(model, padded(prompts), tokens, **how)
    assert got == greedy(model, padded(prompts), tokens, decoding="composite") and len(got[0]) == tokens


def test_stop_strings_and_a_criterion_of_one_s_own(model: MemoryModel, tiny_tokenizer: Any, over_buffers: Any) -> None:
    def after_seven(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 3 + 7)

    ids = {"input_ids": torch.tensor([[4, 8, 15]])}
    free = greedy(model, ids, decoding="composite")[0]
    assert greedy(model, ids, stopping_criteria=[after_seven], **HOW["γ = 4"]) == [free[:7]]
    for prompt in prompts_of(12, seed=8):
        ids = {"input_ids": torch.tensor([prompt])}
        word = tiny_tokenizer.decode(greedy(model, ids, decoding="composite")[0][5])
        if word.strip() and word.isascii():
            settings = {"stop_strings": [word], "tokenizer": tiny_tokenizer}
            wanted = greedy(model, ids, decoding="composite", **settings)
            assert greedy(model, ids, **settings, **HOW["γ = 4"]) == wanted


def test_a_streamer_gets_token_after_token(model: MemoryModel, over_buffers: Any) -> None:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    ids = {"input_ids": torch.tensor([[4, 8, 15]])}
    wanted = greedy(model, ids, decoding="composite")[0]
    streamer = Collect()
    greedy(model, ids, streamer=streamer, **HOW["γ = 4"])
    assert streamer.pieces == [[4, 8, 15], *[[token] for token in wanted]] and streamer.ended == 1


@how_to
def test_the_buffers_grow(
    model: MemoryModel, how: dict[str, Any], over_buffers: list[graphs.Rounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rooms of 64 and 128 tokens, padding among them; what was read goes along."""
    monkeypatch.setattr(graphs, "ROOM", 16)
    prompts = prompts_of(5, seed=9)
    wanted = greedy(model, padded(prompts), 90, decoding="composite")
    assert_same_texts(model, prompts, greedy(model, padded(prompts), 90, **how), wanted)
    rooms = sorted({rounds.room for rounds in over_buffers})
    assert rooms == ([128] if how == HOW["γ = 30"] else [64, 128])


def test_prompts_as_long_as_the_context(model: MemoryModel, strangers: MemoryModel, over_buffers: Any) -> None:
    """256 positions, gpt2's table of them included: drafts never reach beyond the last."""
    for one in (model, strangers):
        prompts = [torch.arange(1, 250).tolist(), torch.arange(1, 240).tolist()]
        got = greedy(one, padded(prompts), 7, **HOW["γ = 30"])
        assert_same_texts(one, prompts, got, greedy(one, padded(prompts), 7, decoding="composite"))


@pytest.mark.parametrize("longest", [2, 4, 5, 8, 9, 16, 40])
def test_prompts_are_read_in_pieces(
    make_pair: Callable[..., MemoryModel], longest: int, over_buffers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches hold what the models' own forward leaves there; beside it, only what will be written over."""
    monkeypatch.setattr(graphs, "PIECES", (4, 8))
    model, prompts = make_pair(close=0.35), prompts_of(4, seed=longest, longest=longest)
    given = padded([*prompts, list(range(1, longest + 1))])
    ids, mask = given["input_ids"], given["attention_mask"]
    rounds = graphs.Rounds(model, 5, 64, 4, None)
    for _ in range(2):  # the second time over what the first has left
        rounds.begin(ids, mask, 7, torch.zeros(5, dtype=torch.int64))
    assert {key[1] for key in rounds.called} == {4 if longest <= 5 else 8}
    kept = {name: value.clone() for name, value in vars(rounds).items() if isinstance(value, Tensor)}
    caches = [(layer.keys.clone(), layer.values.clone()) for one in rounds.slots for layer in one.cache.layers]
    monkeypatch.setattr(graphs, "MOST_IN_PIECES", 0)
    rounds.begin(ids, mask, 7, torch.zeros(5, dtype=torch.int64))
    for name, value in vars(rounds).items():
        if isinstance(value, Tensor) and name not in ("piece", "stop"):
            assert torch.equal(value, kept[name]), name
    layers = [layer for one in rounds.slots for layer in one.cache.layers]
    assert longest > 1 and len(layers) == len(caches) > 2
    for layer, pair in zip(layers, caches, strict=True):
        for store, found in zip((layer.keys, layer.values), pair, strict=True):
            torch.testing.assert_close(found[:, :, : longest - 1], store[:, :, : longest - 1], rtol=1e-4, atol=1e-5)
            assert found.isfinite().all() and not found[:, :, longest:].any()
            assert store[4].any()


@pytest.mark.parametrize("alone", [False, True])
def test_texts_after_prompts_in_pieces(
    make_pair: Callable[..., MemoryModel],
    alone: bool,
    over_buffers: list[graphs.Rounds],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "PIECES", (4, 8))
    model = make_pair(close=0.35)
    prompts = prompts_of(12, seed=5, longest=30)
    wanted = greedy(model, padded(prompts), decoding="composite")
    if alone:
        got = [greedy(model, {"input_ids": torch.tensor([p])}, **HOW["γ = 4"])[0] for p in prompts]
    else:
        got = greedy(model, padded(prompts), **HOW["γ = 4"])
    assert_same_texts(model, prompts, got, wanted)
    assert any(name == "prompt" for rounds in over_buffers for name, _ in rounds.called)


def test_long_prompts_and_other_families_are_read_at_once(
    make_pair: Callable[..., MemoryModel], over_buffers: list[graphs.Rounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_IN_PIECES", 63)
    for one in (make_pair(close=0.35), make_pair()):
        ids = {"input_ids": torch.tensor([[3, 1, 4]])}
        assert greedy(one, ids, **HOW["γ = 4"]) == greedy(one, ids, decoding="composite")
    assert len(over_buffers) == 2 and not any(name == "prompt" for rounds in over_buffers for name, _ in rounds.called)


def test_zeros_between_tokens_are_not_padding(
    model: MemoryModel, over_buffers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers infers them where a prompt has the padding token: positions count what is not masked."""
    monkeypatch.setattr(graphs, "PIECES", (16, 64))
    generator = torch.Generator().manual_seed(4)
    for rows in (1, 3):
        ids = torch.randint(1, 384, (rows, 20), generator=generator)
        mask = (torch.rand(ids.shape, generator=generator) < 0.7).long()
        mask[:, -1] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        wanted = greedy(model, inputs, decoding="composite")
        assert greedy(model, inputs, **HOW["γ = 4"]) == wanted
    assert not any(name == "prompt" for rounds in over_buffers for name, _ in rounds.called)


@pytest.mark.parametrize("first", [False, True])
def test_in_inference_mode_and_outside(make_pair: Callable[..., MemoryModel], first: bool, over_buffers: Any) -> None:
    """What is kept from a text within that mode serves those after it, and the other way round."""
    model = make_pair(close=0.35)
    inputs = padded(prompts_of(2, seed=3))
    wanted = greedy(model, inputs, decoding="composite")
    for within in (first, not first, first):
        with torch.inference_mode(within):
            assert greedy(model, inputs, **HOW["γ = 4"]) == wanted


def test_what_was_interrupted_is_not_warm(
    make_pair: Callable[..., MemoryModel], stand_ins: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function whose first call failed is called once more before it is captured."""
    model, inputs = make_pair(close=0.35), padded([[1, 2, 3]])
    wanted = greedy(model, inputs, decoding="composite")
    with monkeypatch.context() as patch:
        patch.setattr(graphs.Rounds, "join", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            greedy(model, inputs, **HOW["γ = 4"])
    (rounds,) = graphs._KEPT[model].values()
    assert not rounds.called
    assert greedy(model, inputs, **HOW["γ = 4"]) == wanted
    assert ("prompt", 64) in rounds.called and ("prompt", 64) not in rounds.graphs


def test_a_text_within_a_text(model: MemoryModel, over_buffers: Any) -> None:
    """A criterion that writes texts of its own with the same model: they are written without buffers."""
    inner, outer = padded([[5, 6, 7]]), padded([[1, 2, 3, 4]])
    wanted = [greedy(model, inputs, decoding="composite") for inputs in (inner, outer)]
    found = []

    def writes(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found.append(greedy(model, inner, **HOW["γ = 4"]))
        return torch.zeros(len(ids), dtype=torch.bool)

    assert greedy(model, outer, stopping_criteria=[writes], **HOW["γ = 4"]) == wanted[1]
    assert found and all(text == wanted[0] for text in found)


def test_a_module_is_replaced(make_pair: Callable[..., MemoryModel], over_buffers: Any) -> None:
    """One without weights, after a first text."""
    model, inputs = make_pair(close=0.35), padded(prompts_of(2, seed=3))
    greedy(model, inputs, **HOW["γ = 4"])
    for block in model.base.model.layers:
        block.mlp.act_fn = torch.nn.ReLU()
    wanted = greedy(model, inputs, decoding="composite")
    assert greedy(model, inputs, **HOW["γ = 4"]) == wanted


def test_a_round_is_queued_before_the_last_one_was_looked_at(
    model: MemoryModel, over_buffers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    launch, wait = graphs.Rounds.launch, graphs.Flight.wait

    def launched(*arguments: Any) -> graphs.Flight:
        happened.append("launch")
        return launch(*arguments)

    def waited(self: graphs.Flight) -> Any:
        happened.append("look")
        return wait(self)

    monkeypatch.setattr(graphs.Rounds, "launch", launched)
    monkeypatch.setattr(graphs.Flight, "wait", waited)
    greedy(model, {"input_ids": torch.tensor([[4, 8]])}, 5, decoding="parallel")
    assert happened == ["launch", *["launch", "look"] * 4, "look"]


@pytest.mark.parametrize("warped", [False, True], ids=["plain", "warped"])
@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
def test_law(make_pair: Callable[..., MemoryModel], draft_tokens: int, warped: bool, over_buffers: Any) -> None:
    """As in test_law, at α = 0.4; false alarm 10⁻⁶ a case."""
    how = {"decoding": "speculative", "draft_tokens": draft_tokens} if draft_tokens else {"decoding": "parallel"}
    found, limit = statistic(make_pair(vocab=VOCAB), 0.4, warped, seed=draft_tokens, **how)
    assert found < limit and len(PROMPT) == 4


def test_broken_weights_are_said_to_be(make_pair: Callable[..., MemoryModel], over_buffers: Any) -> None:
    broken = make_pair()
    with torch.no_grad():
        broken.base.model.norm.weight.fill_(torch.nan)
    with pytest.raises(MemdecError, match="no token to choose"):
        greedy(broken, {"input_ids": torch.tensor([[1, 2]])}, **HOW["γ = 4"])


# -- graphs and streams, by stand-ins --------------------------------------------------------------------------------


class Moment:
    """An event or a stream, as far as they are asked for anything."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Graph:
    """What runs between its begin and its end leaves no trace; a replay does it."""

    fails = False
    made: list[Graph] = []  # noqa: RUF012
    capturing: tuple[graphs.Rounds, tuple[str, int]] | None = None

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert Graph.capturing is not None
        self.rounds, self.key = Graph.capturing
        Graph.made.append(self)
        caches = (self.rounds.base.cache, self.rounds.memory.cache)
        kept = [v for v in vars(self.rounds).values() if isinstance(v, Tensor)]
        kept += [store for cache in caches for layer in cache.layers for store in (layer.keys, layer.values)]
        self.before = [(tensor, tensor.clone()) for tensor in kept]

    def capture_end(self) -> None:
        for tensor, value in self.before:
            tensor.copy_(value)
        if Graph.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        getattr(self.rounds, self.key[0])(self.key[1])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Graph]]:
    """The code for a GPU runs, with stand-ins for graphs, streams and events."""
    init, capture = graphs.Rounds.__init__, graphs.Rounds.capture

    def made(self: graphs.Rounds, *arguments: Any) -> None:
        init(self, *arguments)
        self.captures, self.streams = True, (Moment(), Moment())  # type: ignore[assignment]

    def captured(self: graphs.Rounds, key: tuple[str, int]) -> None:
        Graph.capturing = self, key
        capture(self, key)

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.Rounds, "__init__", made)
    monkeypatch.setattr(graphs.Rounds, "capture", captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Moment())
    monkeypatch.setattr(Graph, "made", [])
    yield Graph


def test_each_function_is_captured_once(make_pair: Callable[..., MemoryModel], stand_ins: type[Graph]) -> None:
    model, prompts = make_pair(close=0.35), prompts_of(5)
    wanted = greedy(model, padded(prompts), decoding="composite")
    for _ in range(2):
        assert_same_texts(model, prompts, greedy(model, padded(prompts), **HOW["γ = 4"]), wanted)
    made = [graph.key for graph in stand_ins.made]
    assert sorted(made) == [*[("draft", i) for i in range(4)], ("prompt", 64), ("verify", 4)]
    last = model.last_decode
    assert last is not None and last.cost_ratio is not None and last.seconds["draft"] > 0
    assert_same_texts(model, prompts, greedy(model, padded(prompts), decoding="auto"), wanted)


def test_where_a_capture_fails_the_text_is_written_without(
    make_pair: Callable[..., MemoryModel],
    stand_ins: type[Graph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stand_ins, "fails", True)
    model, ids = make_pair(close=0.35), {"input_ids": torch.tensor([[4, 8, 15]])}
    wanted = greedy(model, ids, decoding="composite")
    assert greedy(model, ids, **HOW["γ = 4"]) == wanted and len(stand_ins.made) == 1
    assert "goes on without CUDA graphs: capturing draft(0) failed: operation not permitted" in caplog.text
    assert greedy(model, ids, **HOW["γ = 4"]) == wanted and len(stand_ins.made) == 1
    assert model.last_decode is not None and "capture" not in model.last_decode.seconds


# -- where it applies ------------------------------------------------------------------------------------------------


def test_why_not(
    make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, cpu = make_pair(), torch.device("cpu")
    assert graphs.why_not(model, cpu) == "the models are not on a CUDA device"
    with caplog.at_level(logging.DEBUG, logger="memdec"):
        greedy(model, {"input_ids": torch.tensor([[1, 2]])}, 2)
    assert "without CUDA graphs: the models are not on a CUDA device" in caplog.text
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    assert graphs.why_not(model, cpu) is None
    monkeypatch.setenv("MEMDEC_GRAPHS", "0")
    assert graphs.why_not(model, cpu) == "MEMDEC_GRAPHS is 0"
    monkeypatch.delenv("MEMDEC_GRAPHS")
    with torch.autocast("cpu"):
        assert graphs.why_not(model, cpu) == "autocast is on"
    hook = model.memory.lm_head.register_forward_hook(lambda *_: None)
    assert graphs.why_not(model, cpu) == "the memory has hooks"
    hook.remove()
    model.base.train()
    assert graphs.why_not(model, cpu) == "the base is in training mode"
    model.base.eval()
    model.base.config._attn_implementation = "flex_attention"
    assert "not made for static caches" in str(graphs.why_not(model, cpu))


@pytest.mark.parametrize("name", ["base", "memory"])
def test_a_model_alone_needs_one_stream(
    make_pair: Callable[..., MemoryModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To wait for a stream that nothing was queued on, within a capture, is an error of CUDA's."""
    monkeypatch.setattr(graphs.Rounds, "beside", None)
    monkeypatch.setattr(graphs.Rounds, "join", None)
    model = make_pair(close=0.35)
    prompt = torch.arange(1, 10)[None]
    wanted = getattr(model, name).generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(Alone(model, name, 64).generate(prompt, 12), wanted[:, prompt.shape[1] :])


def test_steps_are_fused(make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the llama and not of the gpt2, and of none that is compiled; its forward is the model's own all the same."""
    model = make_pair()
    rounds = graphs.rounds_of(model, 1, 16, 8, None)
    assert isinstance(rounds.fused[rounds.base], FusedStep) and rounds.fused[rounds.memory] is None
    assert not any("forward" in module.__dict__ for module in model.base.modules())
    monkeypatch.setenv("MEMDEC_COMPILE", "1")
    rounds = graphs.rounds_of(model, 1, 16, 8, None)
    assert list(rounds.fused.values()) == [None, None]


def test_few_buffers_are_kept(make_pair: Callable[..., MemoryModel]) -> None:
    model = make_pair()
    first = graphs.rounds_of(model, 1, 16, 8, None)
    assert graphs.rounds_of(model, 1, 16, 8, None) is first
    for rows in range(2, 2 + graphs.KEPT):
        graphs.rounds_of(model, rows, 16, 8, None)
    assert len(graphs._KEPT[model]) == graphs.KEPT and graphs.rounds_of(model, 1, 16, 8, None) is not first
    second = graphs.rounds_of(model, 1, 16, 8, None)
    with torch.no_grad():
        model.base.model.norm.weight.data = model.base.model.norm.weight.clone()
    assert graphs.rounds_of(model, 1, 16, 8, None) is not second  # a weight lies elsewhere
    graphs.forget(model)
    assert model not in graphs._KEPT
