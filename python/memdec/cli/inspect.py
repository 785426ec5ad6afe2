"""``memdec info`` and ``memdec verify``: what a folder is, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memdec.cli.guard import guarded
from memdec.errors import MemdecError
from memdec.readable import size

Folder = Annotated[Path, typer.Argument(help="An artefact, a memory, or the folder of them that `memdec fit` makes.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(short_help="What an artefact or a memory is.")(info)
    app.command(short_help="Whether an artefact or a memory is whole.")(verify)


@guarded()
def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a folder is: its kind, the parameters it was made with, what came out, and how much of it is done.

    \b
    Examples:
      memdec info run                  every artefact in the folder of a fit
      memdec info run/memory           a memory's recommended alpha and where it comes from
      memdec info run/datastore --json
    """
    facts = describe(folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    for part in facts:
        _print_facts(part)


@guarded()
def verify(folder: Folder) -> None:
    """Read every byte of an artefact or a memory and compare it with its checksums; status 1 if anything is wrong.

    \b
    Examples:
      memdec verify run
      memdec verify run/memory
    """
    from memdec.stores.verify import verify as find_problems

    _must_exist(folder)
    problems = find_problems(folder)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise MemdecError(f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''} found:\n{listed}")
    typer.secho(
        f"{folder}: whole; every file has the size and the checksum it was written with.", fg=typer.colors.GREEN
    )


def _must_exist(folder: Path) -> None:
    if not folder.exists():
        raise MemdecError(f"{folder} does not exist. Check the path.")
    if not folder.is_dir():
        raise MemdecError(f"{folder} is a file; give the folder of an artefact or of a memory.")


def describe(folder: Path) -> list[dict[str, Any]]:
    """The facts of the artefact or memory in ``folder``, or of each one directly below it.

    Raises:
        MemdecError: nothing of memdec is there.
    """
    from memdec.stores.verify import artefacts

    _must_exist(folder)
    own = _describe_one(folder)
    if own is not None:
        return [own]
    parts = [facts for facts in map(_describe_one, artefacts(folder)) if facts is not None]
    if not parts:
        raise MemdecError(
            f"{folder} holds nothing of memdec: neither a manifest.json nor a memory_config.json, here or one folder "
            "below."
        )
    return parts


def _describe_one(folder: Path) -> dict[str, Any] | None:
    from memdec.stores.manifest import MANIFEST_NAME, Manifest
    from memdec.stores.memory import is_memory, read_memory_card

    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if is_memory(folder):
        card = read_memory_card(folder)
        return {
            "folder": str(folder),
            "format": "memdec.memory",
            "complete": True,
            "bytes": total,
            "parameters": {"vocab_size": card.vocab_size, "tokenizer_fingerprint": card.tokenizer_fingerprint},
            "results": {"alpha": card.alpha},
            "provenance": card.provenance,
        }
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(folder)
    return {
        "folder": str(folder),
        "format": manifest.format,
        "version": manifest.version,
        "complete": manifest.complete,
        "bytes": total,
        "shards": len(manifest.shards),
        "rows": manifest.rows,
        "parameters": manifest.fields,
        "results": manifest.results,
    }


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{facts['folder']}   {facts['format']}"
    if "version" in facts:
        title += f", version {facts['version']}"
    table = Table(
        title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0), title_style="bold"
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    state = "complete" if facts["complete"] else "not finished: run the command that makes it again, and it continues"
    table.add_row("state", state)
    table.add_row("size", size(int(facts["bytes"])))
    for name in ("shards", "rows"):
        if facts.get(name):
            table.add_row(name, f"{facts[name]:,}")
    for group in ("parameters", "results", "provenance"):
        for name, value in sorted(facts.get(group, {}).items()):
            table.add_row(name, _short(value))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()


def _short(value: Any, most: int = 400) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= most else text[:most] + " …"
