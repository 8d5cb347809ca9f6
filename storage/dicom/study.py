"""Finds the DICOM studies in a folder, and opens a study as `NiftiFile` opens a file: as a header and frames.

A study's folder is the highest one that holds no image of another study. So it does not matter how many folders lie
below it, one for each series or none at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.dicom.read import Plane, files_below, is_dicom, read_contents, read_pixels
from storage.dicom.stack import Stack, find_stack
from storage.errors import InputError
from storage.nifti.file import MOST_FRAME_VOXELS
from storage.nifti.header import Header, Spacing, stated_spacing

Array = npt.NDArray[Any]

MODALITIES = ("MR", "")
LOOKED_AT = 1000  # files that are looked at before a folder counts as one without DICOM


class DicomStudy:
    """The short-axis cine of a study's folder.

    `left_out` describes the other images in the folder, one kind a line. `manufacturer` is the scanner's Manufacturer.
    `spacing` (slice, row, column; mm) replaces the study's own. Raises InputError, naming the folder without those
    above it, if there is no such cine or if it is not complete.
    """

    def __init__(self, folder: str, spacing: Spacing | None = None) -> None:
        self.name = fs.base_name(folder)
        stack = _opened(folder, change_stamp(folder))
        self.left_out, self._planes = stack.left_out, stack.planes
        first = stack.planes[0][0]
        self.manufacturer = first.manufacturer
        rows, columns = first.size
        shape = (columns, rows, len(stack.planes), len(stack.planes[0]))
        if rows * columns * shape[2] > MOST_FRAME_VOXELS:
            raise InputError(
                self.name, f"has {' × '.join(map(str, shape))} voxels, more than a study has", "name another"
            )
        own = stack.spacing_mm
        self.header = Header(
            shape=shape,
            spacing_mm=own if spacing is None else stated_spacing(spacing, self.name),
            dtype=_dtype(first),
            path=folder,
            affine=tuple(tuple(float(v) for v in row) for row in stack.affine[:3]),
        )

    def frame(self, index: int | None) -> Array:
        """One phase (Z, H, W): integers as stored, or float32 if the study scales them.

        Raises InputError if there is no such phase or if its pixels cannot be decoded.
        """
        at = -1 if index is None else index
        if not 0 <= at < self.header.frames:
            raise InputError(
                self.name, f"has no frame {index}: its frames are 0 to {self.header.frames - 1}", "name one of them"
            )
        return np.stack([read_pixels(phases[at], self.name) for phases in self._planes])

    def close(self) -> None:
        """Do nothing, since no file is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def holds_dicom(folder: str) -> bool:
    """Whether one of the first thousand files in a folder or below it is a DICOM file."""
    return any(is_dicom(path) for path, _ in zip(files_below(folder), range(LOOKED_AT), strict=False))


def dicom_folders(place: str) -> list[str]:
    """The folders of the studies in `place`, sorted. Only MR images count.

    If there is one study, its folder is `place`, however deep its images lie: folders such as `DICOM` tell nobody which
    patient it is. Studies without a short-axis cine are among them.
    """
    folders = sorted({folder for folder, _ in _by_folder(place, _images(place)[0], top=True)})
    return [place] if len(folders) == 1 else folders


def change_stamp(folder: str) -> str:
    """SHA-256, in hex, over the names and stamps of a study's files: it changes when these files change."""

    def of_file(path: str) -> str:
        try:
            return fs.change_stamp(path)
        except OSError:  # such as a link that leads nowhere, which is not read either
            return ""

    digest = hashlib.sha256()
    files = list(files_below(folder))
    for path, stamp in zip(files, fs.map_concurrently(folder, of_file, files), strict=True):
        digest.update(repr((path.removeprefix(folder), stamp)).encode())
    return digest.hexdigest()


def _images(place: str) -> tuple[list[Plane], int, int]:
    """The MR images in a folder and below it, the number of other images, and the number of unreadable files."""
    contents = read_contents(place)
    planes = [plane for plane in contents.planes if plane.modality in MODALITIES]
    return planes, len(contents.planes) - len(planes), contents.unreadable


def _by_folder(folder: str, planes: Sequence[Plane], top: bool) -> Iterator[tuple[str, list[Plane]]]:
    """Yield each study's folder with its images.

    If `top` is set and all images of a study are in one folder below `folder`, the study's folder is that one.
    """
    if not top and len({plane.study for plane in planes}) == 1:
        yield folder, list(planes)
        return
    below: dict[str, list[Plane]] = {}
    for plane in planes:
        name, _, rest = plane.path.removeprefix(folder).lstrip("/").partition("/")
        below.setdefault(name if rest else "", []).append(plane)
    places: dict[str, set[str]] = {}
    for name, inside in below.items():
        for plane in inside:
            places.setdefault(plane.study, set()).add(name)
    own = {study for study, names in places.items() if len(names) > 1 or "" in names}
    if own:
        yield folder, [plane for plane in planes if plane.study in own]
    for name, inside in sorted(below.items()):
        rest_of_it = [plane for plane in inside if plane.study not in own]
        if rest_of_it:
            yield from _by_folder(fs.join(folder, name), rest_of_it, top=False)


@lru_cache(maxsize=8)
def _opened(folder: str, stamp: str) -> Stack:
    """Find the short-axis cine of a study's folder. Raises InputError as `DicomStudy` does.

    The result is cached until `stamp` changes, since headers take as long to read as pixels.
    """
    name = fs.base_name(folder)
    planes, others, unreadable = _images(folder)
    found = list(_by_folder(folder, planes, top=True))
    own = next((inside for place, inside in found if place == folder), None)
    if own is None and len(found) > 1:
        raise InputError(name, f"holds {len(found)} studies in folders of their own", "name one of these folders")
    own = own or (found[0][1] if found else [])
    studies = sorted({plane.study for plane in own}) or [""]
    stacks, problems = [], []
    for study in studies:
        try:
            stacks.append(find_stack([plane for plane in own if plane.study == study], name))
        except InputError as error:
            problems.append(error)
    if len(stacks) > 1:
        raise InputError(
            name, f"holds {len(stacks)} studies that have short-axis cines", "give each a folder of its own"
        )
    if not stacks:
        damaged = f"; {unreadable} DICOM files cannot be read" if unreadable else ""
        raise InputError(name, problems[0].problem + damaged, problems[0].remedy)
    left_out = list(stacks[0].left_out)
    if others:
        left_out.append(f"{others} images that are not MR")
    if len(studies) > 1:
        count = sum(1 for plane in own if plane.study != stacks[0].planes[0][0].study)
        left_out.append(f"{count} images of other studies")
    if unreadable:
        left_out.append(f"{unreadable} DICOM files that cannot be read")
    return Stack(stacks[0].planes, tuple(left_out))


def _dtype(plane: Plane) -> str:
    if (plane.slope, plane.intercept) != (1, 0):
        return "<f4"
    return "<i2" if plane.signed else "<u2"
