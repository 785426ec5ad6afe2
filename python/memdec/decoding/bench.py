"""How fast a pair decodes: the base alone, transformers' ways with the memory, and ours, on the same prompts."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.configuration_utils import CompileConfig

from memdec.decoding.engine import Reader
from memdec.decoding.packing import packed_linears
from memdec.decoding.plan import speed_up

PACKED = "base alone, packed"  # the base as our engine runs it: see memdec.decoding.packing
COMPILED = "base alone, static and compiled"
BASE_RIVALS = ("base alone", "base alone, static", COMPILED, PACKED)


@dataclass
class Timing:
    """One way to decode.

    Attributes:
        name: of the way.
        text_of: whose text it writes: "base" or "mixture" (greedy).
        seconds_per_token: median over prompts and repeats, prompt included; None where it could not run.
        to_best_base: that over the best of the base alone.
        acceptance: share of the drafts looked at that stood.
        tokens_per_round: tokens a forward of the base.
        predicted: seconds per token over the base alone's, by the formula.
        note: why it could not run.
    """

    name: str
    text_of: str
    seconds_per_token: float | None = None
    to_best_base: float | None = None
    acceptance: float | None = None
    tokens_per_round: float | None = None
    predicted: float | None = None
    note: str = ""


@dataclass
class DecodeSpeed:
    """What :func:`measure` found.

    Attributes:
        timings: one a way.
        alpha: weight of the memory.
        cost_ratio: c, a step of the memory alone over one of the base alone, both in transformers' generate, with
            packed weights where these pay.
        verify: v(n) for n = 1, 2, …: a base forward of n tokens over one of one, likewise.
        settings: prompts, tokens, repeats, dtype, device, threads, versions.
    """

    timings: list[Timing]
    alpha: float
    cost_ratio: float
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
    say: Callable[[str], object] = lambda line: None,
) -> DecodeSpeed:
    """Time every way on every prompt, `repeats` times in turn, after one run of each that is not counted.

    Args:
        model: a MemoryModel.
        prompts: (1, L) token ids each.
        new_tokens: tokens that each run makes, greedily; ends of text are not heeded.
        draft_tokens: γ of the speculative runs.
        repeats: runs of each way on each prompt.
        compiled: whether to let the base alone be compiled as well; that takes a minute or more.
        say: is told what is being measured.
    """
    greedy: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    base, memory = model.base, model.memory
    static = {**greedy, "cache_implementation": "static"}
    ways: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
        "base alone": ("base", lambda ids: base.generate(ids, **greedy)),
        "base alone, static": ("base", lambda ids: base.generate(ids, disable_compile=True, **static)),
        COMPILED: ("base", lambda ids: base.generate(ids, compile_config=_compile_anywhere(), **static)),
        PACKED: ("base", lambda ids: _generate_packed(base, ids, greedy)),
        "memory alone": ("memory", lambda ids: _generate_packed(memory, ids, greedy)),
        "assisted (transformers)": (
            "base",
            lambda ids: base.generate(ids, assistant_model=memory, **greedy),
        ),
        "composite (transformers)": ("mixture", lambda ids: model.generate(ids, decoding="composite", **greedy)),
        "parallel": ("mixture", lambda ids: model.generate(ids, decoding="parallel", **greedy)),
    }
    for gamma in draft_tokens:
        ways[f"speculative, {gamma} drafts"] = (
            "mixture",
            lambda ids, n=gamma: model.generate(ids, decoding="speculative", draft_tokens=n, **greedy),  # type: ignore[misc]
        )
    ways["auto"] = ("mixture", lambda ids: model.generate(ids, decoding="auto", **greedy))
    if not compiled:
        del ways[COMPILED]

    accepted: dict[str, list[Any]] = {name: [] for name in ways}

    def keep_decode(name: str) -> None:
        if name == "auto" or name.startswith("speculative"):
            accepted[name].append(model.last_decode)

    runs = {name: run for name, (_, run) in ways.items()}
    seconds, notes = take_turns(runs, prompts, repeats, after=keep_decode, say=say)
    medians = {name: statistics.median(found) / new_tokens for name, found in seconds.items() if found}
    best = min(medians[name] for name in BASE_RIVALS if name in medians)
    cost_ratio = medians["memory alone"] / medians[PACKED]
    with packed_linears(base):
        verify = verify_costs(model, prompts[0], max([1, *draft_tokens]) + 1)
    unit = medians[PACKED] / best  # of the formula, in runs of the best base
    timings = []
    for name, (text_of, _) in ways.items():
        if name == "memory alone":
            continue  # it is there for c
        timing = Timing(name, text_of, note=notes.get(name, ""))
        if name in medians:
            timing.seconds_per_token = medians[name]
            timing.to_best_base = medians[name] / best
        decodes = accepted[name]
        looked = [d for d in decodes if d.acceptance is not None]
        if looked:
            timing.acceptance = statistics.fmean(d.acceptance for d in looked)
        if decodes:
            timing.tokens_per_round = sum(d.tokens for d in decodes) / sum(d.row_rounds for d in decodes)
        if name == "parallel":
            timing.predicted = unit * (1 + cost_ratio)
        if name.startswith("speculative") and timing.acceptance is not None:
            gamma = int(name.split()[1])
            timing.predicted = unit / speed_up(timing.acceptance, gamma, verify[gamma + 1], cost_ratio)
        timings.append(timing)
    return DecodeSpeed(
        timings,
        model.alpha,
        cost_ratio,
        verify,
        {
            "prompts": [int(p.shape[1]) for p in prompts],
            "new_tokens": new_tokens,
            "repeats": repeats,
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            "device": _device_name(base.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "base_parameters": base.num_parameters(),
            "memory_parameters": memory.num_parameters(),
        },
    )


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


def _generate_packed(model: Any, ids: Tensor, options: dict[str, Any]) -> Any:
    with packed_linears(model):
        return model.generate(ids, **options)


def _compile_anywhere() -> Any:
    """That generate compiles the forward pass, on the CPU as well, where it does not by itself."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def verify_costs(model: Any, prompt: Tensor, widest: int, repeats: int = 9) -> dict[int, float]:
    """v(n): medians of base forwards of n tokens after the prompt, over that of one; the widths in turn."""
    reader = Reader(model.base, prompt.shape[1] + widest, model.config.vocab_size)
    positions = torch.arange(prompt.shape[1] + widest, device=prompt.device)[None]
    reader.read(prompt, None, positions[:, : prompt.shape[1]])
    found: dict[int, list[float]] = {n: [] for n in range(1, widest + 1)}
    for _ in range(repeats):
        for n, times in found.items():
            tokens = prompt[:, :1].expand(1, n)
            start = time.perf_counter()
            reader.read(tokens, None, positions[:, prompt.shape[1] : prompt.shape[1] + n])
            if prompt.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            reader.cache.crop(-n)
    one = statistics.median(found[1])
    return {n: statistics.median(times) / one for n, times in found.items()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
