"""What all verbs for a run share: options, the run's settings, its lock and its driver.

Imports stay inside the functions, so that `--help` answers at once.
"""

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
from storage.places import in_a_jobs_folder

if TYPE_CHECKING:
    from experiments.config import Settings
    from experiments.run.driver import Ablation


STDERR = 2  # file descriptor of standard error


def absolute(place: str | None) -> str | None:
    """Make a path absolute: Ray's workers have working directories of their own, so no relative path may reach them.

    Raises InputError for a relative path inside a Ray job, because Ray removes the job's working directory afterwards.
    """
    if place and "://" not in place and not Path(place).is_absolute() and in_a_jobs_folder():
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
    """The configuration of the run, or of the preset if the run has none, with the overrides of `--set`."""
    from experiments import config

    known = fs.exists(fs.join(run, config.CONFIG_FILE))
    return config.override(config.load(run) if known else config.preset(preset), assignments or [])


@contextmanager
def driving(run: str, settings: Settings) -> Iterator[Ablation]:
    """Lock the run, save `settings` as its configuration, and yield its driver.

    An interrupt ends the body like an exception: the driver closes its MLflow runs and releases the lock. If the run's
    lease is lost, the body ends in the same way, and LeaseLostError is raised.
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
    """Let SIGINT (Ctrl-C) and SIGTERM (`ray job stop`, preempted machines) end the body like an exception.

    Then one line is printed. The exit status is as in a shell: 128 plus the signal's number.
    """
    with _stderr_apart() as silence:
        stop = _Stop(silence)
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _stopped(stop, say, line):
                yield stop
        finally:
            if stop.number is None:  # after an interrupt, the next ones are ignored while the process ends
                for number, handler in before.items():
                    signal.signal(number, handler)


@contextmanager
def _stopped(stop: _Stop, say: Callable[[str], None], line: str) -> Iterator[None]:
    """If `stop` ended the body, raise its reason, or print `line` and exit with the signal's status."""
    try:
        yield
    except SystemExit as error:
        if stop.reason is not None:
            stop.heard()
            raise stop.reason from None
        if error.code == signal.SIGTERM:  # while Ray starts, Ray's own handler is installed
            stop.number = signal.SIGTERM
        if stop.number is None:
            raise
        stop.over = True  # only Ray's own end is left, and another interrupt would tear it
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of Ray's, if it was still starting
            signal.signal(number, stop)
        stop.heard()
        say(line)
        raise SystemExit(128 + stop.number) from None  # while Ray waits, it turns any exit status into 1


@contextmanager
def _stderr_apart() -> Iterator[Callable[[], None]]:
    """Give Python's standard error a descriptor of its own. Yields a function that silences descriptor 2 for good.

    Native code writes to descriptor 2: after an interrupt, Ray's threads would report each of their processes that the
    interrupt has ended too.
    """
    usual, silenced = sys.stderr, False
    try:
        is_usual = usual.fileno() == STDERR
    except OSError:  # it is not a file, for example while a test captures it
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
    """A signal handler that ends the process by an exception.

    It sends the signal again every second until `heard` is called: Python swallows an exception that is raised in a
    destructor or in a callback of its garbage collector.
    """

    def __init__(self, silence: Callable[[], None]) -> None:
        self.number: int | None = None
        self._silence = silence
        self.reason: StageError | None = None
        self.over = False  # the process ends already
        self._again: threading.Timer | None = None

    def __call__(self, number: int, _frame: object) -> None:
        if self.over:
            return
        self.heard()
        self._silence()
        self.number = number
        self._again = threading.Timer(1.0, os.kill, (os.getpid(), number))
        self._again.daemon = True
        self._again.start()
        sys.exit(128 + number)

    def end(self, reason: StageError) -> None:
        """End the body as a signal does, then raise `reason`. Called from another thread."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def heard(self) -> None:
        """Do not send the signal again: the exception has arrived."""
        if self._again is not None:
            self._again.cancel()


def require_place_for(run: str) -> None:
    """`require_place`. An interrupt while it waits for a lease ends with one line."""
    from experiments.progress import Progress
    from experiments.run.refusals import require_place

    progress = Progress()
    with interruptible(progress.say):
        require_place(run, progress.say)


def stage(run: str, assignments: list[str] | None = None) -> AbstractContextManager[Ablation]:
    """`driving` for a run that has slices. Raises InputError if it has none, or they were split by other options."""
    from experiments.run.driver import require_data

    settings = settings_of(run, "cpu", assignments)
    require_data(run, settings)  # before the settings are saved in the run
    return driving(run, settings)
