"""A step in the extension says what the model says, to the bit the same whatever else is read beside a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused_checks
import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from memdec import MemoryModel, build_info
from memdec.decoding import packing, stepping
from memdec.decoding.engine import Reader
from memdec.decoding.stepping import MOST_ROWS, cpu_step, quick_steps, step_of
from memdec.errors import MemdecError
from memdec.modeling.keys import captured_inputs

VOCABULARY = 97
PROMPT = 5
every_level = pytest.mark.parametrize("simd", build_info()["simd_levels"], indirect=True)
everyone = pytest.mark.parametrize("name", fused_checks.MODELS)


def ids_of(rows: int, count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(1))


def padded(rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Mask and positions of `rows` texts of `count` tokens, of which text i is padded with i on the left."""
    padding = torch.arange(rows)[:, None]
    columns = torch.arange(count)
    return (columns >= padding).long(), (columns - padding).clamp(min=0)


def read(model: Any, counts: list[int], *, quick: bool, rows: int = 2, room: int = 32) -> tuple[Tensor, list[Tensor]]:
    """Logits (rows, sum of counts, V) of what is read behind a prompt, so many tokens at a time, and the caches."""
    total = PROMPT + sum(counts)
    ids = ids_of(rows, total)
    mask, positions = padded(rows, total)

    def all_of_it() -> tuple[Tensor, list[Tensor]]:
        reader = Reader(model, room, VOCABULARY)
        assert (reader.step is not None) is quick
        reader.read(ids[:, :PROMPT], mask[:, :PROMPT], positions[:, :PROMPT], last_only=True)
        assert all(store.isfinite().all() for layer in reader.cache.layers for store in layer.stores)
        found, at = [], PROMPT
        for count in counts:
            to = at + count
            found.append(reader.read(ids[:, at:to], mask[:, :to], positions[:, at:to]))
            at = to
        assert reader.cache.get_seq_length() == total
        return torch.cat(found, 1), [store[:, :, PROMPT:total] for one in reader.cache.layers for store in one.stores]

    with torch.no_grad():
        if not quick:
            return all_of_it()
        with quick_steps(model):
            return all_of_it()


