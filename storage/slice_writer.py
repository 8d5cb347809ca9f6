"""Writing the slice store: NIfTI files in, one array pair a subject out, then the index over all of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from storage import uri
from storage.errors import InputError
from storage.frame_reader import read_frames
from storage.sharded_array import write_array
from storage.subjects import SLICE_SCHEMA, SLICES_VERSION, FrameSource, Skipped, Subject

ARRAYS, TABLE, SKIPPED, SPLITS = "slices.zarr", "slices.parquet", "skipped.csv", "splits.csv"
FRAMES = "frames.json"
LONGEST_NAME = 200  # bytes; file systems end at 255
# Scans compress hardly better at higher levels, which take up to four times as long; masks are nearly nothing.
IMAGE_LEVEL, MASK_LEVEL = 1, 5
AXES = ("row", "y", "x")


@dataclass(frozen=True)
class Stored:
    """A subject as stored: `frames` holds one dict a frame, `digests` SHA-256 of its image (`Frame.digest`)."""

    frames: tuple[dict[str, Any], ...]
    digests: tuple[str, ...]

    @property
    def slices(self) -> int:
        """Slices of all frames."""
        return sum(int(f["slices"]) for f in self.frames)

    @property
    def labelled(self) -> int:
        """Slices of labelled frames."""
        return sum(int(f["slices"]) for f in self.frames if f["labelled"])


def write_subject(run: str, subject: Subject) -> Stored:
    """Read a subject's files, check them and write its arrays.

    A subject that is complete and was made from the same files in the same way is not read again. An unfinished one is
    removed and written anew, so that any number of attempts leave the same bytes. Raises InputError for bad files.
    """
    folder = subject_folder(run, subject.subject)
    source = source_hash(subject)
    done = _committed(folder)
    if done is None or done["source"] != source:
        uri.remove(folder)
        stored = _convert(folder, subject)
        done = {"version": SLICES_VERSION, "source": source, **asdict(stored)}
        uri.write_text(uri.join(folder, FRAMES), json.dumps(done))
    return Stored(tuple(done["frames"]), tuple(done["digests"]))


def finalise(run: str, stored: Mapping[str, Stored], skipped: Sequence[Skipped], subjects: Sequence[Subject]) -> None:
    """Write the index and the two CSV files, each atomically, the index last.

    `slice_id` is the row number after sorting by subject; splits are those of `subjects` (of which only the stored ones
    are listed), so that a change of split does not touch the arrays.
    """
    known = {s.subject: s for s in subjects}
    names = sorted(stored)
    parts = [_index(stored[name], known[name]) for name in names]
    table = pa.concat_tables(parts) if parts else SLICE_SCHEMA.empty_table()
    ids = pa.array(np.arange(table.num_rows, dtype=np.int64))
    table = table.set_column(0, SLICE_SCHEMA.field("slice_id"), ids).combine_chunks()
    lines = [asdict(s) for s in sorted(skipped, key=lambda s: (s.subject, s.file, s.reason))]
    uri.write_text(uri.join(run, SKIPPED), _csv(("subject", "file", "reason", "remedy"), lines))
    splits = [{**_said(known[name]), "reason": known[name].split_reason} for name in names]
    uri.write_text(uri.join(run, SPLITS), _csv(("subject", "vendor", "centre", "split", "reason"), splits))
    _write_root(uri.join(run, ARRAYS))
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    uri.write_bytes(uri.join(run, TABLE), out.getvalue())


def subject_folder(run: str, subject: str) -> str:
    """Where a subject's arrays are; any character that could leave or confuse a folder is percent-encoded."""
    name = quote(subject, safe=" ")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not 0 < len(name) <= LONGEST_NAME:
        raise InputError(subject[:40] or "subject", f"a name of {len(name)} bytes", f"use 1 to {LONGEST_NAME}")
    return uri.join(run, ARRAYS, name)


def source_hash(subject: Subject) -> str:
    """What a subject's arrays follow from: its files (name, size, time), frames, label order and spacing.

    Folders do not count, so that moved data are recognised; vendor and split do not, since no array depends on them.
    """
    files = sorted({path for f in subject.frames for path in (f.image, f.mask) if path})
    definition = {
        "version": SLICES_VERSION,
        "frames": [_without_folders(f) for f in subject.frames],
        "files": [[uri.base_name(path), _stamp(path)] for path in files],
        "labels": subject.labels,
        "spacing": subject.spacing,
    }
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _convert(folder: str, subject: Subject) -> Stored:
    """Read, check and write all frames."""
    images: list[npt.NDArray[np.int16]] = []
    masks: list[npt.NDArray[np.uint8]] = []
    facts, digests = [], []
    for frame in read_frames(subject):
        facts.append(frame.facts())
        digests.append(frame.digest)
        images.append(frame.image.stored)
        masks.append(np.zeros(frame.image.stored.shape, np.uint8) if frame.mask is None else frame.mask)
    write_array(uri.join(folder, "image"), np.concatenate(images), IMAGE_LEVEL, AXES)
    write_array(uri.join(folder, "mask"), np.concatenate(masks), MASK_LEVEL, AXES)
    return Stored(tuple(facts), tuple(digests))


def _index(stored: Stored, subject: Subject) -> pa.Table:
    """The subject's rows of the index, `slice_id` still 0."""
    counts = np.array([f["slices"] for f in stored.frames])
    said = _said(subject)
    columns: dict[str, Any] = {
        "slice_id": np.zeros(counts.sum(), dtype=np.int64),
        "slice": np.concatenate([np.arange(n) for n in counts]),
        "row": np.arange(counts.sum()),
    }
    for name in SLICE_SCHEMA.names:
        if name in said:
            columns[name] = [said[name]] * int(counts.sum())
        elif name not in columns:
            columns[name] = np.repeat([f[name] for f in stored.frames], counts)
    return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in SLICE_SCHEMA}, schema=SLICE_SCHEMA)


def _write_root(arrays: str) -> None:
    """Make the folder of arrays a Zarr group, so that other tools may open it whole."""
    if not uri.exists(uri.join(arrays, "zarr.json")):
        attributes = {"format": "cardiomix-slices", "version": int(SLICES_VERSION)}
        zarr.create_group(uri.zarr_store(arrays, read_only=False), zarr_format=3, attributes=attributes)


def _said(subject: Subject) -> dict[str, str]:
    """What a subject says of all its rows: these may change without the arrays being redone."""
    return {
        "subject": subject.subject,
        "vendor": subject.vendor,
        "centre": subject.centre,
        "split": subject.split or "train",
        "layout": subject.layout,
        "terms": subject.terms,
    }


def _committed(folder: str) -> dict[str, Any] | None:
    path = uri.join(folder, FRAMES)
    if not uri.exists(path):
        return None
    try:
        done: dict[str, Any] = json.loads(uri.read_text(path))
    except ValueError:  # not ours, or damaged: the subject is written again
        return None
    return done if done.get("version") == SLICES_VERSION else None


def _without_folders(frame: FrameSource) -> dict[str, Any]:
    names = {key: uri.base_name(path) for key in ("image", "mask") if (path := getattr(frame, key))}
    return {**asdict(frame), **names}


def _stamp(path: str) -> str:
    try:
        return uri.stamp(path)
    except FileNotFoundError as error:
        raise InputError(
            uri.base_name(path), "no such file", "copy it from the data set or correct its name"
        ) from error


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
