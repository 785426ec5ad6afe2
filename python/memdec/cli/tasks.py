"""``memdec tasks``: zero-shot classification with base, memory and mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memdec.cli.guard import guarded, remark
from memdec.cli.use import MEMORY, Base, Device, Dtype
from memdec.errors import MemdecError

if TYPE_CHECKING:
    from memdec.evaluation.pmi import TaskMeasure, TasksResult


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(short_help="Zero-shot tasks with base, memory and mixture.")(tasks)


@guarded(resumable=True)
def tasks(
    base: Base,
    memory: Annotated[str | None, MEMORY] = None,
    names: Annotated[
        str | None,
        typer.Option("--tasks", help="Any of sst2,mr,cr,rt,hyp,cb,rte,agnews,yahoo; default: all, or the files alone."),
    ] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(help="A .jsonl file with a task and its rows; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many test rows of each task, drawn by --seed; default: all.")
    ] = None,
    validation_limit: Annotated[
        int, typer.Option(min=1, help="So many rows at most to tune alpha on, drawn by --seed.")
    ] = 500,
    alpha: Annotated[
        float | None,
        typer.Option(help="A weight of the memory to report beside the tuned one; default: the memory's own."),
    ] = None,
    first_word_only: Annotated[
        bool, typer.Option("--first-word-only", help="One word a label, not the sum over several.")
    ] = False,
    context: Annotated[int, typer.Option(help="Tokens of a prompt at most; longer ones lose their beginning.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a forward.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for tasks.json and the log-probs.")] = Path("tasks"),
) -> None:
    """Zero-shot accuracy on the nine tasks of the Memory Decoder paper, or on tasks of your own, by PMI.

    A label's score is log P(its words | prompt) - log P(its words | the end of the prompt alone); plain LM scores stand
    beside it. Alpha is tuned on each task's validation rows. The rows come from the hub, or from --task-file, whose
    first line names or defines the task. Stopped, the same command continues.

    \b
    Examples:
      memdec tasks --base model --memory run/memory --tasks sst2,cb,agnews --limit 500
      memdec tasks --base model --memory run/memory --task-file reviews.jsonl --out reviews
    """
    from memdec.evaluation.pmi import check_out, evaluate_tasks
    from memdec.evaluation.tasks import TASKS, load_from_hub, named_tasks, read_task_file

    check_out(out)  # not after an hour of scoring
    files = task_file or []
    wanted = named_tasks(names) if names is not None else [] if files else list(TASKS.values())
    options = {"validation_limit": validation_limit, "seed": seed}
    rows = [read_task_file(path, limit=limit, **options) for path in files]
    doubled = {entry.task.name for entry in rows} & {task.name for task in wanted}
    if doubled:
        raise MemdecError(f"--tasks and --task-file both give {', '.join(sorted(doubled))}. Leave one of them out.")
    rows += [load_from_hub(task, limit=limit, **options) for task in wanted]
    result = evaluate_tasks(
        base,
        memory,
        rows,
        alpha=alpha,
        context=context,
        first_word_only=first_word_only,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        out=out,
        seed=seed,
        say=remark,
    )
    path = result.save(out)
    print_tasks(result)
    typer.echo(f"Figures: {path}")


def print_tasks(result: TasksResult) -> None:
    """The table of a run: a row a task, the PMI accuracies of all methods and the plain LM's of base and mixture."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ["rows", "base, LM", "base"]
    if result.models["memory"] is not None:
        columns += ["memory", "base+mem", "alpha", "vs base", "p"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    def percent(share: float) -> str:
        return f"{100 * share:.1f}"

    def difference(entry: TaskMeasure) -> list[str]:
        assert entry.alpha is not None and entry.difference is not None and entry.p_value is not None
        return [f"{entry.alpha:.2f}", f"{100 * entry.difference:+.1f}", f"{entry.p_value:.2g}"]

    for task in result.tasks:
        cells = [f"{task.rows['test']:,}", percent(task.measure("base", "lm").accuracy)]
        cells.append(percent(task.measure("base").accuracy))
        if result.models["memory"] is not None:
            mixture = task.measure("base+memory", "pmi", "tuned on validation")
            cells += [percent(task.measure("memory").accuracy), percent(mixture.accuracy), *difference(mixture)]
        table.add_row(task.task["title"], *cells)
    if len(result.tasks) > 1:
        means = {
            (entry["method"], entry["scoring"]): percent(entry["accuracy"])
            for entry in result.averages()
            if entry["alpha_source"] in ("", "tuned on validation")
        }
        cells = ["", means["base", "lm"], means["base", "pmi"]]
        if result.models["memory"] is not None:
            cells += [means["memory", "pmi"], means["base+memory", "pmi"]]
        table.add_row("mean", *cells, style="bold")
    console.print(table)
    lines = ["Accuracy in %, by domain-conditional PMI; LM: by plain log-probs."]
    if result.models["memory"] is not None:
        lines.append("alpha is tuned on each task's validation rows; p: exact McNemar test against the base.")
    for line in lines:
        console.print(line, style="dim", markup=False)
