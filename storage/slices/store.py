"""The slice store: every subject's slices and masks in Zarr, and one Parquet row for each slice.

    <run>/slices.zarr/<subject>/{image,mask}    (rows, H, W) int16 and uint8; one shard per array, one chunk per slice
    <run>/slices.zarr/<subject>/frames.json     written last: the subject is complete, and what it was made from
    <run>/slices.parquet                        `subjects.SLICE_SCHEMA`, sorted by subject, frame and slice; with one
                                                more column, `structures`, if some mask lacks one that nobody drew
    <run>/slices.json                           the name of these slices, and the checksum of slices.parquet
    <run>/skipped.csv, <run>/splits.csv         the subjects that were skipped, and the splits of all others, with
                                                the reasons

`storage.slices.writer` writes it; readers need not import that module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from storage import fs
from storage.errors import InputError, StageError
from storage.layouts import LayoutOptions
from storage.nifti.header import Spacing
from storage.parquet import different_texts, read_parquet, text_array, with_repeated
from storage.sharded_array import ShardedArray
from storage.slices.foreground import ForegroundStatistics, foreground_statistics
from storage.slices.intensities import Statistics
from storage.slices.name import checksum_of, name_of, stored_name
from storage.slices.node_copy import NodeCopy
from storage.subjects import ALL_STRUCTURES, SLICE_SCHEMA, SLICES_VERSION, STRUCTURES_FIELD

ARRAYS, TABLE, SKIPPED, SPLITS = "slices.zarr", "slices.parquet", "skipped.csv", "splits.csv"
GROUP = "zarr.json"  # beside the subjects' folders
LONGEST_NAME = 200  # bytes; file systems allow 255
LAYOUTS_KEY = b"cardiomix_layouts"  # in the index's metadata
VERSION_KEY = b"cardiomix_slices"
SAMPLES_LAYOUT = "export"  # layout of stores that hold training samples; their intensities are already normalised


def subject_folder(run: str, subject: str) -> str:
    """The folder of a subject's arrays. Characters that are not safe in a folder's name are percent-encoded.

    Raises InputError if the encoded name is empty or longer than 200 bytes.
    """
    name = quote(subject, safe=" ")
    if name.startswith(".") or name == GROUP:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if not 0 < len(name) <= LONGEST_NAME:
        raise InputError(subject[:40] or "subject", f"a name of {len(name)} bytes", f"use 1 to {LONGEST_NAME}")
    return fs.join(run, ARRAYS, name)


@dataclass(frozen=True)
class Volume:
    """One frame of one subject. `spacing` is (slice, row, column) in mm.

    `rows` holds its slice ids, first slice to last. `structures` names the structures that were drawn, if it is
    labelled.
    """

    subject: str
    vendor: str
    centre: str
    phase: str
    frame: int
    rows: tuple[int, ...]
    labelled: bool
    split: str
    spacing: Spacing
    structures: tuple[str, ...] = ALL_STRUCTURES


class SliceStore:
    """A map-style view of a run's slices: `len(store)`, `store[i]`. torch's DataLoader takes it as it is.

    Any number of threads may read at once. Reading raises InputError if a subject's array is missing or if decoding
    detects damage, and StageError if the array cannot be read.
    """

    def __init__(self, run: str, table: pa.Table, checksum: str = "") -> None:
        self.run = run
        self.table = table  # text columns hold each different text once (`storage.parquet.REPEATED`)
        self._checksum = checksum
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._arrays: dict[tuple[str, str], ShardedArray] = {}
        self._copy = NodeCopy(run)
        self._foreground: dict[int, ForegroundStatistics] = {}
        self._hearts: dict[int, tuple[int, int]] = {}

    @classmethod
    def open(cls, run: str) -> SliceStore:
        """Open a run's slice store.

        Raises InputError if there is none, or if its index is damaged or not of this cardiomix's version.
        """
        try:
            content = fs.read_bytes(fs.join(run, TABLE))
            table = read_parquet(content, repeated=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = "run `cardiomix ingest DATA --run RUN` first"
            raise InputError(fs.base_name(run), "has no slices", remedy) from error
        except pa.ArrowInvalid as error:
            raise InputError(TABLE, "is damaged", "remove it and ingest again: finished subjects are kept") from error
        version = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
        if version != SLICES_VERSION:
            raise InputError(
                TABLE,
                f"its version is {version}, this cardiomix reads {SLICES_VERSION}",
                "ingest the data again into a new run, or use the cardiomix that wrote it",
            )
        if table.schema not in (with_repeated(SLICE_SCHEMA), with_repeated(SLICE_SCHEMA.append(STRUCTURES_FIELD))):
            raise InputError(TABLE, "its columns are not those of its version", "ingest the data again")
        return cls(run, table, checksum_of(content))

    def __reduce__(self) -> tuple[Any, ...]:
        return SliceStore.open, (self.run,)  # another process opens the store itself

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """The name of the slices: 16 hex digits over the index, which has each volume's statistics, split and origin.

        It is read from `slices.json`, or computed if that file is absent or belongs to another index.
        """
        return stored_name(self.run, self._checksum) or name_of(self.table)

    @property
    def layouts(self) -> LayoutOptions | None:
        """The options that gave the splits; None if the index has none, or has some that this version does not know."""
        try:
            return LayoutOptions.model_validate_json((self.table.schema.metadata or {}).get(LAYOUTS_KEY, b""))
        except ValidationError:
            return None

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column, (len,): numbers and bools in their type, text as numpy str. Do not write into it."""
        if name not in self._columns:
            values = self.table.column(name)
            self._columns[name] = values.to_numpy() if pa.types.is_primitive(values.type) else text_array(values)
        return self._columns[name]

    def texts(self, name: str, rows: npt.NDArray[np.bool_] | None = None) -> list[str]:
        """The different texts of a column, sorted. `rows`, (len,) bool, restricts them to the rows that are true."""
        column = self.table.column(name)
        return different_texts(column if rows is None else column.filter(pa.array(rows)))

    @property
    def partly_labelled(self) -> bool:
        """Whether some labelled slice has a structure that nobody drew; the table then has a column `structures`."""
        return STRUCTURES_FIELD.name in self.table.column_names

    @property
    def drawn(self) -> npt.NDArray[np.bool_]:
        """(len, 3) bool: whether LV, MYO and RV are drawn in each slice's mask. All false if it is not labelled."""
        if not self.partly_labelled:
            return np.repeat(self.column("labelled").astype(bool)[:, None], len(ALL_STRUCTURES), axis=1)
        texts, which = np.unique(self.column(STRUCTURES_FIELD.name), return_inverse=True)
        known = [[name in text.split() for name in ALL_STRUCTURES] for text in texts.tolist()]
        found: npt.NDArray[np.bool_] = np.array(known, dtype=np.bool_)[which]
        return found

    def image(self, i: int) -> npt.NDArray[np.float32]:
        """Image of slice `i`, (H, W) float32, in the scanner's intensities."""
        return self._decoded(self._rows_of_array("image", i, [int(self.column("row")[i])])[0], i)

    def mask(self, i: int) -> npt.NDArray[np.uint8]:
        """Mask of slice `i`, (H, W) uint8: LV 1, MYO 2, RV 3; all zeros if the slice is not labelled."""
        return np.asarray(self._rows_of_array("mask", i, [int(self.column("row")[i])])[0])

    def statistics(self, i: int) -> Statistics:
        """Statistics of the whole volume that slice `i` is in, in the scanner's intensities."""
        names = ("volume_mean", "volume_std", "volume_min", "volume_max", "volume_p005", "volume_p995")
        return Statistics(*(float(self.column(name)[i]) for name in names))

    def foreground(self, i: int) -> ForegroundStatistics:
        """Foreground statistics of the volume that slice `i` is in. In a store of samples: those of the whole volume.

        They are computed from the volume's slices at the first call, and then kept in memory. The index does not hold
        them, so that stores of every version have them.
        """
        if self.column("layout")[i] == SAMPLES_LAYOUT:
            return ForegroundStatistics(**asdict(self.statistics(i)), padding=False)
        rows = self._volume_of(i)
        first = rows[0]
        if first not in self._foreground:
            slice_mm, row_mm, col_mm = (float(self.column(name)[i]) for name in ("slice_mm", "row_mm", "col_mm"))
            volume_ZHW, _ = self.volume(rows)
            self._foreground[first] = foreground_statistics(volume_ZHW, (slice_mm, row_mm, col_mm))
        return self._foreground[first]

    def heart(self, i: int) -> tuple[int, int]:
        """Offset (rows, columns), in whole pixels, from the image's centre to the centre of mass of the labels.

        All labels of the volume that slice `i` is in count. The offset is (0, 0) if there are none. It is computed at
        the first call, and then kept in memory.
        """
        if not self.column("labelled")[i]:
            return 0, 0
        rows = self._volume_of(i)
        if rows[0] not in self._hearts:
            mask = self._rows_of_array("mask", rows[0], self.column("row")[rows].tolist())
            labelled = np.argwhere(mask)[:, 1:]
            row, column = labelled.mean(0) - (np.array(mask.shape[1:]) - 1) / 2 if len(labelled) else (0.0, 0.0)
            self._hearts[rows[0]] = round(float(row)), round(float(column))
        return self._hearts[rows[0]]

    def _volume_of(self, i: int) -> range:
        """The slices of the volume that slice `i` is in, which follow one another in the table."""
        first = i - int(self.column("slice")[i])
        stop = first + 1
        while stop < len(self) and self.column("slice")[stop] > 0:
            stop += 1
        return range(first, stop)

    def volume(self, rows: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Images (Z, H, W) float32 and masks (Z, H, W) uint8 of the given slices of one frame, such as `Volume.rows`.

        Raises ValueError for slices of several frames.
        """
        index = np.asarray(rows, dtype=np.int64)
        frames = {(self.column("subject")[i], int(self.column("frame")[i])) for i in index}
        if len(frames) != 1:
            raise ValueError(f"slices of {len(frames)} volumes where one is expected")
        own, first = self.column("row")[index].tolist(), int(index[0])
        return self._decoded(self._rows_of_array("image", first, own), first), self._rows_of_array("mask", first, own)

    def volumes(self, split: str | None = None) -> list[Volume]:
        """Every frame of every subject, or of those in one split, in the order of the table."""
        names = ["subject", "vendor", "centre", "phase", "frame", "labelled", "split", "slice_mm", "row_mm", "col_mm"]
        names += [STRUCTURES_FIELD.name] if self.partly_labelled else []
        columns = {name: self.column(name) for name in names}
        chosen = np.arange(len(self)) if split is None else np.flatnonzero(columns["split"] == split)
        frames = zip(columns["subject"][chosen].tolist(), columns["frame"][chosen].tolist(), strict=True)
        rows: dict[tuple[str, int], list[int]] = {}
        for i, frame in zip(chosen.tolist(), frames, strict=True):
            rows.setdefault(frame, []).append(i)
        order = self.column("slice")
        return [_volume(columns, sorted(found, key=lambda i: int(order[i]))) for found in rows.values()]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Slice `i`: `image` (H, W) float32, `mask` (H, W) uint8 and every column of the table. Raises IndexError."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"slice {i} of {len(self)}")
        at = i % len(self)
        facts = {name: self.table.column(name)[at].as_py() for name in self.table.column_names}
        return {"image": self.image(at), "mask": self.mask(at), **facts}

    def _rows_of_array(self, kind: str, i: int, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Read rows of the array `kind` (`image` or `mask`) of slice `i`'s subject, (len(rows), H, W)."""
        subject = str(self.column("subject")[i])
        try:
            try:
                return self._array(subject, kind).rows(rows)
            except ValueError:
                opened = self._arrays.pop((subject, kind), None)
                if opened is not None and fs.exists(opened.path):
                    raise
                # Another process needed the room and removed the copy on this node, perhaps while it was opened.
                return self._array(subject, kind).rows(rows)
        except ValueError as error:
            folder = subject_folder("", subject)
            remedy = f"remove {folder} and ingest (or export) again: the others are kept"
            raise InputError(f"{subject}, {kind}", str(error), remedy) from error
        except OSError as error:
            told = f"cannot be read ({error.strerror or error}); check the disk and its permissions"
            raise StageError(f"{subject}, {kind}: {told}") from error

    def _array(self, subject: str, kind: str) -> ShardedArray:
        """The open array `kind` (`image` or `mask`) of a subject, from the copy on this node if the store is remote."""
        if (subject, kind) not in self._arrays:
            folder = self._copy.of(subject_folder(self.run, subject))
            self._arrays[subject, kind] = ShardedArray.open(fs.join(folder, kind))
        return self._arrays[subject, kind]

    def _decoded(self, stored: npt.NDArray[np.int16], i: int) -> npt.NDArray[np.float32]:
        scale, offset = float(self.column("scale")[i]), float(self.column("offset")[i])
        if scale == 1.0 and offset == 0.0:
            return stored.astype(np.float32)
        return (stored * scale + offset).astype(np.float32)


def _volume(columns: Mapping[str, npt.NDArray[Any]], rows: Sequence[int]) -> Volume:
    i = rows[0]
    text = {name: str(columns[name][i]) for name in ("subject", "vendor", "centre", "phase", "split")}
    slice_mm, row_mm, col_mm = (float(columns[name][i]) for name in ("slice_mm", "row_mm", "col_mm"))
    return Volume(
        **text,
        frame=int(columns["frame"][i]),
        rows=tuple(rows),
        labelled=bool(columns["labelled"][i]),
        spacing=(slice_mm, row_mm, col_mm),
        structures=tuple(str(columns["structures"][i]).split()) if "structures" in columns else ALL_STRUCTURES,
    )
