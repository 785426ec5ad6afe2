"""How the benchmarks measure: rivals turn about in one run, and one JSON line for each contestant of each case.

    python -m pytest bench/bench_alignment_loss.py --json-lines=bench/results/alignment_loss.jsonl
    python -m pytest bench --device=cuda

A line holds the case (op, shape, dtype), the contestant, its median and least time, `ratio` (how many times longer than
memdec's it took: the median over rounds of one run after the other), GB/s of the bytes that have to move, their share
of this machine's copy bandwidth, the peak of memory beside what was there before, and device, versions and commit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from measuring import THREADS, Clock, machine

ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--json-lines", metavar="PATH", help="append one JSON line for each contestant of each case to PATH"
    )
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the benchmarks run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`rows` and other sizes that a benchmark names in SIZES, a dict of device → list of values a name."""
    device = metafunc.config.getoption("--device")
    sizes = getattr(metafunc.module, "SIZES", {}).get(device, {})
    for names, values in sizes.items():
        if all(name.strip() in metafunc.fixturenames for name in names.split(",")):
            metafunc.parametrize(names, values)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda": where tensors are made that do not say otherwise."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def here(device: str) -> Iterator[None]:
    """All CPU figures are for two threads, ours and torch's. Benchmarks make their tensors on the device."""
    torch.set_num_threads(THREADS)
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def measured_on(device: str) -> dict[str, Any]:
    """What the figures were measured on, and how fast it copies memory."""
    return machine(device)


@pytest.fixture
def generator(device: str) -> torch.Generator:
    """Draws the same numbers in every run."""
    return torch.Generator(device).manual_seed(0)


Compare = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def compare(benchmark: Any, device: str, measured_on: dict[str, Any], request: pytest.FixtureRequest) -> Compare:
    """compare(op, case, contestants, nbytes, setup=None): time all contestants, the first one being memdec's.

    `case` is what goes into the JSON line beside the op: shape, dtype. `contestants` maps a name to a function without
    arguments, or of what `setup()` returns. `nbytes`: each input byte once and each output byte once. `calls`: how many
    steps one call of a contestant makes; times are of one.
    """
    clock = Clock(device)

    def run(
        op: str,
        case: dict[str, Any],
        contestants: dict[str, Callable[..., object]],
        nbytes: int,
        setup: Callable[[], tuple[Any, ...]] = tuple,
        rounds: int = ROUNDS,
        calls: int = 1,
    ) -> dict[str, dict[str, Any]]:
        torch.set_default_device(None)  # every call of torch's would take microseconds longer
        names = list(contestants)
        peaks = {name: clock.peak_beside(contestants[name], setup()) for name in names}  # the warm-up, too
        rounds = clock.rounds(rounds, contestants[names[0]], *setup())
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                arguments = setup()
                times[name].append(clock.seconds(contestants[name], *arguments) / calls)

        def waited_for(*arguments: Any) -> None:
            contestants[names[0]](*arguments)
            if clock.on_gpu:
                torch.cuda.synchronize()

        benchmark.pedantic(waited_for, setup=lambda: (setup(), {}), rounds=3)
        results = {}
        for name in names:
            median = statistics.median(times[name])
            gb_s = nbytes / median / 1e9
            peak = peaks[name]
            results[name] = {
                "op": op,
                **case,
                "contestant": name,
                "median_ms": round(median * 1e3, 3 if device == "cpu" else 5),
                "least_ms": round(min(times[name]) * 1e3, 3 if device == "cpu" else 5),
                "ratio": round(statistics.median(a / b for a, b in zip(times[name], times[names[0]], strict=True)), 2),
                "gb_s": round(gb_s, 2),
                "percent_of_copy": round(100 * gb_s / measured_on["copy_gb_s"], 1),
                "peak_mb": None if peak is None else round(peak / 1e6, 1),
                "rounds": rounds,
                **measured_on,
            }
        report(op, case, results)
        benchmark.extra_info.update({name: results[name]["ratio"] for name in names[1:]})
        path = request.config.getoption("--json-lines")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(result) + "\n" for result in results.values())
        return results

    return run


def report(op: str, case: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """A line a contestant, seen with -s."""
    print(f"\n{op} {case}")
    for name, line in results.items():
        print(
            f"  {name:42} {line['median_ms']:10.3f} ms  {line['ratio']:6.2f}x  {line['gb_s']:6.2f} GB/s "
            f"({line['percent_of_copy']:.0f}% of copy)  peak +{line['peak_mb']} MB"
        )
