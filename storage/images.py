"""Opens an image and turns it to the orientation that the networks expect.

An image is a NIfTI file or the folder of a DICOM study.
"""

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
    """An open image. `header` and `frame` are those of the turned array; `stored` is the image as it is stored.

    `spacing` (slice, row, column of the turned array; mm) replaces the image's voxel size. `orientation` is `header` or
    a text from `parsed_orientation`. For a mask it is the Orientation of the mask's image. Raises InputError if the
    file cannot be opened or its header is not valid.
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
        """One turned frame (Z, H, W); see `NiftiFile.frame`. Raises InputError if there is no such frame."""
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
    """Whether `path` is to be read as a DICOM study: it is a folder, and its name is not that of a NIfTI file."""
    if is_nifti_name(path):
        return False
    try:
        return fs.is_folder(path)
    except OSError:  # no file can have such a name; opening it raises the error
        return False


def open_image(path: str, spacing: Spacing | None = None, orientation: str | Orientation = HEADER) -> Image:
    """Open an image and check its header; see `Image`. Raises InputError."""
    return Image(path, spacing, orientation)


def read_image_header(path: str, spacing: Spacing | None = None, orientation: str | Orientation = HEADER) -> Header:
    """The turned image's header; no intensities are read. Raises InputError."""
    with open_image(path, spacing, orientation) as image:
        return image.header


def left_out_of(path: str) -> tuple[str, ...]:
    """The images of a DICOM study that are not used, one kind a line. Empty for a NIfTI file. Raises InputError."""
    return DicomStudy(path).left_out if is_study(path) else ()


def write_mask_of(
    path: str, mask: npt.NDArray[np.uint8], image: str, spacing: Spacing | None = None, orientation: str = HEADER
) -> None:
    """Write an image's mask, (Z, H, W) or (T, Z, H, W), as NIfTI on the grid in which the image is stored; atomic.

    `spacing` and `orientation` must be those with which the image was opened when the mask was made. Raises InputError.
    """
    with open_image(image, spacing, orientation) as opened:
        stored, grid = opened.orientation.turn.back(mask), opened.stored.header
    if is_study(image):
        write_mask_on(path, stored, grid)
    else:
        write_mask_like(path, stored, image, spacing)


def image_stamp(path: str) -> str:
    """A text that changes when the image's content changes. Raises FileNotFoundError."""
    return change_stamp(path) if is_study(path) else fs.change_stamp(path)
