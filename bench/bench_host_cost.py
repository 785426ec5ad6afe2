"""What an eager call costs the host, N = 1, V = 32: wanted are at most 10 µs more than the launch of an empty kernel.

Calls are queued one after the other and only that is timed; the device is waited for between rounds. Beside the ops
stand what they are made of: launches, and torch's allocations for the output and the workspace.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch

from memdec import ops

ROUNDS, CALLS, ALPHA = 9, 300, 0.4
SIZES = {"cpu": {"rows": [1]}, "cuda": {"rows": [1]}}


def bench_host_cost(device, measured_on, rows, request):
    if device != "cuda":
        pytest.skip("on the CPU a call is its computation")
    base, memory = (torch.randn(rows, 32, device=device) for _ in range(2))
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    torch.set_default_device(None)
    contestants = {
        "an empty kernel": lambda: torch.cuda._sleep(0),
        "torch.empty": lambda: torch.empty(1 << 16, dtype=torch.uint8, device=device),
        "torch's add_": lambda: targets.add_(0),
        "token_log_prob": lambda: ops.token_log_prob(base, targets),
        "interpolate_log_prob": lambda: ops.interpolate_log_prob(base, memory, targets, ALPHA),
        "interpolate_argmax": lambda: ops.interpolate_argmax(base, memory, ALPHA),
        "interpolate_sample": lambda: ops.interpolate_sample(base, memory, ALPHA, seed=1),
        "interpolate_sample, seed and offset of tensors": lambda: ops.interpolate_sample(
            base, memory, ALPHA, seed=targets, offset=targets
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, call in contestants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS)
    lines = []
    for name, found in times.items():
        median = statistics.median(found[1:])
        over = median - statistics.median(times["an empty kernel"][1:])
        lines.append({"op": "host cost", "shape": [rows, 32], "dtype": "float32", "contestant": name,
                      "median_ms": round(median * 1e3, 5), "least_ms": round(min(found) * 1e3, 5),
                      "over_an_empty_kernel_ms": round(over * 1e3, 5), "rounds": ROUNDS, **measured_on})  # fmt: skip
        print(f"  {name:48} {median * 1e6:6.1f} µs, {over * 1e6:5.1f} over an empty kernel")
    path = request.config.getoption("--json-lines")
    if path:
        with open(Path(path), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
