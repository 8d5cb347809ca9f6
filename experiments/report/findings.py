"""What is computed from a run's cases for the tables, the verdicts and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.first_screen import reference_arm
from experiments.report.paper_table import ALL_CONTRASTS, arm_order
from pipeline.scores.compare_arms import compare_arms, rank_arms
from pipeline.scores.tables import summarise
from pipeline.scores.volumes import agreement, cardiac_function


@dataclass(frozen=True)
class Findings:
    """What is computed from a run's cases. Each field names the function that makes it."""

    summary: list[dict[str, Any]]  # tables.summarise, arms in the paper's order
    comparisons: list[dict[str, Any]]  # compare_arms.compare_arms
    ranking: list[dict[str, Any]]  # compare_arms.rank_arms
    function: list[dict[str, Any]]  # volumes.cardiac_function
    agreement: list[dict[str, Any]]  # volumes.agreement


def work_out(cases: Sequence[Mapping[str, Any]]) -> Findings:
    """Compute all findings from the rows of `cases.csv`."""
    function = cardiac_function(cases)
    return Findings(
        summary=sorted(summarise(cases), key=lambda row: arm_order(row["arm"])),
        comparisons=compare_arms(cases, [(arm, baseline) for _, _, arm, baseline in ALL_CONTRASTS]),
        ranking=rank_arms(cases, reference_arm(list({case["arm"] for case in cases}))),
        function=function,
        agreement=agreement(function),
    )
