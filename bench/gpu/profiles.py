"""What ncu says of the kernels of each op, at the shapes of the goals: a JSON line a kernel.

    python bench/gpu/profiles.py --out OUTDIR/profile.jsonl                    all of it, about a minute
    python bench/gpu/profiles.py --only argmax,aggregate --out profile.jsonl

A line holds the op, the kernel, its time, bytes of memory read and written, the shares of their peaks at which it used
memory (`dram`), the second-level cache and the multiprocessors, instructions issued a cycle by a scheduler, warps
resident (% of the most), registers a thread, and what warps waited for most (cycles between two instructions).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

ALPHA = 0.4
MARK = "== profiled: "
NUMBER = re.compile(r"[\d,]+(\.\d+)?")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats")
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "smsp__issue_active.avg.per_cycle_active": "issue",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+)_per_issue_active\.ratio")


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """By name what makes the inputs and gives the call."""
    from bench_alignment_loss import teacher_of
    from memdec import ops
    from memdec.decoding.products import linear_of_rows

    def align(rows: int, vocab: int) -> Callable[[], object]:
        logits = torch.randn(rows, vocab).mul_(3).bfloat16()
        labels, teacher = torch.randint(vocab, (rows,)), teacher_of(rows, vocab)
        return lambda: ops.alignment_loss(
            logits.detach().requires_grad_(), labels, teacher, grad_in_place=True
        ).total.backward()

    def pair(rows: int, op: Callable[..., object], **settings: object) -> Callable[[], object]:
        base, memory = (torch.randn(rows, 151936).mul_(3).bfloat16() for _ in range(2))
        return lambda: op(base, memory, ALPHA, **settings)

    def log_prob(base: torch.Tensor, memory: torch.Tensor, alpha: float) -> object:
        return ops.interpolate_log_prob(base, memory, torch.arange(len(base), device=base.device), alpha)

    def neighbours(text: bool) -> Callable[[], object]:
        draws = torch.rand(16384, 1024)
        tokens = (draws**30 if text else draws).mul_(50257).int()
        distances = (torch.rand(16384, 1024) * 300 + 100).bfloat16()
        return lambda: ops.aggregate_neighbors(distances, tokens, temperature=16.0, vocab_size=50257)

    def few_rows(outputs: int, width: int, gated: bool) -> Callable[[], object]:
        x, weight, norm = (torch.randn(*shape).bfloat16() for shape in ((3, width), (outputs, width), (width,)))
        residual = None if gated else torch.randn(3, outputs).bfloat16()
        return lambda: linear_of_rows(x, weight, None, norm if gated else None, 1e-6, residual, gated)

    sample = ops.interpolate_sample
    return {
        "alignment_loss 50257": lambda: align(4096, 50257),
        "alignment_loss 151936": lambda: align(4096, 151936),
        "aggregate_neighbors uniform": lambda: neighbours(False),
        "aggregate_neighbors text": lambda: neighbours(True),
        "interpolate_log_prob": lambda: pair(1024, log_prob),
        "interpolate_argmax": lambda: pair(1024, ops.interpolate_argmax),
        "interpolate_argmax, 1 row": lambda: pair(1, ops.interpolate_argmax),
        "interpolate_argmax, 8 rows": lambda: pair(8, ops.interpolate_argmax),
        "interpolate": lambda: pair(1024, ops.interpolate),
        "interpolate_sample": lambda: pair(1024, sample, seed=1),
        "interpolate_sample, 1 row": lambda: pair(1, sample, seed=1),
        "interpolate_sample, 8 rows": lambda: pair(8, sample, seed=1),
        "interpolate_sample temperature": lambda: pair(1024, sample, seed=1, temperature=0.8),
        "linear_of_rows, gate and up of 1.5B": lambda: few_rows(17920, 1536, True),
        "linear_of_rows, down of 1.5B": lambda: few_rows(1536, 8960, False),
        "interpolate_sample top_k top_p": lambda: pair(67, sample, seed=1, top_k=50, top_p=0.9),
    }


def run_cases(wanted: list[str]) -> None:
    """Each call once to warm up, then once between the marks that ncu looks for, its name printed before."""
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    cuda = torch.cuda.cudart()
    for name in wanted:
        call = cases()[name]()
        call()
        torch.cuda.synchronize()
        print(f"{MARK}{name}", flush=True)
        cuda.cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        cuda.cudaProfilerStop()


def lines_of(output: str) -> list[dict[str, Any]]:
    """A line a kernel, from all that ncu and the calls under it have printed."""
    op, ops = "", {}
    for row in output.splitlines():
        if MARK in row:
            op = row.split(MARK)[1]
        elif 'Profiling "' in row:  # ncu counts kernels from 0
            ops[str(len(ops))] = op
    lines = []
    for kernel in csv.DictReader(row for row in output.splitlines() if row.startswith('"')):
        if not kernel["ID"]:
            continue  # the units
        line: dict[str, Any] = {"op": ops.get(kernel["ID"], "unknown")}
        line["kernel"] = re.sub(r"\w+::|<unnamed>::|\(anonymous namespace\)::|^void ", "", kernel["Kernel Name"]).split(
            "("
        )[0]
        numbers = {
            name: float(value.replace(",", "")) for name, value in kernel.items() if NUMBER.fullmatch(value or "")
        }
        line |= {METRICS[name]: numbers[name] for name in METRICS if name in numbers}
        waits = {found[1]: value for name, value in numbers.items() if (found := STALL.fullmatch(name))}
        line["waits"] = dict(sorted(waits.items(), key=lambda wait: -wait[1])[:3])
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names hold one of these, separated by commas")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines are appended to this file")
    parser.add_argument("--under-ncu", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = [name for name in cases() if any(part in name for part in arguments.only.split(","))]
    if arguments.under_ncu:
        run_cases(wanted)
        return
    from measuring import machine

    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]
    command += [argument for section in SECTIONS for argument in ("--section", section)]
    command += [sys.executable, __file__, "--under-ncu", "--only", arguments.only]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = [] if done.returncode else lines_of(done.stdout)
    if not lines:
        sys.exit(f"ncu failed with {done.returncode}:\n{done.stdout}")
    here = machine("cuda")
    for line in lines:
        shown = " ".join(f"{name}={line[name]:.4g}" for name in METRICS.values() if name in line)
        waits = " ".join(f"{name} {value:.3g}" for name, value in line["waits"].items())
        print(f"{line['op']:32.32} {line['kernel']:30.30} {shown}; waits: {waits}")
    if arguments.out is not None:
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "machine": here}) + "\n" for line in lines)


if __name__ == "__main__":
    main()
