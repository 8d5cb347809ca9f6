"""Find the heart's centre. Networks know hearts near the image's centre, so a heart elsewhere gets a second look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.predictor import Segmented
from pipeline.samples.preprocess import PreprocessConfig

Shift = tuple[int, int]  # rows and columns; positive is down and to the right

# Distances from the image's centre, as shares of the network's field; 1/8 is 28 of 224 pixels. In M&Ms and ACDC half of
# the hearts lie within 14 pixels of the centre, and 9 of 10 within 32.
OFF_CENTRE = 1 / 8
CUT_OFF = 1 / 25  # the limit if the field of view cuts a structure off
LEAST_PART = 0.9  # of the voxels of the first look, which a second look must find


def heart_shift(found: Sequence[Segmented], config: PreprocessConfig) -> Shift | None:
    """Rows and columns from the image's centre to the centre of the heart, over all frames together.

    None if no heart was found, or if it lies within `OFF_CENTRE` of the centre. If the field of view cuts a structure
    off, the limit is `CUT_OFF`.
    """
    count, at = 0, np.zeros(2)
    for frame in found:
        _, rows, columns = np.nonzero(frame.mask)
        count += len(rows)
        at += rows.sum(), columns.sum()
    if not count:
        return None
    height, width = found[0].mask.shape[1:]
    offset = at / count - (np.array([height, width]) - 1) / 2
    most = CUT_OFF if any(frame.cut for frame in found) else OFF_CENTRE
    return None if np.hypot(*offset) <= most * config.field else (round(offset[0]), round(offset[1]))


def is_better(second: Sequence[Segmented], first: Sequence[Segmented]) -> bool:
    """Whether a second look found at least 90 % (`LEAST_PART`) of the voxels of the first."""
    voxels = [sum(int(np.count_nonzero(frame.mask)) for frame in found) for found in (second, first)]
    return voxels[0] >= LEAST_PART * voxels[1]


def around(volume_ZHW: npt.NDArray[Any], shift: Shift, config: PreprocessConfig) -> npt.NDArray[Any]:
    """The part of a volume from which its statistics are taken.

    Foreground statistics are of the image's centre, so for them the largest part centred on the heart is returned.
    Otherwise, or without a shift, it is the whole volume.
    """
    if config.normalisation != "foreground" or shift == (0, 0):
        return volume_ZHW
    rows, columns = (
        slice(max(0, 2 * at), n + min(0, 2 * at)) for at, n in zip(shift, volume_ZHW.shape[1:], strict=True)
    )
    return volume_ZHW[:, rows, columns]
