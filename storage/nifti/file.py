"""Reads NIfTI files. The header is checked before the data are read. Arrays are (slices, rows, columns).

A slice (H, W) has the file's second axis as rows and the first as columns. So a volume is the file's array (x, y, z)
transposed to (z, y, x). It is returned as stored; `storage.images` turns it. Free-text fields are never read.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt
from isal.igzip import IGzipFile
from nibabel.arrayproxy import ArrayProxy

from storage import fs
from storage.errors import InputError
from storage.nifti.header import CUT_OFF, DAMAGED, Header, Spacing, checked_header, read_raw_header

Array = npt.NDArray[Any]

# No cardiac study has frames of 2^28 voxels (512 × 512 × 1024). A header that claims more is broken.
MOST_FRAME_VOXELS = 2**28
DEFLATE_RATIO = 1032  # no gzip stream grows by a larger factor
ENDINGS = (".nii.gz", ".nii")


def is_nifti_name(path: str) -> bool:
    """Whether a file is named as NIfTI files are."""
    return path.lower().endswith(ENDINGS)


class NiftiFile:
    """An open NIfTI file with a checked header. If frames are read in order, the file is decompressed only once.

    `spacing` (slice, row, column; mm) replaces the header's voxel size, which is then not checked. Raises InputError,
    naming the file without its folder, if anything is wrong.
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
        self._nifti = read_raw_header(self._stream, self.name)
        self.header = checked_header(self._nifti, path, spacing)
        wanted = self._check_size()
        # A gzip file ends with the length of its content. If the header asks for another length, the whole file is read
        # first: it may be cut off after the wanted frames, or be complete and made of several parts.
        self._unsure = wanted if self._zipped and trailer != wanted % 2**32 else None
        self._data = ArrayProxy(self._stream, self._nifti, mmap=False)

    def _check_size(self) -> int:
        """The bytes of header and data, decompressed. Raises InputError if the file cannot hold that many."""
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
        """Read one frame (Z, H, W) in the file's type, scaled if the header says so.

        `index` is None for a file of one frame. Raises InputError if there is no such frame, or if it is damaged or
        does not fit in memory.
        """
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
                self._stream.read(1)  # reads to the end, where the stream's checksum is compared
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
    """The InputError for a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return InputError(name, "no such file", "copy it from the data set or correct its name")
    return InputError(name, f"cannot be opened ({error.strerror})", "check that it is a file and its permissions")


def read_header(path: str, spacing: Spacing | None = None) -> Header:
    """Read and check the header of a NIfTI file (.nii or .nii.gz, local or remote) alone. Raises InputError."""
    with NiftiFile(path, spacing) as file:
        return file.header


def _unzipped(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, IGzipFile(fileobj=raw))  # type: ignore[no-untyped-call]
