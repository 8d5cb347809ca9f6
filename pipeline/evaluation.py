"""How good a segmentation is: Dice, HD95 and ASSD per volume on the native grid, and their summary per vendor.

A structure that one of the two masks has and the other has not (missed or invented) scores Dice 0 and infinite
distances and counts as a failure, so that it can never improve a mean. A structure absent from both has no score (NaN):
it is left out of the means and counted.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import uri
from storage.errors import InputError

STRUCTURES: dict[str, int] = {"LV": 1, "MYO": 2, "RV": 3}

CASE_FIELDS = (
    "arm", "seed", "subject", "vendor", "centre", "phase", "structure",
    "dice", "hd95_mm", "assd_mm", "missed", "dice_slices",
)  # fmt: skip
TABLE_FIELDS = ("arm", "vendor", "structure", "n", "dice_mean", "dice_low", "dice_high", "hd95_median_mm", "missed")

_RESAMPLES = 2000
_FLOAT_FIELDS = ("dice", "hd95_mm", "assd_mm", "dice_slices")


@dataclass(frozen=True)
class StructureScore:
    """One structure of one volume: Dice in [0, 1], distances in mm; see the module docstring for NaN and infinity."""

    structure: str
    dice: float
    hd95_mm: float
    assd_mm: float
    missed: bool
    dice_slices: float


def score_volume(
    prediction_ZHW: npt.NDArray[np.uint8], mask_ZHW: npt.NDArray[np.uint8], spacing: tuple[float, float, float]
) -> list[StructureScore]:
    """Score LV, MYO and RV of one volume against its reference mask.

    Both are `(slices, rows, columns)` label volumes (0 background, LV 1, MYO 2, RV 3) on one grid; `spacing` is (slice,
    row, column) in mm. Distances are MONAI's, between surface voxels in 3D: HD95 is the larger of the two directed 95th
    percentiles, ASSD the mean over the surface voxels of both. `dice_slices` is the mean of the 2D Dice over the slices
    where either mask has the structure.

    Raises `InputError` where the shapes differ or a spacing is not a positive number.
    """
    if prediction_ZHW.shape != mask_ZHW.shape or mask_ZHW.ndim != 3:
        raise InputError(
            "evaluation",
            f"the prediction is {prediction_ZHW.shape}, the reference {mask_ZHW.shape}",
            "score 3D masks on the same grid",
        )
    if not all(np.isfinite(mm) and mm > 0 for mm in spacing):
        raise InputError(
            "evaluation", f"voxel size is {spacing} mm", "fix the header: distances need three positive sizes"
        )
    return [
        _score_structure(name, prediction_ZHW == label, mask_ZHW == label, spacing)
        for name, label in STRUCTURES.items()
    ]


def _score_structure(
    name: str, predicted: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_], spacing: tuple[float, float, float]
) -> StructureScore:
    in_prediction, in_reference = bool(predicted.any()), bool(reference.any())
    if not (in_prediction or in_reference):
        return StructureScore(name, np.nan, np.nan, np.nan, False, np.nan)
    if in_prediction != in_reference:
        return StructureScore(name, 0.0, np.inf, np.inf, True, 0.0)
    overlap_Z = (predicted & reference).sum(axis=(1, 2))
    size_Z = predicted.sum(axis=(1, 2)) + reference.sum(axis=(1, 2))
    present = size_Z > 0
    hd95, assd = surface_distances(predicted, reference, spacing)
    return StructureScore(
        name,
        dice=float(2 * overlap_Z.sum() / size_Z.sum()),
        hd95_mm=hd95,
        assd_mm=assd,
        missed=False,
        dice_slices=float(np.mean(2 * overlap_Z[present] / size_Z[present])),
    )


def surface_distances(
    predicted: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[float, float]:
    """HD95 and ASSD in mm (MONAI) between two non-empty masks of one shape, 2D or 3D; `spacing` is mm an axis."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    # Outside the box both are background, which is also what the surface extraction assumes beyond an array's border:
    # cropping changes the time, not the distances.
    box = _bounding_box(predicted | reference)
    p, r = (torch.from_numpy(np.ascontiguousarray(m[box]))[None, None] for m in (predicted, reference))
    mm = [float(size) for size in spacing]  # MONAI refuses a mixture of number types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls itself with an argument that it deprecates
        hd95 = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=mm)
        assd = compute_average_surface_distance(p, r, include_background=True, symmetric=True, spacing=mm)
    return float(hd95), float(assd)


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def case_rows(
    scores: Iterable[StructureScore], *, arm: str, seed: int, subject: str, vendor: str, centre: str, phase: str
) -> list[dict[str, Any]]:
    """The rows of `cases.csv` for one scored volume, with the columns of `CASE_FIELDS`."""
    whose = {"arm": arm, "seed": seed, "subject": subject, "vendor": vendor, "centre": centre, "phase": phase}
    return [
        whose | {field: getattr(score, field) for field in CASE_FIELDS if hasattr(score, field)} for score in scores
    ]


