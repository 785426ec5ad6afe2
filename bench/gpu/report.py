"""What run.sh writes down: a JSON line a step, and at the end a table.

report.py step OUTDIR NAME STATUS SECONDS LOG    PASSES=wanted: not green unless a test passed
report.py table OUTDIR              exits with 1 unless every step was green
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def versions(out: Path) -> dict[str, Any]:
    """Device, driver, versions, commit: asked for once, because loading torch takes seconds."""
    known = out / "steps.jsonl"
    if known.exists():
        return dict(json.loads(known.read_text().splitlines()[0])["machine"])
    found: dict[str, Any] = {"python": platform.python_version()}
    try:
        import torch

        from measuring import commit, cpu_name, gpu

        found |= {"torch": torch.__version__, "commit": commit()}
        found |= gpu() if torch.cuda.is_available() else {"device": cpu_name(), "driver": None}
    except Exception as error:  # no memdec to import: the build failed
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def failures(text: str) -> list[str]:
    """The tests that failed, once each: with their errors where pytest got as far as its summary, or as they came."""
    found: dict[str, str] = {}
    summary = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] )?(FAILED|ERROR) (\S+::.+?)(?: - (.*))?")
    as_it_came = re.compile(r"(\S+::.+?) (FAILED|ERROR)(?: +\[ *\d+%\])?")
    for row in map(str.strip, text.splitlines()):
        if match := summary.fullmatch(row):
            word, test, error = match.groups()
        elif match := as_it_came.fullmatch(row):
            test, word, error = *match.groups(), None
        else:
            continue
        found[test] = f"{word} {test} - {error}" if error else found.get(test, f"{word} {test}")
    return list(found.values())


def step(out: Path, name: str, status: int, seconds: int, log: Path) -> None:
    """Append the step's line; print how it went, and if it went wrong which tests failed and the end of its log."""
    text = log.read_text(errors="replace")
    counts = re.findall(
        # Not compute-sanitizer's own count of errors.
        r"^(?!========= ).*\b\d+ (?:passed|failed|skipped|error|tests? collected).*$",
        text.rsplit("\n== ", 1)[-1],
        re.M,
    )
    shown = not os.environ.get("PASSES") or (bool(counts) and " passed" in counts[-1])
    line = {
        "step": name,
        "ok": status == 0 and shown,
        "status": status,
        "seconds": seconds,
        "tests": counts[-1].strip("= ") if counts else None,
        "machine": versions(out),
    }
    with open(out / "steps.jsonl", "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    word = "ok" if line["ok"] else "OUT OF TIME" if status == 124 else "FAILED" if status else "NOTHING RAN"
    print(f"{word} {seconds} s  {name}  {line['tests'] or ''}", flush=True)
    if not line["ok"]:
        failed = failures(text)
        for row in failed[:40]:
            print("   ! " + row[:240], flush=True)
        if len(failed) > 40:
            print(f"   ! and {len(failed) - 40} more", flush=True)
        print("\n".join("   | " + row for row in text.splitlines()[-25:]), flush=True)


def table(out: Path) -> int:
    """Figures first, steps last: the end of an output is what is read."""
    bench = out / "bench.jsonl"
    for row in map(json.loads, bench.read_text().splitlines() if bench.exists() else []):
        case = f"{row['op']} {'×'.join(map(str, row['shape']))} {row['dtype']}"
        extra = " ".join(f"{key}={row[key]}" for key in ("tokens", "warpers", "graph", "calls") if row.get(key))
        shown = f"{case:52.52} {extra:24.24} {row['contestant']:34.34} {row['median_ms']:10.4f} ms"
        if "ratio" in row:
            shown += f" {row['ratio']:7.2f}x {row['percent_of_copy']:6.1f}% of copy  +{row['peak_mb']} MB"
        print(shown)
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    print(json.dumps(steps[-1]["machine"]))
    for line in steps:
        print(f"{'ok  ' if line['ok'] else 'FAIL'} {line['seconds']:4d} s  {line['step']}  {line['tests'] or ''}")
    green = all(line["ok"] for line in steps)
    print("all green" if green else f"{sum(not line['ok'] for line in steps)} of {len(steps)} steps failed")
    return 0 if green else 1


if __name__ == "__main__":
    if sys.argv[1] == "step":
        step(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        sys.exit(table(Path(sys.argv[2])))
