"""What Dice a mask can be expected to have, where no expert drew one.

It is read from how sure the network is: the Dice of its mask with its own class shares, structure by structure. What
sureness means differs from network to network, so each is calibrated by its validation volumes: the logit of the Dice
is a number of the network's own plus a slope times the logit of the sureness. The slopes are the same for all; they
were fitted to volumes of the training vendor, spoilt in 17 ways. How well that foretells the Dice of other scanners is
in docs/prediction.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.subjects import STRUCTURES

DOUBTFUL: Final = 0.7  # expected mean Dice below which a mask is told as doubtful

SLOPES: Final = {"LV": 1.76, "MYO": 2.26, "RV": 1.71}
LEAST, MOST = 0.02, 0.995  # of sureness and Dice; beyond, a logit says nothing more

Floats = npt.NDArray[np.float32]


def sureness(shares_ZCHW: Floats) -> dict[str, float]:
    """Of LV, MYO and RV the Dice of one volume's mask with the class shares (Z, classes, H, W) that it comes from; 0
    for a structure that is found nowhere."""
    labels = shares_ZCHW.argmax(1)
    out = {}
    for name, label in STRUCTURES.items():
        share, own = shares_ZCHW[:, label], labels == label
        total = float(share.sum(dtype=np.float64)) + float(own.sum())
        out[name] = 2.0 * float(share[own].sum(dtype=np.float64)) / total if total else 0.0
    return out


def calibrated(known: Iterable[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """A network's own numbers, a structure each, from (sureness, Dice) of volumes that it has not learned from.

    A Dice that is absent or NaN does not count; a structure without any is left out.
    """
    apart: dict[str, list[float]] = {}
    for sure, dice in known:
        for name, value in dice.items():
            if not np.isnan(value):
                apart.setdefault(name, []).append(_logit(value) - SLOPES[name] * _logit(sure[name]))
    return {name: round(float(np.median(values)), 4) for name, values in apart.items()}


def expected_dice(shares_ZCHW: Floats, starts: Mapping[str, float]) -> dict[str, float]:
    """The Dice, 0 to 1, that one volume's mask can be expected to have; of the structures that are in `starts`, a
    network's own numbers (see `calibrated`).

    A structure that is found nowhere has 0: no short-axis stack lacks one.
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
    """Mean of the structures."""
    return float(np.mean(list(expected.values())))


def foretold(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How well the expected Dice foretold the Dice, by arm and vendor, seeds together; rows as of `trust.csv`.

    arm, vendor, volumes; bad: those with a Dice below `DOUBTFUL`; doubtful: those that were expected to be; found:
    those that are both; auroc: the chance that of a bad and a good volume the bad one has the lower expected Dice (NaN
    where all are one or the other); off: mean distance of expected and real Dice; ece, ece_tempered: the volumes' mean.
    Rows that lack a Dice or an expected one are left out.
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
    """Of those that are not NaN; NaN without any."""
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
    """Such as .84."""
    return f"{dice:.2f}".removeprefix("0")
