"""Who trains, who validates, who is tested: every subject gets one answer and the reason for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from storage.errors import InputError
from storage.layouts import protocols
from storage.layouts.options import LayoutOptions
from storage.subjects import FrameSource, Skipped, Subject


def assign(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """The same subjects, in order, each with a split and a reason; a pure function of what they are and the options.

    - A subject with a split keeps it, unless the protocol moves it; one without trains.
    - A validation subject whose vendor has no labelled training subject is excluded: choosing a checkpoint by it would
      let an unseen vendor in (Liu et al. 2020 test on such vendors).
    - Where a vendor has labelled training subjects and no labelled validation subject anywhere in the data, some of its
      labelled training subjects are held out; unlabelled subjects never are.
    - Training subjects whose labels `label_fraction` withholds come back without masks.
    - Test subjects of the half that is not asked for are excluded.

    Raises InputError where the protocol cannot be had with these subjects.
    """
    out = [s if s.split else replace(s, split="train", split_reason="no split given") for s in subjects]
    out = protocols.apply(out, options)
    trained = {s.vendor for s in out if s.split == "train" and s.labelled}
    out = [_without_unseen(s, trained) for s in out]
    validated = {s.vendor for s in out if s.split == "validation" and s.labelled}
    held_out: set[str] = set()
    for vendor in sorted(trained - validated):
        held_out |= _hold_out([s.subject for s in out if _trains(s, vendor)], options)
    reason = f"held out of its vendor's labelled training subjects (seed {options.split_seed})"
    out = [replace(s, split="validation", split_reason=reason) if s.subject in held_out else s for s in out]
    return protocols.halved(protocols.withhold_labels(out, options), options)


def assign_splits_and_read(
    subjects: Sequence[Subject],
    options: LayoutOptions,
    read: Callable[[Sequence[Subject]], Sequence[Skipped]],
    skipped: list[Skipped],
) -> list[Subject]:
    """Those of the subjects that can be read, as `assign` has them, in order.

    `read` is given subjects as they are to be read, with or without masks, and answers with those that cannot enter,
    new or not; they are added to `skipped`. Each of these may change who keeps labels, so that another subject is given
    again. Raises InputError as `assign` does, with the reason of one that was skipped.
    """
    left = list(subjects)
    given: dict[str, tuple[FrameSource, ...]] = {}
    while left:
        try:
            assigned = assign(left, options)
        except InputError as error:
            raise _with_reason(error, subjects, options, skipped) from error
        changed = [s for s in assigned if given.get(s.subject) != s.frames]
        if not changed:
            return assigned
        given |= {s.subject: s.frames for s in changed}
        unread = read(changed)
        skipped += unread
        gone = {s.subject for s in unread}
        left = [s for s in left if s.subject not in gone]
    return []


def _with_reason(
    error: InputError, subjects: Sequence[Subject], options: LayoutOptions, skipped: Sequence[Skipped]
) -> InputError:
    """The same error, and why a subject was skipped, one of the protocol's vendor if there is one."""
    if not skipped:
        return error
    own = {s.subject for s in subjects if s.vendor == options.protocol_vendor}
    first = next((s for s in skipped if s.subject in own), skipped[0])
    why = f"{len(skipped)} skipped, such as {first.subject}, {first.file}: {first.reason}"
    return InputError(error.where, f"{error.problem} ({why})", error.remedy)


def _without_unseen(subject: Subject, trained: set[str]) -> Subject:
    if subject.split != "validation" or subject.vendor in trained:
        return subject
    reason = f"{subject.split_reason}, but vendor {subject.vendor} has no labelled training subject"
    return replace(subject, split="excluded", split_reason=reason)


def _trains(subject: Subject, vendor: str) -> bool:
    return subject.split == "train" and subject.labelled and subject.vendor == vendor


def _hold_out(names: list[str], options: LayoutOptions) -> set[str]:
    """Who validates of a vendor's labelled training subjects; one alone trains."""
    return protocols.drawn(names, protocols.part(options.validation_fraction, len(names)), str(options.split_seed))
