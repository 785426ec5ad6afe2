"""Decoding on a real GPU: what captured rounds write is what the composite and the uncaptured engine write.

tests/decoding/test_graphs.py runs the same rounds on the CPU; here they are captured, replayed, and on two streams.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fused_checks
import kernel_checks
import pytest
import torch
from continuations import TOKENS, assert_same_texts, greedy, padded
from test_law import VOCAB, statistic

from memdec import MemoryModel, build_info
from memdec.decoding import graphs, kernels
from memdec.decoding.bench import Alone
from memdec.decoding.cache import slot_cache
from memdec.decoding.fusing import fused_step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or build_info()["cuda"] != "on",
    reason="needs a GPU, and a memdec with CUDA kernels",
)

HOW: dict[str, dict[str, Any]] = {
    "parallel": {"decoding": "parallel"},
    "γ = 1": {"decoding": "speculative", "draft_tokens": 1},
    "γ = 4": {"decoding": "speculative", "draft_tokens": 4},
    "auto": {"decoding": "auto"},
}
how_to = pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
MOST_TIES = 0.1  # of the texts; the kernels of a row and of five round differently


def prompts_of(count: int, seed: int = 0, longest: int = 12, vocab: int = 384) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def make_pair(tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> Callable[..., MemoryModel]:
    """A llama with a copy of itself with noise in its weights, or with a gpt2, in float32 on the GPU."""

    def make(close: float = 0.0, vocab: int = 384, dtype: torch.dtype = torch.float32) -> MemoryModel:
        base = tiny_llama(vocab=vocab, eos_token_id=None)
        memory = (
            tiny_llama(vocab=vocab, eos_token_id=None) if close else tiny_gpt2(vocab=vocab, seed=2, eos_token_id=None)
        )
        torch.manual_seed(9)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter += close * parameter.std() * torch.randn_like(parameter)
        return MemoryModel.from_pretrained(base.to("cuda", dtype), memory.to("cuda", dtype), alpha=0.4)

    return make


@pytest.fixture(scope="module")
def model(make_pair: Callable[..., MemoryModel]) -> MemoryModel:
    """A pair of which about half of the drafts stand."""
    return make_pair(close=0.35)


@pytest.fixture(scope="module")
def strangers(make_pair: Callable[..., MemoryModel]) -> MemoryModel:
    return make_pair()


def assert_captured(model: MemoryModel) -> None:
    """The last text was written by graphs, and none of them failed."""
    assert model not in graphs._REFUSED, graphs._REFUSED[model]
    last = list(graphs._KEPT[model].values())[-1]
    assert last.failure is None and last.graphs
    assert model.last_decode is not None and "capture" in model.last_decode.seconds


def assert_same(model: MemoryModel, prompts: list[list[int]], got: list[Any], wanted: list[Any]) -> None:
    """Near-ties are reported."""
    ties = assert_same_texts(model, prompts, got, wanted, MOST_TIES)
    if ties:
        warnings.warn(f"{ties} of {len(prompts)} texts part at a near-tie", stacklevel=2)


@pytest.fixture(scope="module")
def composite() -> Callable[..., list[list[int]]]:
    """greedy(…, decoding="composite"), once for the same model and prompts: its steps are the slowest thing here."""
    known: dict[Any, list[list[int]]] = {}

    def texts(model: MemoryModel, prompts: list[list[int]], tokens: int = TOKENS, **settings: Any) -> list[list[int]]:
        key = (id(model), str((prompts, tokens, settings)))
        if key not in known:
            known[key] = greedy(model, padded(prompts), tokens, decoding="composite", **settings)
        return known[key]

    return texts


@how_to
@pytest.mark.parametrize("which", ["model", "strangers"])
def test_greedy_is_the_composite_s(
    which: str, how: dict[str, Any], composite: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """Left-padded batches of forty, twice, so that buffers and graphs are used again."""
    model = request.getfixturevalue(which)
    for seed in range(2):
        prompts = prompts_of(40, seed=seed)
        wanted = composite(model, prompts)
        assert_same(model, prompts, greedy(model, padded(prompts), **how), wanted)
        assert_captured(model)
    if how.get("draft_tokens") == 4 and which == "model":
        assert 0.2 < model.last_decode.acceptance < 0.95 and model.last_decode.tokens_per_round > 1.3


@how_to
def test_one_prompt_as_in_a_batch(model: MemoryModel, how: dict[str, Any]) -> None:
    prompts = [[7], *prompts_of(4, seed=3), [9]]
    together = greedy(model, padded(prompts), **how)
    alone = [greedy(model, {"input_ids": torch.tensor([p])}, **how)[0] for p in prompts]
    assert_captured(model)
    ties = assert_same_texts(model, prompts, alone, together, most_ties=0.35)
    if ties:
        warnings.warn(f"{ties} of {len(prompts)} texts part at a near-tie", stacklevel=1)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 50, "temperature": 0.9, "top_p": 0.95}], ids=str)
def test_draws_are_those_of_the_uncaptured_engine(
    model: MemoryModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of their seed; and other seeds, or going on, draw something else."""
    ask = {"input_ids": torch.tensor([[4, 8, 15]] * 6, device="cuda"), "max_new_tokens": TOKENS, "do_sample": True}
    texts = []
    for how in HOW.values():
        torch.manual_seed(1)
        first, second = (model.generate(**ask, **settings, **how).tolist() for _ in range(2))
        assert_captured(model)
        own = torch.Generator("cuda").manual_seed(1)
        assert model.generate(**ask, **settings, **how, generator=own).tolist() == first != second
        texts.append(first)
    monkeypatch.setenv("MEMDEC_GRAPHS", "0")
    torch.manual_seed(1)
    texts.append(model.generate(**ask, **settings, **HOW["γ = 4"]).tolist())
    assert model.last_decode is not None and "capture" not in model.last_decode.seconds
    assert all(text == texts[0] for text in texts)
    assert len({tuple(row) for row in texts[0]}) == 6


