"""The M&Ms challenge's open release (Campello et al., IEEE TMI 2021), and data sets in the same layout.

    [OpenDataset/]{Training/{Labeled,Unlabeled},Validation,Testing}/<code>/<code>_sa[_gt].nii.gz

Image and mask are 4D; masks are LV 1, MYO 2, RV 3 at ED and ES, and zero elsewhere. The information table, under any of
its names, has vendor, centre and the 0-based frames of ED and ES. This module handles four traps. Unlabelled subjects
have ED = ES = 0 in the table. They may have `_gt` files, which are ignored. A mask may lie in the folder of another
split. The table may start with a nameless index.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from storage import fs
from storage.errors import InputError
from storage.images import read_image_header
from storage.layouts.frames import cine_frames, frame_number, nifti_name
from storage.layouts.options import LayoutOptions
from storage.layouts.read_each import read_each
from storage.layouts.records import Record, check_row, need_columns, read_records
from storage.layouts.terms import terms_of
from storage.subjects import LV, MYO, RV, FrameSource, Skipped, Subject

LABELS = ((1, LV), (2, MYO), (3, RV))
TERMS = "M&Ms: research, under its registration's terms; cite Campello et al. 2021, doi 10.1109/TMI.2021.3090082"
PARENT = "opendataset"
PARTS = {
    "training/labeled": ("train", "M&Ms Training/Labeled"),
    "training/labelled": ("train", "M&Ms Training/Labeled"),
    "training/unlabeled": ("train", "M&Ms Training/Unlabeled"),
    "training/unlabelled": ("train", "M&Ms Training/Unlabeled"),
    "validation": ("validation", "M&Ms Validation"),
    "testing": ("test", "M&Ms Testing"),
}
TABLES = "*m&ms*nformation*"
NEEDED = ("external code", "vendor", "centre", "ed", "es")
ALIASES = {"code": "external code", "externalcode": "external code", "center": "centre"}
VENDOR_CODES = {"siemens": "A", "philips": "B", "ge": "C", "canon": "D"}  # for tables that have only the vendors' names


@dataclass(frozen=True)
class Place:
    """A subject's folder: the part of the data set that it lies in, its path, and the names of the files in it."""

    part: str
    path: str
    names: frozenset[str]

    def file(self, stem: str) -> str | None:
        """The path of `stem`.nii.gz or `stem`.nii in this folder; None if both are absent."""
        found = nifti_name(self.names, stem)
        return None if found is None else fs.join(self.path, found)


def matches(folder: str) -> bool:
    """Whether the folder, or OpenDataset in it, has at least one of the data set's parts."""
    return not fs.base_name(folder).lower().endswith((".csv", ".parquet")) and bool(_parts(_root(folder)))


