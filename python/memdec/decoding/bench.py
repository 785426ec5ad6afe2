"""How fast a pair decodes: the base alone, transformers' ways with the memory, and ours, on the same prompts."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.configuration_utils import CompileConfig

from memdec.decoding import engine, graphs
from memdec.decoding.engine import Reader, generate_alone
from memdec.decoding.plan import LONGEST_DRAFT, expected_tokens, speed_up
from memdec.decoding.stepping import quick_steps
from memdec.errors import MemdecError
from memdec.modeling.memory_model import MemoryModel
from memdec.ops import verify_draft
from memdec.ops.reference import VerifiedDraft

OURS = "base alone, our steps"  # the base as our engine runs it on the CPU: see memdec.decoding.stepping
CAPTURED = "base alone, captured"  # and on a GPU: over fixed buffers, a step a CUDA graph
COMPILED = "base alone, compiled"  # and with a static cache
BOTH = "base alone, captured, compiled"
FIRST = "first token, "  # before a way's name: a run of one token
BASE_RIVALS = ("base alone", "base alone, static", COMPILED, OURS, CAPTURED, BOTH)

# Shapes of Qwen2.5 (config.json of each), for random weights. The 7B's 128 columns of padding are left out, so that all
# have one vocabulary.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 151936


@dataclass
class Timing:
    """One way to decode.

    Attributes:
        name: of the way.
        text_of: whose text it writes: "base" or "mixture" (greedy).
        seconds_per_token: median over prompts and repeats, prompt included; None where it could not run.
        to_best_base: that over the best of the base alone.
        first_seconds: median until the first token, by runs of one token. On a GPU, where such runs would capture
            graphs of their own, until the prompt was read but for its last token, by the marks of our engine; None for
            others' ways.
        seconds_per_next: median of what every further token took: a run's time less that of those seconds.
        next_to_best_base: that over the least of the base alone, of the ways whose prompt is known apart.
        acceptance: share of the drafts looked at that stood.
        tokens_per_round: tokens a forward of the base.
        predicted: seconds per further token over the base alone's, by the formula, which knows of no prompt.
        floor: seconds per token in which the weights that it reads can be read, at the bandwidth of a copy; None where
            that was not measured. Caches, logits and prompts are left out.
        note: why it could not run.
    """

    name: str
    text_of: str
    seconds_per_token: float | None = None
    to_best_base: float | None = None
    first_seconds: float | None = None
    seconds_per_next: float | None = None
    next_to_best_base: float | None = None
    acceptance: float | None = None
    tokens_per_round: float | None = None
    predicted: float | None = None
    floor: float | None = None
    note: str = ""


@dataclass
class DecodeSpeed:
    """What :func:`measure` found.

    Attributes:
        timings: one a way.
        alpha: weight of the memory.
        costs: c(n) for n = 1, 2, …: a step of the memory over one of the base, both in steps of ours, in a round of n
            steps (see :func:`costs_in_turn`); on a GPU, whose caches do not hold a model, the same for every n, each
            model by itself as CUDA graphs.
        verify: v(n) for n = 1, 2, …: a base forward of n tokens over one of one, likewise.
        settings: prompts, tokens, repeats, dtype, device, threads, versions.
    """

    timings: list[Timing]
    alpha: float
    costs: dict[int, float]
    verify: dict[int, float]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@torch.no_grad()
def measure(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int = 64,
    draft_tokens: Sequence[int] = (2, 4),
    repeats: int = 3,
    compiled: bool = True,
    acceptance: float | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> DecodeSpeed:
    """Time every way on every prompt, `repeats` times in turn, after one run of each that is not counted.

    Args:
        model: a MemoryModel.
        prompts: (1, L) token ids each.
        new_tokens: tokens that each run makes, greedily; ends of text are not heeded.
        draft_tokens: γ of the speculative runs; no more than `new_tokens` − 1 are ever drafted.
        repeats: runs of each way on each prompt.
        compiled: whether to let the base alone be compiled as well, on a GPU also both models of ours; that takes a
            minute or more.
        acceptance: drafts stand by draws of this chance instead of the models' words, as if by a pair that was measured
            elsewhere (see :func:`forced_acceptance`); None lets the models decide.
        say: is told what is being measured.

    Raises:
        MemdecError: a model's logits are no numbers, so nothing would be known of a text that it writes.
    """
    for role, one in (("base", model.base), ("memory", model.memory)):
        if bool(one(prompts[0].to(one.device)).logits.isnan().any()):
            raise MemdecError(
                f"The {role}'s logits on the first prompt are NaN: its weights are broken, or activations overflow; "
                "try --dtype float32."
            )

    def greedy(tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}

    base, memory, width = model.base, model.memory, model.config.vocab_size
    static = {"cache_implementation": "static"}
    on_gpu = base.device.type == "cuda"
    widest = min(max([1, *draft_tokens]) + 1, new_tokens)  # tokens that a forward reads
    alone = CAPTURED if on_gpu else OURS
    ways: dict[str, tuple[str, Callable[[int, Tensor], Any]]] = {
        "base alone": ("base", lambda n, ids: base.generate(ids, **greedy(n))),
        COMPILED: (
            "base",
            lambda n, ids: base.generate(ids, compile_config=_compile_anywhere(), **static, **greedy(n)),
        ),
        "composite (transformers)": ("mixture", lambda n, ids: model.generate(ids, decoding="composite", **greedy(n))),
        "parallel": ("mixture", lambda n, ids: model.generate(ids, decoding="parallel", **greedy(n))),
    }
    captured: dict[str, Alone] = {}
    if on_gpu:
        room = graphs.room_for(max(ids.shape[1] for ids in prompts) + new_tokens + 1)
        singles = {name: Alone(model, name, room, widest) for name in ("base", "memory")}
        ways[CAPTURED] = ("base", lambda n, ids: singles["base"].generate(ids, n))
        ways["memory alone"] = ("memory", lambda n, ids: singles["memory"].generate(ids, n))
        captured |= {CAPTURED: singles["base"], "memory alone": singles["memory"]}
    else:
        ways["base alone, static"] = (
            "base",
            lambda n, ids: base.generate(ids, disable_compile=True, **static, **greedy(n)),
        )
        ways[OURS] = ("base", lambda n, ids: generate_alone(base, ids, n, width))
    if acceptance is None:  # transformers' drafts cannot be forced
        ways["assisted (transformers)"] = (
            "base",
            lambda n, ids: base.generate(ids, assistant_model=memory, **greedy(n)),
        )
    for gamma in draft_tokens:
        ways[f"speculative, {gamma} drafts"] = (
            "mixture",
            lambda n, ids, gamma=gamma: model.generate(ids, decoding="speculative", draft_tokens=gamma, **greedy(n)),  # type: ignore[misc]
        )
        if on_gpu and compiled:
            ways[f"speculative, {gamma} drafts, compiled"] = (
                "mixture",
                _compiled(ways[f"speculative, {gamma} drafts"][1]),
            )
    if on_gpu and compiled:
        with _environment("MEMDEC_COMPILE", "1"):
            quick = Alone(model, "base", room, widest)
        ways[BOTH] = ("base", lambda n, ids: quick.generate(ids, n))
        captured[BOTH] = quick
        ways["parallel, compiled"] = ("mixture", _compiled(ways["parallel"][1]))
    ways["auto"] = ("mixture", lambda n, ids: model.generate(ids, decoding="auto", **greedy(n)))
    if not compiled:
        del ways[COMPILED]

    uncaptured = graphs.why_not(model, base.device)
    accepted: dict[str, list[Any]] = {name: [] for name in ways}
    prompt_seconds: dict[str, list[float]] = {}

    def keep_decode(name: str) -> None:
        if name == "auto" or name.startswith("speculative"):
            accepted[name].append(model.last_decode)
        if on_gpu and name in captured:
            prompt_seconds.setdefault(name, []).append(captured[name].prompt_seconds)
        elif uncaptured is None and name.startswith(("auto", "speculative", "parallel")):
            prompt_seconds.setdefault(name, []).append(model.last_decode.seconds.get("prefill", 0.0))

    with forced_acceptance(model, acceptance) as draw_anew:

        def drawn_alike(run: Callable[[int, Tensor], Any], tokens: int, ids: Tensor) -> Any:
            draw_anew()
            return run(tokens, ids)

        runs: dict[str, Callable[[Tensor], Any]] = {}
        for name, (_, run) in ways.items():
            if not on_gpu and new_tokens > 1:
                runs[FIRST + name] = partial(drawn_alike, run, 1)
            runs[name] = partial(drawn_alike, run, new_tokens)
        seconds, notes = take_turns(runs, prompts, repeats, after=keep_decode, say=say)
    medians = {name: statistics.median(found) / new_tokens for name, found in seconds.items() if found}
    best = min(medians[name] for name in BASE_RIVALS if name in medians)
    if on_gpu:
        firsts, further = prompt_seconds, new_tokens
    else:
        firsts = {name: seconds[FIRST + name] for name in ways if FIRST + name in medians}
        further = new_tokens - 1
    nexts = {
        name: statistics.median((whole - first) / further for whole, first in zip(seconds[name], found, strict=True))
        for name, found in firsts.items()
        if name in medians
    } or medians
    best_next = min((nexts[name] for name in BASE_RIVALS if name in nexts), default=best)
    step_seconds: dict[str, float] | None = None
    if on_gpu:
        verify = {n: singles["base"].forward_seconds(n) for n in range(1, widest + 1)}
        step_seconds = {"base": verify[1], "memory": singles["memory"].forward_seconds(1)}
        costs = dict.fromkeys(verify, step_seconds["memory"] / verify[1])
        verify = {n: found / verify[1] for n, found in verify.items()}
    else:
        with quick_steps(base, memory):
            costs, verify = costs_in_turn(model, prompts[0], widest)
    unit = nexts[alone] / best_next if alone in nexts else 1.0  # of the formula, in runs of the best base
    rate = copy_bandwidth(base.device) if on_gpu else None
    timings = []
    for name, (text_of, _) in ways.items():
        if name == "memory alone":
            continue  # it is there for c
        timing = Timing(name, text_of, note=notes.get(name, ""))
        if name in medians:
            timing.seconds_per_token = medians[name]
            timing.to_best_base = medians[name] / best
        if name in firsts and name in nexts:
            timing.first_seconds = statistics.median(firsts[name])
            timing.seconds_per_next = nexts[name]
            timing.next_to_best_base = nexts[name] / best_next
        decodes = accepted[name]
        looked = [d for d in decodes if d.acceptance is not None]
        if looked:
            timing.acceptance = statistics.fmean(d.acceptance for d in looked)
        if any(d.row_rounds for d in decodes):
            timing.tokens_per_round = sum(d.tokens for d in decodes) / sum(d.row_rounds for d in decodes)
        if name == "parallel":
            timing.predicted = unit * (1 + costs[1])
        if name.startswith("speculative") and "compiled" not in name and timing.acceptance is not None:
            gamma = int(name.split()[1])
            if gamma < widest:
                timing.predicted = unit / speed_up(timing.acceptance, gamma, verify[gamma + 1], costs[gamma + 1])
        if rate is not None:
            timing.floor = _floor(name, timing, bytes_read(base) / rate, bytes_read(memory) / rate)
        timings.append(timing)
    return DecodeSpeed(
        timings,
        model.alpha,
        costs,
        verify,
        {
            "prompts": [int(p.shape[1]) for p in prompts],
            "new_tokens": new_tokens,
            "repeats": repeats,
            "acceptance": "the models'"
            if acceptance is None
            else f"forced: drafts stand by draws of chance {acceptance:g}",
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            "device": _device_name(base.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "base_parameters": base.num_parameters(),
            "memory_parameters": memory.num_parameters(),
            "base_bytes_a_step": bytes_read(base),
            "memory_bytes_a_step": bytes_read(memory),
            "step_seconds": step_seconds,
            "copy_gb_s": None if rate is None else round(rate / 1e9, 1),
            "uncaptured": uncaptured,
        },
    )


def _floor(name: str, timing: Timing, base: float, memory: float) -> float | None:
    """Seconds per token for the weights alone, of which the base's take `base` and the memory's `memory`."""
    if timing.text_of == "base":
        return None if name.startswith("assisted") else base
    if not name.startswith("speculative"):
        return base + memory if name != "auto" else None
    gamma = int(name.split()[1])
    tokens = expected_tokens(timing.acceptance, gamma) if timing.acceptance is not None else 1.0
    return (base + (gamma + 1) * memory) / tokens


def bytes_read(model: Any) -> int:
    """Bytes of a model's weights that a step reads: all but an embedding that is not the head as well."""
    embedding = model.get_input_embeddings().weight
    unread = 0 if model.get_output_embeddings().weight is embedding else embedding.nbytes
    return sum(int(weight.nbytes) for weight in model.parameters()) - unread


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second of a large copy on a GPU, bytes read and bytes written counted."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _device_seconds(lambda: target.copy_(source), repeats=10)


