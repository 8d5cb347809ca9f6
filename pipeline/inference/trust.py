"""What Dice a mask can be expected to have, where no expert drew one.

It is read from how sure the network is: the Dice of its mask with its own class shares, structure by structure. A
network is too sure of what it has not seen, so this number is turned into a Dice by curves that were fitted to volumes
of the training vendor, spoilt in 17 ways. How well that foretells the Dice of other scanners is in docs/prediction.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

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


def foretold(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How well the expected Dice foretold the Dice, by arm and vendor, seeds together; rows as of `trust.csv`.

    arm, vendor, volumes; bad: those with a Dice below `DOUBTFUL`; doubtful: those that were expected to be; found:
    those that are both; auroc: the chance that of a bad and a good volume the bad one has the lower expected Dice (NaN
    where all are one or the other); off: mean distance of expected and real Dice.
    """
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if not np.isnan(row["dice"]):
            groups.setdefault((row["arm"], row["vendor"]), []).append((row["dice"], row["expected_dice"]))
    return [{"arm": arm, "vendor": vendor, **_foretold(*np.array(pairs).T)} for (arm, vendor), pairs in groups.items()]


def _foretold(dice: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> dict[str, Any]:
    bad, doubtful = dice < DOUBTFUL, expected < DOUBTFUL
    lower = expected[bad][:, None] < expected[~bad]
    same = expected[bad][:, None] == expected[~bad]
    return {
        "volumes": len(dice),
        "bad": int(bad.sum()),
        "doubtful": int(doubtful.sum()),
        "found": int((bad & doubtful).sum()),
        "auroc": float((lower + 0.5 * same).mean()) if lower.size else float("nan"),
        "off": float(np.abs(expected - dice).mean()),
    }


def in_words(dice: float) -> str:
    """Such as .84."""
    return f"{dice:.2f}".removeprefix("0")
