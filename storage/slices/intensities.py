"""How the intensities of a volume are stored as int16, and their statistics.

Scanners write integers of 12 to 16 bits. int16 keeps them exactly at half the size of float32; float16 would be exact
only up to 2048. Other intensities are quantised over the volume's own range, with an error of at most 1/131,070 of that
range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INT16_MIN, INT16_MAX, INT16_STEPS = -32768, 32767, 65535
LOW, HIGH = 0.005, 0.995

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one frame's whole volume, in its intensities as read. The percentiles are 0.5 % and 99.5 %."""

    mean: float
    std: float
    minimum: float
    maximum: float
    p005: float
    p995: float


@dataclass(frozen=True)
class Quantised:
    """A volume (Z, H, W) as int16: intensity = stored * scale + offset. With scale 1 the stored values are exact."""

    stored: npt.NDArray[np.int16]
    scale: float
    offset: float


def quantise(volume: Array) -> Quantised:
    """Store a volume of any shape as int16. Its values must be finite and not all equal.

    Whole numbers that span at most 65,535 stay exact, with offset 0 if they fit int16 as they are.
    """
    low, high = float(volume.min()), float(volume.max())
    if _whole(volume) and high - low <= INT16_STEPS:
        if low >= INT16_MIN and high <= INT16_MAX:
            return Quantised(volume.astype(np.int16), 1.0, 0.0)
        scale, offset = 1.0, low - INT16_MIN
    else:
        scale = (high - low) / INT16_STEPS
        offset = low - INT16_MIN * scale
    stored = np.rint((volume.astype(np.float64) - offset) / scale)
    return Quantised(np.clip(stored, INT16_MIN, INT16_MAX).astype(np.int16), scale, offset)


def statistics(volume: Array) -> Statistics:
    """Compute the statistics of a volume of any shape in float64. Its values must be finite and not all equal.

    Whole numbers that span at most 65,535 are counted instead of sorted, which is faster.
    """
    low, high = float(volume.min()), float(volume.max())
    if not _whole(volume) or high - low > INT16_STEPS:
        values = volume.astype(np.float64)
        p005, p995 = np.percentile(values, [100 * LOW, 100 * HIGH])
        return Statistics(float(values.mean()), float(values.std()), low, high, float(p005), float(p995))
    counts = np.bincount(volume.ravel().astype(np.int64) - int(low))
    levels = np.arange(len(counts)) + low
    mean = float(counts @ levels) / volume.size
    std = math.sqrt(float(counts @ (levels - mean) ** 2) / volume.size)
    return Statistics(mean, std, low, high, *(_percentile(counts, low, share) for share in (LOW, HIGH)))


def _percentile(counts: npt.NDArray[np.int64], low: float, share: float) -> float:
    """The percentile at `share` (0 to 1), linear between the two nearest values, as in numpy's default.

    `counts[k]` says how often the value `low + k` occurs.
    """
    below = np.cumsum(counts)
    rank = share * (int(below[-1]) - 1)
    first, second = (float(np.searchsorted(below, at, side="right")) for at in (math.floor(rank), math.ceil(rank)))
    return low + first + (second - first) * (rank - math.floor(rank))


def _whole(volume: Array) -> bool:
    return volume.dtype.kind in "iu" or bool(np.array_equal(volume, np.rint(volume)))
