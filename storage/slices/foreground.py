"""Which part of a volume is image, and intensity statistics that do not depend on padding.

Converters and PACS put constant values around an image: they make a rectangle square, give all stacks one size, or
append blank slices. `foreground_box` finds this padding from outside in. A row or column at the edge of a slice is
padding if all its pixels but one are equal. Then the next one is tested, until a row or column varies. So the result
does not depend on how much padding there was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.nifti.header import Spacing
from storage.slices.intensities import HIGH, LOW, Statistics

CENTRAL_MM = 160.0  # side of a square that holds the heart and its surroundings

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ForegroundStatistics(Statistics):
    """Like `Statistics`, but of the foreground alone, with the lowest and highest 0.5 % of its intensities clipped.

    `padding` says whether constant values at the edge of a slice are padding. In a store of training samples they are
    not: they are part of the sample.
    """

    padding: bool = True


def foreground_box(image_HW: Array) -> tuple[slice, slice] | None:
    """The rows and columns of a slice (H, W) that are not constant padding; None if the whole slice is padding.

    In a padding row or column, one pixel may differ from the constant.
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
    """(H,) bool: whether more than one pixel of a row differs from the row's constant.

    The constant is the median of the row's first three pixels. In a padding row at most one of them differs from it.
    """
    first = np.sort(image_HW[:, :3], axis=1)
    constant = first[:, first.shape[1] // 2, None]
    varying: npt.NDArray[np.bool_] = (image_HW != constant).sum(axis=1) > 1
    return varying


def foreground_statistics(volume_ZHW: Array, spacing: Spacing) -> ForegroundStatistics:
    """Statistics of the image, without its padding, in the central 160 mm of a volume (Z, H, W).

    `spacing` is (slice, row, column) in mm. The centre is that of the smallest box that holds the foreground of all
    slices. In each slice, pixels with the slice's lowest intensity there count as if they had the next one, because a
    uniform background such as -1024 has that value where other images have dark air. If no part of the volume can be
    told from padding, the statistics are those of the whole volume.
    `minimum` and `maximum` are the limits of the clipping, equal to `p005` and `p995`.
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
            above = seen[seen > seen.min()] if seen.size else seen
            if above.size:
                parts.append(np.maximum(seen, above.min()).ravel())
    values = np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
    return values if len(values) else None


def _central(start: int, stop: int, pixel_mm: float) -> slice:
    """The central `CENTRAL_MM` of a range of pixels, or the whole range if it is shorter."""
    half = max(1, math.ceil(CENTRAL_MM / pixel_mm / 2)) if pixel_mm * (stop - start) > CENTRAL_MM else stop - start
    centre = (start + stop) // 2
    return slice(max(start, centre - half), min(stop, centre + half))


def _common(first: slice, second: slice) -> slice:
    start = max(first.start, second.start)
    return slice(start, max(start, min(first.stop, second.stop)))
