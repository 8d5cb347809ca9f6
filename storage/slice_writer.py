"""Writing the slice store: NIfTI files in, one array pair a subject out, then the index over all of them.

Images are int16: scanners write 12 to 16 bit integers, which it keeps exactly (float16 is exact only up to 2048), at
half of float32. Other intensities are quantised over the volume's own range: an error of at most its 1/131,070.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BloscCodec

from storage import uri
from storage.errors import InputError
from storage.nifti import NiftiFile, Spacing, check_same_grid, checked_image, checked_labels
from storage.subjects import SLICE_SCHEMA, SLICES_VERSION, FrameSource, Skipped, Subject

ARRAYS, TABLE, SKIPPED, SPLITS, ROWS = "slices.zarr", "slices.parquet", "skipped.csv", "splits.csv", "rows.json"
INT16_MIN, INT16_MAX, INT16_STEPS = -32768, 32767, 65535
LONGEST_NAME = 200  # bytes; file systems end at 255

Row = dict[str, Any]


def write_subject(run: str, subject: Subject) -> list[Row]:
    """Read a subject's files and write its arrays; returns its rows, complete but for `slice_id`.

    A subject that is complete and was made from the same files in the same way is not read again. An unfinished one is
    removed and written anew, so that any number of attempts leave the same bytes. Raises InputError for bad files.
    """
    folder = subject_folder(run, subject.subject)
    source = source_hash(subject)
    done = _committed(folder)
    if done is None or done["source"] != source:
        uri.remove(folder)
        done = {"version": SLICES_VERSION, "source": source, **_convert(folder, subject)}
        uri.write_text(uri.join(folder, ROWS), json.dumps(done))
    return [_described(row, subject) for row in done["rows"]]


def frame_digests(run: str, subject: str) -> list[str]:
    """SHA-256 of each stored frame's image (shape and values): the same image under two names has the same one."""
    done = _committed(subject_folder(run, subject))
    return [] if done is None else [str(d) for d in done["digests"]]


def finalise(
    run: str,
    rows_by_subject: Mapping[str, Sequence[Row]],
    skipped: Sequence[Skipped],
    subjects: Sequence[Subject],
) -> None:
    """Write the index and the two CSV files, each atomically, the index last.

    `slice_id` is the row number after sorting by subject; splits are those of `subjects` (of which only the ones with
    rows are listed), so that a change of split does not touch the arrays.
    """
    known = {s.subject: s for s in subjects}
    names = sorted(rows_by_subject)
    rows = [_described(row, known[name]) for name in names for row in rows_by_subject[name]]
    table = pa.Table.from_pylist([{**row, "slice_id": i} for i, row in enumerate(rows)], schema=SLICE_SCHEMA)
    lines = [asdict(s) for s in sorted(skipped, key=lambda s: (s.subject, s.file, s.reason))]
    uri.write_text(uri.join(run, SKIPPED), _csv(("subject", "file", "reason", "remedy"), lines))
    splits = [{**asdict(known[name]), "reason": known[name].split_reason} for name in names]
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


def encode(image: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int16], float, float]:
    """A volume as int16 with scale and offset: intensity = stored * scale + offset.

    Exact (scale 1) for whole numbers that span at most 65,535, with offset 0 if they fit int16 as they are.
    """
    low, high = float(image.min()), float(image.max())
    if np.array_equal(image, np.rint(image)) and high - low <= INT16_STEPS:
        fits = low >= INT16_MIN and high <= INT16_MAX
        scale, offset = 1.0, 0.0 if fits else low - INT16_MIN
    else:
        scale = (high - low) / INT16_STEPS
        offset = low - INT16_MIN * scale
    stored = np.rint((image.astype(np.float64) - offset) / scale)
    return np.clip(stored, INT16_MIN, INT16_MAX).astype(np.int16), scale, offset


