"""What `memdec fit` and `memdec evaluate` have in common: ``--recipe``, and the table that ``fit --dry-run`` prints.

A recipe's options become the command's defaults before it reads the others, so that an option that is given overrules
the file, and an argument that the file gives need not be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from memdec.cli.guard import guarded

if TYPE_CHECKING:
    from memdec.pipeline.estimate import Estimate


@guarded()
def take_defaults(context: typer.Context, value: str | None) -> None:
    """Make the options of the recipe ``value`` the defaults of the command that ``context`` is of.

    Raises:
        MemdecError: the recipe cannot be read.
    """
    if value is None or context.resilient_parsing:
        return
    from memdec.pipeline.recipe import read_recipe

    section = "fit" if context.command.name == "fit" else "evaluate"
    context.default_map = read_recipe(value).command_line(section)


def _take_recipe(context: typer.Context, value: str | None) -> str | None:
    take_defaults(context, value)
    return value


RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        is_eager=True,
        callback=_take_recipe,
        help="A .toml file that gives the options, those above without -- too; what is given here overrules it.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what the run would cost; load no weights, write nothing.")
]
On = Annotated[str, typer.Option("--on", help="For --dry-run: h100, a100, rtx4090 or cpu.")]
Tokens = Annotated[int | None, typer.Option(min=2, help="For --dry-run: how long the text is; default: counted.")]
Utilisation = Annotated[
    float | None, typer.Option(help="For --dry-run: share of the device's peak that is reached; default: 0.4, cpu 0.3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The dry run as JSON.")]


def complete(path: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of the command line with those of a recipe that the command line has no option for."""
    if path is None:
        return options
    from memdec.pipeline.recipe import read_recipe

    others = {name: value for name, value in read_recipe(path).fit.items() if name not in ("model", "source", "out")}
    return {**others, **options}


def estimate(
    model: str,
    source: str,
    path: str | None,
    options: dict[str, Any],
    *,
    on: str,
    tokens: int | None,
    utilisation: float | None,
    as_json: bool,
) -> None:
    """``fit --dry-run``: print the estimate, as a table or as JSON."""
    from memdec.pipeline.estimate import estimate_fit
    from memdec.pipeline.recipe import read_recipe

    recipe = None if path is None else read_recipe(path)
    found = estimate_fit(
        model,
        source,
        on=on,
        utilisation=utilisation,
        tokens=tokens,
        stated_tokens=None if recipe is None else recipe.tokens,
        shapes=None if recipe is None else recipe.shapes,
        **options,
    )
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    print_estimate(found, None if recipe is None else recipe.title)


def print_estimate(found: Estimate, title: str | None) -> None:
    """A table with a line a stage, the totals, and what they rest on."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from memdec.pipeline.estimate import DEVICES
    from memdec.readable import duration, size

    console = Console(highlight=False)
    if title is not None:
        console.print(title, style="bold", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("stage", "together", no_wrap=True)
    table.add_column("what it does")
    table.add_column("FLOPs", f"{found.flops:.2e}", justify="right", no_wrap=True)
    table.add_column("time", duration(3600 * found.hours), justify="right", no_wrap=True)
    table.add_column("disk", size(found.disk), justify="right", no_wrap=True)
    table.add_column("memory", size(max(part.memory for part in found.parts)), justify="right", no_wrap=True)
    for part in found.parts:
        flops = f"{part.flops:.2e}" if part.flops else "–"
        cells = (duration(part.seconds), size(part.disk), size(part.memory))
        table.add_row(part.name, part.what, flops, *cells)
    console.print(table)
    names = {"base": "the base", "teacher": "the teacher", "memory": "the memory"}
    sizes = ", ".join(f"{names[name]} {count:,}" for name, count in found.parameters.items())
    split = ", ".join(f"{count:,} for {name}" for name, count in found.tokens.items())
    console.print(f"Tokens: {split}. Parameters: {sizes}.")
    console.print(f"On {DEVICES[found.device].label}. What this rests on, and count on a factor of two:")
    for line in found.assumptions:
        console.print(f"  {line}", style="dim", markup=False)
