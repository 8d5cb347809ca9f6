"""Ingest: read any mix of data sets into one run's slice store, with one Ray task per subject."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from actors.crew import Crew, that_fit
from actors.pool import Pool
from actors.progress import Progress
from actors.waiting import PATIENCE, Patience
from storage import fs
from storage.errors import InputError
from storage.layouts import LayoutOptions, collect, same_images, splits
from storage.layouts.structures import declaring, never_drawn
from storage.slices.writer import StoredSubject, finalise, mask_contents, write_subject
from storage.subjects import ALL_STRUCTURES, Skipped, Subject, left_out_lines

TASK_CPUS = 1.0
QUEUED = 2  # tasks that wait besides those that can run, so that no process waits for the driver


@dataclass(frozen=True)
class VendorCount:
    """How much of one vendor came in. `labelled` is the number of slices in labelled frames."""

    subjects: int
    slices: int
    labelled: int


@dataclass(frozen=True)
class IngestReport:
    """What came in and what did not.

    left_out: lines about images that were left out of subjects that came in. undrawn: lines about structures that
    nobody seems to have drawn, with the option that declares this.
    """

    subjects: int
    slices: int
    by_vendor: dict[str, VendorCount]
    skipped: list[Skipped] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    undrawn: tuple[str, ...] = ()


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
    """Read data folders of any layouts into the slice store of `run`. Ray must be initialised.

    A subject that cannot enter is skipped, with a reason in `skipped.csv`; with `strict` it raises InputError. After a
    kill, finished subjects are kept and not read again. The store's bytes do not depend on the number of workers or the
    order of the files. `progress` is called with (label, subjects done, subjects in all).
    Raises InputError if a folder cannot be used at all, if these subjects do not allow the protocol, or if no subject
    came in; StageError if a subject's task fails or kills its processes, or no node has room for one.
    """
    chosen, run = options or LayoutOptions(), fs.absolute(run)
    subjects, skipped = collect(data, chosen, layout)
    if strict and skipped:
        raise skipped[0].as_error()
    stored: dict[str, StoredSubject] = {}
    before = 0

    with _readers(run, num_cpus, patience) as pool:

        def read(wanted: Sequence[Subject]) -> list[Skipped]:
            nonlocal before
            left_out = _convert_subjects(pool, wanted, stored, strict, progress, before)
            before += len(wanted)
            return left_out

        entered = splits.assign_splits_and_read(subjects, chosen, read, skipped)
    if not stored:
        raise skipped[0].as_error(" (no subject came in)")
    finalise(run, stored, skipped, entered, chosen)
    slices = sum(found.slices for found in stored.values())
    undrawn = tuple(_undrawn_lines(entered, stored))
    return IngestReport(len(stored), slices, _by_vendor(entered, stored), skipped, left_out_lines(entered), undrawn)


def _read(run: str, subject: Subject) -> StoredSubject | Skipped:
    """Runs in a worker. Bad input is returned, not raised, so that it ends no other subject."""
    try:
        return write_subject(run, subject)
    except InputError as error:
        return Skipped(subject.subject, error.where, error.problem, error.remedy)


def _readers(run: str, num_cpus: float, patience: Patience) -> Pool[Subject]:
    """A pool that reads subjects. It uses tasks: most data sets are read in the time that an actor takes to start.

    Raises InputError if the cluster cannot hold one task.
    """
    what = "a subject"
    crew = Crew[Subject](
        stage="ingest",
        what=what,
        make=_read,
        arguments=(run,),
        method=None,
        size=that_fit(None, num_cpus, 0.0, what) + QUEUED,
        cpus=num_cpus,
        named=lambda subject: f"ingest of {subject.subject}",
    )
    return Pool(crew, patience)


def _convert_subjects(
    pool: Pool[Subject],
    wanted: Sequence[Subject],
    stored: dict[str, StoredSubject],
    strict: bool,
    progress: Progress | None,
    before: int,
) -> list[Skipped]:
    """Convert subjects and put them into `stored`. Returns the subjects that cannot enter; they are not in `stored`.

    `before` subjects were converted in earlier passes; progress counts on from there. With `strict`, raises InputError
    for a subject that cannot enter.
    """
    skipped = []
    for done, (subject, outcome) in enumerate(pool.run(wanted), start=1):
        if isinstance(outcome, Skipped):
            if strict:
                raise outcome.as_error()
            skipped.append(outcome)
            stored.pop(subject.subject, None)
        else:
            stored[subject.subject] = outcome
        if progress is not None:
            progress("ingest", before + done, before + len(wanted))
    repeated = same_images({name: found.digests for name, found in stored.items()})
    if strict and repeated:
        raise repeated[0].as_error()
    for copy in repeated:
        del stored[copy.subject]
    return skipped + repeated


def _undrawn_lines(subjects: Sequence[Subject], stored: Mapping[str, StoredSubject]) -> Iterator[str]:
    """Lines about structures that all masks of a vendor and centre lack, and about those that no training mask has."""
    contents = {s.subject: mask_contents(s, stored[s.subject]) for s in subjects}
    for found in never_drawn([mask for masks in contents.values() for mask in masks]):
        yield (
            f"{found.vendor}, {found.centre}: {found.finding} of {len(found.subjects)} subjects; it is taught as "
            "background there and scored as missed. If nobody drew it, say what is drawn, with "
            f"{declaring(found, contents)}, or in a column structures of a table"
        )
    taught = {name for s in subjects if s.split == "train" for mask in contents[s.subject] for name in mask.structures}
    for name in ALL_STRUCTURES if taught else ():
        if name not in taught:
            yield f"{name} is drawn in no training mask: the networks take it for background"


def _by_vendor(subjects: Sequence[Subject], stored: Mapping[str, StoredSubject]) -> dict[str, VendorCount]:
    counts = {}
    for vendor in sorted({s.vendor for s in subjects}):
        own = [stored[s.subject] for s in subjects if s.vendor == vendor]
        counts[vendor] = VendorCount(len(own), sum(s.slices for s in own), sum(s.labelled for s in own))
    return counts
