"""Arms against each other, paired by subject; and one arm across vendors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.scores.statistics import FEWEST, bootstrap_interval, holm, paired_test
from pipeline.scores.tables import subject_dice
from storage.subjects import STRUCTURES

ALL = "all"  # vendors together; also the mean of the structures
ALPHA = 0.05
COMPARISON_FIELDS = (
    "arm",
    "baseline",
    "vendor",
    "structure",
    "n",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "verdict",
)


def compare_arms(cases: Sequence[Mapping[str, Any]], planned: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """How much better each planned (arm, baseline) is, by vendor and structure, on the subjects that both have.

    Rows with the columns of `COMPARISON_FIELDS`: `structure` is LV, MYO, RV or `all`, the mean of a subject's
    structures; `vendor` is one, or `all` where there are several. `difference` is the mean over subjects of the Dice of
    `arm` less that of `baseline` (phases and seeds averaged first), `low` and `high` its 95 % bootstrap interval, `p`
    of the paired Wilcoxon test. `p_holm` is corrected for the number of planned pairs that were tested on that vendor
    and structure; vendors and structures are questions of their own.

    `verdict`: `better` or `worse` where the interval leaves out zero and `p_holm` < .05; `hint` where it is the
    interval alone; `untested` for fewer than six subjects; else `no evidence`. No row where two arms have no subject in
    common.
    """
    names = sorted({case["vendor"] for case in cases})
    vendors = [[name] for name in names] + ([names] if len(names) > 1 else [])
    rows: list[dict[str, Any]] = []
    for arm, baseline in planned:
        for among in vendors:
            ours, theirs = (_dice(cases, name, among) for name in (arm, baseline))
            for structure in (*STRUCTURES, ALL):
                row = _difference(ours[structure], theirs[structure])
                if row is not None:
                    vendor = among[0] if len(among) == 1 else ALL
                    rows.append({"arm": arm, "baseline": baseline, "vendor": vendor, "structure": structure} | row)
    for question in {(row["vendor"], row["structure"]) for row in rows}:
        family = [row for row in rows if (row["vendor"], row["structure"]) == question]
        adjusted = holm([float(row["p"]) for row in family])
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"] = p
            row["verdict"] = _verdict(row)
    return rows


def _dice(
    cases: Sequence[Mapping[str, Any]], arm: str, vendors: Sequence[str]
) -> dict[str, dict[tuple[str, str], float]]:
    """Structure to (vendor, subject) to Dice; `all` is the mean of a subject's structures."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    means: dict[tuple[str, str], list[float]] = {}
    for structure in STRUCTURES:
        here = found.setdefault(structure, {})
        for vendor in vendors:
            own = (c for c in cases if (c["arm"], c["vendor"], c["structure"]) == (arm, vendor, structure))
            here |= {(vendor, subject): dice for subject, dice in subject_dice(own).items()}
        for who, dice in here.items():
            means.setdefault(who, []).append(dice)
    return found | {ALL: {who: float(np.mean(dice)) for who, dice in means.items()}}


def _difference(
    ours: Mapping[tuple[str, str], float], theirs: Mapping[tuple[str, str], float]
) -> dict[str, Any] | None:
    deltas = np.array([ours[who] - theirs[who] for who in sorted(ours.keys() & theirs.keys())])
    if not len(deltas):
        return None
    low, high = bootstrap_interval(deltas)
    # Means of the same numbers in another order differ in their last bits, and are not to be ranked by them.
    p = paired_test(np.round(deltas, 12))
    return {"n": len(deltas), "difference": float(deltas.mean()), "low": low, "high": high, "p": p}


def _verdict(row: Mapping[str, Any]) -> str:
    if row["n"] < FEWEST:
        return "untested"
    if row["low"] > 0 or row["high"] < 0:
        if row["p_holm"] < ALPHA:
            return "better" if row["difference"] > 0 else "worse"
        return "hint"
    return "no evidence"


def across_vendors(summary: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How evenly each arm does: rows of arm, worst (vendor), worst_dice, best (vendor), best_dice, spread.

    `summary` is that of `tables.summarise`. A vendor's Dice is the mean of its structures' means, `spread` the best
    vendor's less the worst's (NaN where there is only one).
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in summary:
        if not np.isnan(row["dice_mean"]):
            found.setdefault(row["arm"], {}).setdefault(row["vendor"], []).append(row["dice_mean"])
    rows = []
    for arm, vendors in found.items():
        means = {vendor: float(np.mean(dice)) for vendor, dice in vendors.items()}
        worst, best = min(means, key=lambda v: means[v]), max(means, key=lambda v: means[v])
        spread = means[best] - means[worst] if len(means) > 1 else np.nan
        rows.append({
            "arm": arm, "worst": worst, "worst_dice": means[worst], "best": best, "best_dice": means[best],
            "spread": spread,
        })  # fmt: skip
    return rows
