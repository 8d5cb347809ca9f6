"""NIfTI in and out: the header is checked before the data are touched, arrays come out as slices, rows, columns.

A slice is (H, W): rows are the file's second axis, columns its first, so a volume is the file's (x, y, z) transposed
to (z, y, x). It is never turned by a header's direction cosines (some data sets' are not orthonormal, or lost): those
serve only to compare a mask with its image. Free-text fields are never read.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from isal.igzip import IGzipFile
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from storage import fs
from storage.errors import InputError
from storage.nifti.checks import checked_image, checked_labels

Spacing = tuple[float, float, float]
Array = npt.NDArray[Any]

MAGIC = {b"n+1\0": 1, b"n+2\0": 2}
HEADER_BYTES: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
UNIT_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
# A frame of 2^28 voxels (512 × 512 × 1024) is beyond any cardiac study; more is a broken header, not a large heart.
MOST_FRAME_VOXELS = 2**28
DEFLATE_RATIO = 1032  # no gzip stream grows by more
SMALLEST_MM, LARGEST_MM = 0.01, 100.0
FARTHEST_MM = 1e6  # in an affine: nothing is a kilometre from a scanner's centre, such numbers are no directions
CUT_OFF = "is damaged or cut off: it cannot be read to the end"
FREE_TEXT = ("descrip", "aux_file", "intent_name", "db_name")
DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, isal_zlib.error, ValueError)  # type: ignore[assignment]


@dataclass(frozen=True)
class Header:
    """What a header says. `shape` is the file's own (x, y, z) or (x, y, z, t); `spacing_mm` is (slice, row, column).

    `affine` (3, 4), in mm, goes from voxel (x, y, z) to the scanner's (right, anterior, superior); None where the
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


class NiftiFile:
    """An open file, its header checked; frames read forwards cost one decompression in all.

    `spacing` (slice, row, column; mm) stands in for the header's voxel size, which is then not looked at. Raises
    InputError for whatever is wrong, naming the file without its folder.
    """

    def __init__(self, path: str, spacing: Spacing | None = None) -> None:
        self.name = fs.base_name(path)
        try:
            self._size = fs.size(path)
            self._raw: BinaryIO = fs.open_binary(path)
        except OSError as error:
            raise not_opened(self.name, error) from error
        try:
            self._open(path, spacing)
        except OSError as error:
            self.close()
            raise not_opened(self.name, error) from error
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, spacing: Spacing | None) -> None:
        self._raw.seek(max(self._size - 4, 0))
        trailer = int.from_bytes(self._raw.read(4), "little")
        self._raw.seek(0)
        self._zipped = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        self._stream = _unzipped(self._raw) if self._zipped else self._raw
        self._nifti = _read_raw_header(self._stream, self.name)
        self.header = _checked(self._nifti, path, spacing)
        wanted = self._check_size()
        # A gzip file ends in its content's length. Where that is not what the header asks for, the file is read
        # through: it may break off behind the frames that are taken, or be whole, of several parts.
        self._unsure = wanted if self._zipped and trailer != wanted % 2**32 else None
        self._data = ArrayProxy(self._stream, self._nifti, mmap=False)

    def _check_size(self) -> int:
        """Bytes that header and data need, unpacked."""
        voxels = math.prod(self.header.volume_shape)
        claimed: int = voxels * self.header.frames * self._nifti.get_data_dtype().itemsize
        start, most = int(self._nifti["vox_offset"]), self._size * (DEFLATE_RATIO if self._zipped else 1)
        if start > most:
            raise InputError(self.name, f"its header says that data start at byte {start}", "export it again")
        if voxels > MOST_FRAME_VOXELS or start + claimed > most:
            raise InputError(
                self.name,
                f"its header claims {' × '.join(map(str, self.header.shape))} voxels, more than "
                + ("a study has" if voxels > MOST_FRAME_VOXELS else "the file can hold"),
                "copy the file again or mend its header",
            )
        return start + claimed

    def frame(self, index: int | None) -> Array:
        """One frame (Z, H, W) in the file's type, scaled if the header scales. `index` None: the file has one frame."""
        header = self.header
        if index is None and header.frames > 1:
            raise InputError(self.name, f"has {header.frames} frames where one was expected", "say which is meant")
        at = index or 0
        if not 0 <= at < header.frames:
            raise InputError(
                self.name,
                f"has no frame {at}: its frames are 0 to {header.frames - 1}",
                "correct ED and ES in the data set's table",
            )
        try:
            if self._unsure is not None:
                self._read_through(self._unsure)
            data = np.asarray(self._data[..., at] if len(header.shape) == 4 else self._data[...])
            if self._zipped and at == header.frames - 1:
                self._stream.read(1)  # to the end, where the stream's checksum is compared
        except MemoryError as error:
            raise InputError(self.name, "a frame does not fit in memory", "use a machine with more of it") from error
        except DAMAGED as error:
            raise InputError(self.name, CUT_OFF, "copy the file again") from error
        return data.transpose(2, 1, 0)

    def _read_through(self, wanted: int) -> None:
        self._stream.seek(0)
        while part := self._stream.read(2**20):
            wanted -= len(part)
        if wanted > 0:
            raise EOFError
        self._unsure = None

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def not_opened(name: str, error: OSError) -> InputError:
    """What to tell of a file that cannot even be opened."""
    if isinstance(error, FileNotFoundError):
        return InputError(name, "no such file", "copy it from the data set or correct its name")
    return InputError(name, f"cannot be opened ({error.strerror})", "check that it is a file and its permissions")


