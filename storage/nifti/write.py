"""Writes volumes and masks as NIfTI files, atomically. The same input gives the same bytes."""

from __future__ import annotations

import gzip
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from storage import fs
from storage.errors import InputError
from storage.nifti.file import NiftiFile
from storage.nifti.header import Header, Spacing

Array = npt.NDArray[Any]

FREE_TEXT = ("descrip", "aux_file", "intent_name", "db_name")


def write_volume(path: str, data: Array, spacing: Spacing, dtype: npt.DTypeLike) -> None:
    """Write (Z, H, W) or (T, Z, H, W) as a new file, atomically; gzipped if its name ends in .gz.

    `spacing` is (slice, row, column) in mm. The affine says that columns run to the patient's left and rows to the
    back, as in a DICOM axial image, so that viewers show row 0 at the top.
    """
    header = nib.Nifti1Header()
    slice_mm, row_mm, col_mm = spacing
    header.set_data_shape(data.shape[::-1])
    header.set_data_dtype(np.dtype(dtype))
    header.set_sform(np.diag([-col_mm, -row_mm, slice_mm, 1.0]), code="scanner")
    header.set_qform(np.diag([-col_mm, -row_mm, slice_mm, 1.0]), code="scanner")
    header.set_xyzt_units("mm", "sec")
    _write(path, header, data, np.dtype(dtype))


def write_mask_like(path: str, mask: npt.NDArray[np.uint8], reference: str, spacing: Spacing | None = None) -> None:
    """Write a mask (Z, H, W), or (T, Z, H, W) for a 4D reference, on the reference image's own grid; atomic.

    Voxel size, units and both transforms are the reference's, bit by bit; its free-text fields are not copied. If
    `spacing` is given, the voxel size in the reference's header may be an impossible one. Raises InputError if the
    shapes do not fit.
    """
    with NiftiFile(reference, spacing) as file:
        header, shape, name = file._nifti, file.header.shape, file.name
    wanted = shape[::-1] if mask.ndim == 4 else shape[2::-1]
    if mask.shape != wanted:
        raise InputError(name, f"a mask of shape {mask.shape} does not fit its {wanted}", "give a mask of this image")
    # The fields that place the grid stay as they are: writing them through nibabel would mend odd direction cosines.
    header.set_data_shape(mask.shape[::-1])
    header.set_data_dtype(np.uint8)
    for field in FREE_TEXT:
        if field in header.keys():  # noqa: SIM118 (a NIfTI header is no mapping)
            header[field] = b""
    header["cal_min"] = header["cal_max"] = 0
    _write(path, header, mask, np.dtype(np.uint8))


def write_mask_on(path: str, mask: npt.NDArray[np.uint8], grid: Header) -> None:
    """Write a mask (Z, H, W) or (T, Z, H, W) as a new file on the grid of `grid`, which has an affine; atomic."""
    header = nib.Nifti1Header()
    header.set_data_shape(mask.shape[::-1])
    header.set_data_dtype(np.uint8)
    affine = np.vstack([np.array(grid.affine), [0, 0, 0, 1]])
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    header.set_xyzt_units("mm", "sec")
    _write(path, header, mask, np.dtype(np.uint8))


def _write(path: str, header: nib.Nifti1Header, data: Array, dtype: np.dtype[Any]) -> None:
    header.set_slope_inter(1, 0)
    header["vox_offset"] = offset = int(header["sizeof_hdr"]) + 4  # four zero bytes: no extension follows
    stored = np.ascontiguousarray(data, dtype=dtype.newbyteorder(header.endianness))
    body = header.binaryblock.ljust(offset, b"\0") + stored.tobytes()
    # The gzip header gets no name and no time, so that equal data are equal bytes.
    fs.write_bytes(path, gzip.compress(body, compresslevel=6, mtime=0) if path.endswith(".gz") else body)
