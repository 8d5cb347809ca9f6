"""Surveys data folders before anything is stored: each subject is read as `ingest` reads it, but only numbers stay.

A subject that `ingest` would skip is skipped here for the same reason. Of a subject's voxels, only one small picture is
kept, so that much data need little memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.errors import InputError
from storage.layouts import LayoutOptions, collect, same_images, splits
from storage.nifti.header import Header, Spacing
from storage.nifti.orientation import Orientation
from storage.slices.frames import Frame, read_frames
from storage.slices.store import subject_folder
from storage.slices.writer import source_hash
from storage.subjects import ALL_STRUCTURES, LV, MYO, RV, Skipped, Subject, left_out_lines

PICTURE_PIXELS, PICTURE_PIXEL_MM = 128, 1.5  # 192 mm hold a heart and the chest wall in front of it
WINDOW = (1, 99)  # percentiles

Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class VolumeFacts:
    """Facts about one frame. `slices` is the number of slices; `p995` is p99.5 of the intensities as read.

    `contrast` is the standard deviation divided by p99.5 - p0.5, dimensionless. `structures` names those that were
    drawn in the mask, according to the data set.
    """

    phase: str
    frame: int
    slices: int
    p995: float
    contrast: float
    mask: MaskFacts | None
    structures: tuple[str, ...] = ALL_STRUCTURES


@dataclass(frozen=True)
class MaskFacts:
    """Facts about a labelled frame's mask. Volumes are in ml; 0 means that the structure is absent.

    `blood_to_muscle` is the mean intensity of the LV divided by that of the MYO. It is None if one of them is absent,
    or if the mean of the MYO is not positive. `at_border` says whether any label lies on the image's outermost rows or
    columns.
    """

    lv_ml: float
    myo_ml: float
    rv_ml: float
    blood_to_muscle: float | None
    at_border: bool

    @property
    def absent(self) -> tuple[str, ...]:
        """The structures that are not in the mask."""
        volumes = {"LV": self.lv_ml, "MYO": self.myo_ml, "RV": self.rv_ml}
        return tuple(name for name in ALL_STRUCTURES if volumes[name] == 0)


@dataclass(frozen=True)
class Picture:
    """A middle slice around the heart, or around the image's centre if nothing is labelled.

    `image` and `mask` are (128, 128) uint8 with pixels of 1.5 mm, whatever the file's are. `image` is 0 at the lower
    percentile of `WINDOW` and 255 at the upper one. `mask` is LV 1, MYO 2, RV 3.
    """

    image: Grey
    mask: Grey
    phase: str
    slice: int


@dataclass(frozen=True)
class SubjectFacts:
    """Facts about a subject that `ingest` would take.

    Matrix and spacing (slice, row, column; mm) are those of the first frame. `orientation` says how the first frame is
    turned, and why. `digests` holds one for each frame (`Frame.digest`).
    """

    subject: str
    vendor: str
    centre: str
    split: str
    height: int
    width: int
    spacing_mm: Spacing
    orientation: Orientation
    volumes: tuple[VolumeFacts, ...]
    picture: Picture
    digests: tuple[str, ...]

    @property
    def pixel_area_mm2(self) -> float:
        """Area of a pixel in mm²."""
        return self.spacing_mm[1] * self.spacing_mm[2]

    @property
    def labelled(self) -> bool:
        """Whether any frame has a mask."""
        return any(v.mask is not None for v in self.volumes)

    @property
    def p995(self) -> float:
        """Median of the volumes' p99.5, in intensities as read."""
        return float(np.median([v.p995 for v in self.volumes]))

    @property
    def contrast(self) -> float:
        """Median of the volumes' contrast, dimensionless."""
        return float(np.median([v.contrast for v in self.volumes]))

    def mask(self, phase: str) -> MaskFacts | None:
        """Facts about the mask of the first labelled frame of a phase; None if there is none."""
        return next((v.mask for v in self.volumes if v.phase == phase and v.mask is not None), None)


@dataclass(frozen=True)
class Survey:
    """The subjects, sorted by name, and what `ingest` would list in skipped.csv, in the same order.

    `left_out` describes the images of the subjects that are not used, one kind a line.
    """

    subjects: tuple[SubjectFacts, ...]
    skipped: tuple[Skipped, ...]
    left_out: tuple[str, ...] = ()