def write_cases(target: str, cases: Iterable[Mapping[str, Any]]) -> None:
    """Write `cases.csv` at a path or URI, atomically; infinity and NaN are written as `inf` and `nan`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CASE_FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(cases)
    uri.write_text(target, text.getvalue())


def read_cases(source: str) -> list[dict[str, Any]]:
    """Read what `write_cases` wrote, types restored; `InputError` where a column lacks or a value does not parse."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(csv.DictReader(io.StringIO(uri.read_text(source))), start=2):
        try:
            case: dict[str, Any] = {field: row[field] for field in CASE_FIELDS}
            case["seed"] = int(case["seed"])
            case["missed"] = {"True": True, "False": False}[case["missed"]]
            for field in _FLOAT_FIELDS:
                case[field] = float(case[field])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source}, line {number}", f"not a row of cases.csv ({error})", "evaluate the arm again"
            ) from error
        rows.append(case)
    return rows


def summarise(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm, vendor and structure: the columns of `TABLE_FIELDS`, then volumes, absent, assd_median_mm,
    dice_slices_mean.

    A subject's value is the mean over its phases and seeds, `dice_mean` the mean over the `n` subjects, `dice_low` and
    `dice_high` the 95 % percentile bootstrap over subjects (2000 resamples, Philox with seed 0; NaN for a single
    subject, who has no spread). Distances are medians over volumes, where a missed structure counts as infinite.
    `volumes`, `absent` and `missed` count (phase, seed) volumes: scored, without the structure in either mask (left out
    of everything else), and failed. Arms and vendors come sorted by name.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["arm"], case["vendor"], case["structure"]), []).append(case)
    order = {name: i for i, name in enumerate(STRUCTURES)}
    keys = sorted(groups, key=lambda key: (key[0], key[1], order.get(key[2], len(order)), key[2]))
    return [_summary_row(key, groups[key]) for key in keys]


def _summary_row(key: tuple[str, str, str], cases: list[Mapping[str, Any]]) -> dict[str, Any]:
    scored = [case for case in cases if not np.isnan(case["dice"])]
    subjects = subject_dice(scored)
    values = np.array(list(subjects.values()), dtype=np.float64)
    low, high = bootstrap_interval(values)
    return {
        "arm": key[0],
        "vendor": key[1],
        "structure": key[2],
        "n": len(values),
        "dice_mean": float(values.mean()) if len(values) else np.nan,
        "dice_low": low,
        "dice_high": high,
        "hd95_median_mm": _median([case["hd95_mm"] for case in scored]),
        "missed": sum(bool(case["missed"]) for case in scored),
        "volumes": len(scored),
        "absent": len(cases) - len(scored),
        "assd_median_mm": _median([case["assd_mm"] for case in scored]),
        "dice_slices_mean": _mean(list(subject_dice(scored, "dice_slices").values())),
    }


def subject_dice(cases: Iterable[Mapping[str, Any]], field: str = "dice") -> dict[str, float]:
    """Subject to its mean Dice over seeds, then over phases; NaN (structure absent from both masks) is left out."""
    phases: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        if not np.isnan(case[field]):
            phases.setdefault(case["subject"], {}).setdefault(case["phase"], []).append(case[field])
    return {
        subject: float(np.mean([np.mean(seeds) for seeds in by_phase.values()]))
        for subject, by_phase in sorted(phases.items())
    }


def paired_differences(cases: Sequence[Mapping[str, Any]], arm: str, baseline: str) -> list[dict[str, Any]]:
    """How much better `arm` is than `baseline`, by vendor, on the subjects that both have.

    Rows: vendor, n, difference (mean over subjects of the Dice difference, itself a mean of LV, MYO, RV), low, high
    (95 % bootstrap over subjects; NaN for one subject). No row where the two have no subject in common.
    """
    rows = []
    for vendor in sorted({case["vendor"] for case in cases}):
        ours, theirs = (
            _mean_dice(case for case in cases if (case["arm"], case["vendor"]) == (name, vendor))
            for name in (arm, baseline)
        )
        deltas = np.array([ours[subject] - theirs[subject] for subject in sorted(ours.keys() & theirs.keys())])
        if len(deltas):
            low, high = bootstrap_interval(deltas)
            rows.append(
                {"vendor": vendor, "n": len(deltas), "difference": float(deltas.mean()), "low": low, "high": high}
            )
    return rows


def _mean_dice(cases: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Subject to the mean of its structures' Dice."""
    by_structure: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        by_structure.setdefault(case["structure"], []).append(case)
    values: dict[str, list[float]] = {}
    for here in by_structure.values():
        for subject, dice in subject_dice(here).items():
            values.setdefault(subject, []).append(dice)
    return {subject: float(np.mean(dice)) for subject, dice in values.items()}


def bootstrap_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `(N,)` values, one a subject; NaN where N < 2. The same each time."""
    if len(values) < 2:
        return np.nan, np.nan
    generator = np.random.Generator(np.random.Philox(0))
    draws = generator.integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _median(values: list[float]) -> float:
    # np.median averages the middle two; inf + finite is inf there, as it should be, but inf - inf never occurs.
    return float(np.median(values)) if values else np.nan


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else np.nan
