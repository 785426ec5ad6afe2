"""The engine's rounds on a GPU: over tensors at fixed addresses, so that they can be captured as CUDA graphs.

A step of a model is hundreds of short kernels, which Python launches more slowly than a GPU runs them. A CUDA graph is
a list of kernels with their addresses that is launched at once. So all that a round reads or writes lies in tensors
that are made once: the block of tokens, each row's length, position, tokens left, seed and offset, and the caches.

    prompt(n)   both models read n tokens of the prompts, which go behind those before
    draft(i)    the memory reads token i of the block and draws token i + 1            i = 0 … γ−1
    verify(γ)   the base reads tokens 0 … γ, beside it (another stream) the memory token γ; verify_draft decides;
                lengths, positions, offsets and the block's first token move on: a row that keeps n + 1 tokens is
                n + 1 longer, and what lies behind is hidden until it is written over

Each is called the first time as it is, which warms up what must not happen in a capture, is captured the second time,
and replayed from then on. Nothing of it waits for the host: a round's result is copied to pinned memory and looked at
while the next round runs, so that ends of texts are noticed a round late. Rows that have ended compute on unheard.

On the CPU the same functions run as they are; that is how the tests see them.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memdec.decoding.cache import slot_cache, wipe
from memdec.decoding.engine import ROOM, Continuations, Reader, row_seeds
from memdec.decoding.fusing import fused_step
from memdec.decoding.plan import LONGEST_DRAFT, Estimates
from memdec.decoding.support import Warpers, rotates_by_length, tensors_of, why_not_itself
from memdec.modeling.decode import Decode
from memdec.modeling.structure import input_device, takes
from memdec.ops import interpolate_argmax, interpolate_sample, verify_draft

LOGGER = logging.getLogger(__name__)

DEVICES = ("cuda",)
ATTENTION = ("sdpa", "eager")  # which take a mask made by others
PIECES = (64, 256)  # tokens of a prompt that are read at once: the smallest that holds it, or the largest several times
MOST_IN_PIECES = (
    2048  # tokens of a batch's prompts up to which they are read so; a kernel's launch is nothing beside more
)
KEPT = 3  # sets of buffers and graphs a model, the last used ones

Mark = Any  # a moment: a CUDA event, or seconds on the CPU


def why_not(model: Any, device: torch.device) -> str | None:
    """Why the rounds of a pair cannot be captured; None where they can, as far as can be told beforehand."""
    if os.environ.get("MEMDEC_GRAPHS", "") == "0":
        return "MEMDEC_GRAPHS is 0"
    if device.type not in DEVICES:
        return "the models are not on a CUDA device"
    if model in _REFUSED:
        return _REFUSED[model]
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    for name, one in (("base", model.base), ("memory", model.memory)):
        if any(tensor.device != device for tensor in tensors_of(one)):
            return f"the {name} is on another device, or spread over several"
        beside = why_not_itself(one)
        if beside is not None:
            return f"the {name} {beside}"
        if not takes(one, "position_ids"):
            return f"the {name} has no position_ids"
        if not getattr(one, "_can_compile_fullgraph", False) or one.config._attn_implementation not in ATTENTION:
            return f"the {name}'s attention is not made for static caches ({one.config._attn_implementation})"
        if rotates_by_length(one):
            return f"the {name}'s rotary embedding looks at the positions"
    return None


def compiling() -> bool:
    """Whether the steps are compiled before they are captured: MEMDEC_COMPILE=1 asks for it, and it takes its time."""
    return os.environ.get("MEMDEC_COMPILE", "") == "1"


@dataclass
class Flight:
    """A round that was queued.

    Attributes:
        gamma: drafts.
        result: (B, γ + 2) on the host, once `ended` has come: number accepted, next token, drafts.
        began: when the first draft was begun; likewise the next two.
        drafted: the first thing after the drafts.
        ended: the result was copied.
        steady: nothing of it was called for the first time or captured, so that its times mean something.
    """

    gamma: int
    result: Tensor
    began: Mark
    drafted: Mark
    ended: Mark
    steady: bool

    def wait(self) -> list[list[int]]:
        """The result."""
        if not isinstance(self.ended, float):
            self.ended.synchronize()
        rows: list[list[int]] = self.result.tolist()
        return rows


class Rounds:
    """The buffers of a batch, and the rounds over them.

    Args:
        model: a MemoryModel; its two models are kept, it itself is not.
        rows: B.
        room: tokens that the caches hold.
        widest: the largest γ.
        warpers: of the draws; None takes the likeliest token.
    """

    def __init__(self, model: Any, rows: int, room: int, widest: int, warpers: Warpers | None) -> None:
        self.room = room
        self.alpha = model.alpha
        self.greedy = warpers is None
        self.drawing = {} if warpers is None else warpers.arguments()
        self.device = input_device(model.base)
        caches = {"base": slot_cache(model.base, room), "memory": slot_cache(model.memory, room)}
        self.base = Reader(model.base, room, model.config.vocab_size, caches["base"][0])
        self.memory = Reader(model.memory, room, model.config.vocab_size, caches["memory"][0])
        self.slots = {self.base: caches["base"][1], self.memory: caches["memory"][1]}
        self.compiles = compiling()
        self.fused = {one: None if self.compiles else fused_step(one.model) for one in self.slots}
        longest = max(widest + 1, PIECES[-1])

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self.block = integers(rows, widest + 1)  # each row's last token, which no model has read, and the drafts
        self.drafts = integers(rows, widest)  # the drafts as drawn: −1 where there was nothing to draw
        self.length = integers(rows)  # tokens in the caches
        self.position = integers(rows)  # of the last token
        self.left = integers(rows)  # tokens that the row may still make
        self.seed = integers(rows)
        self.offset = integers(rows)
        self.report = integers(rows, widest + 2)
        self.piece = integers(rows, PIECES[-1])  # of the prompts
        self.stop = integers()  # the slot of the prompts' last tokens
        self.seen = torch.ones(rows, room, dtype=torch.bool, device=self.device)  # False for padding
        self.logits: Tensor | None = None  # the memory's, (B, widest + 1, V), once their dtype is known
        self.columns = torch.arange(room, device=self.device)
        self.steps = torch.arange(longest, device=self.device)

        self.streams = _streams(self.device)
        on_gpu = self.device.type == "cuda"
        self.results = [torch.empty(self.report.shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self.captures = on_gpu
        self.failure: str | None = None
        self.called: set[tuple[str, int]] = set()
        self.graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self.capture_seconds = 0.0

    # -- a text's beginning ------------------------------------------------------------------------------------------

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int, seeds: Tensor) -> None:
        """Both models read the prompts (B, L) but for their last tokens, which the first round reads."""
        rows, prompt = input_ids.shape
        self.wait_for_caller()
        with self.queueing():  # what is made here for a moment is made here: its memory may be used again at once
            padded = attention_mask is not None and bool((attention_mask == 0).any())
            # Positions are slots less the padding, unless zeros stand between tokens, or a mask counts otherwise.
            plain = attention_mask is None or only_left_padded(attention_mask)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            self.seen.fill_(True)
            self.seen[:, :prompt] = attention_mask.bool()
            for reader in self.slots:
                wipe(reader.cache)
            if prompt > 1:
                piece = self.piece_for(rows, prompt - 1) if plain else None
                if piece is None:
                    self.read_at_once(input_ids[:, :-1], attention_mask[:, :-1] if rows > 1 or padded else None)
                else:
                    self.read_in_pieces(input_ids[:, :-1], attention_mask, piece)
                if padded:  # what attended to nothing may be NaN, and a NaN behind a mask is still one
                    for reader in self.slots:
                        for layer in reader.cache.layers:
                            layer.clear(~self.seen)
            self.length.fill_(prompt - 1)
            self.position.copy_(attention_mask.sum(1) - 1)
            self.left.fill_(new_tokens)
            self.offset.zero_()
            self.seed.copy_(seeds)
            self.block[:, 0] = input_ids[:, -1]

    def piece_for(self, rows: int, tokens: int) -> int | None:
        """How many tokens of prompts (B, n) are read at once; None: all of them, by the models' own forward."""
        if any(self.fused[reader] is None for reader in self.slots):
            return None
        piece = next((size for size in PIECES if tokens <= size), PIECES[-1])
        return piece if rows * piece * -(-tokens // piece) <= MOST_IN_PIECES else None

    def read_at_once(self, tokens: Tensor, mask: Tensor | None) -> None:
        """The models' own forward reads prompts (B, n)."""
        ones = torch.ones_like(tokens) if mask is None else mask.long()
        positions = (ones.cumsum(-1) - 1).clamp(min=0)
        for reader, slots in self.slots.items():
            reader.forward = reader.model  # prompts are not compiled: each has another length
            slots.at = None
            reader.read(tokens, mask, positions, last_only=True)

    def read_in_pieces(self, tokens: Tensor, mask: Tensor, piece: int) -> None:
        """``prompt(piece)`` reads prompts (B, n), as often as it takes."""
        count = tokens.shape[1]
        self.stop.fill_(count)
        self.length.zero_()
        self.position.copy_(mask.sum(1) - mask.shape[1])
        for start in range(0, count, piece):
            part = tokens[:, start : start + piece]
            self.piece[:, : part.shape[1]] = part
            self.run("prompt", piece)

    def go_on_from(self, other: Rounds) -> None:
        """Takes over the texts of a set of buffers with less room."""
        self.wait_for_caller()
        with self.queueing():
            for name in ("block", "length", "position", "left", "seed", "offset"):
                getattr(self, name).copy_(getattr(other, name))
            self.seen.fill_(True)
            self.seen[:, : other.room] = other.seen
            for mine, theirs in ((self.base, other.base), (self.memory, other.memory)):
                wipe(mine.cache)
                for layer, old in zip(mine.cache.layers, theirs.cache.layers, strict=True):
                    layer.copy_from(old)

    # -- a round -----------------------------------------------------------------------------------------------------

    def launch(self, gamma: int, turn: int) -> Flight:
        """Queues a round of γ drafts; the result of the round but one before must have been looked at."""
        began = self.mark()
        steady = True
        for i in range(gamma):
            steady &= self.run("draft", i)
        drafted = self.mark()
        steady &= self.run("verify", gamma)
        with self.queueing():
            result = self.results[turn % 2]
            result.copy_(self.report, non_blocking=True)
        return Flight(gamma, result, began, drafted, self.mark(), steady)

    def prompt(self, count: int) -> None:
        """Both models read the piece; what of it lies behind the prompts leaves something only in the slot that the
        first round writes."""
        ahead = self.steps[:count]
        slots = torch.minimum(self.length[:, None] + ahead, self.stop)
        places = (self.position[:, None] + slots).clamp(min=0)  # the position is less by the padding
        hidden = (self.columns > slots[..., None]) | ~self.seen[:, None]
        hidden &= self.columns != slots[..., None]  # padding sees itself: to see nothing gives NaN
        both = len(self.slots) > 1
        for reader in reversed(self.slots):  # the memory first, and the base beside it
            fused = self.fused[reader]
            assert fused is not None
            with self.beside() if both and reader is self.memory else nullcontext():
                fused.states(self.piece[:, :count], places, slots, hidden, reader.cache)
        if both:
            self.join()
        self.length.add_(count)

    def draft(self, i: int) -> None:
        """The memory reads token i of the block; token i + 1 is drawn from what it says."""
        self.remember(i, self.read(self.memory, i, 1))
        assert self.logits is not None
        row = self.logits[:, i]
        if self.greedy:
            drawn = interpolate_argmax(row, row, 1.0)
        else:
            drawn = interpolate_sample(row, row, 1.0, seed=self.seed, offset=self.offset + i, **self.drawing)
        self.drafts[:, i] = drawn
        self.block[:, i + 1] = drawn.clamp(min=0)  # an index out of range would end CUDA for this process

    def verify(self, gamma: int) -> None:
        """The base reads the block beside the memory's last step; what stands is decided, and the rows move on."""
        with self.beside():  # of tensors made in here, only those that stay are used outside
            self.remember(gamma, self.read(self.memory, gamma, 1))
        base_logits = self.read(self.base, 0, gamma + 1)
        self.join()
        assert self.logits is not None
        verified = verify_draft(
            base_logits,
            self.logits[:, : gamma + 1],
            self.block[:, 1 : gamma + 1],
            self.alpha,
            draft_lengths=(self.left - 1).clamp(0, gamma),
            greedy=self.greedy,
            seed=self.seed,
            offset=self.offset,
            **self.drawing,
        )
        self.report[:, 0] = verified.num_accepted
        self.report[:, 1] = verified.next_token
        self.report[:, 2 : 2 + gamma] = self.drafts[:, :gamma]
        made = torch.minimum(verified.num_accepted + 1, self.left)
        for counter in (self.length, self.position, self.offset):
            counter.add_(made)
        self.left.sub_(made)
        self.block[:, 0] = verified.next_token.clamp(min=0)

    def read(self, reader: Reader, first: int, count: int) -> Tensor:
        """Logits (B, count, V) of one of the models after `count` tokens of the block."""
        ahead = self.steps[first : first + count]
        # Drafts beyond a row's end, to no purpose, may have no slot and no position of their own.
        slots = (self.length[:, None] + ahead).clamp(max=self.room - 1)
        final = self.position + self.left.clamp(min=1) - 1
        places = torch.minimum(self.position[:, None] + ahead, final[:, None])
        hidden = (self.columns > slots[..., None]) | ~self.seen[:, None]
        block, fused = self.block[:, first : first + count], self.fused[reader]
        if fused is not None:
            return fused(block, places, slots, hidden, reader.cache)[..., : reader.vocab_size]
        self.slots[reader].at = slots
        mask = torch.zeros(hidden.shape, dtype=reader.model.dtype, device=self.device)
        mask.masked_fill_(hidden, -torch.inf)
        if self.compiles and reader.forward is reader.model:
            reader.forward = torch.compile(reader.model, dynamic=False)
        return reader.read(block, mask[:, None], places)

    def remember(self, i: int, logits: Tensor) -> None:
        """Keeps the memory's logits (B, 1, V) after token i of the block."""
        if self.logits is None:
            self.logits = logits.new_zeros(*self.block.shape, logits.shape[2])
        self.logits[:, i] = logits[:, 0]

    # -- streams and graphs ------------------------------------------------------------------------------------------

    def run(self, name: str, count: int) -> bool:
        """Queues one of the functions, such as ``verify(count)``; whether nothing was done for the first or second
        time."""
        key = (name, count)
        function = getattr(self, name)
        first = key not in self.called
        if self.captures and not first and key not in self.graphs:
            self.capture(key)
            first = True
        with self.queueing():
            if key in self.graphs:
                self.graphs[key].replay()
            else:
                function(count)
        self.called.add(key)  # only now: what was interrupted is not warm
        return not first or not self.captures

    def capture(self, key: tuple[str, int]) -> None:
        """Makes a graph of such a call; where that fails, they all run without from now on."""
        start = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a tensor or graph that happened to be freed now would spoil it
        try:
            with self.queueing():
                torch.cuda.current_stream().synchronize()
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    getattr(self, key[0])(key[1])
                finally:
                    graph.capture_end()
            self.graphs[key] = graph
        except RuntimeError as problem:
            said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            self.failure = f"capturing {key[0]}({key[1]}) failed: {said}"
            self.captures = False
            self.graphs.clear()
            LOGGER.warning("decoding goes on without CUDA graphs: %s", self.failure)
            LOGGER.debug("the capture that failed", exc_info=True)
        finally:
            if collecting:
                gc.enable()
        self.capture_seconds += time.perf_counter() - start

    def wait_for_caller(self) -> None:
        """What is queued from here on waits for what the caller's stream has queued."""
        if self.streams is not None:
            self.streams[0].wait_stream(torch.cuda.current_stream(self.device))

    def queueing(self) -> Any:
        """What is called within goes to the rounds' stream."""
        return nullcontext() if self.streams is None else torch.cuda.stream(self.streams[0])

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is called within goes to the second stream, after what was queued before."""
        if self.streams is None:
            yield
            return
        main, side = self.streams
        side.wait_stream(main)
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        """What is called from here on waits for the second stream."""
        if self.streams is not None:
            self.streams[0].wait_stream(self.streams[1])

    def mark(self) -> Mark:
        """A moment on the rounds' stream."""
        if self.streams is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.streams[0])
        return event


