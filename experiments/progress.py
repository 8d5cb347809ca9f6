"""What the user sees while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from actors.ingest import IngestReport

QUIET_LINES_S = 20.0  # seconds between plain lines of one stage, if there is no terminal


class ProgressBar:
    """One bar, or without a terminal a line now and then. `update(note, done, total)` moves it."""

    def __init__(self, bars: Bars | None, console: Console, name: str, total: float | None = None) -> None:
        self._bars, self._console, self._name = bars, console, name
        self._task = bars.add_task(name, total=total, note="") if bars is not None else None
        self._said = time.monotonic()
        self._last: tuple[str, int] | None = None

    def update(self, note: str, done: int, total: int) -> None:
        """Show `done` of `total`, with a short note."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, note=note)
        elif (note, done) != self._last and (time.monotonic() - self._said > QUIET_LINES_S or done == total):
            self._console.print(f"  {self._name}: {done} of {total} {note}", highlight=False, soft_wrap=True)
            self._said = time.monotonic()
        self._last = (note, done)


class ArmBars:
    """One bar for each arm."""

    def __init__(self, steps: dict[str, ProgressBar]) -> None:
        self._steps = steps

    def of(self, label: str) -> ProgressBar:
        """The arm's bar."""
        return self._steps[label]


class Progress:
    """Shows stages, arms and lines on standard error, or on the given console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Print one plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressBar]:
        """Show a stage with one bar. When it ends, print its duration."""
        began = time.perf_counter()
        with self._bars() as bars:
            yield ProgressBar(bars, self.console, name)
        self.say(f"✓ {name}  {time.perf_counter() - began:.0f} s")

    @contextmanager
    def arms(self, name: str, labels: Sequence[str], total: int | None = None) -> Iterator[ArmBars]:
        """Show a bar for each arm, of `total` epochs if that is known. When all end, print the stage's duration."""
        began = time.perf_counter()
        with self._bars() as bars:
            yield ArmBars({label: ProgressBar(bars, self.console, label, total) for label in labels})
        self.say(f"✓ {name}  {time.perf_counter() - began:.0f} s")

    def ingested(self, report: IngestReport) -> None:
        """Print what came in by vendor, what was left out of it, and what was skipped and why."""
        for vendor, counts in report.by_vendor.items():
            self.say(
                f"  {vendor}: {counts.subjects} subjects, {counts.slices} slices, {counts.labelled} of them labelled"
            )
        for line in (*report.left_out, *report.undrawn):
            self.say(f"  {line}")
        for skipped in report.skipped:
            self.say(f"  skipped {skipped.subject}: {skipped.reason}; {skipped.remedy}")

    @contextmanager
    def _bars(self) -> Iterator[Any]:
        if not self.console.is_terminal:
            yield None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            yield bars
