"""Class shares as probabilities: one temperature a network, and how far its probabilities are from how often it is
right.

The temperature divides the logits (Guo et al., ICML 2017). It is that under which the labels of the validation volumes
are the most likely. Pixels far from the heart are background to every network, and would hide what it knows of the
rest: those in each slice's box round the expert's heart count, `MARGIN` pixels wider on each side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

MARGIN: Final = 8  # pixels of the network
MOST_PIXELS: Final = 20_000  # of a volume that a temperature is fitted to
BINS: Final = 15  # of equal width, as in Guo et al.
LEAST, MOST = 0.25, 8.0  # of temperatures
SMALLEST = 1e-6  # share: below, float32 knows no logit

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def near_heart(shares_ZCHW: Floats, labels_ZHW: Labels) -> tuple[Floats, Labels]:
    """Shares (N, classes) and labels (N,) of the pixels near the heart; slices without a heart have none."""
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
    """Shares whose logits are divided by the temperature; they add up to 1 along `axis`."""
    powers = np.maximum(shares, SMALLEST) ** np.float32(1.0 / temperature)
    out: Floats = powers / powers.sum(axis, keepdims=True)
    return out


def best_temperature(known: Iterable[tuple[Floats, Labels]]) -> float | None:
    """The temperature for volumes that the network has not learned from, each with shares (N, classes) and labels (N,)
    as `near_heart` gives them; None without any pixel. Of a large volume `MOST_PIXELS`, evenly spaced, count."""
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
    """Expected calibration error, 0 to 1, of shares (N, classes) and labels (N,): the distance between the share of the
    class that was chosen and how often it is the right one, over `BINS` bins of that share; NaN without any pixel."""
    if not len(labels):
        return float("nan")
    sure, right = shares.max(1).astype(np.float64), shares.argmax(1) == labels
    bins = np.minimum((sure * BINS).astype(np.intp), BINS - 1)
    gaps = np.bincount(bins, weights=sure - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))
