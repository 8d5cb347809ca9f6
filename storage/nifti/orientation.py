"""Finds from a header how an array lies, and how to turn it to the orientation that the networks expect.

The networks expect a short axis seen from the apex, as a scanner displays it and as M&Ms and ACDC store their arrays.
Columns run to the patient's left and back, rows downwards. Slices keep the file's order, since a network sees one slice
at a time.

A turn is written as the file's axes in the order columns, rows, slices and, if they are not the last axis, frames. `x y
z` is an array as stored, `x -y z` has its rows turned over, `x y t z` has its frames on the third axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.errors import InputError
from storage.nifti.header import Header, Spacing

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

HEADER, STORED = "header", "stored"
LETTERS = "xyzt"

# All vectors are (left, back, head) of the patient, as in DICOM. LONG_AXIS points from base to apex in most hearts.
LONG_AXIS = np.array([0.65, -0.60, -0.47])
COLUMNS, ROWS = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.45, -0.89])
LPS = np.diag([-1.0, -1.0, 1.0])

ALONG = 0.999  # cosine above which an axis counts as the scanner's own
AXIS_RATIO = 1.5  # slice over pixel distance, from which on a voxel's longest side tells the axis of the slices
SEEN_FROM = 0.3  # cosine between normal and long axis; below it, the side from which the heart is seen is not known
UNSURE_DEGREES = 39.0  # largest sure angle to the networks' orientation; at 45° the next turn is as near
NO_ORIGIN_MM = 1e-3

RIGHT_ANGLES = 0.5  # volume that three unit vectors span; below it, they are not the axes of an image

SAY = (
    "look at the image and say how its array lies: predict --orientation, --set layouts.orientation, or a column "
    "orientation in a table"
)


@dataclass(frozen=True)
class Turn:
    """Which axes of the file (0 to 3: x, y, z, t) are columns, rows, slices and frames (`axes`).

    `backwards` says which of columns, rows and slices run backwards.
    """

    axes: tuple[int, int, int, int] = (0, 1, 2, 3)
    backwards: tuple[bool, bool, bool] = (False, False, False)

    @property
    def nothing(self) -> bool:
        """Whether the array stays as it is."""
        return self == Turn()

    @property
    def moves_frames(self) -> bool:
        """Whether frames are not the file's fourth axis. Then the whole file must be read for one frame."""
        return self.axes[3] != 3

    @property
    def words(self) -> str:
        """The turn as text, such as `x -y z`."""
        named = [("-" if back else "") + LETTERS[axis] for axis, back in zip(self.axes, self.backwards, strict=False)]
        return " ".join([*named, LETTERS[self.axes[3]]] if self.moves_frames else named)

    def volume(self, data_ZHW: Array) -> Array:
        """A view of one frame, (z, y, x) as stored, turned to (slices, rows, columns).

        Only for a turn that does not move frames.
        """
        return data_ZHW.transpose([2 - axis for axis in self._by_numpy()])[self._flips()]

    def cine(self, data_TZHW: Array) -> Array:
        """A view of a whole 4D file, (t, z, y, x) as stored, turned to (frames, slices, rows, columns)."""
        order = [3 - self.axes[3], *(3 - axis for axis in self._by_numpy())]
        return data_TZHW.transpose(order)[(slice(None), *self._flips())]

    def back(self, mask: Array) -> Array:
        """A view of a turned array, (Z, H, W) or (T, Z, H, W), as the file stores it."""
        if mask.ndim == 3:
            order = [2 - axis for axis in self._by_numpy()]
            return mask[self._flips()].transpose(np.argsort(order))
        order = [3 - self.axes[3], *(3 - axis for axis in self._by_numpy())]
        return mask[(slice(None), *self._flips())].transpose(np.argsort(order))

    def header(self, header: Header, spacing: Spacing | None = None) -> Header:
        """The header of the turned array.

        `spacing` (slice, row, column of the turned array; mm) replaces its voxel size. If the turn changes nothing, the
        header is returned as it is. Raises InputError for a file of three axes, one of which is to be frames.
        """
        if self.nothing:
            return header
        if self.moves_frames and len(header.shape) < 4:
            name = fs.base_name(header.path)
            raise InputError(name, "has three axes, one of them frames", "store it as x, y, slice, frame")
        moved = self.axes[: len(header.shape)]
        sizes = [*header.spacing_mm[::-1], 0.0]
        sizes[3] = sizes[self.axes[3]]  # the time axis has no slice distance: take that of the axis with the frames
        x, y, z = (sizes[axis] for axis in self.axes[:3])
        return replace(
            header,
            shape=tuple(header.shape[axis] for axis in moved),
            spacing_mm=(z, y, x) if spacing is None else spacing,
            affine=self._affine(header),
        )

    def _affine(self, header: Header) -> tuple[tuple[float, ...], ...] | None:
        if header.affine is None or self.moves_frames:  # an affine says nothing about a time axis
            return None
        affine = np.array(header.affine)
        columns, origin = [], affine[:, 3].copy()
        for axis, back in zip(self.axes, self.backwards, strict=False):
            columns.append(-affine[:, axis] if back else affine[:, axis])
            origin += affine[:, axis] * (header.shape[axis] - 1) * back
        return tuple(tuple(float(v) for v in row) for row in np.column_stack([*columns, origin]))

    def _by_numpy(self) -> tuple[int, int, int]:
        """The file's axes that are slices, rows and columns, in this order."""
        return self.axes[2], self.axes[1], self.axes[0]

    def _flips(self) -> tuple[slice, slice, slice]:
        columns, rows, slices = (slice(None, None, -1 if back else 1) for back in self.backwards)
        return slices, rows, columns


AS_STORED: Final = Turn()


