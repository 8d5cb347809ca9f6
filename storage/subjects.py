"""A subject as every layout describes it, and the Arrow schema of the slice store's index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from storage.errors import InputError

BACKGROUND, LV, MYO, RV = 0, 1, 2, 3
STRUCTURES: Final = {"LV": LV, "MYO": MYO, "RV": RV}
ALL_STRUCTURES: Final = tuple(STRUCTURES)
SPLITS: Final = ("train", "validation", "test", "excluded")
PHASES: Final = ("ED", "ES", "-")

SLICES_VERSION: Final = "1"


@dataclass(frozen=True)
class FrameSource:
    """One volume of a subject: where its image is and, if it is labelled, its mask.

    `phase` is `ED`, `ES` or `-`. `frame` is the 0-based frame number in the study. `image` is a file, or the folder of
    a DICOM study. `image_index` is the index along the fourth axis of the image, None for a 3D file; `mask_index` is
    the same for the mask. `structures` names the structures that were drawn in the mask. If another one is not in the
    mask, it may still be in the image. Paths are full paths or URIs; they are never stored.
    """

    phase: str
    frame: int
    image: str
    image_index: int | None
    mask: str | None
    mask_index: int | None
    structures: tuple[str, ...] = ALL_STRUCTURES


@dataclass(frozen=True)
class Subject:
    """One subject of one data set, ready to be read.

    `labels` pairs the values in the mask files with ours: LV 1, MYO 2, RV 3 (0 stays 0); any other value is an error.
    `split` is None until `layouts.splits.assign` has run. `spacing` (slice, row, column; mm) overrides the headers.
    `orientation` says how arrays are turned: `header`, `stored`, or as `parsed_orientation` gives it. `check_masks`
    says whether to check that a mask lies on its image in space, and that its labels lie as in a heart.
    `trust_mask_place` and `trust_label_order` each leave out one of these two checks. `left_out` describes the images
    of its folder that are not used, one kind a line.
    """

    subject: str
    layout: str
    vendor: str
    centre: str
    frames: tuple[FrameSource, ...]
    split: str | None
    split_reason: str
    labels: tuple[tuple[int, int], ...]
    terms: str
    spacing: tuple[float, float, float] | None = None
    check_masks: bool = True
    trust_mask_place: bool = False
    trust_label_order: bool = False
    left_out: tuple[str, ...] = ()
    orientation: str = "header"

    @property
    def labelled(self) -> bool:
        """Whether any frame has a mask."""
        return any(f.mask is not None for f in self.frames)


def left_out_lines(subjects: Iterable[Subject]) -> tuple[str, ...]:
    """The lines in `left_out` of all subjects, each with the subject's name in front."""
    return tuple(f"{subject.subject}: left out: {line}" for subject in subjects for line in subject.left_out)


@dataclass(frozen=True)
class Skipped:
    """A subject (or a row, or a file) that is not used, with the reason and a remedy. `file` is without its folder."""

    subject: str
    file: str
    reason: str
    remedy: str

    def as_error(self, more: str = "") -> InputError:
        """The same as an error, for callers that cannot go on without this subject. `more` is added to the reason."""
        where = ", ".join(name for name in (self.subject, self.file) if name != "-")
        return InputError(where, f"{self.reason}{more}", self.remedy)


# One row a slice. `row` is the index in the subject's own arrays, `slice` the index along the volume's slice axis;
# intensity = stored * scale + offset; the volume_ columns are statistics over the frame's whole volume, as read.
SLICE_SCHEMA: Final = pa.schema(
    [
        pa.field("slice_id", pa.int64(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("vendor", pa.string(), nullable=False),
        pa.field("centre", pa.string(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("slice", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("slice_mm", pa.float64(), nullable=False),
        pa.field("row_mm", pa.float64(), nullable=False),
        pa.field("col_mm", pa.float64(), nullable=False),
        pa.field("pixel_area_mm2", pa.float64(), nullable=False),
        pa.field("labelled", pa.bool_(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("scale", pa.float64(), nullable=False),
        pa.field("offset", pa.float64(), nullable=False),
        pa.field("volume_mean", pa.float64(), nullable=False),
        pa.field("volume_std", pa.float64(), nullable=False),
        pa.field("volume_min", pa.float64(), nullable=False),
        pa.field("volume_max", pa.float64(), nullable=False),
        pa.field("volume_p005", pa.float64(), nullable=False),
        pa.field("volume_p995", pa.float64(), nullable=False),
        pa.field("layout", pa.string(), nullable=False),
        pa.field("terms", pa.string(), nullable=False),
    ],
    metadata={"cardiomix_slices": SLICES_VERSION},
)

# This column exists only if some mask lacks a structure that nobody drew. A cell names the structures that were drawn,
# in our order with a space between them, such as "LV MYO"; it is "" if the slice is not labelled.
STRUCTURES_FIELD: Final = pa.field("structures", pa.string(), nullable=False)


def structures_text(structures: Iterable[str]) -> str:
    """The cell of a column `structures` for a slice in whose mask these are drawn, such as `LV MYO`."""
    return " ".join(name for name in STRUCTURES if name in structures)


def partly_drawn(texts: Iterable[str]) -> bool:
    """Whether a column with these cells is needed: some labelled slice has a structure that nobody drew."""
    return not set(texts) <= {"", structures_text(ALL_STRUCTURES)}