_KEPT: WeakKeyDictionary[Any, dict[Any, Rounds]] = WeakKeyDictionary()
_REFUSED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_LOCKS: dict[torch.device, threading.Lock] = {}
_STREAMS: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """The two streams of a device, the same for all rounds; None on the CPU."""
    if device.type != "cuda":
        return None
    if device not in _STREAMS:
        _STREAMS[device] = tuple(torch.cuda.Stream(device) for _ in range(2))  # type: ignore[assignment,no-untyped-call]
    return _STREAMS[device]


def only_left_padded(mask: Tensor) -> bool:
    """Whether each row of a mask (B, L) is zeros, then ones."""
    mask = mask.long()
    return bool(((mask[:, 1:] >= mask[:, :-1]).all() & (mask <= 1).all()).item())


def seconds_between(start: Mark, end: Mark) -> float:
    """Of two moments, once both have come."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def rounds_of(model: Any, rows: int, room: int, widest: int, warpers: Warpers | None) -> Rounds:
    """Buffers and graphs for such a batch: those of before, where the same modules have the same types of
    weights at the same addresses."""

    def key() -> Any:
        tensors = [*tensors_of(model.base), *tensors_of(model.memory)]
        modules = [id(module) for one in (model.base, model.memory) for module in one.modules()]
        return (
            rows,
            room,
            widest,
            warpers,
            model.alpha,
            compiling(),
            hash((*modules, *((t.data_ptr(), t.dtype) for t in tensors))),
        )

    kept = _KEPT.setdefault(model, {})
    wanted = key()
    found = kept.pop(wanted, None)
    if found is None:
        while len(kept) >= KEPT:
            oldest = kept.pop(next(iter(kept)))
            if oldest.streams is not None:
                oldest.streams[0].synchronize()  # its graphs may be running
        found = Rounds(model, rows, room, widest, warpers)
        wanted = key()  # the first buffers of a model move weights: see fused_step
    kept[wanted] = found
    return found


def forget(model: Any) -> None:
    """Frees the buffers and graphs of a model."""
    for rounds in _KEPT.pop(model, {}).values():
        if rounds.streams is not None:
            rounds.streams[0].synchronize()


def room_for(tokens: int) -> int:
    """The least power of two times ROOM that holds so many tokens: few sizes, and rows that begin at even addresses."""
    room = ROOM
    while room < tokens:
        room *= 2
    return room


@contextmanager
def claimed(device: torch.device) -> Iterator[bool]:
    """Whether no other text is being written over buffers of the device; within it none will be.

    Another may come from a second thread, or from a streamer or a criterion that writes texts of its own.
    """
    lock = _LOCKS.setdefault(device, threading.Lock())
    mine = lock.acquire(blocking=False)
    try:
        yield mine
    finally:
        if mine:
            try:
                if device in _STREAMS:
                    # What is freed from now on may be used by a round that was queued in vain, or before an error.
                    torch.cuda.current_stream(device).wait_stream(_STREAMS[device][0])
            finally:
                lock.release()


@torch.inference_mode(False)  # what is kept for later texts must not be a tensor of that mode
@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,  # (B, L), padded on the left
    attention_mask: Tensor | None,  # (B, L)
    *,
    criteria: Any,
    max_length: int,
    pad_token: int | None,
    warpers: Warpers | None,
    draft_tokens: int | Estimates,
    estimates: Estimates | None = None,
    streamer: Any = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Decode]:
    """As :func:`memdec.decoding.engine.decode`, over fixed buffers, for a pair that :func:`why_not` lets pass."""
    start_time = time.perf_counter()
    rows, prompt = input_ids.shape
    learning = draft_tokens if isinstance(draft_tokens, Estimates) else (estimates or Estimates())
    texts = Continuations(input_ids, criteria, max_length, streamer)
    fixed = 0 if isinstance(draft_tokens, Estimates) else min(draft_tokens, texts.room - 1)
    widest = max(LONGEST_DRAFT, fixed)
    if seeds is None:
        seeds = torch.zeros(rows, dtype=torch.int64) if warpers is None else row_seeds(rows, input_ids.device)
    enough = max_length + 1  # the last slot is for drafts beyond the end
    room = room_for(min(enough, prompt + ROOM // 2 + 2 * widest))
    rounds = rounds_of(model, rows, room, widest, warpers)
    captured = rounds.capture_seconds
    seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "choose": 0.0, "capture": 0.0}

    first = rounds.mark()
    rounds.begin(input_ids, attention_mask, texts.room, seeds)
    prefilled = rounds.mark()
    in_prompt = rounds.capture_seconds - captured
    flying: Flight | None = None
    launched = 0
    while texts.active:
        left = max(texts.left())
        coming: Flight | None = None
        # A round is queued before the one before it has been looked at, unless that may well be the last.
        if flying is None or left > flying.gamma + 1:
            gamma = draft_tokens.draft_tokens() if isinstance(draft_tokens, Estimates) else fixed
            ahead = 0 if flying is None else flying.gamma + 1
            longest = max_length - min(texts.left()) + ahead  # of a row that goes on, when the round begins
            if longest + gamma > rounds.room < enough:
                bigger = rounds_of(model, rows, 2 * rounds.room, widest, warpers)
                seconds["capture"] += rounds.capture_seconds - captured
                captured = bigger.capture_seconds
                bigger.go_on_from(rounds)
                rounds = bigger
            coming = rounds.launch(gamma, launched)
            launched += 1
        if flying is not None:
            result = flying.wait()
            began = time.perf_counter()
            table = [result[row] for row in texts.active]
            texts.take(
                flying.gamma, [row[0] for row in table], [row[1] for row in table], [row[2:] for row in table], learning
            )
            draft, verify = seconds_between(flying.began, flying.drafted), seconds_between(flying.drafted, flying.ended)
            seconds["draft"] += draft
            seconds["verify"] += verify
            seconds["choose"] += time.perf_counter() - began
            if flying.steady:
                _learn(learning, flying.gamma, draft, verify)
        flying = coming
    if rounds.failure is not None:
        _REFUSED[model] = rounds.failure
    if streamer is not None:
        streamer.end()
    sequences = texts.sequences(pad_token)
    seconds["prefill"] = max(seconds_between(first, prefilled) - in_prompt, 0.0)
    seconds["capture"] += rounds.capture_seconds - captured
    seconds["total"] = time.perf_counter() - start_time
    step = learning.memory_seconds
    ratio = step / learning.base_cost(1) if step is not None and learning.base_seconds else None
    return sequences, texts.summary(fixed, seconds, ratio)


def _learn(learning: Estimates, gamma: int, draft: float, verify: float) -> None:
    """Tells the estimates what a round took; the memory's last step, which runs beside the base, counts as one more."""
    step = draft / gamma if gamma else learning.memory_seconds
    if step is not None:
        learning.add_times(gamma + 1, step * (gamma + 1), max(verify - step, 0.1 * verify))