def assert_same(model: Any, counts: list[int], tolerance: float) -> None:
    (wanted, wanted_stores), (got, stores) = (read(model, counts, quick=quick) for quick in (False, True))
    assert wanted.float().std() > 0.5 and not wanted.isnan().any()
    for one, other in zip([got, *stores], [wanted, *wanted_stores], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@every_level
@everyone
@pytest.mark.parametrize("counts", [[1, 1], [3], [8]])
def test_says_what_the_model_says(name: str, counts: list[int], simd: str) -> None:
    """Keys and values as well; one of the two texts is padded."""
    assert_same(fused_checks.tiny(name), counts, 3e-5)


@every_level
@everyone
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_rounds_as_the_model_does(name: str, dtype: torch.dtype, tolerance: float, simd: str) -> None:
    assert_same(fused_checks.tiny(name).to(dtype), [3, 1], tolerance)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_beside_a_token_changes_no_bit(dtype: torch.dtype, simd: str) -> None:
    """Other tokens at the same time, other texts, other numbers of threads."""
    model = fused_checks.tiny("llama", hidden_size=192, intermediate_size=320, num_hidden_layers=3).to(dtype)
    with torch.no_grad():
        alone, stores = read(model, [1] * 8, quick=True, rows=1)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for counts in ([8], [3, 5], [7, 1]):
                together, others = read(model, counts, quick=True, rows=1)
                assert torch.equal(alone, together)
                assert all(torch.equal(a, b) for a, b in zip(stores, others, strict=True))
    torch.set_num_threads(1)


def test_other_texts_change_no_bit() -> None:
    """Behind prompts whose keys and values are the same to the bit."""
    model = fused_checks.tiny("qwen3").to(torch.bfloat16)
    ids, found = ids_of(1, 3), []
    with torch.no_grad(), quick_steps(model):
        for rows in (1, 4):
            reader = Reader(model, 32, VOCABULARY)
            for at in range(3):  # no prompt is read by the model's forward
                logits = reader.read(ids[:, at : at + 1].expand(rows, 1), None, torch.full((rows, 1), at))
            found.append(logits)
    assert torch.equal(found[0].expand(4, -1, -1), found[1])


def test_room_grows_texts_leave_and_tokens_are_taken_back() -> None:
    """What is forgotten leaves nothing behind."""
    model = fused_checks.tiny("llama")
    wanted, _ = read(model, [1] * 8, quick=True, rows=3)
    ids = ids_of(3, PROMPT + 8)
    mask, positions = padded(3, PROMPT + 8)
    with torch.no_grad(), quick_steps(model):
        reader = Reader(model, PROMPT + 1, VOCABULARY)
        reader.read(ids[:, :PROMPT], mask[:, :PROMPT], positions[:, :PROMPT], last_only=True)
        end = PROMPT + 4
        reader.read((ids[:, PROMPT:end] + 1) % VOCABULARY, mask[:, :end], positions[:, PROMPT:end])
        reader.cache.crop(-4)
        reader.read(ids[:, PROMPT:end], mask[:, :end], positions[:, PROMPT:end])
        kept = torch.tensor([0, 2])
        reader.cache.batch_select_indices(kept)
        got = reader.read(ids[kept, end:], mask[kept], positions[kept, end:])
    assert torch.equal(got, wanted[kept, 4:])


def test_more_rows_than_a_step_takes_go_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And both write the same cache."""
    called = []
    run = stepping.run
    monkeypatch.setattr(stepping, "run", lambda *given: (called.append(given[3] * given[4]), run(*given)))
    assert_same(fused_checks.tiny("llama"), [MOST_ROWS // 2 + 1, 2, MOST_ROWS // 2], 3e-5)
    assert called == [2 * PROMPT, 4, MOST_ROWS]


def test_of_logits_as_many_as_are_wanted() -> None:
    model = fused_checks.tiny("llama")
    with torch.no_grad(), quick_steps(model):
        one, zero = torch.tensor([[7]]), torch.zeros(1, 1, dtype=torch.int64)
        whole, some = (Reader(model, 8, size).read(one, None, zero) for size in (VOCABULARY, 33))
    assert some.shape == (1, 1, 33) and torch.equal(some, whole[..., :33])


def test_no_copy_of_the_weights_is_kept() -> None:
    """An edit that PyTorch does not hear of counts at once."""
    model = fused_checks.tiny("qwen2")
    with torch.no_grad(), quick_steps(model):
        one, zero = torch.tensor([[7]]), torch.zeros(1, 1, dtype=torch.int64)
        before = Reader(model, 8, VOCABULARY).read(one, None, zero)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(0.5)
        after = Reader(model, 8, VOCABULARY).read(one, None, zero)
        torch.testing.assert_close(after, model(one).logits, rtol=3e-5, atol=3e-5)
    assert not torch.allclose(before, after)


def test_a_nan_stays_a_nan() -> None:
    """In a weight it reaches the logits; behind a mask it does not."""
    model = fused_checks.tiny("llama")
    with torch.no_grad(), quick_steps(model):
        one, zero = torch.tensor([[7]]), torch.zeros(1, 1, dtype=torch.int64)
        reader = Reader(model, 8, VOCABULARY)
        reader.read(one, None, zero)
        for layer in reader.cache.layers:
            layer.stores[1][:, :, 0] = torch.nan
        assert reader.read(one, torch.tensor([[0, 1]]), zero).isfinite().all()
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
        assert Reader(model, 8, VOCABULARY).read(one, None, zero).isnan().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-5), (torch.bfloat16, 0.15)])
def test_what_an_mlp_reads_can_be_kept(dtype: torch.dtype, tolerance: float) -> None:
    """As a hook would catch it; a module that is no layer's MLP is none to be watched."""
    model = fused_checks.tiny("llama").to(dtype)
    mlp, given = model.model.layers[1].mlp, (ids_of(2, 3), None, torch.arange(3).expand(2, 3))
    with torch.no_grad(), captured_inputs(mlp) as captured:
        Reader(model, 8, VOCABULARY).read(*given)
    with torch.no_grad(), quick_steps(model):
        reader = Reader(model, 8, VOCABULARY)
        assert reader.step is not None and not reader.step.watch(model.lm_head) and reader.step.watch(mlp)
        reader.read(*given)
    assert reader.step.caught is not None and captured[0].shape == reader.step.caught.shape
    torch.testing.assert_close(reader.step.caught, captured[0], rtol=tolerance, atol=tolerance)


def has_a_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def has_another_head(model: Any) -> None:
    model.lm_head = torch.nn.Sequential(model.lm_head)


def has_two_epsilons(model: Any) -> None:
    model.model.norm.variance_epsilon *= 2


def sees_ahead(model: Any) -> None:
    model.model.layers[1].self_attn.is_causal = False


def has_two_scales(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 3


@pytest.mark.parametrize(
    "change",
    [
        has_a_hook,
        has_another_head,
        has_two_epsilons,
        has_two_scales,
        sees_ahead,
        lambda one: one.train(),
        lambda one: one.double(),
    ],
)
def test_who_goes_by_the_model(change: Callable[[Any], Any]) -> None:
    model = fused_checks.tiny("llama")
    assert cpu_step(model) is not None
    change(model)
    assert cpu_step(model) is None


def test_hooks_of_every_module() -> None:
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert cpu_step(fused_checks.tiny("llama")) is None
    finally:
        hook.remove()


def test_the_switch_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused_checks.tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_step(model) is None
    monkeypatch.setenv("MEMDEC_STEP", "0")
    assert cpu_step(model) is None


def test_other_models_are_packed(make_pair: Callable[..., MemoryModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left behind, by an error neither."""
    monkeypatch.setattr(packing, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(packing, "pays", lambda weight: True)
    model = fused_checks.tiny("llama")
    other = torch.nn.Linear(40, 70)
    with pytest.raises(KeyError), quick_steps(model, other):
        with quick_steps(model):
            pass
        assert step_of(model) is not None and step_of(other) is None
        assert "forward" in other.__dict__ and "forward" not in model.lm_head.__dict__
        raise KeyError
    assert step_of(model) is None and "forward" not in other.__dict__


@pytest.mark.parametrize("sampled", [False, True])
def test_a_text_does_not_depend_on_how_it_was_drafted(make_pair: Callable[..., MemoryModel], sampled: bool) -> None:
    """In bfloat16, where near-ties are common: to the bit the same logits, so the same text."""
    model = make_pair(close=0.3)
    model.base.to(torch.bfloat16)
    model.memory.to(torch.bfloat16)
    prompt = ids_of(1, 7)
    texts = []
    for drafts in (None, 1, 2, 4, 7):
        torch.manual_seed(5)
        how = {"decoding": "parallel"} if drafts is None else {"decoding": "speculative", "draft_tokens": drafts}
        texts.append(model.generate(prompt, max_new_tokens=60, do_sample=sampled, **how).tolist())
        assert model.last_decode is not None and (drafts is None or model.last_decode.accepted > 0)
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("rows, prompt, drafts", [(4, 5, None), (5, 4, None), (3, 5, 7), (2, 8, 12)])
def test_short_padded_prompts(
    make_pair: Callable[..., MemoryModel], rows: int, prompt: int, drafts: int | None
) -> None:
    """A step reads the prompts and the model's own forward the drafts, of what the step has stored."""
    model = make_pair(close=0.3)
    mask, _ = padded(rows, prompt)
    given = {"input_ids": ids_of(rows, prompt), "attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    texts = [
        model.generate(**given, decoding="speculative", draft_tokens=drafts),
        model.generate(**given, decoding="auto"),
        model.generate(**given, decoding="composite"),
    ]
    assert texts[0].tolist() == texts[1].tolist() == texts[2].tolist()


def test_a_head_of_fewer_tokens_than_the_other_model_has(make_pair: Callable[..., MemoryModel]) -> None:
    """No more is read than there is, and the error is the one that it was."""
    model = make_pair(close=0.3)
    model.base.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="60"):
        model.generate(ids_of(1, 6) % 60, max_new_tokens=4, do_sample=False, decoding="parallel")


class Meddler(BaseStreamer):
    """Does something to a model when the fifth token comes."""

    def __init__(self, meddle: Callable[[], Any]) -> None:
        self.left, self.meddle = 5, meddle

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.meddle()

    def end(self) -> None:
        pass


def test_weights_that_are_replaced_meanwhile(make_pair: Callable[..., MemoryModel]) -> None:
    """Another dtype is an error; other memory is not read before the next call, and the old is not freed before."""
    model = make_pair(close=0.3)
    given = {"max_new_tokens": 24, "do_sample": False, "decoding": "parallel"}
    wanted = model.generate(ids_of(1, 6), **given)

    def replace() -> None:
        for one in (model.base, model.memory):
            for parameter in one.parameters():
                if parameter.ndim == 2 and parameter is not one.get_input_embeddings().weight:
                    parameter.data = torch.full_like(parameter, torch.nan)

    with pytest.raises(MemdecError, match="was converted"):
        model.generate(ids_of(1, 6), streamer=Meddler(model.base.half), **given)
    model.base.float()
    model = make_pair(close=0.3)
    assert torch.equal(model.generate(ids_of(1, 6), streamer=Meddler(replace), **given), wanted)
    with pytest.raises(MemdecError, match="NaN"):
        model.generate(ids_of(1, 6), **given)


def no_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("grown", [0, 2], ids=["no layer grew", "one layer grew"])
def test_a_cache_that_could_not_grow_goes_on(grown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused_checks.tiny("llama")
    cat, left = torch.cat, [grown]  # keys and values of a layer

    def at_first(*given: Any) -> Tensor:
        left[0] -= 1
        return cat(*given) if left[0] >= 0 else no_memory()

    with torch.no_grad(), quick_steps(model):
        reader = Reader(model, 4, VOCABULARY)
        reader.read(ids_of(1, 4), None, torch.arange(4)[None])
        with monkeypatch.context() as without:
            without.setattr(torch, "cat", at_first)
            with pytest.raises(MemoryError):
                reader.read(ids_of(1, 1), None, torch.tensor([[4]]))
        assert len({layer.room for layer in reader.cache.layers}) == 1 + (grown > 0)
        assert all(layer.room == store.shape[2] for layer in reader.cache.layers for store in layer.stores)
        assert reader.read(ids_of(1, 1), None, torch.tensor([[4]])).isfinite().all()
        assert len({layer.room for layer in reader.cache.layers}) == 1
