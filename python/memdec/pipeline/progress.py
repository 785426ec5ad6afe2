"""A progress bar with a rate and an end for long work; nothing at all where no one watches.

>>> with progress(1000, unit="tokens", label="Embedding") as advance:
...     advance(250)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from memdec.readable import count


class _Rate(ProgressColumn):
    """Units a second, with k and M for thousands and millions."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{count(speed)} {task.fields['unit']}/s", style="progress.data.speed")


@contextmanager
def progress(
    total: int | None,  # units of the whole work; None: unknown
    unit: str,  # what is counted, in the plural: "tokens", "rows"
    label: str,  # what is being done: "Embedding"
    *,
    done: int = 0,  # units that an earlier run did
) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error while the block runs, if that is a terminal and ``--quiet`` was not given; yields
    ``advance(units)``."""
    if not sys.stderr.isatty() or os.environ.get("MEMDEC_QUIET"):  # --quiet
        yield lambda units: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, unit=unit)
        yield lambda units: bar.advance(task, units)
