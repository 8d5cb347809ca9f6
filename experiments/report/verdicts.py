"""The comparison of arms in words: one sentence for each planned step and vendor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.paper_table import ALL_CONTRASTS, CONTRASTS, arm_label
from experiments.report.tables import number, signed
from pipeline.scores.compare_arms import ALL, FEWEST_SUBJECTS, trainings
from storage.subjects import STRUCTURES

MARKS = {
    "better": "▲",
    "worse": "▼",
    "mixed": "◆",
    "hint": "◇",
    "no evidence": "○",
    "untested": "○",
    "descriptive": "·",
}
_VERBS = {"better": "helps", "worse": "harms"}
_HEADLINES = {
    "better": "Helps",
    "worse": "Harms",
    "hint": "A hint, not established,",
    "no evidence": "No evidence either way",
    "untested": "Too few subjects",
}
_SIZED = ("better", "worse", "hint", "descriptive")  # states whose sentence names the difference


def verdicts(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each planned step that can be compared.

    Its keys: `name`, `step` (the title), `arms` (which are compared), `state` (a key of `MARKS`), `headline` (where the
    step helps, harms, or neither), `rows` (means over the structures, by vendor) and `all` (all rows of the step).
    `comparisons` are the rows of `pipeline.scores.compare_arms.compare_arms`.
    """
    found = []
    for name, title, arm, baseline in ALL_CONTRASTS:
        own = [row for row in comparisons if (row["arm"], row["baseline"]) == (arm, baseline)]
        rows = [row for row in own if row["structure"] == ALL]
        if rows:
            states = {row["verdict"] for row in rows}
            established = states & set(_VERBS)
            state = "mixed" if len(established) == 2 else min(established or states, key=list(MARKS).index)
            entry = {"name": name, "step": title, "arms": f"{arm_label(arm)} against {arm_label(baseline)}"}
            found.append(entry | {"state": state, "headline": _headline(rows), "rows": rows, "all": own})
    return found


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    few = trainings(rows[0]["seeds"])  # all rows of a pair have the same
    parts = []
    for state, words in (_HEADLINES | {"descriptive": f"{few.capitalize()},"}).items():
        there = [row for row in rows if row["verdict"] == state]
        there.sort(key=lambda row: -abs(row["difference"]) if row["verdict"] in _SIZED else 0)  # the largest first
        told = [
            _vendor_and_structure(row) + (f" ({signed(row['difference'])})" if state in _SIZED else "") for row in there
        ]
        parts += [f"{words} {_joined_words(told)}."] if told else []
    return " ".join(parts)


def _vendor_and_structure(row: Mapping[str, Any]) -> str:
    return "over all vendors" if row["vendor"] == ALL else f"on {row['vendor']}"


def _joined_words(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def not_compared(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the paper's steps that cannot be compared, because an arm has no scores; empty if all can."""
    done = {(row["arm"], row["baseline"]) for row in comparisons}
    lacking = [
        f"{name} ({arm_label(arm)} against {arm_label(baseline)})"
        for name, _, arm, baseline in CONTRASTS
        if (arm, baseline) not in done
    ]
    return f"Not compared, since an arm has no scores: {', '.join(lacking)}." if lacking else ""


def evenness(across: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on which arm has the highest Dice on its worst vendor; empty if there is only one vendor or arm.

    `across` are the rows of `pipeline.scores.compare_arms.across_vendors`.
    """
    several = [row for row in across if not np.isnan(row["spread"])]
    if len(several) < 2:
        return ""
    best = max(several, key=lambda row: row["worst_dice"])
    return (
        f"Highest on its worst vendor: {arm_label(best['arm'])}, {number(best['worst_dice'])} on {best['worst']}, "
        f"which is {number(best['spread'])} below its best, {best['best']}."
    )


def sentences(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence with numbers for each step and vendor, established differences first; then what was not compared."""
    said = []
    for entry in verdicts(comparisons):
        ordered = sorted(entry["rows"], key=lambda row: list(MARKS).index(row["verdict"]))
        said += [_sentence(entry["name"], row, entry["all"]) for row in ordered]
    return [*said, *filter(None, [not_compared(comparisons)])]


def _sentence(name: str, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    where, state = _vendor_and_structure(row), row["verdict"]
    change, many = size_text(row), count_text(row)
    if state in _VERBS or state == "descriptive":
        parts = [r for r in rows if r["vendor"] == row["vendor"] and r["structure"] in STRUCTURES]
        by_structure = ", ".join(f"{r['structure']} {signed(r['difference'], 2)}" for r in parts)
        change += f" ({by_structure})"
    if state in _VERBS:
        return f"{name} {_VERBS[state]} {where}: {change}, {many}, {p_text(row['p_holm'])}."
    if state == "descriptive":
        return f"{name} {where} ({trainings(row['seeds'])}): {change}, {many}."
    if state == "untested":
        return f"{name} {where}: too few subjects to test ({many}, at least {FEWEST_SUBJECTS} needed): {change}."
    weight = "a hint, not established" if state == "hint" else "no evidence either way"
    return f"{name} {where}: {weight}: {change}, {many}, {p_text(row['p_holm'])}."


def size_text(row: Mapping[str, Any]) -> str:
    """The difference as `+.035 mean Dice [.018, .052]`, without the interval if there is none."""
    interval = "" if np.isnan(row["low"]) else f" [{_bound(row['low'])}, {_bound(row['high'])}]"
    return f"{signed(row['difference'])} mean Dice{interval}"


def count_text(row: Mapping[str, Any]) -> str:
    """Subjects and seeds as `n = 56, 3 seeds`."""
    return f"n = {row['n']}, {row['seeds']} seed{'s' * (row['seeds'] != 1)}"


def p_text(p: float) -> str:
    """A p-value as `p = .031` or `p < .001`; a dash if nothing was tested."""
    if np.isnan(p):
        return "–"
    return "p < .001" if p < 0.001 else f"p = {number(p)}"


def _bound(value: float) -> str:
    return signed(value) if value < 0 else number(value)
