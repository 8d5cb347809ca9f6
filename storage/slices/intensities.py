"""Intensities of a volume: kept in int16, and their statistics.

Scanners write 12 to 16 bit integers, which int16 keeps exactly (float16 is exact only up to 2048) at half the size of
float32. Other intensities are quantised over the volume's own range: an error of at most its 1/131,070.
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
    """Of one frame's whole volume, in its intensities as read; percentiles are 0.5 % and 99.5 %."""

    mean: float
    std: float
    minimum: float
    maximum: float
    p005: float
    p995: float


@dataclass(frozen=True)
class Quantised:
    """A volume (Z, H, W) as int16: intensity = stored * scale + offset; scale 1 is exact."""

    stored: npt.NDArray[np.int16]
    scale: float
    offset: float


def quantise(volume: Array) -> Quantised:
    """Exact for whole numbers that span at most 65,535, with offset 0 if they fit int16 as they are.

    `volume` is finite and not constant.
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
    """Statistics of a finite, not constant volume of any shape, in float64; whole numbers are counted, not sorted."""
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
    """Linear between the two nearest values, as numpy's default."""
    below = np.cumsum(counts)
    rank = share * (int(below[-1]) - 1)
    first, second = (float(np.searchsorted(below, at, side="right")) for at in (math.floor(rank), math.ceil(rank)))
    return low + first + (second - first) * (rank - math.floor(rank))


def _whole(volume: Array) -> bool:
    return volume.dtype.kind in "iu" or bool(np.array_equal(volume, np.rint(volume)))
