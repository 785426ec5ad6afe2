"""What a figure needs to mean something: the machine it was taken on, and a clock that fits the device."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memdec

THREADS = 2


def machine(device: str) -> dict[str, Any]:
    """Device, driver, versions and commit, and how fast the device copies its own memory."""
    build = memdec.build_info()
    named = gpu() if device == "cuda" else {"cpu": cpu_name(), "threads": THREADS, "simd": build["simd"]}
    return {
        **named,
        "compiler": build["compiler"],
        "copy_gb_s": copy_bandwidth(device),
        "memdec": memdec.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def importable(name: str) -> Any:
    """A rival's module, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def cpu_name() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The first GPU, its driver, and the CUDA that torch and memdec were built with."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        driver = []
    build = memdec.build_info()
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "nvcc": build["nvcc"],
        "arches": " ".join(build["arches"]),
    }


def commit() -> str:
    """The commit, with a + where files differ from it; MEMDEC_COMMIT where the folder has no history."""
    if os.environ.get("MEMDEC_COMMIT"):
        return os.environ["MEMDEC_COMMIT"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy, bytes read and bytes written counted."""
    source = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    copies = [clock.seconds(lambda: target.copy_(source)) for _ in range(10)]
    return round(2 * source.nbytes / statistics.median(copies) / 1e9, 1)


class Clock:
    """Times calls: the CPU's by the wall, a GPU's by events on its stream, its cache filled with other data before."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.other = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def seconds(self, function: Callable[..., object], *arguments: Any) -> float:
        """One call. On a GPU it is queued while that fills its caches, so the time of launching does not show.

        Filled once, a loss and its gradient in place came out at 1144 µs on an H100, where their kernels take 1030: the
        host was slower to queue them than the GPU to fill.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            function(*arguments)
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            self.other.fill_(1)
        start.record()
        function(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def rounds(self, asked_for: int, function: Callable[..., object], *arguments: Any) -> int:
        """How many rounds: what was asked for; on a GPU half a second, 5 to 50."""
        if not self.on_gpu:
            return asked_for
        return max(5, min(50, int(0.5 / self.seconds(function, *arguments))))

    def peak_beside(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> int | None:
        """The most memory, in bytes, that a second call of the function held beside what was there before it.

        On the CPU this reads the kernel's high-water mark of the process, which Linux lets a process reset; None where
        it does not.
        """
        function(*arguments)
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            function(*arguments)
            return torch.cuda.max_memory_allocated() - allocated
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
