"""Gives every subject its split (train, validation, test or excluded) and the reason for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from storage.errors import InputError
from storage.layouts import protocols
from storage.layouts.options import LayoutOptions
from storage.subjects import FrameSource, Skipped, Subject


def assign(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """Give each subject a split and a reason. Returns the subjects in the same order.

    - A subject that has a split keeps it, unless the protocol moves it. A subject without a split trains.
    - A validation subject is excluded if its vendor has no labelled training subject. To choose a checkpoint by such a
      subject would use an unseen vendor (Liu et al. 2020 test on such vendors).
    - If a vendor has labelled training subjects and no labelled validation subject anywhere in the data, some of its
      labelled training subjects are held out for validation. Unlabelled subjects are never held out.
    - Training subjects whose labels the options withhold come back without masks.
    - If `test_half` names one half of the test subjects, the other half is excluded.

    The result depends on the subjects and the options alone. Raises InputError if the protocol is impossible with these
    subjects.
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
    """Assign splits, read the subjects, and do so again without those that cannot be read, until all can.

    Returns the remaining subjects, as `assign` returns them. `read` is called with the subjects to read, with or
    without masks. It returns the subjects that cannot be used, which may be subjects of an earlier call; they are added
    to `skipped`. A subject that is skipped may change which others keep their labels. A subject whose masks change is
    read again. Raises InputError as `assign` does; the error then gives the reason of a subject that was skipped.
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
    """The error with the reason why a subject was skipped, if possible one of the protocol's vendor."""
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
    """Choose which of a vendor's labelled training subjects validate. A single subject trains."""
    return protocols.drawn(names, protocols.part(options.validation_fraction, len(names)), str(options.split_seed))
