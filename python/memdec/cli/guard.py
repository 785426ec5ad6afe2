"""What stands between a command and the user: remarks on its way, and, when something goes wrong, one clear message and
the right exit status.

=====================  ==============================================================  ======
what happened          what is printed                                                 status
=====================  ==============================================================  ======
`MemdecError`          its message                                                     1
disk, memory           what was full, closed or exhausted, and what to do              1
anything else          the exception in one line, and that --debug shows more          1
Ctrl-C                 that it stopped, and whether the same command continues it      130
a closed pipe          nothing                                                         141
wrong usage            typer's own message                                             2
=====================  ==============================================================  ======

``--debug`` adds the traceback to each of these.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from memdec.errors import MemdecError

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Settings:
    """The global options of this run."""

    debug: bool = False
    quiet: bool = False


SETTINGS = Settings()

_DISK_ERRORS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Not permitted",
    errno.EROFS: "The file system is read-only",
    errno.EMFILE: "Too many open files",
    errno.EIO: "The disk reports an error",
}
_REMEDIES = {
    errno.ENOSPC: "Free some space and run the same command again.",
    errno.EDQUOT: "Free some space and run the same command again.",
    errno.EACCES: "Choose another folder, or change who may read and write this one.",
    errno.EPERM: "Choose another folder, or change who may read and write this one.",
    errno.EROFS: "Choose a folder on another disk.",
    errno.EMFILE: "Raise the limit with `ulimit -n 4096` and run the same command again.",
    errno.EIO: "The disk may be failing; copy what is there and use another.",
}


def guarded(resumable: bool = False) -> Callable[[Command], Command]:
    """Decorate a command so that whatever goes wrong in it becomes a message and an exit status.

    Args:
        resumable: whether the same command continues an interrupted run.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
                sys.stdout.flush()  # a closed pipe shows here, while it can still be handled
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except KeyboardInterrupt:
                remark = " Run the same command again: it continues where it stopped." if resumable else ""
                fail(f"Interrupted.{remark}", status=130)
            except BrokenPipeError:
                # Whoever read our output has had enough. Python would complain once more when it flushes at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(141) from None
            except Exception as error:
                fail(explain(error), status=1)

        return run  # type: ignore[return-value]

    return decorate


def explain(error: BaseException) -> str:
    """The one message for ``error``: its own where it is ours, what to do where we know, else its first line."""
    if isinstance(error, MemdecError):
        return str(error)
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f": {error.filename}" if error.filename else ""
        return f"{_DISK_ERRORS[error.errno]}{where}. {_REMEDIES[error.errno]}"
    if "No space left on device" in text:  # as safetensors and tokenizers, written in Rust, report it
        return f"{_DISK_ERRORS[errno.ENOSPC]}. {_REMEDIES[errno.ENOSPC]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            "Not enough memory. Try a smaller --batch-size, a shorter --context or, where there is one, --memory-limit."
        )
    first = text.splitlines()[0] if text else "no message"
    return (
        f"{type(error).__name__}: {first}\nThis is not a message that memdec knows; --debug shows where it came from."
    )


def fail(message: str, status: int) -> None:
    """Print ``message`` in red on standard error, the traceback before it under --debug, and exit with ``status``."""
    if SETTINGS.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    colour = typer.colors.RED if status != 130 else typer.colors.YELLOW
    typer.secho(message, fg=colour, err=True)
    raise typer.Exit(status) from None


def remark(line: str) -> None:
    """Say a line about what is being done, on standard error; nothing under --quiet."""
    if not SETTINGS.quiet:
        typer.echo(line, err=True)
