"""How fast a pair decodes on a GPU, for models of random weights that are as large as real ones.

    python bench/gpu/decoding.py --out OUTDIR/decoding.jsonl                     1.5B + 0.5B and 7B + 0.5B, under 110 s
    python bench/gpu/decoding.py --shapes qwen2.5-1.5b+qwen2.5-0.5b --compile    compiled as well; minutes

A step takes as long with random weights as with trained ones; only what the models agree on is lost. So each draft
stands by a draw of the chance given by --acceptance, measured on the real pair of bench/results/decoding.json, and the
texts mean nothing. A JSON line a pair: every way to decode in seconds a token, beside what reading the weights alone
would take.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen2.5-1.5b+qwen2.5-0.5b,qwen2.5-7b+qwen2.5-0.5b", help="BASE+MEMORY,…")
    parser.add_argument("--acceptance", type=float, default=0.8, help="chance that a draft stands")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", default="2,3,4,5")
    parser.add_argument("--repeats", type=int, default=2, help="runs that count, after one that does not")
    parser.add_argument("--compile", action="store_true", help="everything compiled as well")
    parser.add_argument("--out", type=Path, default=None, help="a JSON line a pair is appended to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("COLUMNS", "120")  # of the table, where there is no terminal
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from measuring import machine
    from memdec.cli.use import print_speed
    from memdec.decoding.bench import measure, random_pair

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    here = machine(device)
    for pair in arguments.shapes.split(","):
        start = time.perf_counter()
        base, memory = pair.split("+")
        model = random_pair(base, memory, device, dtype)
        print(f"{pair}, random weights, {dtype}: made in {time.perf_counter() - start:.1f} s", flush=True)
        prompt = torch.randint(1, 100_000, (1, arguments.prompt_tokens), generator=torch.Generator().manual_seed(0))
        speed = measure(
            model,
            [prompt.to(device)],
            new_tokens=arguments.new_tokens,
            draft_tokens=[int(part) for part in arguments.draft_tokens.split(",")],
            repeats=arguments.repeats,
            compiled=arguments.compile,
            acceptance=arguments.acceptance,
        )
        print_speed(speed)
        seconds = time.perf_counter() - start
        print(f"{pair}: {seconds:.0f} s in all", flush=True)
        if arguments.out is not None:
            line = {"pair": pair, "weights": "random", **speed.to_json(), "machine": here, "seconds": round(seconds, 1)}
            with open(arguments.out, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        del model, speed
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