def read_header(path: str, spacing: Spacing | None = None) -> Header:
    """The header of a NIfTI file (.nii or .nii.gz, local or remote), checked; no data are read. Raises InputError."""
    with NiftiFile(path, spacing) as file:
        return file.header


def read_frame(
    path: str, index: int | None = None, spacing: Spacing | None = None
) -> tuple[npt.NDArray[np.float32], Spacing]:
    """One frame as (Z, H, W) float32 in the file's intensities, and (slice, row, column) in mm.

    `index` is along the fourth axis, None for a file of one frame. Raises InputError, also for intensities that are not
    finite or all the same.
    """
    with NiftiFile(path, spacing) as file:
        return checked_image(file.frame(index), file.name).astype(np.float32, copy=False), file.header.spacing_mm


def read_labels(path: str, index: int | None = None, coding: Mapping[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """One frame of a mask as (Z, H, W) uint8 in our labels.

    `coding` maps the file's values to ours (default LV 1, MYO 2, RV 3 as they are). Raises InputError for other values.
    """
    with NiftiFile(path) as file:
        return checked_labels(file.frame(index), coding or {1: 1, 2: 2, 3: 3}, file.name)


def write_volume(path: str, data: Array, spacing: Spacing, dtype: npt.DTypeLike) -> None:
    """Write (Z, H, W) or (T, Z, H, W) as a new file, gzipped if its name ends in .gz; atomic, same input same bytes.

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


def write_mask_like(path: str, mask: npt.NDArray[np.uint8], reference: str) -> None:
    """Write a mask (Z, H, W), or (T, Z, H, W) for a 4D reference, on the reference image's own grid; atomic.

    Voxel size, units and both transforms are the reference's, bit by bit; its free-text fields are not copied. Raises
    InputError if the shapes do not fit.
    """
    with NiftiFile(reference) as file:
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


def _write(path: str, header: nib.Nifti1Header, data: Array, dtype: np.dtype[Any]) -> None:
    header.set_slope_inter(1, 0)
    header["vox_offset"] = offset = int(header["sizeof_hdr"]) + 4  # four zero bytes: no extension follows
    stored = np.ascontiguousarray(data, dtype=dtype.newbyteorder(header.endianness))
    body = header.binaryblock.ljust(offset, b"\0") + stored.tobytes()
    # No name and no time in the gzip header, so that equal data are equal bytes.
    fs.write_bytes(path, gzip.compress(body, compresslevel=6, mtime=0) if path.endswith(".gz") else body)


def _unzipped(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, IGzipFile(fileobj=raw))  # type: ignore[no-untyped-call]


def _read_raw_header(stream: BinaryIO, name: str) -> nib.Nifti1Header:
    not_nifti = InputError(name, "is not a NIfTI file", "convert it, for instance with dcm2niix, or remove it")
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


def _checked(raw: nib.Nifti1Header, path: str, spacing: Spacing | None) -> Header:
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
    spacing_mm = _voxel_size(raw, name) if spacing is None else _stated(spacing, name)
    return Header(shape, spacing_mm, dtype.str, path, _affine(raw))


def _affine(raw: nib.Nifti1Header) -> tuple[tuple[float, ...], ...] | None:
    """The sform if there is one, else the qform; None for neither or for one that cannot be meant."""
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
            "fix the header, or list the file in a table with a column spacing (slice row column, mm)",
        )
    return z, y, x


def _stated(spacing: Spacing, name: str) -> Spacing:
    if not all(SMALLEST_MM <= mm <= LARGEST_MM for mm in spacing):
        shown = " × ".join(f"{mm:g}" for mm in spacing)
        raise InputError(name, f"the spacing given for it is {shown} mm", "give slice, row and column distance in mm")
    return spacing
