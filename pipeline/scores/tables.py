"""The tables of an evaluation, and their summary by arm, vendor and structure.

`cases.csv` has one row for each structure of a volume, `slices.csv` one for each structure of a slice, and `trust.csv`
one for each volume, with its expected Dice.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.scores.metrics import SliceScore, StructureScore
from pipeline.scores.statistics import bootstrap_interval
from storage import fs
from storage.csv_table import csv_text
from storage.errors import InputError
from storage.subjects import STRUCTURES

_WHOSE = ("arm", "seed", "subject", "vendor", "centre", "phase")
CASE_FIELDS = (
    *_WHOSE, "structure", "dice", "hd95_mm", "assd_mm", "missed", "dice_slices", "hd_mm", "reference_ml",
    "predicted_ml", "outside",
)  # fmt: skip
SLICE_FIELDS = (*_WHOSE, "slice", "position", "structure", "dice", "missed")
TRUST_FIELDS = (*_WHOSE, "dice", "expected_dice", "ece", "ece_tempered")
TABLE_FIELDS = ("arm", "vendor", "structure", "n", "dice_mean", "dice_low", "dice_high", "hd95_median_mm", "missed")

_LATER = frozenset({"ece", "ece_tempered"})  # columns that the tables of an earlier version lack; they are read as NaN
_TEXT = frozenset({"arm", "subject", "vendor", "centre", "phase", "structure", "position"})
_WHOLE = frozenset({"seed", "slice"})


def case_rows(
    scores: Iterable[StructureScore], outside: Mapping[str, float], whose: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of `cases.csv` for one scored volume, with the columns of `CASE_FIELDS`.

    `outside` is the result of `volumes.share_outside` for the reference mask. `whose` has arm, seed, subject, vendor,
    centre and phase.
    """
    return [_merged_row(CASE_FIELDS, whose, vars(score), {"outside": outside[score.structure]}) for score in scores]


