"""The expected Dice of a mask without a reference mask.

It comes from the network's sureness, the Dice between its mask and its own class shares, for each structure. Networks
differ in how sure they are, so each is calibrated on its validation volumes: logit(Dice) = start + slope ·
logit(sureness). Each network has its own starts. The slopes are the same for all networks: they were fitted to Siemens
volumes, plain and degraded in 17 ways. docs/prediction.md says how well this predicts the Dice on other scanners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.subjects import STRUCTURES

DOUBTFUL: Final = 0.7  # a mask with a lower mean expected Dice is called doubtful

SLOPES: Final = {"LV": 1.76, "MYO": 2.26, "RV": 1.71}
LEAST, MOST = 0.02, 0.995  # limits of sureness and Dice, beyond which the logit means nothing

Floats = npt.NDArray[np.float32]


def sureness(shares_ZCHW: Floats) -> dict[str, float]:
    """For LV, MYO and RV, the Dice (0 to 1) between one volume's mask and its class shares (Z, classes, H, W).

    The mask is the class with the largest share. A structure without any voxel has 0.
    """
    labels = shares_ZCHW.argmax(1)
    out = {}
    for name, label in STRUCTURES.items():
        share, own = shares_ZCHW[:, label], labels == label
        total = float(share.sum(dtype=np.float64)) + float(own.sum())
        out[name] = 2.0 * float(share[own].sum(dtype=np.float64)) / total if total else 0.0
    return out


def calibrated(known: Iterable[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """A network's start for each structure, from (sureness, Dice) of volumes that it did not train on.

    A Dice that is absent or NaN does not count. A structure without any Dice is left out.
    """
    apart: dict[str, list[float]] = {}
    for sure, dice in known:
        for name, value in dice.items():
            if not np.isnan(value):
                apart.setdefault(name, []).append(_logit(value) - SLOPES[name] * _logit(sure[name]))
    return {name: round(float(np.median(values)), 4) for name, values in apart.items()}


def expected_dice(shares_ZCHW: Floats, starts: Mapping[str, float]) -> dict[str, float]:
    """The expected Dice (0 to 1) of one volume's mask, for each structure in `starts` (see `calibrated`).

    A structure without any voxel has 0, since every short-axis stack shows all three.
    """
    if not starts:
        return {}
    out = {}
    for name, sure in sureness(shares_ZCHW).items():
        if name in starts:
            logit = starts[name] + SLOPES[name] * _logit(sure)
            out[name] = round(1.0 / (1.0 + math.exp(-logit)), 3) if sure else 0.0
    return out


def _logit(share: float) -> float:
    share = min(max(share, LEAST), MOST)
    return math.log(share / (1.0 - share))


def mean_dice(expected: Mapping[str, float]) -> float:
    """Mean over the structures."""
    return float(np.mean(list(expected.values())))


def foretold(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How well the expected Dice predicted the Dice, from rows of `trust.csv`. One row for each arm and vendor.

    Seeds are pooled, and rows with a NaN Dice or expected Dice are left out. Columns:

    - `volumes`, `bad`, `doubtful`, `found`: numbers of all volumes, of those with a Dice below `DOUBTFUL`, of those
      with an expected Dice below it, and of those with both.
    - `auroc`: the chance that a bad volume has a lower expected Dice than a good one. NaN if there is only one kind.
    - `off`: mean absolute difference of expected Dice and Dice.
    - `ece`, `ece_tempered`: the means over the volumes.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not (np.isnan(row["dice"]) or np.isnan(row["expected_dice"])):
            groups.setdefault((row["arm"], row["vendor"]), []).append(row)
    return [
        {
            "arm": arm,
            "vendor": vendor,
            **_foretold(*(np.array([row[name] for row in own]) for name in ("dice", "expected_dice"))),
            **{name: _mean([row[name] for row in own]) for name in ("ece", "ece_tempered")},
        }
        for (arm, vendor), own in groups.items()
    ]


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


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
    """A Dice with two digits and without the leading 0, such as .84."""
    return f"{dice:.2f}".removeprefix("0")