def _device_seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of a call's seconds on the GPU, by events around each of calls that are queued in a row."""
    marks: list[Any] = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) / 1e3 for start, end in marks[1:]))


class Alone(graphs.Rounds):
    """One of a pair's models decoding greedily by itself, over fixed buffers and captured as our engine does it.

    Args:
        model: a MemoryModel.
        name: "base" or "memory".
        room: tokens that the cache holds.
        widest: the most tokens that a forward reads.
    """

    def __init__(self, model: Any, name: str, room: int, widest: int = 1) -> None:
        super().__init__(model, 1, room, max(LONGEST_DRAFT, widest), None)
        self.reader: Reader = getattr(self, name)
        self.slots = {self.reader: self.slots[self.reader]}  # the other one reads no prompts
        self.prompt_seconds = 0.0  # of the last generate: until all of the prompt but its last token was read

    def verify(self, gamma: int) -> None:
        """A step: the likeliest token follows."""
        self.block[:, 0] = self.read(self.reader, 0, 1)[:, -1].argmax(-1)
        for counter in (self.length, self.position):
            counter.add_(1)

    def forward(self, count: int) -> None:
        """A forward of `count` tokens, after which all is as before."""
        self.read(self.reader, 0, count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The likeliest continuation (1, new_tokens) of one prompt (1, L)."""
        start = self.mark()
        self.begin(ids, None, new_tokens, torch.zeros(1, dtype=torch.int64))
        prompt_read = self.mark()
        made = []
        for _ in range(new_tokens):
            self.run("verify", 0)
            with self.queueing():
                made.append(self.block[:, :1].clone())
        with self.queueing():
            text = torch.cat(made, 1).cpu()
        self.prompt_seconds = graphs.seconds_between(start, prompt_read)
        return text

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward_seconds(self, count: int) -> float:
        """Seconds of a forward of `count` tokens on the GPU."""
        for _ in range(3):
            self.run("forward", count)
        with self.queueing():
            return _device_seconds(lambda: self.run("forward", count), repeats=20)


@contextmanager
def forced_acceptance(model: Any, chance: float | None) -> Iterator[Callable[[], object]]:
    """Within it our engines accept each draft with a given chance, whatever the models say; None changes nothing.

    What it gives begins the draws anew: called before each run, it lets all of them have the same.

    For models of random weights, whose steps take as long as those of real ones, but which agree on nothing: acceptance
    is taken from a real pair. Verification is computed all the same, for its time; the text means nothing.
    """
    if chance is None:
        yield lambda: None
        return
    rounds = 4096
    # Multiples of square roots of primes: as independent from place to place as random draws, but of an even spread, so
    # that a few rounds have the share that was asked for.
    primes = torch.tensor([n for n in range(2, 312) if all(n % d for d in range(2, n))])
    draws = (torch.arange(1, rounds + 1)[:, None] * primes.double().sqrt() % 1).float().to(model.base.device)
    turn = torch.zeros(1, dtype=torch.int64, device=model.base.device)  # counted on the device: a graph replays it

    def verify(base_logits: Tensor, memory_logits: Tensor, draft_ids: Tensor, alpha: Any, **how: Any) -> VerifiedDraft:
        found = verify_draft(base_logits, memory_logits, draft_ids, alpha, **how)
        stands = draws.index_select(0, turn)[:, : draft_ids.shape[1]] < chance
        turn.add_(1).remainder_(rounds)
        accepted = stands.long().cumprod(1).sum(1).expand_as(found.num_accepted)
        if how.get("draft_lengths") is not None:
            accepted = torch.minimum(accepted, how["draft_lengths"])
        return VerifiedDraft(accepted, found.next_token)

    graphs.forget(model)
    before = {module: vars(module)["verify_draft"] for module in (engine, graphs)}
    try:
        for module in before:
            vars(module)["verify_draft"] = verify
        yield turn.zero_
    finally:
        for module, function in before.items():
            vars(module)["verify_draft"] = function
        graphs.forget(model)


def random_pair(base: str, memory: str, device: torch.device | str, dtype: torch.dtype, alpha: float = 0.5) -> Any:
    """A MemoryModel of random weights, made on the device, of two of the SHAPES: for the time of a step."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    models = []
    for shape in (base, memory):
        config = Qwen2Config(vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, **SHAPES[shape])
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                models.append(Qwen2ForCausalLM._from_config(config, dtype=dtype).eval())
        finally:
            torch.set_default_dtype(before)
    return MemoryModel.from_pretrained(models[0], models[1], alpha=alpha)


def take_turns(
    ways: Mapping[str, Callable[[Tensor], Any]],
    prompts: Sequence[Tensor],
    repeats: int,
    *,
    after: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each way on each prompt, `repeats` times in turn, after one run of each that is not counted.

    Args:
        ways: what is called with a prompt.
        prompts: (1, L) token ids each.
        repeats: runs of each way on each prompt.
        after: is told the name of the way after each run that counts.
        clock: seconds that go by.
        say: is told what is being measured.

    Returns:
        Seconds by way, round by round and prompt by prompt, the same places for all ways; and why others could not run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    notes: dict[str, str] = {}
    for repeat in range(repeats + 1):
        say(f"round {repeat} of {repeats}" if repeat else "one run of each, not counted")
        for prompt in prompts if repeat else prompts[:1]:
            for name, run in ways.items():
                if name in notes:
                    continue
                start = clock()
                try:
                    run(prompt)
                    if prompt.is_cuda:
                        torch.cuda.synchronize(prompt.device)
                except Exception as problem:  # a rival that cannot run with this pair is part of the result
                    notes[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
                    continue
                if repeat:
                    seconds[name].append(clock() - start)
                    after(name)
    return {name: found for name, found in seconds.items() if name not in notes}, notes


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _compiled(run: Callable[[int, Tensor], Any]) -> Callable[[int, Tensor], Any]:
    """The same with both models' steps compiled before they are captured."""

    def compiled(n: int, ids: Tensor) -> Any:
        with _environment("MEMDEC_COMPILE", "1"):
            return run(n, ids)

    return compiled


def _compile_anywhere() -> Any:
    """That generate compiles the forward pass, on the CPU as well, where it does not by itself."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def costs_in_turn(
    model: Any, prompt: Tensor, widest: int, repeats: int = 9
) -> tuple[dict[int, float], dict[int, float]]:
    """c(n) and v(n) for n up to `widest`, of steps on the CPU that take turns as rounds have them.

    n steps of the memory are followed by a base forward of n tokens. By itself the memory's steps would be faster,
    where a processor's caches keep weights that a forward of the base drives out; the more of them a round has, the
    less that counts.

    Args:
        model: a MemoryModel within :func:`quick_steps`.
        prompt: (1, L).
        widest: the largest n.
        repeats: rounds of each n, of which medians are taken.
    """
    length = prompt.shape[1]
    positions = torch.arange(length + widest)[None]
    base, memory = (Reader(one, length + widest, model.config.vocab_size) for one in (model.base, model.memory))
    for reader in (base, memory):
        reader.read(prompt, None, positions[:, :length])
    forwards: dict[int, list[float]] = {n: [] for n in range(1, widest + 1)}
    steps: dict[int, list[float]] = {n: [] for n in forwards}
    for _ in range(repeats):
        for n in forwards:
            tokens, after = prompt[:, :1].expand(1, n), positions[:, length : length + n]
            start = time.perf_counter()
            for i in range(n):
                memory.read(tokens[:, :1], None, after[:, i : i + 1])
            middle = time.perf_counter()
            base.read(tokens, None, after)
            forwards[n].append(time.perf_counter() - middle)
            steps[n].append((middle - start) / n)
            for reader in (base, memory):
                reader.cache.crop(-n)
    one = statistics.median(forwards[1])
    costs, verify = ({n: statistics.median(times) / one for n, times in found.items()} for found in (steps, forwards))
    return costs, verify


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
