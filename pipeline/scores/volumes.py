"""Clinical measures of a mask: volumes, ejection fraction and mass, and how well two methods agree on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.samples.preprocess import PreprocessConfig, even, working_scales
from pipeline.samples.rescale import resampling_matrix
from storage.nifti.header import Spacing
from storage.subjects import STRUCTURES

Labels = npt.NDArray[np.uint8]

MYOCARDIUM_G_PER_ML = 1.05
LIMIT = 1.96  # standard deviations: 95 % of a normal distribution

# measure → unit, in the order of display
MEASURES = {
    "LV EDV": "ml", "LV ESV": "ml", "LV EF": "%", "RV EDV": "ml", "RV ESV": "ml", "RV EF": "%", "LV mass": "g",
}  # fmt: skip


def volumes_ml(mask_ZHW: Labels, spacing: Spacing) -> dict[str, float]:
    """Volumes of LV, MYO and RV in ml, by name. `spacing` is (slice, row, column) in mm."""
    counts = np.bincount(mask_ZHW.ravel(), minlength=max(STRUCTURES.values()) + 1)
    voxel_ml = float(np.prod(spacing)) / 1000.0
    return {name: float(counts[label]) * voxel_ml for name, label in STRUCTURES.items()}


def ejection_fraction(edv_ml: float, esv_ml: float) -> float:
    """Stroke volume over end-diastolic volume, in %. NaN if the end-diastolic volume is 0."""
    return 100.0 * (edv_ml - esv_ml) / edv_ml if edv_ml > 0 else np.nan


def share_outside(mask_ZHW: Labels, spacing: Spacing, config: PreprocessConfig) -> dict[str, float]:
    """The share (0 to 1) of each structure's voxels that lie outside the network's field of view, by name.

    `mask_ZHW` (slices, rows, columns) and `spacing` (mm) are of the native grid. An absent structure has 0.
    """
    seen = []
    for n, scale in zip(mask_ZHW.shape[1:], working_scales(spacing[1], spacing[2], config), strict=True):
        drawn = resampling_matrix(config.size, even(n), 1.0 / scale).sum(axis=1) > 0
        seen.append(np.pad(drawn, (0, n - len(drawn))))
    inside = seen[0][:, None] & seen[1][None]
    total, lost = (np.bincount(m.ravel(), minlength=4) for m in (mask_ZHW, mask_ZHW[:, ~inside]))
    return {name: float(lost[label] / max(total[label], 1)) for name, label in STRUCTURES.items()}


def cardiac_function(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and reference measures, from rows of `cases.csv`.

    Returned rows: arm, seed, subject, vendor, centre, measure (a key of `MEASURES`), unit, reference, predicted. EDV
    and the LV's mass (myocardium, 1.05 g/ml) are of ED, ESV is of ES, and EF is of both. If a phase was not scored, its
    measures have no row. A missed structure has 0 ml. EF is NaN if the end-diastolic volume is 0.
    """
    ml: dict[tuple[Any, ...], dict[tuple[str, str], tuple[float, float]]] = {}
    for case in cases:
        whose = tuple(case[field] for field in ("arm", "seed", "subject", "vendor", "centre"))
        ml.setdefault(whose, {})[case["structure"], case["phase"]] = case["reference_ml"], case["predicted_ml"]
    return [
        dict(zip(("arm", "seed", "subject", "vendor", "centre"), whose, strict=True))
        | {"measure": measure, "unit": MEASURES[measure], "reference": pair[0], "predicted": pair[1]}
        for whose, found in ml.items()
        for measure, pair in _measures(found).items()
    ]


def _measures(ml: Mapping[tuple[str, str], tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """(reference, predicted) by measure. A measure whose structure or phase is lacking is left out."""
    out: dict[str, tuple[float, float]] = {}
    for side in ("LV", "RV"):
        ed, es = ml.get((side, "ED")), ml.get((side, "ES"))
        if ed is not None:
            out[f"{side} EDV"] = ed
        if es is not None:
            out[f"{side} ESV"] = es
        if ed is not None and es is not None:
            out[f"{side} EF"] = (ejection_fraction(ed[0], es[0]), ejection_fraction(ed[1], es[1]))
    wall = ml.get(("MYO", "ED"))
    if wall is not None:
        out["LV mass"] = (MYOCARDIUM_G_PER_ML * wall[0], MYOCARDIUM_G_PER_ML * wall[1])
    return {measure: out[measure] for measure in MEASURES if measure in out}


def subject_measures(function: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `cardiac_function` with predictions averaged over seeds: one row for each arm, measure and subject.

    If one seed's prediction is NaN, so is the mean.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in function:
        groups.setdefault((row["arm"], row["measure"], row["subject"]), []).append(row)
    return [
        {**rows[0], "seed": None, "predicted": float(np.mean([row["predicted"] for row in rows]))}
        for rows in groups.values()
    ]


def agreement(function: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bias and limits of agreement of each arm and measure over all subjects (Bland and Altman, Lancet 1986).

    Takes rows of `cardiac_function`; seeds are averaged within a subject first. Returned rows: arm, measure, unit, n,
    bias (mean of predicted minus reference), sd, low and high (bias ± 1.96 sd; NaN for a single subject), and
    undefined, the number of subjects that are left out because a value is NaN.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in subject_measures(function):
        groups.setdefault((row["arm"], row["measure"]), []).append(row)
    rows = []
    for (arm, measure), members in groups.items():
        deltas = np.array([row["predicted"] - row["reference"] for row in members])
        known = deltas[~np.isnan(deltas)]
        bias = float(known.mean()) if len(known) else np.nan
        sd = float(known.std(ddof=1)) if len(known) > 1 else np.nan
        rows.append({
            "arm": arm, "measure": measure, "unit": MEASURES[measure], "n": len(known), "bias": bias, "sd": sd,
            "low": bias - LIMIT * sd, "high": bias + LIMIT * sd, "undefined": len(deltas) - len(known),
        })  # fmt: skip
    return rows
