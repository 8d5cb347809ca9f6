"""The header of a NIfTI file, which is checked before the data are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from nibabel.spatialimages import HeaderDataError

from storage import fs
from storage.errors import InputError

Spacing = tuple[float, float, float]

MAGIC = {b"n+1\0": 1, b"n+2\0": 2}

HEADER_BYTES: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}

UNIT_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}

SMALLEST_MM, LARGEST_MM = 0.01, 100.0

FARTHEST_MM = 1e6  # in an affine: nothing is a kilometre from a scanner's centre; others are ignored

CUT_OFF = "is damaged or cut off: it cannot be read to the end"

DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, isal_zlib.error, ValueError)  # type: ignore[assignment]


@dataclass(frozen=True)
class Header:
    """A header. `shape` is the file's own (x, y, z) or (x, y, z, t); `spacing_mm` is (slice, row, column).

    `affine` (3, 4) maps a voxel (x, y, z) to mm in the scanner's space (right, anterior, superior). It is None if the
    header has none.
    """

    shape: tuple[int, ...]
    spacing_mm: Spacing
    dtype: str
    path: str
    affine: tuple[tuple[float, ...], ...] | None = None

    @property
    def frames(self) -> int:
        """Number of frames; 1 for a 3D file."""
        return self.shape[3] if len(self.shape) == 4 else 1

    @property
    def directions(self) -> npt.NDArray[np.float64] | None:
        """Unit vectors (3, 3) along the file's x, y and z, one a column, in scanner space; None if not known."""
        if self.affine is None:
            return None
        columns = np.array(self.affine)[:, :3]
        lengths = np.linalg.norm(columns, axis=0)
        return columns / lengths if (lengths > 0).all() else None

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """Shape (Z, H, W) of one frame."""
        return self.shape[2], self.shape[1], self.shape[0]


def read_raw_header(stream: BinaryIO, name: str) -> nib.Nifti1Header:
    """Read the header block of a NIfTI-1 or NIfTI-2 file from the start of an uncompressed stream.

    Raises InputError, naming `name`, if the file is no NIfTI file, is cut off, or is one half of a .hdr/.img pair.
    """
    not_nifti = InputError(name, "is not a NIfTI file", "convert it to NIfTI, or name the folder of a DICOM study")
    try:
        block = stream.read(4)
        sizes = {int.from_bytes(block, order) for order in ("little", "big")} & set(HEADER_BYTES)
        if len(block) < 4 or not sizes:
            raise not_nifti
        kind = HEADER_BYTES[size := sizes.pop()]
        block += stream.read(size - 4)
        if len(block) < size:
            raise EOFError
    except DAMAGED as error:
        raise InputError(name, CUT_OFF, "copy the file again") from error
    magic = block[344:348] if size == 348 else block[4:8]
    if magic in (b"ni1\0", b"ni2\0"):
        raise InputError(name, "is one half of a .hdr/.img pair", "convert the pair to one .nii.gz file")
    if magic not in MAGIC:
        raise not_nifti
    # nibabel's own checks mend a voxel size of 0 to 1 mm in silence, so they are not run.
    header: nib.Nifti1Header = kind(block, check=False)
    return header


def checked_header(raw: nib.Nifti1Header, path: str, spacing: Spacing | None) -> Header:
    """Check a raw header. Returns shape, voxel size in mm (`spacing` overrides it), type of the data and affine.

    Raises InputError for shapes, data types and voxel sizes that a short-axis stack cannot have.
    """
    name = fs.base_name(path)
    axes = int(raw["dim"][0])
    if axes not in (3, 4):
        raise InputError(
            name, f"has {axes} axes where 3 (a volume) or 4 (a cine) are needed", "export it as x, y, slice (, frame)"
        )
    shape = tuple(int(n) for n in raw["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise InputError(name, f"its header claims {' × '.join(map(str, shape))} voxels", "mend the header")
    try:
        dtype = np.dtype(raw.get_data_dtype())
        raw.get_slope_inter()
    except (HeaderDataError, KeyError) as error:
        raise InputError(name, f"its header is not valid ({error})", "export it again") from error
    if dtype.kind not in "iuf":
        raise InputError(name, "its voxels are colours or complex numbers", "export it as grey values")
    offset = float(raw["vox_offset"])
    if not (math.isfinite(offset) and offset >= int(raw["sizeof_hdr"])):
        raise InputError(name, f"its header says that data start at byte {offset:g}", "export it again")
    spacing_mm = _voxel_size(raw, name) if spacing is None else stated_spacing(spacing, name)
    return Header(shape, spacing_mm, dtype.str, path, _affine(raw))


def _affine(raw: nib.Nifti1Header) -> tuple[tuple[float, ...], ...] | None:
    """The sform if there is one, else the qform, in mm; None if there is neither or its numbers are impossible."""
    try:
        affine = raw.get_sform() if raw["sform_code"] > 0 else raw.get_qform() if raw["qform_code"] > 0 else None
    except (HeaderDataError, ValueError):  # a quaternion longer than 1
        return None
    if affine is None or not (np.abs(affine) < FARTHEST_MM).all():
        return None
    unit = _unit(raw)
    return tuple(tuple(unit * float(v) for v in row) for row in affine[:3])


def _unit(raw: nib.Nifti1Header) -> float:
    try:
        return UNIT_MM[raw.get_xyzt_units()[0]]
    except KeyError:  # a code that the standard does not know
        return 1.0


def _voxel_size(raw: nib.Nifti1Header, name: str) -> Spacing:
    x, y, z = (
        abs(float(mm)) * _unit(raw) for mm in raw["pixdim"][1:4]
    )  # a sign there only says which way an axis runs
    if not all(SMALLEST_MM <= mm <= LARGEST_MM for mm in (x, y, z)):
        raise InputError(
            name,
            f"voxel size is {x:g} × {y:g} × {z:g} mm",
            "fix the header, or give slice, row and column distance in mm: predict --spacing '8 1.4 1.4', or a column "
            "spacing in a table for ingest",
        )
    return z, y, x


def parsed_spacing(text: str, where: str) -> Spacing:
    """Parse slice, row and column distance in mm from text such as `8 1.4 1.4` or `8 x 1.4 x 1.4`.

    Raises InputError, with `where` as its place, for other text.
    """
    words = text.lower().replace("×", " ").replace("x", " ").replace(",", " ").replace(";", " ").split()
    try:
        slice_mm, row_mm, col_mm = (float(word) for word in words)
    except ValueError as error:
        raise InputError(where, f"spacing is '{text}'", "write slice, row and column in mm: 8 1.4 1.4") from error
    return slice_mm, row_mm, col_mm


def stated_spacing(spacing: Spacing, name: str) -> Spacing:
    """Check and return a spacing (slice, row, column; mm) that the user gives for the image `name`.

    Raises InputError for a distance that is not between 0.01 and 100 mm.
    """
    if not all(SMALLEST_MM <= mm <= LARGEST_MM for mm in spacing):
        shown = " × ".join(f"{mm:g}" for mm in spacing)
        raise InputError(name, f"the spacing given for it is {shown} mm", "give slice, row and column distance in mm")
    return spacing
