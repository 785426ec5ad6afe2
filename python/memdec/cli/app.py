"""The ``memdec`` application: its commands, and the options that all of them share."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from memdec.cli import guard

HELP = """A pretrained, plug-and-play memory for language models.

A memory is a small model that has learnt, from a domain's text, what a nearest-neighbour retriever would say. Mixed
with any model that has the same tokenizer it makes that model know the domain, with no change to its weights.

The whole job on your own text and model:

    memdec fit path/to/model path/to/text --out run
    memdec evaluate --base path/to/model --memory run/memory --text run/corpus --datastore run/datastore
    memdec generate --base path/to/model --memory run/memory "A prompt from the domain"

`fit` runs four stages, which also run alone: corpus, datastore, distributions, train.
To see all of it at work on a small model and real text, in minutes: memdec demo
"""


def make_app() -> typer.Typer:
    """The application with all its commands."""
    from memdec.cli import inspect, stages, tasks, use

    app = typer.Typer(
        name="memdec",
        help=HELP.replace("\n\n    ", "\n\n\b\n    "),
        rich_markup_mode=None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(global_options)
    stages.register(app)
    use.register(app)
    tasks.register(app)
    inspect.register(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from memdec import __version__

        typer.echo(f"memdec {__version__}")
        raise typer.Exit()


def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and detailed logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no remarks: only results.")] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, max=4096, help="Processor threads to use; 0 leaves it to PyTorch.")
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What holds for every command; these options may stand before or after the command's name."""
    guard.SETTINGS.debug, guard.SETTINGS.quiet = debug, quiet
    if threads:
        set_threads(threads)
    if quiet:
        os.environ["MEMDEC_QUIET"] = "1"
    # The libraries below us have progress bars and advice of their own; ours is one bar a stage.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if debug else "%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("memdec")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def set_threads(threads: int) -> None:
    """Use so many processor threads, here and in whatever is loaded later."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def refuse_empty(arguments: list[str]) -> None:
    """Exit with a message where an argument is empty: a shell variable that is not set must not become this folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "--":
            return
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            where = f" after {before}" if before else ""
            typer.secho(f"An argument{where} is empty. Is a variable of the shell not set?", fg="red", err=True)
            sys.exit(2)


def hoist_global_options(arguments: list[str]) -> list[str]:
    """Move --debug, --quiet and --threads N to the front, so that they may stand anywhere before a ``--``."""
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            rest += arguments[index:]
            break
        if argument in ("--debug", "--quiet") or argument.startswith("--threads="):
            front.append(argument)
        elif argument == "--threads":
            front += arguments[index : index + 2]
            index += 1
        else:
            rest.append(argument)
        index += 1
    return front + rest
