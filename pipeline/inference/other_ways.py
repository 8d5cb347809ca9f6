"""Propose another orientation for an image with a doubtful mask. It is only a warning; no image is turned."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.inference.predictor import Predictor
from pipeline.inference.trust import DOUBTFUL, in_words, mean_dice
from pipeline.samples.preprocess import volume_statistics
from storage.nifti.header import Spacing
from storage.nifti.orientation import AS_STORED, Turn

MORE: Final = 0.15  # the least gain in expected Dice for another orientation to be proposed
WAYS: Final = [
    Turn((*axes, 2, 3), (columns, rows, False))
    for axes in ((0, 1), (1, 0))
    for columns, rows in product((False, True), repeat=2)
    if (axes, columns, rows) != ((0, 1), False, False)
]


def other_way_warnings(predictor: Predictor, name: str, stored_ZHW: npt.NDArray[Any], spacing: Spacing) -> list[str]:
    """A warning if a frame that was read as stored would have a much better mask in another orientation, else empty.

    stored_ZHW: (Z, H, W) as in the file. spacing: (slice, row, column) in mm. All seven other orientations within the
    slices' plane are tried.
    """
    own, *others = [_expected(predictor, stored_ZHW, spacing, way) for way in (AS_STORED, *WAYS)]
    best = int(np.argmax(others))
    if others[best] < max(DOUBTFUL, own + MORE):
        return []
    return [
        f"{name} may lie otherwise: as '{WAYS[best].words}' its expected Dice is {in_words(others[best])}, as stored "
        f"{in_words(own)}; look at the image, and use --orientation if that is so"
    ]


def _expected(predictor: Predictor, stored_ZHW: npt.NDArray[Any], spacing: Spacing, way: Turn) -> float:
    frame = np.ascontiguousarray(way.volume(stored_ZHW), dtype=np.float32)
    slice_mm, row_mm, column_mm = spacing
    turned = (slice_mm, column_mm, row_mm) if way.axes[0] == 1 else spacing
    stats = volume_statistics(frame, turned, predictor.preprocess)
    (found,) = predictor.masks([(frame, stats)], turned)
    return mean_dice(found.expected)