@how_to
def test_end_of_text_inside_a_draft(model: MemoryModel, how: dict[str, Any], composite: Callable[..., Any]) -> None:
    prompts = prompts_of(20, seed=6)
    free = composite(model, prompts)
    ends = sorted({text[i % 17] for i, text in enumerate(free)})[::3]
    settings = {"eos_token_id": ends, "pad_token_id": 1}
    wanted = composite(model, prompts, **settings)
    got = greedy(model, padded(prompts), **settings, **how)
    assert_same(model, prompts, got, wanted)
    assert len({text.index(1) if 1 in text else TOKENS for text in got}) > 4


@how_to
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_max_new_tokens_inside_a_draft(
    model: MemoryModel, how: dict[str, Any], tokens: int, composite: Callable[..., Any]
) -> None:
    prompts = prompts_of(8, seed=7)
    got = greedy(model, padded(prompts), tokens, **how)
    assert_same(model, prompts, got, composite(model, prompts, tokens))
    assert len(got[0]) == tokens


@how_to
def test_the_buffers_grow(
    model: MemoryModel, how: dict[str, Any], composite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rooms of 64 and 128 tokens, and of as many graphs."""
    monkeypatch.setattr(graphs, "ROOM", 16)
    graphs.forget(model)
    prompts = prompts_of(10, seed=9)
    wanted = composite(model, prompts, 90)
    got = greedy(model, padded(prompts), 90, **how)
    assert_captured(model)
    assert sorted(rounds.room for rounds in graphs._KEPT[model].values()) == [64, 128]
    ties = assert_same_texts(model, prompts, got, wanted, most_ties=0.3)
    if ties:
        warnings.warn(f"{ties} of {len(prompts)} texts part at a near-tie", stacklevel=1)


def test_prompts_are_read_in_pieces(
    make_pair: Callable[..., MemoryModel], composite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text twice: the first time the pieces are called or captured, the second time replayed."""
    monkeypatch.setattr(graphs, "PIECES", (16, 64))
    model = make_pair(close=0.35)
    generator = torch.Generator().manual_seed(3)
    lengths = (2, 16, 17, 18, 64, 65, 66, 129, 200)
    prompts = [torch.randint(1, 384, (n,), generator=generator).tolist() for n in lengths]
    wanted = composite(model, prompts)
    for _ in range(2):
        got = [greedy(model, {"input_ids": torch.tensor([p])}, **HOW["γ = 4"])[0] for p in prompts]
        assert_captured(model)
        assert_same(model, prompts, got, wanted)
        assert_same(model, prompts[:5], greedy(model, padded(prompts[:5]), **HOW["γ = 4"]), wanted[:5])
    read = {key for rounds in graphs._KEPT[model].values() for key in rounds.graphs if key[0] == "prompt"}
    assert read == {("prompt", 16), ("prompt", 64)}


@pytest.mark.parametrize("name", ["base", "memory"])
def test_a_model_alone_is_captured(make_pair: Callable[..., MemoryModel], name: str) -> None:
    """What `memdec bench-decode` compares with: its prompt and its steps, the first time called and then replayed."""
    model = make_pair(close=0.35)
    alone = Alone(model, name, 64)
    prompt = torch.arange(1, 10, device="cuda")[None]
    texts = [alone.generate(prompt, 12) for _ in range(3)]
    assert alone.failure is None and {key for key, _ in alone.graphs} == {"prompt", "verify"}
    assert all(torch.equal(text, texts[0]) for text in texts)
    wanted = getattr(model, name).generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(texts[0].cpu(), wanted[:, prompt.shape[1] :].cpu())


@pytest.mark.parametrize("warped", [False, True], ids=["plain", "warped"])
@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
def test_law_of_the_first_tokens(make_pair: Callable[..., MemoryModel], draft_tokens: int, warped: bool) -> None:
    """χ² of 6,000 texts of three tokens against the enumerated law; false alarm 10⁻⁶ a case.

    Twice: what the first texts have not captured, the second ones do or replay.
    """
    model = make_pair(vocab=VOCAB)
    how = {"decoding": "speculative", "draft_tokens": draft_tokens} if draft_tokens else {"decoding": "parallel"}
    for seed in range(2):
        found, limit = statistic(model, 0.4, warped, seed=seed, **how)
        assert found < limit
    assert_captured(model)


def test_bfloat16(make_pair: Callable[..., MemoryModel]) -> None:
    model = make_pair(close=0.2, dtype=torch.bfloat16)
    texts = greedy(model, padded(prompts_of(5)), 40, **HOW["γ = 4"])
    assert_captured(model)
    assert [len(text) for text in texts] == [40] * 5 and all(0 <= t < 384 for text in texts for t in text)


def test_on_a_stream_of_the_caller_s(model: MemoryModel) -> None:
    """The prompt is made on a stream that sleeps before: the rounds wait for it."""
    prompt = torch.tensor([[4, 8, 15]])
    wanted = greedy(model, {"input_ids": prompt}, **HOW["γ = 4"])
    there = prompt.pin_memory()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        ids = there.to("cuda", non_blocking=True)
        got = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, **HOW["γ = 4"])[:, 3:].tolist()
    assert_same(model, [[4, 8, 15]], got, wanted)


