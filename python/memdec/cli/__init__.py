"""The command line. Thin: each command parses, calls one function of the package, and prints.

Nothing heavy is imported before a command needs it, so that ``memdec --help`` answers at once.
"""

from __future__ import annotations

import io
import os
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run ``memdec`` with ``arguments`` (default: those of the process) and exit with its status."""
    _make_printable()
    try:
        from memdec.cli.app import hoist_global_options, make_app, refuse_empty

        given = list(sys.argv[1:] if arguments is None else arguments)
        refuse_empty(given)
        make_app()(args=hoist_global_options(given), prog_name="memdec")
    except KeyboardInterrupt:  # while the above was loading: no command had begun, so none could say so
        sys.exit(130)


def _make_printable() -> None:
    """Let nothing fail for being printed: an escape stands for what the terminal has no character for, and a stream
    that the caller has closed is the null device, so that no file opened later gets its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