def survey(
    data: Sequence[str],
    options: LayoutOptions | None = None,
    layout: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read every subject of the folders, several at a time. `progress` is called with (done, total).

    Raises InputError if a folder cannot be used at all or the protocol is impossible with these subjects, and
    StageError if an object store does not answer.
    """
    chosen = options or LayoutOptions()
    subjects, skipped = collect(data, chosen, layout)
    found: dict[str, SubjectFacts] = {}
    # Decompression and numpy let other threads run. With an object store, threads mostly wait for its answers.
    threads = os.cpu_count() if all(map(fs.is_local, data)) else fs.REQUESTS

    before = 0

    def read(wanted: Sequence[Subject]) -> list[Skipped]:
        nonlocal before
        left_out = []
        with ThreadPoolExecutor(threads) as pool:
            for done, outcome in enumerate(pool.map(_measure, wanted), start=1):
                if isinstance(outcome, Skipped):
                    left_out.append(outcome)
                else:
                    found[outcome.subject] = outcome
                if progress is not None:
                    progress(before + done, before + len(wanted))
        left_out += same_images({name: facts.digests for name, facts in found.items()})
        for skip in left_out:
            found.pop(skip.subject, None)
        before += len(wanted)
        return left_out

    entered = splits.assign_splits_and_read(subjects, chosen, read, skipped)
    return Survey(
        tuple(replace(found[s.subject], split=s.split or "train") for s in entered),
        tuple(sorted(skipped, key=lambda s: (s.subject, s.file, s.reason))),
        left_out_lines(entered),
    )


def _measure(subject: Subject) -> SubjectFacts | Skipped:
    try:
        subject_folder("", subject.subject)  # both raise what `ingest` raises before it reads
        source_hash(subject)
        return _facts(subject)
    except InputError as error:
        return Skipped(subject.subject, error.where, error.problem, error.remedy)


def _facts(subject: Subject) -> SubjectFacts:
    volumes, digests = [], []
    header: Header | None = None
    orientation: Orientation | None = None
    picture: Picture | None = None
    for frame in read_frames(subject):
        header, orientation = header or frame.header, orientation or frame.orientation
        if picture is None or (frame.mask is not None and not picture.mask.any()):
            picture = _picture(frame)
        volumes.append(_volume(frame))
        digests.append(frame.digest)
    assert (
        header is not None and orientation is not None and picture is not None
    )  # every layout gives at least one frame
    _, height, width = header.volume_shape
    return SubjectFacts(
        subject=subject.subject,
        vendor=subject.vendor,
        centre=subject.centre,
        split="",
        height=height,
        width=width,
        spacing_mm=header.spacing_mm,
        orientation=orientation,
        volumes=tuple(volumes),
        picture=picture,
        digests=tuple(digests),
    )


def _volume(frame: Frame) -> VolumeFacts:
    seen = frame.statistics
    span = seen.p995 - seen.p005
    return VolumeFacts(
        phase=frame.source.phase,
        frame=frame.source.frame,
        slices=len(frame.image.stored),
        p995=seen.p995,
        contrast=seen.std / span if span > 0 else 0.0,
        mask=None if frame.mask is None else _mask(frame, frame.mask),
        structures=frame.source.structures,
    )


def _mask(frame: Frame, mask: Grey) -> MaskFacts:
    voxels = np.bincount(mask.ravel(), minlength=4)
    ml = voxels * float(np.prod(frame.header.spacing_mm)) / 1000
    ratio = None
    if voxels[LV] and voxels[MYO]:
        blood, muscle = (
            float(frame.image.stored[mask == label].mean()) * frame.image.scale + frame.image.offset
            for label in (LV, MYO)
        )
        ratio = blood / muscle if muscle > 0 else None
    border = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
    return MaskFacts(float(ml[LV]), float(ml[MYO]), float(ml[RV]), ratio, any(edge.any() for edge in border))


def _picture(frame: Frame) -> Picture:
    """The picture of a frame: the middle one of its labelled slices, or of all slices if none is labelled."""
    stored = frame.image.stored
    mask = np.zeros(stored.shape, np.uint8) if frame.mask is None else frame.mask
    shown = np.flatnonzero(mask.any(axis=(1, 2)))
    z = int(shown[len(shown) // 2]) if len(shown) else len(stored) // 2
    centre = [(n - 1) / 2 for n in stored.shape[1:]]
    if len(shown):
        centre = [float(found.mean()) for found in np.nonzero(mask[z])]
    rows, cols = (
        _Samples(at, mm, n) for at, mm, n in zip(centre, frame.header.spacing_mm[1:], stored.shape[1:], strict=True)
    )
    image = cols.between(rows.between(stored[z].astype(np.float32)).T).T
    inside = np.outer(rows.inside, cols.inside)
    low, high = np.percentile(image[inside], WINDOW)
    grey = np.clip((image - low) / ((high - low) or 1.0), 0, 1) * 255
    return Picture(
        np.rint(grey * inside).astype(np.uint8),
        mask[z][np.ix_(rows.nearest, cols.nearest)] * inside.astype(np.uint8),
        frame.source.phase,
        z,
    )


class _Samples:
    """Where a picture's pixels lie along one axis of an image.

    The axis has `size` pixels of `mm` each; the picture's middle is at the pixel `centre`.
    """

    def __init__(self, centre: float, mm: float, size: int) -> None:
        at = centre + (np.arange(PICTURE_PIXELS) - (PICTURE_PIXELS - 1) / 2) * PICTURE_PIXEL_MM / mm
        self.inside = (at > -0.5) & (at < size - 0.5)
        at = np.clip(at, 0, size - 1)
        self.nearest = np.rint(at).astype(np.intp)
        self._below = np.floor(at).astype(np.intp)
        self._above = np.minimum(self._below + 1, size - 1)
        self._part = (at - self._below)[:, None].astype(np.float32)

    def between(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Sample `image` (size, n) at these places, linearly between pixels: (128, n) float32."""
        below, above = image[self._below], image[self._above]
        mixed: npt.NDArray[np.float32] = below + (above - below) * self._part
        return mixed
