"""Arms against each other, paired by subject and seed; and one arm across vendors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.scores.power import detectable
from pipeline.scores.statistics import Floats, crossed_interval, holm
from storage.subjects import STRUCTURES

ALL = "all"  # vendors together; also the mean of the structures
ALPHA = 0.05
FEWEST_SEEDS = 3  # for a verdict: the seeds of one arm differ by as much as arms do
FEWEST_SUBJECTS = 6  # for a verdict: Dice is skewed, and Student's t of fewer is not to be trusted
WHOLE_SHARE = 0.8  # of the level, for the mean over all vendors and structures; the rest is the others' together
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
    "seeds",
    "seed_sd",
    "subject_sd",
    "detectable",
)

RANKING_FIELDS = ("arm", "dice", "reference", "compared", *COMPARISON_FIELDS[4:])

Who = tuple[str, str]  # vendor, subject


@dataclass(frozen=True)
class _Scores:
    """Of one arm: structure (and `all`, their mean) to (S, N) Dice of its seeds and subjects, NaN for no score."""

    seeds: list[int]
    subjects: list[Who]
    dice: Mapping[str, Floats]

    def of(self, structure: str, seeds: Sequence[int], subjects: Sequence[Who]) -> Floats:
        rows, columns = [self.seeds.index(s) for s in seeds], [self.subjects.index(who) for who in subjects]
        return self.dice[structure][np.ix_(rows, columns)]


def compare_arms(cases: Sequence[Mapping[str, Any]], planned: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """How much better each planned (arm, baseline) is, by vendor and structure, on the subjects and seeds of both.

    Rows with the columns of `COMPARISON_FIELDS`: `structure` is LV, MYO, RV or `all`, the mean of a subject's
    structures; `vendor` is one, or `all` where there are several. `difference` is the mean over `seeds` and over `n`
    subjects of the Dice of `arm` less that of `baseline` (phases averaged first), with the 95 % interval and p of
    `statistics.crossed_interval`. From one seed the interval is over subjects alone. `seed_sd` and `subject_sd` are the
    standard deviations of the seeds' and of the subjects' mean differences, `detectable` the true difference that they
    let show (`power.detectable`).

    A pair is one question. `p_holm` is corrected by Holm for its vendors and structures: `WHOLE_SHARE` of the level
    belongs to the mean over all vendors and structures, the rest to all others together. Pairs are not corrected for
    each other, since they are planned. `verdict`: `descriptive` for fewer than `FEWEST_SEEDS`, `untested` for fewer
    than `FEWEST_SUBJECTS`, both without p; `better` or `worse` where `p_holm` < .05; `hint` where the interval alone
    leaves out zero; else `no evidence`. No row where two arms have no subject or seed in common.
    """
    scores, vendors = _scores(cases), sorted({case["vendor"] for case in cases})
    rows: list[dict[str, Any]] = []
    for arm, baseline in planned:
        if arm in scores and baseline in scores:
            own = _differences(scores[arm], scores[baseline], vendors)
            weights = np.full(len(own), (1 - WHOLE_SHARE) / max(1, len(own) - 1))
            weights[-1:] = WHOLE_SHARE  # the last row is of all vendors and structures
            _judge(own, weights)
            rows += [{"arm": arm, "baseline": baseline} | row for row in own]
    return rows


def rank_arms(cases: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Every arm, the one with the highest Dice over all vendors and structures first: `arm`, `dice` (the mean over its
    `n` subjects and its `seeds`), `reference`, `compared` (how many arms are, with the reference), and but for the
    reference itself the columns of `compare_arms` for its difference to that.

    The comparisons are one question, "is any arm better than the reference?", and corrected by Holm for each other:
    the best arm is chosen by the same scores.
    """
    scores = _scores(cases)
    rows: list[dict[str, Any]] = []
    for arm, own in scores.items():
        beside = scores.get(reference) if arm != reference else None
        compared = _row(own, beside, ALL, _common(own, beside)) if beside else None
        about = {"arm": arm, "dice": float(np.nanmean(own.dice[ALL])), "seeds": len(own.seeds), "n": len(own.subjects)}
        rows.append(about | (compared or {}))
    compared_rows = [row for row in rows if "difference" in row]
    _judge(compared_rows, np.ones(len(compared_rows)))
    return sorted(
        (row | {"reference": reference, "compared": len(compared_rows)} for row in rows), key=lambda row: -row["dice"]
    )


