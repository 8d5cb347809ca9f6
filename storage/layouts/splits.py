"""Who trains, who validates, who is tested: every subject gets one answer and the reason for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from storage.layouts.options import LayoutOptions
from storage.subjects import Subject


def assign(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """The same subjects, in order, each with a split and a reason; a pure function of names, vendors and options.

    - A subject with a split keeps it; one without trains.
    - A validation subject whose vendor has no labelled training subject is excluded: choosing a checkpoint by it would
      let an unseen vendor in (Liu et al. 2020 test on such vendors).
    - Where a vendor has labelled training subjects and no labelled validation subject anywhere in the data, some of its
      labelled training subjects are held out; unlabelled subjects never are.
    """
    out = [s if s.split else replace(s, split="train", split_reason="no split given") for s in subjects]
    trained = {s.vendor for s in out if s.split == "train" and s.labelled}
    out = [_without_unseen(s, trained) for s in out]
    validated = {s.vendor for s in out if s.split == "validation" and s.labelled}
    held_out: set[str] = set()
    for vendor in sorted(trained - validated):
        held_out |= _hold_out([s.subject for s in out if _trains(s, vendor)], options)
    reason = f"held out of its vendor's labelled training subjects (seed {options.split_seed})"
    return [replace(s, split="validation", split_reason=reason) if s.subject in held_out else s for s in out]


def _without_unseen(subject: Subject, trained: set[str]) -> Subject:
    if subject.split != "validation" or subject.vendor in trained:
        return subject
    reason = f"{subject.split_reason}, but vendor {subject.vendor} has no labelled training subject"
    return replace(subject, split="excluded", split_reason=reason)


def _trains(subject: Subject, vendor: str) -> bool:
    return subject.split == "train" and subject.labelled and subject.vendor == vendor


def _hold_out(names: list[str], options: LayoutOptions) -> set[str]:
    """Chosen by a hash of the name, so that a subject more or less changes as few of the others as can be."""
    if len(names) < 2:  # one subject alone trains
        return set()
    count = min(max(1, round(options.validation_fraction * len(names))), len(names) - 1)
    return set(sorted(names, key=lambda n: hashlib.sha256(f"{options.split_seed}:{n}".encode()).hexdigest())[:count])
