"""What a person sees while a race runs: what is being done, how much is done, the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from espalier.bench.protocol import Progress

_LINES = 10  # in a pipe or a log


@contextmanager
def display(quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, a few lines in a pipe, nothing when quiet; on standard error."""
    console = Console(stderr=True)
    if quiet:
        yield _silent
    elif console.is_terminal:
        with _bars(console) as bars:
            task = bars.add_task("starting", total=None)

            def show(what: str, done: int, total: int) -> None:
                bars.update(task, description=what or "starting", completed=done, total=total)

            yield show
    else:
        yield _Lines(console)


def _silent(what: str, done: int, total: int) -> None:
    return None


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("runs,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
    )


class _Lines:
    """A line a tenth of the way."""

    def __init__(self, console: Console) -> None:
        self.console, self.said = console, -1

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth = _LINES * done // max(total, 1)
        if tenth > self.said:
            self.said = tenth
            text = f"{done} of {total} runs done" + (f" ({what})" if what else "")
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