# -- fused steps -----------------------------------------------------------------------------------------------------


def triton_kernels(dtype: torch.dtype) -> Any:
    """They must work wherever Triton is: a fall back to their twins would hide that they do not."""
    pytest.importorskip("triton", reason="this PyTorch came without Triton")
    found = kernels.fast_kernels(torch.device("cuda"), dtype)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", kernel_checks.NORMS)
def test_add_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    kernel_checks.check_add_norm(triton_kernels(dtype), "cuda", dtype, rows, width)


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", kernel_checks.PRODUCTS)
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    kernel_checks.check_silu_mul(triton_kernels(dtype), "cuda", dtype, rows, width)


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("heads, key_heads, dim", [(14, 2, 64), (4, 4, 128), (7, 1, 80)])
def test_rotate_and_store(dtype: torch.dtype, rows: int, count: int, heads: int, key_heads: int, dim: int) -> None:
    kernel_checks.check_rotate_and_store(triton_kernels(dtype), "cuda", dtype, rows, count, heads, key_heads, dim)


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, width, outputs", [*kernel_checks.LINEARS, (4, 896, 1152), (7, 4864, 896), (1, 8960, 1536)]
)
def test_linears(dtype: torch.dtype, rows: int, width: int, outputs: int) -> None:
    kernel_checks.check_linear(triton_kernels(dtype), "cuda", dtype, rows, width, outputs)


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, count, heads, key_heads, dim, room",
    [*kernel_checks.ATTENTIONS, (1, 4, 12, 2, 128, 1024), (8, 1, 14, 2, 64, 512)],
)
def test_cached_attention(
    dtype: torch.dtype, rows: int, count: int, heads: int, key_heads: int, dim: int, room: int
) -> None:
    fast = triton_kernels(dtype)
    kernel_checks.check_cached_attention(fast, "cuda", dtype, rows, count, heads, key_heads, dim, room)
    kernel_checks.check_a_shared_slot(fast, "cuda", dtype)


