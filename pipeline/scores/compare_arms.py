"""Compare arms with each other, paired by subject and seed, and one arm across vendors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.scores.power import detectable
from pipeline.scores.statistics import Floats, crossed_interval, holm
from storage.subjects import STRUCTURES

ALL = "all"  # all vendors together, or the mean of all structures
ALPHA = 0.05
FEWEST_SEEDS = 3  # needed for a verdict, because the seeds of one arm differ as much as arms do
FEWEST_SUBJECTS = 6  # needed for a verdict, because Dice is skewed and Student's t is unreliable for fewer
WHOLE_SHARE = 0.8  # of the level: for the mean over all vendors and structures; the other rows share the rest
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
    """One arm's Dice: for each structure, and for their mean `all`, an array (seeds, subjects). NaN means no score."""

    seeds: list[int]
    subjects: list[Who]
    dice: Mapping[str, Floats]

    def of(self, structure: str, seeds: Sequence[int], subjects: Sequence[Who]) -> Floats:
        rows, columns = [self.seeds.index(s) for s in seeds], [self.subjects.index(who) for who in subjects]
        return self.dice[structure][np.ix_(rows, columns)]


def compare_arms(cases: Sequence[Mapping[str, Any]], planned: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Compare each planned pair (arm, baseline), by vendor and structure, on the subjects and seeds that both have.

    `cases` are rows of `cases.csv`. The result has the columns of `COMPARISON_FIELDS`:

    - `structure`: LV, MYO, RV, or `all`, the mean of a subject's structures.
    - `vendor`: one vendor, or `all` if there are several.
    - `difference`: the Dice of `arm` minus that of `baseline`, phases averaged first, mean over the seeds (`seeds`) and
      subjects (`n`). `low`, `high` and `p` are the 95 % interval and the p of `statistics.crossed_interval`.
    - `seed_sd`, `subject_sd`: standard deviations of the seeds' and of the subjects' mean differences.
    - `detectable`: the smallest true difference that these spreads let a test show (`power.detectable`).
    - `p_holm`: p after Holm's correction over the vendors and structures of the pair. `WHOLE_SHARE` of the level
      belongs to the mean over all vendors and structures; all others share the rest. Pairs are planned, so they are not
      corrected for each other.
    - `verdict`: `descriptive` with fewer than `FEWEST_SEEDS` seeds and `untested` with fewer than `FEWEST_SUBJECTS`
      subjects, both without p. Otherwise `better` or `worse` if `p_holm` < .05, `hint` if only the interval excludes
      zero, else `no evidence`.

    Two arms without a common subject or seed have no row.
    """
    scores, vendors = _scores(cases), sorted({case["vendor"] for case in cases})
    rows: list[dict[str, Any]] = []
    for arm, baseline in planned:
        if arm in scores and baseline in scores:
            own = _differences(scores[arm], scores[baseline], vendors)
            weights = np.full(len(own), (1 - WHOLE_SHARE) / max(1, len(own) - 1))
            weights[-1:] = WHOLE_SHARE  # the last row is the mean over all vendors and structures
            _judge(own, weights)
            rows += [{"arm": arm, "baseline": baseline} | row for row in own]
    return rows


def rank_arms(cases: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Rank all arms by their Dice over all vendors and structures, the highest first.

    Each row has `arm`, `dice` (the mean over all its subjects and seeds), `reference`, `compared` (the number of arms
    that are compared with the reference), `n` and `seeds`. Every other arm that shares subjects and seeds with the
    reference also has the columns of `compare_arms` for the difference; there `n` and `seeds` count what is shared.

    The best arm is chosen by the same scores. So all comparisons together are one question, "is any arm better than the
    reference?", and Holm's correction is over all of them.
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
    """The scores of all arms that have any, by the arm's name."""
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
    dice = {structure: _mean(map(filled, phases.values())) for structure, phases in volumes.items() if phases}
    return _Scores(seeds, subjects, dice | {ALL: _mean(dice.values())})


def filled(scored_SN: Floats) -> Floats:
    """Fill missing scores with the mean over the other seeds.

    If the reference lacks a structure, only the seeds that invent it have a score, 0. This score then counts for all.
    """
    return np.where(np.isnan(scored_SN), _mean(scored_SN), scored_SN)


def _mean(arrays: Iterable[Floats]) -> Floats:
    """The mean of arrays of one shape, element by element, without NaN; NaN where all are NaN."""
    stacked = np.array(list(arrays))
    there = (~np.isnan(stacked)).sum(axis=0)
    mean: Floats = np.nansum(stacked, axis=0) / np.where(there, there, np.nan)
    return mean


def _common(ours: _Scores, theirs: _Scores) -> list[Who]:
    return sorted(set(ours.subjects) & set(theirs.subjects))


def _differences(ours: _Scores, theirs: _Scores, vendors: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `_row` with vendor and structure. The last row is the mean over all vendors and structures."""
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
    # Means of the same numbers in another order differ in their last bits. Rounding removes that.
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
    """Add `p_holm` and `verdict` to the rows that one question covers."""
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
    """A remark for one or two seeds, such as `one training: descriptive`. Empty from `FEWEST_SEEDS` seeds on."""
    return "" if seeds >= FEWEST_SEEDS else f"{('one training', 'two trainings')[seeds - 1]}: descriptive"


def across_vendors(summary: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How much the Dice of each arm differs between vendors.

    `summary` are rows of `tables.summarise`. Returned rows: arm, worst (vendor), worst_dice, best (vendor), best_dice,
    spread (best minus worst; NaN for a single vendor). A vendor's Dice is the mean over its structures.
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