def _scores(cases: Sequence[Mapping[str, Any]]) -> dict[str, _Scores]:
    """Arms that have any score, by name."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        if not np.isnan(case["dice"]):
            by_arm.setdefault(case["arm"], []).append(case)
    return {arm: _arm_scores(own) for arm, own in sorted(by_arm.items())}


def _arm_scores(cases: Sequence[Mapping[str, Any]]) -> _Scores:
    seeds = sorted({case["seed"] for case in cases})
    subjects = sorted({(case["vendor"], case["subject"]) for case in cases})
    row, column = ({name: i for i, name in enumerate(names)} for names in (seeds, subjects))
    volumes: dict[str, dict[str, Floats]] = {structure: {} for structure in STRUCTURES}
    for case in cases:
        phases = volumes[case["structure"]]
        if case["phase"] not in phases:
            phases[case["phase"]] = np.full((len(seeds), len(subjects)), np.nan)
        phases[case["phase"]][row[case["seed"]], column[case["vendor"], case["subject"]]] = case["dice"]
    dice = {structure: _mean(map(_filled, phases.values())) for structure, phases in volumes.items() if phases}
    return _Scores(seeds, subjects, dice | {ALL: _mean(dice.values())})


def _filled(scored_SN: Floats) -> Floats:
    """A structure that the reference lacks has a score in those seeds alone that invent it: it counts in all."""
    return np.where(np.isnan(scored_SN), _mean(scored_SN), scored_SN)


def _mean(arrays: Iterable[Floats]) -> Floats:
    """Of the arrays, each of the same shape, without their NaN; NaN where all are."""
    stacked = np.array(list(arrays))
    there = (~np.isnan(stacked)).sum(axis=0)
    mean: Floats = np.nansum(stacked, axis=0) / np.where(there, there, np.nan)
    return mean


def _common(ours: _Scores, theirs: _Scores) -> list[Who]:
    return sorted(set(ours.subjects) & set(theirs.subjects))


def _differences(ours: _Scores, theirs: _Scores, vendors: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of vendor, structure and what `_row` gives; the last is of all vendors and structures."""
    common = _common(ours, theirs)
    groups = {vendor: [who for who in common if who[0] == vendor] for vendor in vendors}
    groups |= {ALL: common} if len(vendors) > 1 else {}
    rows = []
    for vendor, subjects in groups.items():
        for structure in (s for s in (*STRUCTURES, ALL) if s in ours.dice and s in theirs.dice):
            row = _row(ours, theirs, structure, subjects)
            if row is not None:
                rows.append({"vendor": vendor, "structure": structure} | row)
    return rows


def _row(ours: _Scores, theirs: _Scores, structure: str, subjects: Sequence[Who]) -> dict[str, Any] | None:
    seeds = sorted(set(ours.seeds) & set(theirs.seeds))
    deltas = ours.of(structure, seeds, subjects) - theirs.of(structure, seeds, subjects)  # (S, N)
    # Means of the same numbers in another order differ in their last bits, which is no difference.
    deltas = np.round(deltas[:, ~np.isnan(deltas).any(axis=0)], 12)
    if not deltas.size:
        return None
    mean, low, high, p = map(float, crossed_interval([deltas]))
    tested = len(seeds) >= FEWEST_SEEDS and deltas.shape[1] >= FEWEST_SUBJECTS
    seed_sd, subject_sd = (
        float(np.std(means, ddof=1)) if len(means) > 1 else np.nan
        for means in (deltas.mean(axis=1), deltas.mean(axis=0))
    )
    return {
        "n": deltas.shape[1],
        "difference": mean,
        "low": low,
        "high": high,
        "p": p if tested else np.nan,
        "seeds": len(seeds),
        "seed_sd": seed_sd,
        "subject_sd": subject_sd,
        "detectable": detectable(len(seeds), seed_sd, deltas.shape[1], subject_sd, WHOLE_SHARE * ALPHA),
    }


def _judge(rows: Sequence[dict[str, Any]], weights: Floats) -> None:
    """Adds `p_holm` and `verdict` to the rows of one question."""
    for row, p in zip(rows, holm([row["p"] for row in rows], weights), strict=True):
        row["p_holm"] = float(p)
        row["verdict"] = _verdict(row)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["seeds"] < FEWEST_SEEDS:
        return "descriptive"
    if row["n"] < FEWEST_SUBJECTS:
        return "untested"
    if row["p_holm"] < ALPHA:
        return "better" if row["difference"] > 0 else "worse"
    return "hint" if row["low"] > 0 or row["high"] < 0 else "no evidence"


def trainings(seeds: int) -> str:
    """What one or two seeds are called, `one training: descriptive`; empty from `FEWEST_SEEDS` on, where verdicts
    begin."""
    return "" if seeds >= FEWEST_SEEDS else f"{('one training', 'two trainings')[seeds - 1]}: descriptive"


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
