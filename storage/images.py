"""An image to read, whatever holds it: a NIfTI file or the folder of a DICOM study."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.dicom.study import DicomStudy, change_stamp
from storage.nifti.file import NiftiFile, is_nifti_name
from storage.nifti.header import Header, Spacing
from storage.nifti.write import write_mask_like, write_mask_on


def is_study(path: str) -> bool:
    """Whether the image is to be read as the folder of a DICOM study: a folder that is not named as a NIfTI file is."""
    if is_nifti_name(path):
        return False
    try:
        return fs.is_folder(path)
    except OSError:  # a name that no file can have: whoever opens it says so
        return False


def open_image(path: str, spacing: Spacing | None = None) -> NiftiFile | DicomStudy:
    """The image, its header checked. `spacing` (slice, row, column; mm) replaces its voxel size. Raises InputError."""
    return DicomStudy(path, spacing) if is_study(path) else NiftiFile(path, spacing)


def read_image_header(path: str, spacing: Spacing | None = None) -> Header:
    """The image's header; no intensities are read. Raises InputError."""
    with open_image(path, spacing) as image:
        return image.header


def left_out_of(path: str) -> tuple[str, ...]:
    """What of a DICOM study is not in the image, in lines; nothing of a NIfTI file. Raises InputError."""
    return DicomStudy(path).left_out if is_study(path) else ()


def write_mask_of(path: str, mask: npt.NDArray[np.uint8], image: str, spacing: Spacing | None = None) -> None:
    """Write a mask (Z, H, W) or (T, Z, H, W) as NIfTI on the grid of an image; atomic. Raises InputError."""
    if is_study(image):
        write_mask_on(path, mask, DicomStudy(image).header)
    else:
        write_mask_like(path, mask, image, spacing)


def image_stamp(path: str) -> str:
    """What changes when the image's content does. Raises FileNotFoundError."""
    return change_stamp(path) if is_study(path) else fs.change_stamp(path)
