"""How the benchmarks measure: rivals turn about in one run, and one JSON line for each contestant of each case.

    python -m pytest bench/bench_alignment_loss.py --json-lines=bench/results/alignment_loss.jsonl

A line holds the case (op, shape, dtype), the contestant, its median and least time, `ratio` (how many times longer than
memdec's it took: the median over rounds of one run after the other), GB/s of the bytes that have to move, their share
of this machine's copy bandwidth, the peak of memory beside what was there before, and device, versions and commit.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memdec

ROUNDS = 7
THREADS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--json-lines", metavar="PATH", help="append one JSON line for each contestant of each case to PATH"
    )


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """All figures are for two threads, ours and torch's."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """What the figures were measured on, and how fast it copies memory."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = named[0] if named else cpu
    source, target = torch.ones(2**26), torch.empty(2**26)
    copies = [seconds(lambda: target.copy_(source)) for _ in range(10)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    build = memdec.build_info()
    return {
        "cpu": cpu,
        "threads": THREADS,
        "simd": build["simd"],
        "compiler": build["compiler"],
        "copy_gb_s": round(2 * source.nbytes / statistics.median(copies) / 1e9, 1),
        "memdec": memdec.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": (commit.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else ""),
    }


Compare = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def compare(benchmark: Any, machine: dict[str, Any], request: pytest.FixtureRequest) -> Compare:
    """compare(op, case, contestants, nbytes, setup=None): time all contestants, the first one being memdec's.

    `case` is what goes into the JSON line beside the op: shape, dtype. `contestants` maps a name to a function without
    arguments, or of what `setup()` returns. `nbytes`: each input byte once and each output byte once.
    """

    def run(
        op: str,
        case: dict[str, Any],
        contestants: dict[str, Callable[..., object]],
        nbytes: int,
        setup: Callable[[], tuple[Any, ...]] = tuple,
        rounds: int = ROUNDS,
    ) -> dict[str, dict[str, Any]]:
        names = list(contestants)
        peaks = {name: peak_beside(contestants[name], setup()) for name in names}  # the warm-up, too
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                arguments = setup()
                times[name].append(seconds(contestants[name], *arguments))
        benchmark.pedantic(contestants[names[0]], setup=lambda: (setup(), {}), rounds=3)
        results = {}
        for name in names:
            median = statistics.median(times[name])
            gb_s = nbytes / median / 1e9
            results[name] = {
                "op": op,
                **case,
                "contestant": name,
                "median_ms": round(median * 1e3, 3),
                "least_ms": round(min(times[name]) * 1e3, 3),
                "ratio": round(statistics.median(a / b for a, b in zip(times[name], times[names[0]], strict=True)), 2),
                "gb_s": round(gb_s, 2),
                "percent_of_copy": round(100 * gb_s / machine["copy_gb_s"], 1),
                "peak_mb": None if peaks[name] is None else round(peaks[name] / 1e6, 1),
                "rounds": rounds,
                **machine,
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
            f"  {name:42} {line['median_ms']:10.2f} ms  {line['ratio']:6.2f}x  {line['gb_s']:6.2f} GB/s "
            f"({line['percent_of_copy']:.0f}% of copy)  peak +{line['peak_mb']} MB"
        )


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def peak_beside(function: Callable[..., object], arguments: tuple[Any, ...]) -> int | None:
    """The most memory, in bytes, that a second call of the function held beside what was resident before it.

    Reads the kernel's high-water mark of the process, which Linux lets a process reset; None where it does not.
    """
    function(*arguments)
    gc.collect()
    # Freed memory that malloc still holds would hide what the second call takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    function(*arguments)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
