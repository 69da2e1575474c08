"""What a person sees while a job runs: the phase, how far it is, the best so far, the time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live as RichLive
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table


class Display(Protocol):
    """Where a job tells what it does. `step` is called often and must be cheap."""

    def phase(self, name: str, total: int) -> None: ...

    def step(self, done: int, total: int, text: str = "") -> None: ...

    def best(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Silent:
    """Shows nothing."""

    def phase(self, name: str, total: int) -> None:
        """Nothing."""

    def step(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""

    def best(self, text: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class Lines(Silent):
    """A line a phase and a line a note: for logs and pipes."""

    def __init__(self, console: Console, seconds: float | None = None) -> None:
        self.console = console
        self.seconds = seconds
        self.started = time.time()

    def _stamp(self) -> str:
        return f"[{time.time() - self.started:6.1f}s]"

    def phase(self, name: str, total: int) -> None:
        """One line, when the phase begins."""
        self.console.print(f"{self._stamp()} {name}", highlight=False, markup=False, soft_wrap=True)

    def best(self, text: str) -> None:
        """One line when the best changed."""
        self.console.print(
            f"{self._stamp()} best so far: {text}", highlight=False, markup=False, soft_wrap=True
        )

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(f"{self._stamp()} {text}", highlight=False, markup=False, soft_wrap=True)


class Live(Lines):
    """A bar for the phase, the best so far and the time left; for a terminal."""

    def __init__(self, console: Console, seconds: float | None = None) -> None:
        super().__init__(console, seconds)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[text]}", style="dim"),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=1, text="")
        self._best = "none yet"
        self._live = RichLive(console=console, refresh_per_second=5, get_renderable=self._draw)

    def _draw(self) -> Table:
        table = Table.grid()
        table.add_row(self._bars)
        spent = time.time() - self.started
        clock = f"{spent:.0f}s spent"
        if self.seconds is not None:
            clock += f", {max(self.seconds - spent, 0):.0f}s left of {self.seconds:.0f}s"
        table.add_row(f"best so far: {self._best}   ({clock})")
        return table

    def phase(self, name: str, total: int) -> None:
        """Starts the bar of a phase."""
        self._bars.update(self._task, description=name, total=max(total, 1), completed=0, text="")

    def step(self, done: int, total: int, text: str = "") -> None:
        """Moves the bar."""
        self._bars.update(self._task, completed=done, total=max(total, 1), text=text)

    def best(self, text: str) -> None:
        """Changes the line of the best so far."""
        self._best = text

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)


def display(seconds: float | None, quiet: bool = False) -> Display:
    """The right display for where standard error goes: a terminal, a pipe, or nowhere."""
    console = Console(stderr=True)
    if quiet:
        return Silent()
    return Live(console, seconds) if console.is_terminal else Lines(console, seconds)
