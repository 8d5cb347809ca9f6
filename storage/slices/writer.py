"""Writes the slice store: an image array and a mask array for each subject, then the index over all subjects."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from storage import fs
from storage.csv_table import csv_text
from storage.identity import identity
from storage.images import image_stamp
from storage.layouts import LayoutOptions
from storage.layouts.structures import MaskContents
from storage.nifti.file import not_opened
from storage.nifti.orientation import HEADER
from storage.parquet import read_parquet
from storage.sharded_array import write_array
from storage.slices.frames import read_frames
from storage.slices.name import checksum_of, name_of, store_name, stored_name
from storage.slices.node_copy import FRAMES
from storage.slices.store import ARRAYS, GROUP, LAYOUTS_KEY, SKIPPED, SPLITS, TABLE, subject_folder
from storage.subjects import (
    ALL_STRUCTURES,
    SLICE_SCHEMA,
    SLICES_VERSION,
    STRUCTURES_FIELD,
    FrameSource,
    Skipped,
    Subject,
    partly_drawn,
    structures_text,
)

# At higher levels images are hardly smaller and take up to four times as long. Masks are tiny at any level.
IMAGE_LEVEL, MASK_LEVEL = 1, 5
AXES = ("row", "y", "x")
TRUSTED = ("trust_mask_place", "trust_label_order")  # fields of Subject, and of LayoutOptions
GROUP_ROWS = 4096  # approximate rows in a row group of the index; one group at a time is in memory


@dataclass(frozen=True)
class StoredSubject:
    """A subject as stored.

    `frames` holds one dict for each frame (`Frame.facts`), `digests` the SHA-256 of each frame's image
    (`Frame.digest`).
    """

    frames: tuple[dict[str, Any], ...]
    digests: tuple[str, ...]

    @property
    def slices(self) -> int:
        """Number of slices in all frames."""
        return sum(int(f["slices"]) for f in self.frames)

    @property
    def labelled(self) -> int:
        """Number of slices in the labelled frames."""
        return sum(int(f["slices"]) for f in self.frames if f["labelled"])


def mask_contents(subject: Subject, stored: StoredSubject) -> list[MaskContents]:
    """List what each mask of a stored subject holds.

    An earlier version did not record absent structures. Its masks count as if they held all structures that were drawn.
    """
    return [
        MaskContents(
            subject.subject,
            subject.vendor,
            subject.centre,
            str(frame["phase"]),
            tuple(_drawn(frame).split()),
            tuple(str(frame.get("absent", "")).split()),
        )
        for frame in stored.frames
        if frame["labelled"]
    ]


@dataclass(frozen=True)
class SubjectArrays:
    """A subject before it is written: image (rows, H, W) int16, mask (rows, H, W) uint8, and the facts to store."""

    image: npt.NDArray[np.int16]
    mask: npt.NDArray[np.uint8]
    stored: StoredSubject


def write_subject(run: str, subject: Subject) -> StoredSubject:
    """Read a subject's files, check them and write its arrays.

    A subject that is complete and was made from the same files in the same way is not read again. An unfinished one is
    removed and written anew, so that any number of attempts leave the same bytes. Raises InputError for bad files.
    """
    return write_made(run, subject.subject, source_hash(subject), lambda: _read_arrays(subject))


def write_made(run: str, subject: str, source: str, make: Callable[[], SubjectArrays]) -> StoredSubject:
    """Call `make` and write the arrays that it returns, unless the subject is stored already and complete.

    A stored subject is kept only if it was made from the same `source`, a text such as `source_hash` gives.
    """
    folder = subject_folder(run, subject)
    done = _committed(folder)
    if done is None or done["source"] != source:
        if done is not None:
            fs.remove(fs.join(run, TABLE))  # the rows of the old index would point into the new arrays
        fs.remove(folder)
        made = make()
        write_array(fs.join(folder, "image"), made.image, IMAGE_LEVEL, AXES)
        write_array(fs.join(folder, "mask"), made.mask, MASK_LEVEL, AXES)
        done = {"version": SLICES_VERSION, "source": source, **asdict(made.stored)}
        fs.write_text(fs.join(folder, FRAMES), json.dumps(done))
    return StoredSubject(tuple(done["frames"]), tuple(done["digests"]))


def finalise(
    run: str,
    stored: Mapping[str, StoredSubject],
    skipped: Sequence[Skipped],
    subjects: Sequence[Subject],
    options: LayoutOptions | None = None,
) -> None:
    """Write the index, its name and the two CSV files, each atomically. Then remove the arrays of all other subjects.

    `slice_id` is the row number after sorting by subject. Splits are taken from `subjects`, so that a change of split
    does not touch the arrays; those of `subjects` that are not stored are ignored. `options` are the options that gave
    the splits. The index's metadata keep them.
    """
    known = {s.subject: s for s in subjects}
    names = sorted(stored)
    lines = [asdict(s) for s in sorted(skipped, key=lambda s: (s.subject, s.file, s.reason))]
    fs.write_text(fs.join(run, SKIPPED), csv_text(("subject", "file", "reason", "remedy"), lines))
    splits = [{**_said(known[name]), "reason": known[name].split_reason} for name in names]
    fs.write_text(fs.join(run, SPLITS), csv_text(("subject", "vendor", "centre", "split", "reason"), splits))
    _write_root(fs.join(run, ARRAYS))
    index = _index([(known[name], stored[name]) for name in names], options)
    fs.write_bytes(fs.join(run, TABLE), index)
    if stored_name(run, checksum := checksum_of(index)) is None:
        store_name(run, name_of(read_parquet(index, repeated=True)), checksum)
    kept = {GROUP, *(fs.base_name(subject_folder(run, name)) for name in names)}
    for folder in fs.list_names(fs.join(run, ARRAYS)):
        if folder not in kept:  # the subject was withdrawn, or is a copy of another
            fs.remove(fs.join(run, ARRAYS, folder))


def source_hash(subject: Subject) -> str:
    """SHA-256, in hex, over everything that a subject's arrays depend on.

    That is its files (name, size, time, first bytes), frames, labels, spacing, checks and orientation. The folders that
    hold the files do not count, so that moved data are recognised. Vendor and split do not count, since no array
    depends on them. Raises InputError if a file cannot be opened.
    """
    files = sorted({path for f in subject.frames for path in (f.image, f.mask) if path})
    definition = {
        "version": SLICES_VERSION,
        "frames": [_without_folders(f) for f in subject.frames],
        "files": [[fs.base_name(path), _stamp(path)] for path in files],
        "labels": subject.labels,
        "spacing": subject.spacing,
        "check_masks": subject.check_masks,
        # Only if they are set: else a subject that an earlier version stored would be read again.
        **{name: True for name in TRUSTED if getattr(subject, name)},
        **({} if subject.orientation == HEADER else {"orientation": subject.orientation}),
    }
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _read_arrays(subject: Subject) -> SubjectArrays:
    """Read and check all frames."""
    images: list[npt.NDArray[np.int16]] = []
    masks: list[npt.NDArray[np.uint8]] = []
    facts, digests = [], []
    for frame in read_frames(subject):
        facts.append(frame.facts())
        digests.append(frame.digest)
        images.append(frame.image.stored)
        masks.append(np.zeros(frame.image.stored.shape, np.uint8) if frame.mask is None else frame.mask)
    return SubjectArrays(np.concatenate(images), np.concatenate(masks), StoredSubject(tuple(facts), tuple(digests)))


def _index(entered: Sequence[tuple[Subject, StoredSubject]], options: LayoutOptions | None) -> bytes:
    """The index as the bytes of a Parquet file, rows in the order of `entered`. Built one row group at a time."""
    out, rows, schema = io.BytesIO(), 0, SLICE_SCHEMA
    if partly_drawn(_drawn(frame) for _, stored in entered for frame in stored.frames):
        schema = schema.append(STRUCTURES_FIELD)
    if options is not None:
        about = json.dumps(identity(options), separators=(",", ":"), ensure_ascii=False).encode()
        schema = schema.with_metadata({**schema.metadata, LAYOUTS_KEY: about})
    group_of = np.cumsum([stored.slices for _, stored in entered]) // GROUP_ROWS
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for _, group in groupby(zip(entered, group_of, strict=True), key=itemgetter(1)):
            table = _index_rows([each for each, _ in group], rows, schema)
            writer.write_table(table)
            rows += table.num_rows
    return out.getvalue()


def _index_rows(entered: Sequence[tuple[Subject, StoredSubject]], first: int, schema: pa.Schema) -> pa.Table:
    """The index's rows of some subjects; `slice_id` begins at `first`. Arrow repeats a frame's facts for its slices."""
    frames = [
        {**_said(subject), **frame, STRUCTURES_FIELD.name: _drawn(frame)}
        for subject, stored in entered
        for frame in stored.frames
    ]
    counts = np.array([f["slices"] for f in frames], dtype=np.int64)
    frame_of = pa.array(np.repeat(np.arange(len(frames)), counts))
    numbers = {
        "slice_id": first + np.arange(counts.sum()),
        "slice": _counted(counts),
        "row": _counted(np.array([stored.slices for _, stored in entered], dtype=np.int64)),
    }
    columns = {
        f.name: pa.array(numbers[f.name], type=f.type)
        if f.name in numbers
        else pa.array([frame[f.name] for frame in frames], type=f.type).take(frame_of)
        for f in schema
    }
    return pa.table(columns, schema=schema)


def _drawn(frame: Mapping[str, Any]) -> str:
    """The cell of the column `structures` for a stored frame's slices; empty if the frame is not labelled."""
    return str(frame.get("structures", structures_text(ALL_STRUCTURES))) if frame["labelled"] else ""


