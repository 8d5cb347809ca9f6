"""What the command line's verbs for a run share: options, the run's settings, its lock and driver. Imports stay inside,
so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storage import fs
from storage.errors import InputError, StageError

if TYPE_CHECKING:
    from experiments.config import Settings
    from experiments.run.driver import Ablation


STDERR = 2  # the descriptor


def absolute(place: str | None) -> str | None:
    """Ray's workers have working directories of their own, so no relative path may reach them. A job has one too, which
    Ray removes afterwards."""
    if place and "://" not in place and not Path(place).is_absolute() and "runtime_resources" in Path.cwd().parts:
        raise InputError(place, "is relative to a job's own folder, which Ray removes", "give a full path or a URI")
    return None if place is None else fs.absolute(place)


Run = Annotated[str, typer.Option("--run", callback=absolute, help="Run folder: a local path or an fsspec URI.")]
Preset = Annotated[
    str, typer.Option("--preset", help="Preset for a run that has no config.yaml yet: demo, cpu, robust or paper.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a field, such as train.epochs=10; repeatable.")]
Data = Annotated[list[str] | None, typer.Argument(help="Folders of studies: M&Ms, ACDC, DICOM or a table of files.")]
Layout = Annotated[
    str | None, typer.Option("--layout", help="auto, mnms, acdc, table or dicom; as in the configuration if not given.")
]


def settings_of(run: str, preset: str, assignments: list[str] | None) -> Settings:
    """The run's own configuration if it has one, else the preset's, with overrides."""
    from experiments import config

    known = fs.exists(fs.join(run, config.CONFIG_FILE))
    return config.override(config.load(run) if known else config.preset(preset), assignments or [])


@contextmanager
def driving(run: str, settings: Settings) -> Iterator[Ablation]:
    """The run, locked, with a driver; the settings become the run's.

    An interrupt ends the body as an exception does: MLflow's runs are closed and the lock is given up. So does the loss
    of the run's lease, which raises LeaseLostError.
    """
    from experiments import config
    from experiments.progress import Progress
    from experiments.run.driver import Ablation
    from storage.lock import run_lock

    progress = Progress()
    with (
        interruptible(progress.say) as stop,
        run_lock(run, progress.say, stop.end),
        Ablation(run, settings, progress) as driver,
    ):
        try:
            config.save(settings, run)
            yield driver
        finally:
            stop.heard()


@contextmanager
def interruptible(
    say: Callable[[str], None], line: str = "stopped; the same command goes on from here"
) -> Iterator[_Stop]:
    """Ctrl-C, and SIGTERM, with which `ray job stop` and preempted machines end a process, end the body as an exception
    does and print one line. The exit status is a shell's: 128 and the signal's number."""
    with _stderr_apart() as silence:
        stop = _Stop(silence)
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _stopped(stop, say, line):
                yield stop
        finally:
            if stop.number is None:  # a second interrupt finds the handler still there
                for number, handler in before.items():
                    signal.signal(number, handler)


@contextmanager
def _stopped(stop: _Stop, say: Callable[[str], None], line: str) -> Iterator[None]:
    """What ends the body by `stop` becomes its line and status, or its reason."""
    try:
        yield
    except SystemExit as error:
        if stop.reason is not None:
            stop.heard()
            raise stop.reason from None
        if error.code == signal.SIGTERM:  # while Ray starts, the handler is its own
            stop.number = signal.SIGTERM
        if stop.number is None:
            raise
        stop.heard()
        say(line)
        raise SystemExit(128 + stop.number) from None  # while Ray waits, it makes a 1 of any status


@contextmanager
def _stderr_apart() -> Iterator[Callable[[], None]]:
    """Give Python's standard error a descriptor of its own; what is yielded silences the usual one until the process
    ends. Native code writes there: Ray's threads would tell of each of their processes that an interrupt ends too."""
    usual, silenced = sys.stderr, False
    try:
        is_usual = usual.fileno() == STDERR
    except OSError:  # no file at all, as under a test's capture
        is_usual = False
    if not is_usual:
        yield lambda: None
        return

    def silence() -> None:
        nonlocal silenced
        if not silenced:
            silenced = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDERR)
            os.close(nowhere)

    sys.stderr = os.fdopen(os.dup(STDERR), "w", buffering=1, encoding=usual.encoding, errors=usual.errors)
    try:
        yield silence
    finally:
        if not silenced:
            sys.stderr.close()
            sys.stderr = usual


class _Stop:
    """Ends the process by an exception; once more every second until that was `heard`, since Python swallows what is
    raised in a destructor or in a callback of its garbage collector."""

    def __init__(self, silence: Callable[[], None]) -> None:
        self.number: int | None = None
        self._silence = silence
        self.reason: StageError | None = None
        self._again: threading.Timer | None = None

    def __call__(self, number: int, _frame: object) -> None:
        self.heard()
        self._silence()
        self.number = number
        self._again = threading.Timer(1.0, os.kill, (os.getpid(), number))
        self._again.daemon = True
        self._again.start()
        sys.exit(128 + number)

    def end(self, reason: StageError) -> None:
        """From another thread: end the body as a signal does, and raise `reason` after it."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def heard(self) -> None:
        """What follows is not to be disturbed."""
        if self._again is not None:
            self._again.cancel()


def stage(run: str, assignments: list[str] | None = None) -> AbstractContextManager[Ablation]:
    """`driving` for a run that has slices, split as its settings say."""
    from experiments.run.driver import require_data

    settings = settings_of(run, "cpu", assignments)
    require_data(run, settings)  # before the settings become the run's
    return driving(run, settings)
