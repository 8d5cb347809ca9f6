"""Finds the subjects of a data folder. Each module here reads one layout and knows its traps and its label order."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from storage import fs
from storage.dicom.read import files_below
from storage.errors import InputError
from storage.images import is_study
from storage.layouts import acdc, dicom, mnms, table
from storage.layouts.options import LayoutOptions
from storage.layouts.structures import with_structures
from storage.subjects import Skipped, Subject

__all__ = ["LAYOUTS", "LayoutOptions", "collect", "detect", "read", "same_images"]

# In the order of detection: a M&Ms folder also holds a CSV, and a table or DICOM files may lie in any folder.
LAYOUTS = {"mnms": mnms, "acdc": acdc, "table": table, "dicom": dicom}
EXPECTED = (
    "give a folder in the layout of M&Ms (Training/Labeled/CODE/CODE_sa.nii.gz), of ACDC (patientNNN/Info.cfg), "
    "with a subjects.csv, or of DICOM files"
)


def detect(folder: str) -> str:
    """Name of the layout of a folder (or of a table file): "mnms", "acdc", "table" or "dicom". Raises InputError."""
    folder = _present(folder)
    for name, layout in LAYOUTS.items():
        if layout.matches(folder):
            return name
    raise InputError(fs.base_name(folder), "none of the known layouts", EXPECTED)


def read(
    folder: str, layout: str = "auto", options: LayoutOptions | None = None
) -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects of a folder, sorted by name, and list what cannot be used, with reason and remedy.

    Only listings, metadata and headers are read. A subject's `split` may still be None: see `splits.assign`. Raises
    InputError if the folder is absent or has no known layout or no subject, or if its table is unreadable or lacks a
    column.
    """
    folder = _present(folder)
    chosen = detect(folder) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise InputError(f"layout {layout}", "no such layout", f"choose one of auto, {', '.join(LAYOUTS)}")
    options = options or LayoutOptions()
    found, skipped = LAYOUTS[chosen].read(folder, options)
    if not found and not skipped:
        raise InputError(fs.base_name(folder), f"no subject in the layout {chosen}", EXPECTED)
    subjects = []
    for subject in sorted(found, key=lambda s: s.subject):
        stray = None if options.follow_links else _leaves(folder, subject)
        if stray is not None:
            remedy = "copy the file into the folder, or --set layouts.follow_links=true"
            skipped.append(Skipped(subject.subject, stray, "is a link that leaves the data folder", remedy))
            continue
        try:
            subjects.append(_with_structures(_with_checks(subject, options), options))
        except InputError as error:
            skipped.append(Skipped(subject.subject, error.where, error.problem, error.remedy))
    return subjects, sorted(skipped, key=lambda s: (s.subject, s.file))


def collect(data: Sequence[str], options: LayoutOptions, layout: str = "auto") -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects of all folders, sorted by name, and list what cannot be used. Splits are not yet assigned.

    If two subjects have the same name or share an image file, the one that is found first stays and the other is
    listed. Raises InputError as `read` does.
    """
    subjects: dict[str, Subject] = {}
    skipped: list[Skipped] = []
    origin: dict[str, str] = {}
    owner: dict[str, str] = {}  # image file → name of its subject
    for folder in data:
        name = fs.base_name(fs.absolute(folder))
        found, left_out = read(folder, layout, options)
        skipped += left_out
        for subject in found:
            if subject.subject in subjects:
                reason = f"a subject of that name came in from {origin[subject.subject]}"
                skipped.append(Skipped(subject.subject, name, reason, "rename one, or give each folder once"))
                continue
            images = {_real(f.image) for f in subject.frames}
            other = next((owner[image] for image in sorted(images) if image in owner), None)
            if other is not None:
                file = fs.base_name(subject.frames[0].image)
                reason = f"its image file is subject {other}'s too"
                skipped.append(Skipped(subject.subject, file, reason, "remove one of the two, or correct the path"))
                continue
            owner |= dict.fromkeys(images, subject.subject)
            subjects[subject.subject] = subject
            origin[subject.subject] = name
    return sorted(subjects.values(), key=lambda s: s.subject), skipped


def same_images(digests: Mapping[str, Sequence[str]]) -> list[Skipped]:
    """List each subject that shares an image with a subject earlier in the alphabet, so that it is skipped.

    `digests` maps a subject's name to the digests of its images. If both stayed, one image could be trained on and
    tested on.
    """
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


def _with_checks(subject: Subject, options: LayoutOptions) -> Subject:
    """The subject with those checks of masks that the options leave on for it."""
    return replace(
        subject,
        check_masks=options.check_masks,
        trust_mask_place=_named_in(options.trust_mask_place, subject.subject),
        trust_label_order=_named_in(options.trust_label_order, subject.subject),
    )


def _with_structures(subject: Subject, options: LayoutOptions) -> Subject:
    """The subject with the drawn structures that the first matching pattern of the options names.

    Raises InputError as `with_structures` does.
    """
    for pattern, text in options.structures.items():
        if subject.labelled and _named_in((pattern,), subject.subject):
            return with_structures(subject, text, "layouts.structures")
    return subject


def _named_in(patterns: Sequence[str], name: str) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _real(path: str) -> str:
    return os.path.realpath(fs.local_path(path)) if fs.is_local(path) else path


def _leaves(folder: str, subject: Subject) -> str | None:
    """The name of the subject's first file that lies, by a link, outside the data folder (or a table's folder)."""
    if not fs.is_local(folder):
        return None
    path = fs.local_path(folder)
    root = os.path.realpath(path if path.is_dir() else path.parent)
    for image in dict.fromkeys(p for f in subject.frames for p in (f.image, f.mask) if p):
        for file in files_below(image) if is_study(image) else [image]:
            if not _real(file).startswith(os.path.join(root, "")):
                return fs.base_name(file)
    return None


def _present(folder: str) -> str:
    """The absolute name of a folder: workers, which read the files, may run in another working directory.

    Raises InputError if the folder is absent.
    """
    if not fs.exists(folder):
        raise InputError(fs.base_name(folder), "no such folder", "check the path")
    return fs.absolute(folder)
