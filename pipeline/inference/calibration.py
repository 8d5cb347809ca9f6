"""Turn class shares into probabilities with one temperature for each network, and measure their calibration error.

The temperature divides the logits (Guo et al., ICML 2017). It is chosen so that the labels of the validation volumes
are most likely. Every network recognises pixels far from the heart as background, and they would dominate the fit. So
only pixels near the heart count: in each slice, the box around the expert's heart, widened by `MARGIN` on each side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

MARGIN: Final = 8  # pixels of the network's grid
MOST_PIXELS: Final = 20_000  # of one volume, to fit a temperature
BINS: Final = 15  # bins of equal width, as in Guo et al.
LEAST, MOST = 0.25, 8.0  # limits of temperatures
SMALLEST = 1e-6  # smallest share; below it, float32 gives no useful logit

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def near_heart(shares_ZCHW: Floats, labels_ZHW: Labels) -> tuple[Floats, Labels]:
    """Shares (N, classes) and labels (N,) of the pixels near the heart. A slice without labels has none.

    Takes class shares (Z, classes, H, W) in [0, 1] and labels (Z, H, W) on the same grid.
    """
    shares, labels = [], []
    for share, label in zip(shares_ZCHW, labels_ZHW, strict=True):
        there = label > 0
        if there.any():
            y, x = (_widened(np.flatnonzero(there.any(axis))) for axis in (1, 0))
            shares.append(np.moveaxis(share[:, y, x], 0, -1).reshape(-1, share.shape[0]))
            labels.append(label[y, x].ravel())
    if not shares:
        return np.zeros((0, shares_ZCHW.shape[1]), np.float32), np.zeros(0, np.uint8)
    return np.concatenate(shares), np.concatenate(labels)


def _widened(at: npt.NDArray[np.intp]) -> slice:
    return slice(max(0, int(at[0]) - MARGIN), int(at[-1]) + 1 + MARGIN)


def tempered(shares: Floats, temperature: float, axis: int = -1) -> Floats:
    """Divide the logits of shares by the temperature. The result adds up to 1 along `axis`."""
    powers = np.maximum(shares, SMALLEST) ** np.float32(1.0 / temperature)
    out: Floats = powers / powers.sum(axis, keepdims=True)
    return out


def best_temperature(known: Iterable[tuple[Floats, Labels]]) -> float | None:
    """The temperature, from `LEAST` to `MOST`, under which the labels are most likely. None without any pixel.

    `known` has, for each volume that the network did not train on, the shares (N, classes) and labels (N,) of
    `near_heart`. Of each volume at most `MOST_PIXELS` evenly spaced pixels count.
    """
    from scipy.optimize import minimize_scalar

    logits, own = [], []
    for shares, labels in known:
        every = -(-len(labels) // MOST_PIXELS) or 1
        logs = np.log(np.maximum(shares[::every], SMALLEST)).astype(np.float64)
        logits.append(logs)
        own.append(np.take_along_axis(logs, labels[::every, None].astype(np.intp), 1)[:, 0])
    if not sum(map(len, own)):
        return None
    all_logits, all_own = np.concatenate(logits), np.concatenate(own)

    def unlikely(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float((np.log(np.exp(all_logits * sharpness).sum(1)) - all_own * sharpness).mean())

    found = minimize_scalar(unlikely, bounds=(np.log(LEAST), np.log(MOST)), method="bounded")
    return round(float(np.exp(found.x)), 4)


def calibration_error(shares: Floats, labels: Labels) -> float:
    """Expected calibration error, 0 to 1, of shares (N, classes) and labels (N,). NaN without any pixel.

    The chosen class has the largest share. Pixels are put into `BINS` bins by this share. The error is the mean
    distance, over all pixels, between the bin's mean share and how often the chosen class is right there.
    """
    if not len(labels):
        return float("nan")
    sure, right = shares.max(1).astype(np.float64), shares.argmax(1) == labels
    bins = np.minimum((sure * BINS).astype(np.intp), BINS - 1)
    gaps = np.bincount(bins, weights=sure - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))