def _convert(folder: str, subject: Subject) -> dict[str, Any]:
    """Read, check and write all frames; returns the rows' facts and the frames' digests."""
    images: list[npt.NDArray[np.int16]] = []
    masks: list[npt.NDArray[np.uint8]] = []
    rows: list[Row] = []
    digests: list[str] = []
    for source, image, mask, spacing in _frames(subject):
        stored, scale, offset = encode(image)
        if images and stored.shape[1:] != images[0].shape[1:]:
            raise InputError(
                uri.base_name(source.image),
                f"its slices are {_size(stored)}, another frame's {_size(images[0])}",
                "list the frames as subjects of their own in a table",
            )
        facts = _facts(source, image, spacing) | {"scale": scale, "offset": offset, "labelled": mask is not None}
        start = len(rows)
        rows += [{**facts, "slice": z, "row": start + z} for z in range(len(stored))]
        digests.append(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest())
        images.append(stored)
        masks.append(np.zeros(stored.shape, np.uint8) if mask is None else mask)
    _write_array(uri.join(folder, "image"), np.concatenate(images))
    _write_array(uri.join(folder, "mask"), np.concatenate(masks))
    return {"rows": rows, "digests": digests}


def _frames(
    subject: Subject,
) -> Iterable[tuple[FrameSource, npt.NDArray[np.float32], npt.NDArray[np.uint8] | None, Spacing]]:
    """Each frame with its mask; a file that holds several frames is opened once and read forwards."""
    opened: dict[str, NiftiFile] = {}
    coding = dict(subject.labels)
    try:
        for path in dict.fromkeys(p for f in subject.frames for p in (f.image, f.mask) if p):
            opened[path] = NiftiFile(path, subject.spacing)  # every header is checked before any data are read
        for source in subject.frames:
            file = opened[source.image]
            mask = None
            if source.mask is not None:
                labels = opened[source.mask]
                check_same_grid(file.header, labels.header)
                mask = checked_labels(labels.frame(source.mask_index), coding, labels.name)
                if not mask.any():
                    raise InputError(
                        labels.name,
                        f"the mask is empty at {source.phase}, frame {source.frame}",
                        "correct ED and ES, which say where the masks are, or leave the mask out",
                    )
            yield source, checked_image(file.frame(source.image_index), file.name), mask, file.header.spacing_mm
    finally:
        for file in opened.values():
            file.close()


def _facts(source: FrameSource, image: npt.NDArray[np.float32], spacing: Spacing) -> Row:
    """What a frame's rows share; statistics in float64 over the volume as it was read."""
    values = image.astype(np.float64)
    p005, p995 = np.percentile(values, [0.5, 99.5])
    return {
        "phase": source.phase,
        "frame": source.frame,
        "height": image.shape[1],
        "width": image.shape[2],
        "slice_mm": spacing[0],
        "row_mm": spacing[1],
        "col_mm": spacing[2],
        "pixel_area_mm2": spacing[1] * spacing[2],
        "volume_mean": float(values.mean()),
        "volume_std": float(values.std()),
        "volume_min": float(values.min()),
        "volume_max": float(values.max()),
        "volume_p005": float(p005),
        "volume_p995": float(p995),
    }


def _size(volume: npt.NDArray[Any]) -> str:
    return f"{volume.shape[1]} × {volume.shape[2]}"


def _write_array(path: str, data: npt.NDArray[Any]) -> None:
    # One shard an array: one object to write, in one go. One chunk a slice: one slice to read.
    array = zarr.create_array(
        store=uri.zarr_store(path, read_only=False),
        shape=data.shape,
        dtype=data.dtype,
        chunks=(1, *data.shape[1:]),
        shards=data.shape,
        compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        fill_value=0,
        zarr_format=3,
        dimension_names=("row", "y", "x"),
    )
    array[...] = data


def _write_root(arrays: str) -> None:
    """Make the folder of arrays a Zarr group, so that other tools may open it whole."""
    if not uri.exists(uri.join(arrays, "zarr.json")):
        attributes = {"format": "cardiomix-slices", "version": int(SLICES_VERSION)}
        zarr.create_group(uri.zarr_store(arrays, read_only=False), zarr_format=3, attributes=attributes)


def _described(row: Row, subject: Subject) -> Row:
    """A stored row with what the subject says of all its rows: these may change without the arrays being redone."""
    return {
        **row,
        "subject": subject.subject,
        "vendor": subject.vendor,
        "centre": subject.centre,
        "split": subject.split or "train",
        "layout": subject.layout,
        "terms": subject.terms,
    }


def _committed(folder: str) -> dict[str, Any] | None:
    path = uri.join(folder, ROWS)
    if not uri.exists(path):
        return None
    try:
        done: dict[str, Any] = json.loads(uri.read_text(path))
    except ValueError:  # not ours, or damaged: the subject is written again
        return None
    return done if done.get("version") == SLICES_VERSION else None


def _without_folders(frame: FrameSource) -> Row:
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