def _counted(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers 0 to n - 1 for each count n, one run after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _write_root(arrays: str) -> None:
    """Make the folder of arrays a Zarr group, so that other tools may open it whole."""
    if not fs.exists(fs.join(arrays, GROUP)):
        attributes = {"format": "cardiomix-slices", "version": int(SLICES_VERSION)}
        zarr.create_group(fs.zarr_store(arrays, read_only=False), zarr_format=3, attributes=attributes)


def _said(subject: Subject) -> dict[str, str]:
    """The columns that are equal in all rows of a subject. If they change, the arrays need not be written again."""
    return {
        "subject": subject.subject,
        "vendor": subject.vendor,
        "centre": subject.centre,
        "split": subject.split or "train",
        "layout": subject.layout,
        "terms": subject.terms,
    }


def _committed(folder: str) -> dict[str, Any] | None:
    path = fs.join(folder, FRAMES)
    if not fs.exists(path):
        return None
    try:
        done: dict[str, Any] = json.loads(fs.read_text(path))
    except ValueError:  # not ours, or damaged: the subject is written again
        return None
    return done if done.get("version") == SLICES_VERSION else None


def _without_folders(frame: FrameSource) -> dict[str, Any]:
    names = {key: fs.base_name(path) for key in ("image", "mask") if (path := getattr(frame, key))}
    facts = {**asdict(frame), **names}
    if frame.mask is None or frame.structures == ALL_STRUCTURES:  # keeps the hashes of earlier versions
        del facts["structures"]
    return facts


def _stamp(path: str) -> str:
    try:
        return image_stamp(path)
    except OSError as error:
        raise not_opened(fs.base_name(path), error) from error
