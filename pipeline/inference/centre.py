"""Where the heart is: networks know hearts near the image's centre, so one that lies elsewhere is looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.predictor import Segmented
from pipeline.samples.preprocess import PreprocessConfig

Shift = tuple[int, int]

# From the image's centre, of the network's field: 28 of 224 pixels. In M&Ms and ACDC half of the hearts lie within 14
# pixels of it, and 9 of 10 within 32.
OFF_CENTRE = 1 / 8
CUT_OFF = 1 / 25  # so far from the centre, if the field of view cuts a part off
LEAST_PART = 0.9  # of the heart that was found first, for the second look to count


def heart_shift(found: Sequence[Segmented], config: PreprocessConfig) -> Shift | None:
    """Rows and columns from the image's centre to the heart that was found in all frames together.

    None if it lies near the centre, more so if the field of view cuts a part off, or if nothing was found.
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
    """Whether a second look found the heart, and not less of it."""
    voxels = [sum(int(np.count_nonzero(frame.mask)) for frame in found) for found in (second, first)]
    return voxels[0] >= LEAST_PART * voxels[1]


def around(volume_ZHW: npt.NDArray[Any], shift: Shift, config: PreprocessConfig) -> npt.NDArray[Any]:
    """What a volume's statistics are taken of: for `foreground`, which are of the centre, the part that is centred on
    the heart; else all."""
    if config.normalisation != "foreground" or shift == (0, 0):
        return volume_ZHW
    rows, columns = (
        slice(max(0, 2 * at), n + min(0, 2 * at)) for at, n in zip(shift, volume_ZHW.shape[1:], strict=True)
    )
    return volume_ZHW[:, rows, columns]
