"""Ingest: any mix of data sets into one run's slice store, one Ray task a subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from storage import uri
from storage.errors import InputError
from storage.layouts import LayoutOptions, read, splits
from storage.slice_store import finalise, frame_digests, write_subject
from storage.subjects import Skipped, Subject

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]

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
    """What came in and what did not."""

    subjects: int
    slices: int
    by_vendor: dict[str, VendorCount]
    skipped: list[Skipped] = field(default_factory=list)


def ingest(
    data: Sequence[str],
    run: str,
    options: LayoutOptions | None = None,
    layout: str = "auto",
    progress: Progress | None = None,
    strict: bool = False,
    num_cpus: float = TASK_CPUS,
) -> IngestReport:
    """Read data folders of any layouts into `run`'s slice store. Ray must be initialised.

    Subjects that cannot enter are skipped with a reason (`skipped.csv`), or fail the whole with `strict`. Finished
    subjects are kept over a kill and not read again; the store's bytes do not depend on the number of workers or the
    order of `data`'s files. `progress` is called with (label, done, total). Raises InputError for a folder that cannot
    be used at all, or if no subject came in.
    """
    chosen, run = options or LayoutOptions(), uri.absolute(run)
    subjects, skipped = collect(data, chosen, layout)
    if strict and skipped:
        raise _strictly(skipped[0])
    rows: dict[str, list[Row]] = {}
    for done, (name, outcome) in enumerate(_converted(run, subjects, num_cpus), start=1):
        if isinstance(outcome, Skipped):
            if strict:
                raise _strictly(outcome)
            skipped.append(outcome)
        else:
            rows[name] = outcome
        if progress is not None:
            progress("ingest", done, len(subjects))
    repeated = same_images({name: frame_digests(run, name) for name in rows})
    if strict and repeated:
        raise _strictly(repeated[0])
    skipped += repeated
    for copy in repeated:
        del rows[copy.subject]
    if not rows:
        first = skipped[0]
        raise InputError(f"{first.subject}, {first.file}", f"{first.reason} (no subject came in)", first.remedy)
    entered = splits.assign([s for s in subjects if s.subject in rows], chosen)
    finalise(run, rows, skipped, entered)
    return IngestReport(len(rows), sum(map(len, rows.values())), _by_vendor(entered, rows), skipped)


def collect(data: Sequence[str], options: LayoutOptions, layout: str = "auto") -> tuple[list[Subject], list[Skipped]]:
    """Subjects of all folders, sorted by name, splits not yet assigned; of two with one name, the first stays.

    Raises InputError for a folder that cannot be used at all.
    """
    subjects: dict[str, Subject] = {}
    skipped: list[Skipped] = []
    origin: dict[str, str] = {}
    for folder in data:
        found, left_out = read(folder, layout, options)
        skipped += left_out
        for subject in found:
            if subject.subject in subjects:
                name = uri.base_name(uri.absolute(folder))
                reason = f"a subject of that name came in from {origin[subject.subject]}"
                skipped.append(Skipped(subject.subject, name, reason, "rename one, or give each folder once"))
                continue
            subjects[subject.subject] = subject
            origin[subject.subject] = uri.base_name(uri.absolute(folder))
    return sorted(subjects.values(), key=lambda s: s.subject), skipped


def same_images(digests: Mapping[str, Sequence[str]]) -> list[Skipped]:
    """Subjects that share an image with one earlier in the alphabet: kept, they could be trained on and tested on."""
    first: dict[str, str] = {}
    repeated = []
    for name in sorted(digests):
        owner = next((first[d] for d in digests[name] if d in first), None)
        if owner is not None:
            reason = f"has an image that is also subject {owner}'s"
            repeated.append(Skipped(name, "-", reason, "remove one of the two, or correct the path"))
            continue
        first |= dict.fromkeys(digests[name], name)
    return repeated


def _converted(run: str, subjects: Sequence[Subject], num_cpus: float) -> Iterator[tuple[str, list[Row] | Skipped]]:
    """Rows or the reason of each subject, as they get done; only as many at a time as can run, and a few queued."""
    import ray
    from ray.exceptions import RayError

    cluster = float(ray.cluster_resources().get("CPU", 0.0))
    if cluster < num_cpus:
        raise InputError("resources", f"a task needs {num_cpus:g} CPUs, {cluster:g} in the cluster", "add CPUs")
    task = ray.remote(num_cpus=num_cpus, max_retries=2)(_task)
    waiting = iter(subjects)
    running: dict[Any, str] = {}

    def submit(count: int) -> None:
        for subject in islice(waiting, count):
            running[task.remote(run, subject)] = subject.subject

    submit(int(cluster / num_cpus) + QUEUED)
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayError as error:
                raise RuntimeError(f"ingest of {name} failed: {error}") from error
            submit(1)
            yield name, outcome
    finally:
        for reference in running:  # when the caller stops early
            ray.cancel(reference)


def _task(run: str, subject: Subject) -> list[Row] | Skipped:
    """Runs in a worker: bad input is an answer, not a crash, so that no traceback reaches anybody."""
    try:
        return write_subject(run, subject)
    except InputError as error:
        return Skipped(subject.subject, error.where, error.problem, error.remedy)


def _strictly(skipped: Skipped) -> InputError:
    return InputError(f"{skipped.subject}, {skipped.file}", skipped.reason, skipped.remedy)


def _by_vendor(subjects: Sequence[Subject], rows: Mapping[str, Sequence[Row]]) -> dict[str, VendorCount]:
    counts = {}
    for vendor in sorted({s.vendor for s in subjects}):
        own = [s.subject for s in subjects if s.vendor == vendor]
        slices = [row for name in own for row in rows[name]]
        counts[vendor] = VendorCount(len(own), len(slices), sum(bool(row["labelled"]) for row in slices))
    return counts