def slice_rows(scores: Iterable[SliceScore], whose: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `slices.csv` for one volume, with the columns of `SLICE_FIELDS`; `whose` as in `case_rows`."""
    return [_merged_row(SLICE_FIELDS, whose, vars(score)) for score in scores]


def _merged_row(fields: Sequence[str], *parts: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for part in parts for name, value in part.items()}
    return {field: values[field] for field in fields}


def write_cases(target: str, cases: Iterable[Mapping[str, Any]]) -> None:
    """Write `cases.csv` at a path or URI, atomically; infinity and NaN are written as `inf` and `nan`."""
    fs.write_text(target, csv_text(CASE_FIELDS, cases))


def write_slices(target: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `slices.csv` at a path or URI, atomically."""
    fs.write_text(target, csv_text(SLICE_FIELDS, rows))


def write_trust(target: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `trust.csv` at a path or URI, atomically.

    A row has a volume's mean Dice and mean expected Dice over the drawn structures, and the calibration error
    (`calibration.calibration_error`) of the network's shares without (`ece`) and with its temperature (`ece_tempered`).
    """
    fs.write_text(target, csv_text(TRUST_FIELDS, rows))


def read_cases(source: str) -> list[dict[str, Any]]:
    """Read a table of `write_cases`, with types. Raises InputError if a column is missing or a value does not parse."""
    return _read_table(source, CASE_FIELDS)


def read_slices(source: str) -> list[dict[str, Any]]:
    """Read a table of `write_slices`, with types. Raises InputError as `read_cases` does."""
    return _read_table(source, SLICE_FIELDS)


def read_trust(source: str) -> list[dict[str, Any]]:
    """Read a table of `write_trust`, with types. Raises InputError as `read_cases` does."""
    return _read_table(source, TRUST_FIELDS)


def _read_table(source: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(csv.DictReader(io.StringIO(fs.read_text(source))), start=2):
        try:
            earlier = dict.fromkeys(_LATER - row.keys(), "nan")
            rows.append({field: _parsed_cell(field, (row | earlier)[field]) for field in fields})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source}, line {number}",
                f"not a row of {fs.base_name(source)} ({error})",
                "evaluate the arm again (`cardiomix evaluate --run RUN`)",
            ) from error
    return rows


def _parsed_cell(field: str, text: str) -> Any:
    if field in _TEXT:
        return text
    if field == "missed":
        return {"True": True, "False": False}[text]
    return int(text) if field in _WHOLE else float(text)


def summarise(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarise rows of `cases.csv`: one row for each arm, vendor and structure, sorted in this order.

    The columns are those of `TABLE_FIELDS`, then volumes, absent, hd_median_mm, assd_median_mm, dice_slices_mean,
    seeds, dice_seed_sd. A subject's Dice is the mean over its seeds and phases.

    - `dice_mean`: mean over the `n` subjects. `dice_low`, `dice_high`: its 95 % `statistics.bootstrap_interval`.
    - Distances: medians over volumes. A missed structure counts as infinite.
    - `volumes`, `absent`, `missed`: numbers of volumes (of all phases and seeds) that were scored, that have the
      structure in neither mask and count nowhere else, and that failed.
    - `dice_seed_sd`: standard deviation of the seeds' means over subjects. NaN for one seed.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["arm"], case["vendor"], case["structure"]), []).append(case)
    order = {name: i for i, name in enumerate(STRUCTURES)}
    keys = sorted(groups, key=lambda key: (key[0], key[1], order.get(key[2], len(order)), key[2]))
    return [_summary_row(key, groups[key]) for key in keys]


def _summary_row(key: tuple[str, str, str], cases: list[Mapping[str, Any]]) -> dict[str, Any]:
    scored = [case for case in cases if not np.isnan(case["dice"])]
    values = list(subject_dice(scored).values())
    low, high = bootstrap_interval(np.array(values))
    by_seed = {case["seed"]: [c for c in scored if c["seed"] == case["seed"]] for case in scored}
    of_seeds = [_mean(list(subject_dice(own).values())) for own in by_seed.values()]
    return {
        "arm": key[0],
        "vendor": key[1],
        "structure": key[2],
        "n": len(values),
        "dice_mean": _mean(values),
        "dice_low": low,
        "dice_high": high,
        "hd95_median_mm": _median([case["hd95_mm"] for case in scored]),
        "missed": sum(bool(case["missed"]) for case in scored),
        "volumes": len(scored),
        "absent": len(cases) - len(scored),
        "hd_median_mm": _median([case["hd_mm"] for case in scored]),
        "assd_median_mm": _median([case["assd_mm"] for case in scored]),
        "dice_slices_mean": _mean(list(subject_dice(scored, "dice_slices").values())),
        "seeds": len(of_seeds),
        "dice_seed_sd": float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else np.nan,
    }


def subject_dice(cases: Iterable[Mapping[str, Any]], field: str = "dice") -> dict[str, float]:
    """Mean Dice by subject: over seeds first, then over phases. NaN (both masks lack the structure) is left out."""
    phases: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        if not np.isnan(case[field]):
            phases.setdefault(case["subject"], {}).setdefault(case["phase"], []).append(case[field])
    return {
        subject: float(np.mean([np.mean(seeds) for seeds in by_phase.values()]))
        for subject, by_phase in sorted(phases.items())
    }


def position_dice(slices: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Dice by (arm, position, structure): the mean over each subject's slices there, then over subjects."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in slices:
        here = found.setdefault((row["arm"], row["position"], row["structure"]), {})
        here.setdefault(row["subject"], []).append(row["dice"])
    return {key: _mean([_mean(dice) for dice in subjects.values()]) for key, subjects in found.items()}


def _median(values: list[float]) -> float:
    # np.median averages the middle two. If one of them is infinite, so is the median, as it should be.
    return float(np.median(values)) if values else np.nan


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else np.nan
