"""An image to read, whatever holds it: a NIfTI file or the folder of a DICOM study, turned to the networks' way."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.dicom.study import DicomStudy, change_stamp
from storage.errors import InputError
from storage.nifti.file import NiftiFile, is_nifti_name
from storage.nifti.header import Header, Spacing, stated_spacing
from storage.nifti.orientation import HEADER, Orientation, orientation_of
from storage.nifti.write import write_mask_like, write_mask_on

Array = npt.NDArray[Any]


class Image:
    """An open image. `header` and frames are those of the turned array, `stored` is the image as it is stored.

    `spacing` (slice, row, column of the turned array; mm) replaces its voxel size, `orientation` is `header` or as
    `parsed_orientation` gives it, or that of another image, whose mask this is. Raises InputError.
    """

    def __init__(self, path: str, spacing: Spacing | None = None, orientation: str | Orientation = HEADER) -> None:
        self.stored = DicomStudy(path, spacing) if is_study(path) else NiftiFile(path, spacing)
        self.name = self.stored.name
        self._cine: Array | None = None
        try:
            stored = self.stored.header
            if isinstance(orientation, str):
                orientation = orientation_of(stored, orientation)
            self.orientation: Orientation = orientation
            stated = None if spacing is None else stated_spacing(spacing, self.name)
            self.header = self.orientation.turn.header(stored, stated)
        except BaseException:
            self.close()
            raise

    def frame(self, index: int | None) -> Array:
        """One frame (Z, H, W), turned; see `NiftiFile.frame`."""
        turn = self.orientation.turn
        if not turn.moves_frames:
            data = self.stored.frame(index)
            return data if turn.nothing else turn.volume(data)
        if self._cine is None:
            frames = range(self.stored.header.frames)
            self._cine = turn.cine(np.stack([self.stored.frame(frame) for frame in frames]))
        if index is None or not 0 <= index < len(self._cine):
            problem = f"has no frame {index}: its frames are 0 to {len(self._cine) - 1}"
            raise InputError(self.name, problem, "correct ED and ES in the data set's table")
        found: Array = self._cine[index]
        return found

    def close(self) -> None:
        """Close the image."""
        self.stored.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_study(path: str) -> bool:
    """Whether the image is to be read as the folder of a DICOM study: a folder that is not named as a NIfTI file is."""
    if is_nifti_name(path):
        return False
    try:
        return fs.is_folder(path)
    except OSError:  # a name that no file can have: whoever opens it says so
        return False


def open_image(path: str, spacing: Spacing | None = None, orientation: str | Orientation = HEADER) -> Image:
    """The image, its header checked; see `Image`. Raises InputError."""
    return Image(path, spacing, orientation)


def read_image_header(path: str, spacing: Spacing | None = None, orientation: str | Orientation = HEADER) -> Header:
    """The turned image's header; no intensities are read. Raises InputError."""
    with open_image(path, spacing, orientation) as image:
        return image.header


def left_out_of(path: str) -> tuple[str, ...]:
    """What of a DICOM study is not in the image, in lines; nothing of a NIfTI file. Raises InputError."""
    return DicomStudy(path).left_out if is_study(path) else ()


def write_mask_of(
    path: str, mask: npt.NDArray[np.uint8], image: str, spacing: Spacing | None = None, orientation: str = HEADER
) -> None:
    """Write the mask (Z, H, W) or (T, Z, H, W) of an image that was opened with the same spacing and orientation, as
    NIfTI on the grid in which the image is stored; atomic. Raises InputError."""
    with open_image(image, spacing, orientation) as opened:
        stored, grid = opened.orientation.turn.back(mask), opened.stored.header
    if is_study(image):
        write_mask_on(path, stored, grid)
    else:
        write_mask_like(path, stored, image, spacing)


def image_stamp(path: str) -> str:
    """What changes when the image's content does. Raises FileNotFoundError."""
    return change_stamp(path) if is_study(path) else fs.change_stamp(path)