@dataclass(frozen=True)
class Orientation:
    """How an array is turned, and why. `known` says whether its header or the user determines it.

    If `doubt` is not empty, it is a reason to look at the image.
    """

    turn: Turn
    why: str
    known: bool = True
    doubt: str = ""

    @property
    def line(self) -> str:
        """The orientation and its reason as one line for the user."""
        return f"read as stored: {self.why}" if self.turn.nothing else f"turned to {self.turn.words}: {self.why}"


def parsed_orientation(text: str, where: str) -> str:
    """Parse text such as `X, -Y, Z`. Returns `header`, `stored`, or a turn in its usual form, `x -y z`.

    Raises InputError, with `where` as its place, for other text.
    """
    words = text.lower().replace(",", " ").split()
    if words in ([HEADER], [STORED]):
        return words[0]
    axes = [word.removeprefix("-") for word in words]
    usual = sorted(axes) == sorted("xyz") or sorted(axes) == sorted(LETTERS)
    slices_only = len(axes) == 4 and words[3].startswith("-")
    if not usual or slices_only:
        problem = f"orientation is '{text}'"
        remedy = (
            "write header, stored, or the file's axes in the order columns, rows, slices, a minus before those that "
            "run the other way: 'x -y z', or 'x y t z' if the file's third axis is time"
        )
        raise InputError(where, problem, remedy)
    return _turn(words).words


def _turn(words: list[str]) -> Turn:
    axes = [LETTERS.index(word.removeprefix("-")) for word in words]
    axes += [axis for axis in range(4) if axis not in axes]
    back = [word.startswith("-") for word in words[:3]]
    return Turn((axes[0], axes[1], axes[2], axes[3]), (back[0], back[1], back[2]))


def orientation_of(header: Header, wanted: str = HEADER) -> Orientation:
    """Find how an array is to be turned: by its header, or as `wanted` says, a text from `parsed_orientation`.

    Raises InputError if rows and columns lie halfway between two turns, neither of which leaves the array as stored.
    """
    if wanted == STORED:
        return Orientation(AS_STORED, "as asked for")
    if wanted != HEADER:
        return Orientation(_turn(wanted.split()), "as asked for")
    directions = header.directions
    if directions is None or header.affine is None:
        return Orientation(AS_STORED, "its header gives no directions", known=False)
    if _made_up(header):
        why = "its header has a diagonal transform without an origin, which says nothing of how a heart lies"
        return Orientation(AS_STORED, why, known=False)
    if abs(np.linalg.det(directions)) < RIGHT_ANGLES:
        why = "by its header its axes are not at right angles, as those of every image are"
        return Orientation(AS_STORED, why, known=False, doubt=why)
    return _by_directions(header, LPS @ directions)


def _made_up(header: Header) -> bool:
    affine = np.array(header.affine)
    scale = np.abs(np.diag(affine[:, :3]))
    return bool(
        (np.abs(affine[:, :3] - np.diag(np.diag(affine[:, :3]))) < 1e-4 * scale.max()).all()
        and (np.abs(affine[:, 3]) < NO_ORIGIN_MM).all()
    )


def _by_directions(header: Header, axes: Floats) -> Orientation:
    """Find the turn from the directions of the file's axes. Raises InputError as `orientation_of` does.

    `axes` (3, 3) holds unit vectors along the file's x, y and z, one a column, to the left, back and head.
    """
    slices = _slice_axis(header)
    first, second = (axis for axis in range(3) if axis != slices)
    normal = np.cross(axes[:, first], axes[:, second])
    away = float(normal @ -LONG_AXIS / np.linalg.norm(normal) / np.linalg.norm(LONG_AXIS))
    if abs(away) < SEEN_FROM:
        why = "by its header its slices lie along the heart's long axis"
        return Orientation(AS_STORED, why, known=False, doubt=why)
    ways: dict[Turn, float] = {}
    for (columns, rows), (back_c, back_r) in product(permutations((first, second)), product((False, True), repeat=2)):
        c, r = axes[:, columns] * (-1 if back_c else 1), axes[:, rows] * (-1 if back_r else 1)
        if np.cross(c, r) @ normal * away > 0:  # seen from the apex
            ways[Turn((columns, rows, slices, 3), (back_c, back_r, False))] = float(c @ COLUMNS + r @ ROWS)
    best, beside, *_ = sorted(ways, key=lambda way: -ways[way])
    degrees = math.degrees(math.atan2(ways[beside], ways[best]))
    if degrees <= UNSURE_DEGREES:
        return _sure(best, axes)
    why = "by its header its rows and columns lie halfway between two ways"
    if AS_STORED in (best, beside):
        return Orientation(AS_STORED, why, known=False, doubt=why)
    remedy = f"{SAY}: '{best.words}', '{beside.words}' or another"
    raise InputError(fs.base_name(header.path), why, remedy)


def _sure(turn: Turn, axes: Floats) -> Orientation:
    if turn.nothing:
        return Orientation(turn, "its header says that it lies as networks know it")
    doubt = "its header lies along the scanner's axes, as no short axis does" if upright(axes) else ""
    return Orientation(turn, "its header says how it lies", doubt=doubt)


def upright(directions: Floats) -> bool:
    """Whether unit vectors (3, 3), one a column, are the scanner's own axes in any order."""
    return bool((np.abs(directions).max(axis=0) > ALONG).all())


def _slice_axis(header: Header) -> int:
    """The axis (0 to 2) along which voxels are much longer than along the others, else the third axis (2)."""
    sizes = np.linalg.norm(np.array(header.affine)[:, :3], axis=0)
    shorter, longest = np.sort(sizes)[1:]
    return int(sizes.argmax()) if longest > AXIS_RATIO * shorter else 2
