"""A plain table of files, which can describe any study: one row for each subject.

The columns are `subject, image, mask, vendor, centre, ed, es`. Paths are relative to the table's folder. Images are 3D
or 4D NIfTI files or folders of DICOM studies; `ed` and `es` are 0-based frames. An empty mask means unlabelled. A mask
is 4D like its image, or has one frame if only one frame is labelled. These columns are optional:

- `split`: train, validation, test or excluded.
- `spacing`: distance of slices, rows and columns in mm, such as `8 1.4 1.4`, in place of the headers'.
- `orientation`: such as `x -y z`, see `nifti.orientation`; if empty, the option `layouts.orientation` holds.
- `labels`: the masks' values, 1 to 65535, such as `LV 3, MYO 2, RV 1, background 4`; if empty, LV 1, MYO 2, RV 3.
- `structures`: those that were drawn, such as `LV MYO` or `ED: LV MYO; ES: LV`; if empty, those of `labels`.
- `terms`: the terms of use; if empty, those in the folder's TERMS.txt.
"""

from __future__ import annotations

import posixpath
import re
from itertools import zip_longest

from storage import fs
from storage.errors import InputError
from storage.images import open_image, read_image_header
from storage.layouts.frames import cine_frames, frame_number
from storage.layouts.options import LayoutOptions
from storage.layouts.read_each import legible, read_each
from storage.layouts.records import ROW, Record, check_row, need_columns, read_records
from storage.layouts.structures import coded, with_structures
from storage.layouts.terms import terms_of
from storage.nifti.checks import LARGEST_LABEL
from storage.nifti.header import Spacing, parsed_spacing
from storage.nifti.orientation import parsed_orientation
from storage.subjects import BACKGROUND, LV, MYO, RV, FrameSource, Skipped, Subject

LABELS = ((1, LV), (2, MYO), (3, RV))
STRUCTURE_NAMES = {"lv": LV, "myo": MYO, "rv": RV, "background": BACKGROUND}
NEEDED = ("subject", "image", "mask", "vendor", "centre", "ed", "es")
USUAL = ("subjects.csv", "subjects.parquet")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "excluded": "excluded",
}
DIGITS = len(str(LARGEST_LABEL))
DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)  # a drive of Windows
TERMS = "not stated"


def matches(folder: str) -> bool:
    """Whether this is a table file, or a folder with subjects.csv or another table that lists subjects and images."""
    return _is_table(folder) or bool(_tables(folder))


