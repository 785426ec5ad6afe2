"""The command line. Thin: each command parses, calls one function of the package, and prints.

Nothing heavy is imported before a command needs it, so that ``memdec --help`` answers at once.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run ``memdec`` with ``arguments`` (default: those of the process) and exit with its status."""
    try:
        from memdec.cli.app import hoist_global_options, make_app, refuse_empty

        given = list(sys.argv[1:] if arguments is None else arguments)
        refuse_empty(given)
        make_app()(args=hoist_global_options(given), prog_name="memdec")
    except KeyboardInterrupt:  # while the above was loading: no command had begun, so none could say so
        sys.exit(130)
