"""What of a volume is image, and statistics that padding cannot move.

Converters and PACS put constants around an image: a rectangle is made square, stacks get one size, blank slices are
appended. Such constants are found from outside in: a row or column at the edge of a slice whose pixels are all equal is
padding, and so is the next one, until a row or column varies. What is left does not depend on how much was around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.nifti.header import Spacing
from storage.slices.intensities import HIGH, LOW, Statistics

CENTRAL_MM = 160.0  # a side: the heart with its surroundings. Cutting the image farther out moves nothing.

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ForegroundStatistics(Statistics):
    """As `Statistics`, but of the foreground alone, with the lowest and highest 0.5 % of its intensities clipped.

    `padding`: whether constants at the edge of its slices are padding. In stores of samples they are part of a sample.
    """

    padding: bool = True


def foreground_box(image_HW: Array) -> tuple[slice, slice] | None:
    """Rows and columns of a slice that are not constant padding, in which one hot pixel is allowed a row or column.

    None if all of the slice is padding.
    """
    top, left = 0, 0
    bottom, right = image_HW.shape
    while True:
        window = image_HW[top:bottom, left:right]
        rows, cols = np.flatnonzero(_varying_rows(window)), np.flatnonzero(_varying_rows(window.T))
        if not len(rows) or not len(cols):
            return None
        top, bottom = top + int(rows[0]), top + int(rows[-1]) + 1
        left, right = left + int(cols[0]), left + int(cols[-1]) + 1
        if window.shape == (bottom - top, right - left):
            return slice(top, bottom), slice(left, right)


def _varying_rows(image_HW: Array) -> npt.NDArray[np.bool_]:
    """Which rows have more than one pixel that differs from the rest.

    In a row without, at least two of the first three pixels have the constant, so that it is their median.
    """
    first = np.sort(image_HW[:, :3], axis=1)
    constant = first[:, first.shape[1] // 2, None]
    varying: npt.NDArray[np.bool_] = (image_HW != constant).sum(axis=1) > 1
    return varying


def foreground_statistics(volume_ZHW: Array, spacing: Spacing) -> ForegroundStatistics:
    """Statistics of the central 160 mm of what is image; `spacing` is (slice, row, column) in mm.

    The centre is that of the smallest box that holds the image of all slices. A slice's lowest intensity there does not
    count: it is what a background of one value has. An image that is nothing but constant rows or columns, so that no
    part of it is told from padding, has the statistics of its whole volume.
    """
    values = _central_values(volume_ZHW, spacing)
    if values is None:
        values = volume_ZHW.astype(np.float64).ravel()
    low, high = (float(p) for p in np.percentile(values, [100 * LOW, 100 * HIGH]))
    np.clip(values, low, high, out=values)
    return ForegroundStatistics(float(values.mean()), float(values.std()), low, high, low, high)


def _central_values(volume_ZHW: Array, spacing: Spacing) -> npt.NDArray[np.float64] | None:
    boxes = [foreground_box(image) for image in volume_ZHW]
    whole = [box for box in boxes if box is not None]
    if not whole:
        return None
    window = tuple(
        _central(min(box[axis].start for box in whole), max(box[axis].stop for box in whole), spacing[axis + 1])
        for axis in (0, 1)
    )
    parts = []
    for image, box in zip(volume_ZHW, boxes, strict=True):
        if box is not None:
            seen = image[tuple(_common(*pair) for pair in zip(window, box, strict=True))]
            if seen.size:
                parts.append(seen[seen > seen.min()])
    values = np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
    return values if len(values) else None


def _central(start: int, stop: int, pixel_mm: float) -> slice:
    """The central `CENTRAL_MM` of a range of pixels, or all of it if it is shorter."""
    half = max(1, math.ceil(CENTRAL_MM / pixel_mm / 2)) if pixel_mm * (stop - start) > CENTRAL_MM else stop - start
    centre = (start + stop) // 2
    return slice(max(start, centre - half), min(stop, centre + half))


def _common(first: slice, second: slice) -> slice:
    start = max(first.start, second.start)
    return slice(start, max(start, min(first.stop, second.stop)))
