"""Ingest: any mix of data sets into one run's slice store, one Ray task a subject."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from actors.progress import Progress
from actors.waiting import PATIENCE, Patience, Wait
from storage import fs
from storage.errors import InputError, StageError, one_line
from storage.layouts import LayoutOptions, collect, same_images, splits
from storage.slices.writer import StoredSubject, finalise, write_subject
from storage.subjects import Skipped, Subject, left_out_lines

log = logging.getLogger(__name__)


TASK_CPUS = 1.0
QUEUED = 2  # tasks beyond those that can run, so that no worker waits for the driver


@dataclass(frozen=True)
class VendorCount:
    """What came in of one vendor; `labelled` counts slices of labelled frames."""

    subjects: int
    slices: int
    labelled: int


@dataclass(frozen=True)
class IngestReport:
    """What came in and what did not; `left_out` says in lines which images of subjects that came in were not taken."""

    subjects: int
    slices: int
    by_vendor: dict[str, VendorCount]
    skipped: list[Skipped] = field(default_factory=list)
    left_out: tuple[str, ...] = ()


def ingest(
    data: Sequence[str],
    run: str,
    options: LayoutOptions | None = None,
    layout: str = "auto",
    progress: Progress | None = None,
    strict: bool = False,
    num_cpus: float = TASK_CPUS,
    patience: Patience = PATIENCE,
) -> IngestReport:
    """Read data folders of any layouts into `run`'s slice store. Ray must be initialised.

    Subjects that cannot enter are skipped with a reason (`skipped.csv`), or fail the whole with `strict`. Finished
    subjects are kept over a kill and not read again; the store's bytes do not depend on the number of workers or the
    order of `data`'s files. `progress` is called with (label, done, total). Raises InputError for a folder that cannot
    be used at all, a protocol that cannot be had with these subjects, or if no subject came in; StageError if a
    subject's task fails, or no node has room for one.
    """
    chosen, run = options or LayoutOptions(), fs.absolute(run)
    subjects, skipped = collect(data, chosen, layout)
    if strict and skipped:
        raise _strictly(skipped[0])
    stored: dict[str, StoredSubject] = {}
    before = 0

    def read(wanted: Sequence[Subject]) -> list[Skipped]:
        nonlocal before
        left_out = _convert_subjects(run, wanted, stored, num_cpus, strict, progress, before, patience)
        before += len(wanted)
        return left_out

    entered = splits.assign_splits_and_read(subjects, chosen, read, skipped)
    if not stored:
        first = skipped[0]
        raise InputError(_place_of(first), f"{first.reason} (no subject came in)", first.remedy)
    finalise(run, stored, skipped, entered, chosen)
    slices = sum(found.slices for found in stored.values())
    return IngestReport(len(stored), slices, _by_vendor(entered, stored), skipped, left_out_lines(entered))


def _convert_subjects(
    run: str,
    wanted: Sequence[Subject],
    stored: dict[str, StoredSubject],
    num_cpus: float,
    strict: bool,
    progress: Progress | None,
    before: int,
    patience: Patience,
) -> list[Skipped]:
    """Convert subjects and put them into `stored`; those that cannot enter are returned, and are not in it.

    `before` were converted in earlier passes: progress counts on from there.
    """
    skipped = []
    for done, (name, outcome) in enumerate(_converted(run, wanted, num_cpus, patience), start=1):
        if isinstance(outcome, Skipped):
            if strict:
                raise _strictly(outcome)
            skipped.append(outcome)
            stored.pop(name, None)
        else:
            stored[name] = outcome
        if progress is not None:
            progress("ingest", before + done, before + len(wanted))
    repeated = same_images({name: found.digests for name, found in stored.items()})
    if strict and repeated:
        raise _strictly(repeated[0])
    for copy in repeated:
        del stored[copy.subject]
    return skipped + repeated


def _converted(
    run: str, subjects: Sequence[Subject], num_cpus: float, patience: Patience
) -> Iterator[tuple[str, StoredSubject | Skipped]]:
    """What is stored of each subject, or why nothing is, as they get done; only a few at a time."""
    import ray
    from ray.exceptions import RayError

    cluster = float(ray.cluster_resources().get("CPU", 0.0))
    if cluster < num_cpus:
        raise InputError("resources", f"a task needs {num_cpus:g} CPUs, {cluster:g} in the cluster", "add CPUs")
    task = ray.remote(num_cpus=num_cpus, max_retries=2)(_task)
    waiting = iter(subjects)
    running: dict[Any, str] = {}
    wait = Wait(patience, "ingest", "a subject", {"CPU": num_cpus})

    def submit(count: int) -> None:
        for subject in islice(waiting, count):
            running[task.remote(run, subject)] = subject.subject

    submit(int(cluster / num_cpus) + QUEUED)
    try:
        while running:
            ready = wait.first(dict.fromkeys(running))
            name = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayError as error:
                log.debug("ingest of %s", name, exc_info=True)  # names files with their folders
                raise StageError(
                    f"ingest of {name}: {_cause(error)}; the same command goes on where it stopped"
                ) from None
            submit(1)
            yield name, outcome
    finally:
        for reference in running:  # when the caller stops early
            ray.cancel(reference)


def _task(run: str, subject: Subject) -> StoredSubject | Skipped:
    """Runs in a worker: bad input is an answer, not a crash, so that no traceback reaches anybody."""
    try:
        return write_subject(run, subject)
    except InputError as error:
        return Skipped(subject.subject, error.where, error.problem, error.remedy)


def _cause(error: BaseException) -> str:
    """A line without folders, which other errors' texts may have."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    if isinstance(error, OutOfMemoryError):
        return "its worker ran out of memory"
    if not isinstance(error, RayTaskError):
        return "its worker died"
    return one_line(error, trusted=False)


def _strictly(skipped: Skipped) -> InputError:
    return InputError(_place_of(skipped), skipped.reason, skipped.remedy)


def _place_of(skipped: Skipped) -> str:
    return ", ".join(name for name in (skipped.subject, skipped.file) if name != "-")


def _by_vendor(subjects: Sequence[Subject], stored: Mapping[str, StoredSubject]) -> dict[str, VendorCount]:
    counts = {}
    for vendor in sorted({s.vendor for s in subjects}):
        own = [stored[s.subject] for s in subjects if s.vendor == vendor]
        counts[vendor] = VendorCount(len(own), sum(s.slices for s in own), sum(s.labelled for s in own))
    return counts
