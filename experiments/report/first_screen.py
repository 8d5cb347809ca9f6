"""What a reader should know before any table: the best arm, its difference to the reference, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.paper_table import arm_label, arm_order
from experiments.report.tables import number
from experiments.report.verdicts import count_text, p_text, size_text
from pipeline.scores.compare_arms import ALPHA, FEWEST_SEEDS, WHOLE_SHARE, trainings
from pipeline.scores.power import SEED_SDS, usually_detectable

REFERENCE = "unet_ra"
_WEIGHTS = {
    "better": "established",
    "worse": "established",
    "hint": "a hint, not established",
    "no evidence": "no evidence either way",
    "untested": "too few subjects to test",
}


def reference_arm(arms: Sequence[str]) -> str:
    """The arm with which the others are compared: U-Net+RA, or the first in the paper's order if that has no scores."""
    return REFERENCE if REFERENCE in arms else min(arms, key=arm_order, default=REFERENCE)


def first_screen(ranking: Sequence[Mapping[str, Any]], shared_bank: bool) -> dict[str, Any]:
    """The first screen of a report; empty if nothing is scored.

    Its keys: `best` (the arm's label), `dice` (its mean Dice), `state` (a key of `verdicts.MARKS`), `title`, `answer`
    (a sentence) and `further` (a list of sentences). `ranking` is that of `pipeline.scores.compare_arms.rank_arms`.
    `shared_bank` says whether the seeds share an SDNet and a bank.
    """
    if not ranking:
        return {}
    best = ranking[0]
    others = ranking if best["arm"] == best["reference"] else [best]
    compared = next((row for row in others if "difference" in row), None)  # the best that is not the reference
    found = {"best": arm_label(best["arm"]), "dice": best["dice"]}
    if compared is None:
        what = "Only one arm is scored" if len(ranking) == 1 else "It shares no subject or no seed with the reference"
        many = "; ".join(filter(None, [count_text(best), trainings(best["seeds"])]))
        answer = f"{what}, so there is nothing to compare it with ({many})."
        return found | {"state": "untested", "title": "Mean Dice", "answer": answer, "further": []}
    further = [_power(compared)] + ([_SHARED] if shared_bank else [])
    return found | {
        "state": compared["verdict"],
        "title": f"Highest mean Dice of {len(ranking)} arms, over all vendors and structures",
        "answer": _answer(ranking, compared),
        "further": further,
    }


_SHARED = (
    "The seeds of arms that use factors share one SDNet and one bank (seeds_share_bank): what another SDNet would "
    "change is in no interval."
)


def _answer(ranking: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    change = f"{size_text(row)} against the reference, {arm_label(row['reference'])}"
    if ranking[0]["arm"] == row["reference"]:
        change = f"This is the reference. The next, {arm_label(row['arm'])}: {size_text(row)}"
    many = f"{count_text(row)} an arm"
    if row["verdict"] == "descriptive":
        alone = " The interval is over subjects alone." if row["seeds"] == 1 else ""
        few = f"{trainings(row['seeds']).capitalize()}.{alone} Another training may turn the order round"
        return f"{change} ({many}). {few}; a verdict needs {FEWEST_SEEDS} seeds."
    p = f", {p_text(row['p_holm'])}" if not np.isnan(row["p_holm"]) else ""
    among = f", corrected for {row['compared']} arms" if p and row["compared"] > 1 else ""
    return f"{change}: {_WEIGHTS[row['verdict']]} ({many}{p}{among})."


def _power(row: Mapping[str, Any]) -> str:
    if row["seeds"] >= FEWEST_SEEDS:
        return (
            f"Seeds and subjects that vary as here show a true difference of {number(row['detectable'])} in four of "
            "five such experiments."
        )
    own = (row["subject_sd"], row["subject_sd"])
    low, high = usually_detectable(FEWEST_SEEDS, row["n"], WHOLE_SHARE * ALPHA, own)
    if np.isnan(low):
        return "One subject shows no difference."
    return (
        f"With {FEWEST_SEEDS} seeds, these subjects would show a true difference of {number(low)} to {number(high)} in "
        f"four of five such experiments, if seeds lie {number(SEED_SDS[0], 2)} to {number(SEED_SDS[1])} apart as on "
        "real patients."
    )
