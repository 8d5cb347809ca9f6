"""Protocols: which vendors train, which are tested, and how many subjects keep their labels.

- `paper`: the splits of the data set. For M&Ms they are those of Liu et al. 2020: A and B train, C is unlabelled, A to
  D are tested.
- `leave_one_vendor_out`: one vendor is only tested, all others train.
- `source_only`: one vendor trains, the others are only tested.
- `label_fraction` below 1, with any protocol: this share of each vendor's labelled training subjects keeps its masks.
  `labelled_subjects`: this number of them does.
- `adapt_fraction`, with `source_only`: this share of each other vendor trains without masks and is never tested.
- `test_half`, with any protocol: one half of each vendor's test subjects is tested, the other half is left out.

These are pure functions of names, vendors, masks and options. To choose some of several subjects, they order the names
by a hash. So neither the order of the subjects nor the machine matters, and one subject more changes few other choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from storage.errors import InputError
from storage.layouts.mnms import VENDOR_CODES
from storage.layouts.options import LayoutOptions
from storage.subjects import Subject


def apply(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """Move subjects between splits as the protocol says. Each must have a split. Returns them in the same order.

    A subject that the data exclude stays excluded. Raises InputError if no subject is of the protocol's vendor, if
    nothing would be left to train on with labels or to test on, or if one vendor has two names.
    """
    if options.protocol == "paper":
        return list(subjects)
    vendors = {s.vendor for s in subjects}
    _refuse_two_names(vendors, options)
    vendor = str(options.protocol_vendor)
    out, problem = _outcome(vendor, subjects, options)
    if problem:
        others = sorted(v for v in vendors if not _outcome(v, subjects, options)[1])
        remedy = f"choose one of {', '.join(others)}" if others else "add labelled subjects"
        raise InputError(f"layouts.protocol_vendor={vendor}", problem, remedy)
    return out


def excludes_from_training(options: LayoutOptions, vendor: str) -> bool:
    """Whether the protocol forbids to train on images of this vendor.

    Capitals and spaces in the vendor's name do not matter, and its code in M&Ms counts as its name.
    """
    same = _maker(vendor) == _maker(str(options.protocol_vendor))
    from_one = not same and not options.adapt_fraction
    return {"paper": False, "leave_one_vendor_out": same, "source_only": from_one}[options.protocol]


def withhold_labels(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """Remove the masks of training subjects whose labels the options withhold. Returns all subjects in the same order.

    Of a vendor's n labelled training subjects, round(label_fraction · n) keep their masks, but at least one. If
    `labelled_subjects` is set, that many keep them. The subjects that keep their masks under a small fraction also keep
    them under a larger one. Frames stay as they are. Splits must be final.
    """
    if options.label_fraction == 1 and options.labelled_subjects is None:
        return list(subjects)
    kept: set[str] = set()
    for vendor in {s.vendor for s in subjects}:
        names = [s.subject for s in subjects if s.vendor == vendor and _trains(s)]
        count = options.labelled_subjects or max(1, round(options.label_fraction * len(names)))
        kept |= drawn(names, count, f"labels:{options.split_seed}")
    rule = f"label_fraction {options.label_fraction:g}"
    rule = f"labelled_subjects {options.labelled_subjects}" if options.labelled_subjects else rule
    why = f"its masks are not read, by {rule} (seed {options.split_seed})"
    return [_without_masks(s, why) if _trains(s) and s.subject not in kept else s for s in subjects]


def halved(subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """Exclude those test subjects of each vendor that are not in the half `test_half`. Returns all in the same order.

    A vendor's labelled test subjects are ordered by a hash of their names. The first half is to choose by, the second
    to confirm on. If their number is odd, the middle one is in the second half. Splits must be final.
    """
    if options.test_half == "all":
        return list(subjects)
    chosen: set[str] = set()
    for vendor in {s.vendor for s in subjects}:
        names = [s.subject for s in subjects if s.vendor == vendor and _tested(s)]
        chosen |= drawn(names, len(names) // 2, "half")
    confirms = options.test_half == "confirm"
    why = f"it is in the half that {'chooses' if confirms else 'confirms'}, and this run's {options.test_half}s"
    return [_moved(s, "excluded", why) if _tested(s) and (s.subject in chosen) == confirms else s for s in subjects]


def drawn(names: Iterable[str], count: int, key: str) -> set[str]:
    """Choose `count` of the names by their hash with `key`; all if there are fewer.

    With the same key, a smaller choice is always a part of a larger one.
    """
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{key}:{name}".encode()).hexdigest())[:count])


def part(fraction: float, count: int) -> int:
    """How many of `count` subjects a fraction takes: at least one and never all, but none of a single subject."""
    return 0 if count < 2 else min(max(1, round(fraction * count)), count - 1)


def _maker(vendor: str) -> str:
    """A key for a vendor, the same for its name in any capitals and spacing and for its code in M&Ms."""
    name = " ".join(vendor.casefold().split())
    return VENDOR_CODES.get(name, name).casefold()


def _refuse_two_names(vendors: Set[str], options: LayoutOptions) -> None:
    first: dict[str, str] = {}
    for vendor in sorted(vendors):
        other = first.setdefault(_maker(vendor), vendor)
        if other != vendor:
            problem = f"'{other}' and '{vendor}' name the same vendor, and vendors are told apart by name"
            remedy = "write one name in the tables, or set layouts.acdc_vendor"
            raise InputError(f"layouts.protocol={options.protocol}", problem, remedy)


def _outcome(vendor: str, subjects: Sequence[Subject], options: LayoutOptions) -> tuple[list[Subject], str]:
    """Apply the protocol with this vendor.

    Returns the subjects and what makes the protocol impossible; this text is empty if nothing does.
    """
    if not any(s.vendor == vendor for s in subjects):
        return [], "no subject is of this vendor"
    if options.protocol == "leave_one_vendor_out":
        out = _leave_out(vendor, subjects, options)
        if not any(_tested(s) for s in out if s.vendor == vendor):
            return out, "it has no labelled subject to test on"
        return out, "" if any(map(_trains, out)) else "no other vendor has a labelled subject to train on"
    out = _from_one(vendor, subjects, options.adapt_fraction)
    if not any(map(_trains, out)):
        return out, "it has no labelled training subject"
    return out, "" if any(map(_tested, out)) else "no labelled subject is left to test on"


def _leave_out(vendor: str, subjects: Sequence[Subject], options: LayoutOptions) -> list[Subject]:
    """Every labelled subject of `vendor` is tested. Of each other vendor some are tested and the rest train."""
    aside, drafted = _dealt([s for s in subjects if s.vendor != vendor], options)
    seed = f"(seed {options.split_seed})"

    def moved(s: Subject) -> Subject:
        if s.vendor == vendor and s.labelled:
            return _moved(s, "test", f"leave_one_vendor_out only tests on vendor {vendor}")
        if s.vendor == vendor:
            return _moved(s, "excluded", f"leave_one_vendor_out trains on no image of vendor {vendor}")
        if s.subject in aside:
            return _moved(s, "test", f"leave_one_vendor_out puts it aside, to test on vendor {s.vendor} too {seed}")
        if s.subject in drafted:
            return _moved(s, "train", f"leave_one_vendor_out trains on vendor {s.vendor} {seed}")
        return s

    return [moved(s) for s in subjects]


def _dealt(subjects: Sequence[Subject], options: LayoutOptions) -> tuple[set[str], set[str]]:
    """Choose names to test on and names to train on, for vendors that would only train or only be tested.

    If a training vendor has no test subjects, a share (`protocol_test_fraction`) of its labelled subjects becomes the
    test set. If the data only validate or test on a vendor (M&Ms' C and D), all its labelled subjects are divided anew;
    a single test subject stays one.
    """
    aside: set[str] = set()
    trained: set[str] = set()
    for vendor in {s.vendor for s in subjects}:
        labelled = [s for s in subjects if s.vendor == vendor and s.labelled and s.split != "excluded"]
        training = [s for s in labelled if _trains(s)]
        tested = {s.subject for s in labelled if _tested(s)}
        if not (training and tested):
            names = {s.subject for s in training or labelled}
            if len(tested) != 1:
                tested = drawn(names, part(options.protocol_test_fraction, len(names)), f"test:{options.split_seed}")
            aside |= tested
            trained |= names - tested
    return aside, trained


def _from_one(vendor: str, subjects: Sequence[Subject], adapt: float) -> list[Subject]:
    """Only `vendor` trains; other vendors keep only their test subjects.

    If the data have no test subject of another vendor, all labelled subjects of other vendors are tested. The share
    `adapt` of each other vendor's subjects trains without masks.
    """
    others_tested = any(_tested(s) for s in subjects if s.vendor != vendor)
    adapts: set[str] = set()
    for other in {s.vendor for s in subjects if s.vendor != vendor} if adapt else set():
        names = [s.subject for s in subjects if s.vendor == other and s.split != "excluded"]
        adapts |= drawn(names, part(adapt, len(names)), "adapt")

    def moved(s: Subject) -> Subject:
        if s.subject in adapts:
            why = f"adapt_fraction {adapt:g} trains on its images, without masks"
            return _without_masks(_moved(s, "train", why) if s.split != "train" else s, why)
        if s.vendor == vendor or s.split == "test":
            return s
        if s.labelled and not others_tested:
            return _moved(s, "test", f"source_only tests on it, for want of a test subject of a vendor but {vendor}")
        return _moved(s, "excluded", f"source_only trains on vendor {vendor} alone")

    return [moved(s) for s in subjects]


def _moved(subject: Subject, split: str, why: str) -> Subject:
    if subject.split in (split, "excluded"):
        return subject
    return replace(subject, split=split, split_reason=f"{subject.split_reason}; {why}")


def _without_masks(subject: Subject, why: str) -> Subject:
    frames = tuple(replace(frame, mask=None, mask_index=None) for frame in subject.frames)
    return replace(subject, frames=frames, split_reason=f"{subject.split_reason}; {why}")


def _trains(subject: Subject) -> bool:
    return subject.split == "train" and subject.labelled


def _tested(subject: Subject) -> bool:
    return subject.split == "test" and subject.labelled
