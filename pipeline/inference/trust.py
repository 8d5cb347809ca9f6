"""What Dice a mask can be expected to have, where no expert drew one.

It is read from how sure the network is: the Dice of its mask with its own class shares, structure by structure. A
network is too sure of what it has not seen, so this number is turned into a Dice by curves that were fitted to volumes
of the training vendor, spoilt in 17 ways. How well that foretells the Dice of other scanners is in docs/prediction.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.subjects import STRUCTURES

DOUBTFUL: Final = 0.7  # expected mean Dice below which a mask is told as doubtful

# Dice is logistic in the logit of the sureness: (at logit 0, slope).
CURVES: Final = {"LV": (-3.16, 1.76), "MYO": (-3.72, 2.26), "RV": (-2.79, 1.71)}
LEAST, MOST = 0.02, 0.995  # sureness; beyond, a logit says nothing more


def expected_dice(shares_ZCHW: npt.NDArray[np.float32]) -> dict[str, float]:
    """Of LV, MYO and RV the Dice that one volume's mask can be expected to have, 0 to 1.

    shares: each class's share of each pixel. A structure that is found nowhere has nearly 0: no short-axis stack lacks
    one.
    """
    labels = shares_ZCHW.argmax(1)
    out = {}
    for name, label in STRUCTURES.items():
        share, own = shares_ZCHW[:, label], labels == label
        total = float(share.sum(dtype=np.float64)) + float(own.sum())
        sure = 2.0 * float(share[own].sum(dtype=np.float64)) / total if total else 0.0
        odds = min(max(sure, LEAST), MOST)
        start, slope = CURVES[name]
        out[name] = round(float(1.0 / (1.0 + np.exp(-start) * ((1.0 - odds) / odds) ** slope)), 3)
    return out


def mean_dice(expected: Mapping[str, float]) -> float:
    """Mean of the structures."""
    return float(np.mean(list(expected.values())))


def in_words(dice: float) -> str:
    """Such as .84."""
    return f"{dice:.2f}".removeprefix("0")