def read(folder: str, options: LayoutOptions) -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects and list those that are skipped.

    Raises InputError if the information table is absent or lacks a column.
    """
    root = _root(folder)
    source = _table(folder, root)
    records = [_usual(record) for record in read_records(source)]
    need_columns(source, records, NEEDED)
    known: dict[str, list[Record]] = {}
    for record in records:
        known.setdefault(record["external code"], []).append(record)
    places = _places(root)
    terms = terms_of(folder, TERMS)
    listed = _without_folder(fs.base_name(source), sorted(set(known) - set(places)))
    for code, found in places.items():
        images = [place for place in found if place.file(f"{code}_sa")]
        for place in images[1:]:
            reason = f"is in {_part_name(images[0])} and again in {_part_name(place)}, which is left out"
            listed.append(Skipped(code, f"{code}_sa.nii.gz", reason, "remove one of the two"))

    def subject(code: str) -> Subject:
        place = next((place for place in places[code] if place.file(f"{code}_sa")), None)
        if place is None:
            # A folder may hold a mask alone if the image lies in another part, but here no part has the image.
            raise InputError(f"{code}_sa.nii.gz", "no image in its folder", "copy it from the data set")
        rows = known.get(code, [])
        if len(rows) != 1:
            problem = f"has {len(rows) or 'no'} row{'s' * (len(rows) > 1)} for this subject"
            raise InputError(fs.base_name(source), problem, "leave one of them" if rows else "add the row")
        check_row(rows[0], fs.base_name(source))
        return _subject(code, place, places[code], rows[0], fs.base_name(source), terms, options)

    subjects, skipped = read_each(folder, subject, [(code, code) for code in places])
    return subjects, listed + skipped


def _usual(record: Record) -> Record:
    """A row with its columns named as the release has named them since 2021."""
    named = {ALIASES.get(name, name): cell for name, cell in record.items()}
    if "vendor" not in named and "vendorname" in named:
        named["vendor"] = VENDOR_CODES.get(named["vendorname"].lower(), named["vendorname"])
    return named


def _root(folder: str) -> str:
    inner = next((n for n in fs.list_names(folder) if n.lower() == PARENT), None)
    return folder if inner is None else fs.join(folder, inner)


def _parts(root: str) -> dict[str, str]:
    """Part (key of PARTS) -> its folder, for those that exist."""
    found: dict[str, str] = {}
    for name in fs.list_names(root):
        path = fs.join(root, name)
        if name.lower() == "training":
            inner = {f"training/{n.lower()}": fs.join(path, n) for n in fs.list_names(path)}
            found |= {part: where for part, where in inner.items() if part in PARTS}
        elif name.lower() in PARTS:
            found[name.lower()] = path
    # A folder named `testing` does not suffice: the files of one subject must be named as in M&Ms.
    return found if any(_named_like_mnms(path) for path in found.values()) else {}


def _named_like_mnms(part: str) -> bool:
    return any(
        name.startswith(f"{code}_sa") for code in fs.list_names(part) for name in fs.list_names(fs.join(part, code))
    )


def _places(root: str) -> dict[str, list[Place]]:
    """Code -> the folders of that name, in the order of PARTS."""
    found: dict[str, list[Place]] = {}
    parts = _parts(root)
    paths = [
        (part, fs.join(parts[part], code)) for part in PARTS if part in parts for code in fs.list_names(parts[part])
    ]
    listings = fs.map_concurrently(root, fs.list_names, [path for _, path in paths])  # the listing of a file is empty
    for (part, path), names in zip(paths, listings, strict=True):
        if names:
            found.setdefault(fs.base_name(path), []).append(Place(part, path, frozenset(names)))
    return dict(sorted(found.items()))


def _table(folder: str, root: str) -> str:
    """Find the information table: in the folder, in OpenDataset, or beside OpenDataset if that is the folder given.

    Raises InputError if there is none.
    """
    where = [folder, root]
    if fs.base_name(folder).lower() == PARENT:
        where.append(folder.rstrip("/").rpartition("/")[0] or ".")
    for place in where:
        names = [n for n in fs.list_names(place) if fnmatch.fnmatchcase(n.lower(), TABLES)]
        names = [n for n in names if n.lower().endswith((".csv", ".xlsx"))]
        if names:  # CSV before Excel, then the newest: its name starts with the date
            return fs.join(place, min(names, key=lambda n: (n.lower().endswith(".xlsx"), [-ord(c) for c in n])))
    raise InputError(
        fs.base_name(folder),
        "its information table is absent",
        "copy 211230_M&Ms_Dataset_information_diagnosis_opendataset.csv from the data set into it",
    )


def _without_folder(source: str, codes: list[str]) -> list[Skipped]:
    if not codes:
        return []
    shown = ", ".join(codes[:3]) + (", …" if len(codes) > 3 else "")
    reason = f"{len(codes)} of its subjects have no folder ({shown})"
    return [Skipped("-", source, reason, "fine for part of the data set; else copy the rest")]


def _part_name(place: Place) -> str:
    return PARTS[place.part][1].removeprefix("M&Ms ")


def _subject(
    code: str, place: Place, places: list[Place], record: Record, source: str, terms: str, options: LayoutOptions
) -> Subject:
    if not record["vendor"]:
        raise InputError(source, "vendor is empty", "fill in A, B, C or D")
    split, reason = PARTS[place.part]
    return Subject(
        subject=code,
        layout="mnms",
        vendor=record["vendor"],
        centre=record["centre"],
        frames=_frames(code, place, places, record, source, options),
        split=split,
        split_reason=reason,
        labels=LABELS,
        terms=terms,
        orientation=options.orientation,
    )


def _frames(
    code: str, place: Place, places: list[Place], record: Record, source: str, options: LayoutOptions
) -> tuple[FrameSource, ...]:
    image = place.file(f"{code}_sa") or ""
    if place.part.startswith("training/unlabel"):
        # Here ED = ES = 0 means "unknown", and a mask, if there is one, is not to be learned from.
        return cine_frames(image, read_image_header(image, orientation=options.orientation).frames, {}, {}, options)
    numbers = {phase: frame_number(record[phase.lower()], phase, source) for phase in ("ED", "ES")}
    phases = {phase: number for phase, number in numbers.items() if number is not None}
    if len(phases) < 2 or phases["ED"] == phases["ES"]:
        shown = " and ".join(f"{phase} {record[phase.lower()] or 'empty'}" for phase in ("ED", "ES"))
        raise InputError(source, f"has {shown} for a labelled subject", "fill in its 0-based frames")
    mask = next((path for p in [place, *places] if (path := p.file(f"{code}_sa_gt"))), None)
    if mask is None:
        raise InputError(
            f"{code}_sa_gt.nii.gz",
            "no mask in any part of the data set",
            "copy it, or move the subject to Training/Unlabeled",
        )
    masks: dict[int, tuple[str, int | None]] = {frame: (mask, frame) for frame in phases.values()}
    # The header is read later, with the data. The number of frames is needed here only if all are wanted.
    count = read_image_header(image, orientation=options.orientation).frames if options.frames == "all" else None
    return cine_frames(image, count, phases, masks, options)
