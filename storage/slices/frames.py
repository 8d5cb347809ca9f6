"""Reads and checks a subject's frames. `ingest` stores them; `inspect` only looks at them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import InputError
from storage.images import Image, open_image
from storage.nifti.checks import check_mask_frame, check_same_grid, checked_image, checked_labels, rounded_labels
from storage.nifti.header import Header
from storage.nifti.label_order import check_coding
from storage.nifti.orientation import Orientation
from storage.slices.intensities import Quantised, Statistics, quantise, statistics
from storage.subjects import ALL_STRUCTURES, STRUCTURES, FrameSource, Subject, structures_text


@dataclass(frozen=True)
class Frame:
    """One volume. `image` holds (Z, H, W) int16 with scale and offset.

    `mask` is (Z, H, W) uint8 with LV 1, MYO 2, RV 3, or None if the frame is not labelled. Image and mask are turned as
    `orientation` says; `header` is that of the turned image.
    """

    source: FrameSource
    header: Header
    image: Quantised
    statistics: Statistics
    mask: npt.NDArray[np.uint8] | None
    orientation: Orientation

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the image's shape and intensities. The same image under two names has the same digest."""
        image = self.image
        facts = repr((image.stored.shape, image.scale, image.offset)).encode()
        return hashlib.sha256(facts + image.stored.tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What the slice store records of this frame: values of the index's columns, by column name.

        `slices` is the number of slices. `absent`, if there, names the structures that were drawn but are not in the
        mask.
        """
        slices, height, width = self.image.stored.shape
        slice_mm, row_mm, col_mm = self.header.spacing_mm
        seen = self.statistics
        return self._facts_of_mask() | {
            "phase": self.source.phase,
            "frame": self.source.frame,
            "slices": slices,
            "height": height,
            "width": width,
            "slice_mm": slice_mm,
            "row_mm": row_mm,
            "col_mm": col_mm,
            "pixel_area_mm2": row_mm * col_mm,
            "labelled": self.mask is not None,
            "scale": self.image.scale,
            "offset": self.image.offset,
            "volume_mean": seen.mean,
            "volume_std": seen.std,
            "volume_min": seen.minimum,
            "volume_max": seen.maximum,
            "volume_p005": seen.p005,
            "volume_p995": seen.p995,
        }

    def _facts_of_mask(self) -> dict[str, Any]:
        """`structures`: those drawn, if not all were. `absent`: those drawn that are not in the mask, if any."""
        if self.mask is None:
            return {}
        there = np.bincount(self.mask.ravel(), minlength=4)
        drawn = self.source.structures
        absent = [name for name in drawn if not there[STRUCTURES[name]]]
        facts = {} if drawn == ALL_STRUCTURES else {"structures": structures_text(drawn)}
        return facts | ({"absent": structures_text(absent)} if absent else {})


def read_frames(subject: Subject) -> Iterator[Frame]:
    """Yield every frame with its mask, in order. All files are opened and their headers checked before data are read.

    A file that holds several frames is opened once and read forwards. Raises InputError for the first fault. The checks
    of files and grids are in `nifti` and `dicom`, the check of the order of labels is in `label_order`.
    """
    with _opened(subject) as opened:
        for source in subject.frames:
            file = opened[source.image]
            mask = None if source.mask is None else _mask(opened[source.mask], source, subject)
            image = checked_image(file.frame(source.image_index), file.name, source.image_index)
            yield Frame(source, file.header, quantise(image), statistics(image), mask, file.orientation)


def frame_shapes(subject: Subject) -> list[tuple[int, int, int]]:
    """(slices, height, width) of each frame, by the headers alone.

    Raises InputError for the first fault that the headers of images and masks show, as `read_frames` does.
    """
    with _opened(subject) as opened:
        return [opened[source.image].header.volume_shape for source in subject.frames]


@contextmanager
def _opened(subject: Subject) -> Iterator[dict[str, Image]]:
    """All images and masks of a subject, open, by their paths. Raises InputError for the first fault of a header."""
    opened: dict[str, Image] = {}
    try:
        for source in subject.frames:
            if source.image not in opened:
                opened[source.image] = open_image(source.image, subject.spacing, subject.orientation)
            if source.mask is not None and source.mask not in opened:  # a mask is turned as its image is
                opened[source.mask] = open_image(source.mask, subject.spacing, opened[source.image].orientation)
        _check_headers(subject, opened)
        yield opened
    finally:
        for file in opened.values():
            file.close()


def _check_headers(subject: Subject, opened: Mapping[str, Image]) -> None:
    placement = subject.check_masks and not subject.trust_mask_place
    size = opened[subject.frames[0].image].header.volume_shape[1:]
    for source in subject.frames:
        ours = opened[source.image]
        if source.mask is not None:
            theirs = opened[source.mask]
            check_same_grid(ours.stored.header, theirs.stored.header, placement, subject.subject)
            check_mask_frame(ours.header, theirs.header, source.mask_index)
        if ours.header.volume_shape[1:] != size:
            raise InputError(
                ours.name,
                f"its slices are {_by(ours.header.volume_shape[1:])}, another frame's {_by(size)}",
                "list the frames as subjects of their own in a table",
            )


def _mask(file: Image, source: FrameSource, subject: Subject) -> npt.NDArray[np.uint8]:
    coding = dict(subject.labels)
    mask = checked_labels(file.frame(source.mask_index), coding, file.name, source.mask_index)
    if not mask.any():
        elsewhere = _labelled_frames(file) if source.mask_index is not None else []
        found = f"; it has labels at frames {', '.join(map(str, elsewhere))}" if elsewhere else ""
        raise InputError(
            file.name,
            f"the mask is empty at {source.phase}, frame {source.frame} (from 0)" + found,
            "correct ED and ES, which say where the masks are, or leave the mask out",
        )
    _check_drawn(mask, source, file.name)
    if subject.check_masks and not subject.trust_label_order:
        check_coding(mask, coding, file.name, subject.subject)
    return mask


def _check_drawn(mask: npt.NDArray[np.uint8], source: FrameSource, name: str) -> None:
    """Raise InputError if the mask has a structure that, according to the data set, was not drawn in it."""
    there = np.bincount(mask.ravel(), minlength=4)
    for structure, label in STRUCTURES.items():
        if there[label] and structure not in source.structures:
            told = structures_text(source.structures)
            raise InputError(
                name,
                f"the mask has {structure} at {source.phase}, but structures says '{told}'",
                f"name {structure} in structures; or, to drop it, write background for its value in the column labels",
            )


def _labelled_frames(file: Image) -> list[int]:
    return [frame for frame in range(file.header.frames) if rounded_labels(file.frame(frame)).any()]


def _by(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