@pytest.mark.parametrize("name", fused_checks.MODELS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("path", fused_checks.PATHS)
def test_a_fused_step_says_what_the_model_says(
    name: str, count: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a product of several weights may round otherwise than each; logits that are wrong are wrong by 2."""
    fused_checks.go_by(path, monkeypatch)
    fused_checks.assert_same(fused_checks.tiny(name).to("cuda"), count, 5e-4)
    fused_checks.assert_same(fused_checks.tiny(name).to("cuda", torch.bfloat16), count, 0.25)


@pytest.mark.parametrize("name", ["qwen2", "llama, a key head for each", "qwen3"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_captured_step_is_replayed(name: str, count: int) -> None:
    """With tokens, positions, slots and a mask that came after the capture."""
    model = fused_checks.tiny(name).to("cuda", torch.bfloat16)
    step, (cache, _) = fused_step(model), slot_cache(model, 256)
    assert step is not None
    tokens, at = torch.zeros(2, 2, count, dtype=torch.int64, device="cuda")
    hidden = torch.zeros(2, count, 256, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(tokens, at, at, hidden, cache)
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        captured = step(tokens, at, at, hidden, cache)
        graph.capture_end()
        tokens.copy_(torch.randint(0, 97, tokens.shape))
        at.copy_(torch.arange(40, 40 + count).expand(2, count))
        hidden.copy_(torch.arange(256) > at.cpu()[..., None])
        graph.replay()
        replayed = captured.clone()
        torch.testing.assert_close(replayed, step(tokens, at, at, hidden, cache), rtol=0.02, atol=0.02)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("count, most", [(1, 5), (8, 5), (9, 10)])
def test_kernels_a_layer(name: str, count: int, most: int) -> None:
    """Counted by PyTorch's profiler in steps of models of two layers and of four, without those that end a product."""
    triton_kernels(torch.bfloat16)
    launched = []
    for layers in (2, 4):
        model = fused_checks.tiny(name, num_hidden_layers=layers, hidden_size=64).to("cuda", torch.bfloat16)
        step, (cache, _) = fused_step(model), slot_cache(model, 256)
        assert step is not None
        tokens = torch.zeros(1, count, dtype=torch.int64, device="cuda")
        hidden = torch.zeros(1, count, 256, dtype=torch.bool, device="cuda")
        step(tokens, tokens, tokens, hidden, cache)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(tokens, tokens, tokens, hidden, cache)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        launched.append([name for name in names if "splitK" not in name and "Memset" not in name])
    each = (len(launched[1]) - len(launched[0])) / 2
    assert 0 < each <= most, (each, launched[0])


def test_where_a_capture_fails_the_text_is_written_without(
    make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last test here: a broken capture may leave CUDA in no good state."""
    model = make_pair(close=0.35)
    ids = {"input_ids": torch.tensor([[4, 8, 15]])}
    wanted = greedy(model, ids, **HOW["γ = 4"])
    graphs.forget(model)
    draft = graphs.Rounds.draft

    def waits(self: graphs.Rounds, i: int) -> None:
        draft(self, i)
        self.block.sum().item()

    monkeypatch.setattr(graphs.Rounds, "draft", waits)
    with caplog.at_level(logging.INFO, logger="memdec"):
        assert greedy(model, ids, **HOW["γ = 4"]) == wanted
        assert "goes on without CUDA graphs: capturing draft(0) failed" in caplog.text
        assert greedy(model, ids, **HOW["γ = 4"]) == wanted
        assert "without CUDA graphs: capturing draft(0) failed" in caplog.records[-1].getMessage()
    assert model.last_decode is not None and "capture" not in model.last_decode.seconds