def read(folder: str, options: LayoutOptions) -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects and list the rows that are skipped. Raises InputError if the table itself cannot be used."""
    source = _table(folder)
    base = folder if source != folder else folder.rpartition("/")[0]
    records = read_records(source)
    need_columns(source, records, NEEDED)
    terms = terms_of(base, TERMS)
    first: dict[str, str] = {}
    for record in records:
        first.setdefault(record["subject"], record[ROW])

    def subject(record: Record) -> Subject:
        if record["subject"] and first[record["subject"]] != record[ROW]:
            problem = f"row {record[ROW]} repeats the subject"
            raise InputError(fs.base_name(source), problem, "rename or remove the row")
        return _subject(base, record, f"{fs.base_name(source)} row {record[ROW]}", terms, options)

    rows = [(record["subject"] or f"row {record[ROW]}", record) for record in records]
    return read_each(base, subject, rows)


def _is_table(path: str) -> bool:
    return path.lower().endswith((".csv", ".parquet")) and not fs.is_folder(path)


def _tables(folder: str) -> list[str]:
    """The tables in a folder that list subjects and images; only subjects.csv (or .parquet) if it is there."""
    names = fs.list_names(folder)
    for usual in USUAL:
        if usual in names:
            return [fs.join(folder, usual)]
    found = []
    for path in (fs.join(folder, n) for n in names if n.lower().endswith((".csv", ".parquet"))):
        try:
            records = read_records(path)
        except InputError:  # some other file, which need not be a table of subjects
            continue
        if records and {"subject", "image"} <= set(records[0]):
            found.append(path)
    return found


def _table(folder: str) -> str:
    if _is_table(folder):
        return folder
    found = _tables(folder)
    if len(found) > 1:
        names = ", ".join(fs.base_name(path) for path in found)
        raise InputError(fs.base_name(folder), f"has several tables: {names}", "give the path of the one you mean")
    if not found:
        raise InputError(fs.base_name(folder), "has no subjects.csv", f"write one with columns {', '.join(NEEDED)}")
    return found[0]


def _subject(base: str, record: Record, where: str, terms: str, options: LayoutOptions) -> Subject:
    check_row(record, where)
    for column in ("subject", "image", "vendor"):
        if not record[column]:
            raise InputError(where, f"{column} is empty", f"fill in the {column}")
    for column, cell in record.items():
        if not legible(cell):
            raise InputError(where, f"{column} has a line break or a control character", "write it anew")
    split = record.get("split", "").lower()
    if split and split not in SPLIT_NAMES:
        raise InputError(where, f"split is '{split}'", "write train, validation, test, excluded or nothing")
    stated = record.get("spacing", "")
    spacing = parsed_spacing(stated, where) if stated else None
    orientation = parsed_orientation(record.get("orientation") or options.orientation, where)
    labels = _labels(record.get("labels", ""), where)
    subject = Subject(
        subject=record["subject"],
        layout="table",
        vendor=record["vendor"],
        centre=record["centre"],
        frames=_frames(base, record, where, spacing, orientation, options),
        split=SPLIT_NAMES[split] if split else None,
        split_reason=f"split column of {where.rpartition(' row ')[0]}" if split else "",
        labels=labels,
        terms=record.get("terms") or terms,
        spacing=spacing,
        orientation=orientation,
    )
    drawn = record.get("structures") or " ".join(coded(labels))
    return with_structures(subject, drawn, where) if drawn else subject


def _frames(
    base: str, record: Record, where: str, spacing: Spacing | None, orientation: str, options: LayoutOptions
) -> tuple[FrameSource, ...]:
    image = _inside(base, record["image"], where)
    mask = _inside(base, record["mask"], where) if record["mask"] else None
    numbers = {phase: frame_number(record[phase.lower()], phase.lower(), where) for phase in ("ED", "ES")}
    phases = {phase: number for phase, number in numbers.items() if number is not None}
    with open_image(image, spacing, orientation) as opened:
        header, turned = opened.header, opened.orientation
    if len(header.shape) == 3:
        if mask is not None and len(phases) > 1:
            raise InputError(where, "an image of one frame, but both ed and es", "leave only the labelled one")
        # The image is one frame. If only one of ed and es is filled in, that is its phase.
        phase = next(iter(phases)) if len(phases) == 1 else "-"
        return (FrameSource(phase, phases.get(phase, 0), image, None, mask, None),)
    if len(phases) == 2 and phases["ED"] == phases["ES"]:
        if mask is not None:
            raise InputError(where, "ed and es are the same frame", "correct one of them")
        phases = {}  # some tables write equal numbers if nobody marked the phases
    masks: dict[int, tuple[str, int | None]] = {}
    if mask is not None:
        if not phases:
            raise InputError(where, "a mask, but neither ed nor es to say of which frame", "fill in ed or es")
        # A 4D mask of one frame belongs to the labelled frame, as a 3D mask does.
        mask_header = read_image_header(mask, spacing, turned)
        cine = len(mask_header.shape) == 4 and (mask_header.frames > 1 or header.frames == 1)
        if not cine and len(phases) > 1:
            raise InputError(where, "a mask of one frame, but both ed and es", "leave only the labelled one")
        masks = {frame: (mask, frame if cine else None) for frame in phases.values()}
    return cine_frames(image, header.frames, phases, masks, options)


def _inside(base: str, path: str, where: str) -> str:
    """Join a table's path to its folder. Raises InputError if the path leaves the folder.

    A table may come from someone else, so it must not choose files outside.
    """
    relative = posixpath.normpath(path.replace("\\", "/"))
    if posixpath.isabs(relative) or relative.split("/")[0] == ".." or "://" in path or DRIVE.match(path):
        raise InputError(where, "a path leaves the data folder", "copy the file into the folder, write a relative path")
    return fs.join(base, relative)


def _labels(text: str, where: str) -> tuple[tuple[int, int], ...]:
    if not text:
        return LABELS
    words = re.split(r"[\s,;=:]+", text.strip(" ,;").lower())
    coding: dict[int, int] = {}
    form = "write name and value of each: LV 3, MYO 2, RV 1"
    for name, value in zip_longest(words[::2], words[1::2], fillvalue=""):
        if name not in STRUCTURE_NAMES:
            raise InputError(where, f"labels is '{text}': '{name}' is none of LV, MYO, RV and background", form)
        if not (value.isdecimal() and len(value) <= DIGITS and 0 < int(value) <= LARGEST_LABEL):
            problem = f"labels is '{text}': '{value}' is no whole number from 1 to {LARGEST_LABEL}"
            raise InputError(where, problem, form)
        if int(value) in coding:
            raise InputError(where, f"labels is '{text}': the value {int(value)} comes twice", form)
        coding[int(value)] = STRUCTURE_NAMES[name]
    return tuple(sorted(coding.items()))
