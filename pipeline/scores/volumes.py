"""What a cardiologist reads off a mask: volumes, ejection fraction and mass, and how well two methods agree on them."""

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

# measure → unit; the order in which they are shown
MEASURES = {
    "LV EDV": "ml", "LV ESV": "ml", "LV EF": "%", "RV EDV": "ml", "RV ESV": "ml", "RV EF": "%", "LV mass": "g",
}  # fmt: skip


def volumes_ml(mask_ZHW: Labels, spacing: Spacing) -> dict[str, float]:
    """Volume of LV, MYO and RV in ml: their voxels, times a voxel's size (mm, three axes), over 1000."""
    counts = np.bincount(mask_ZHW.ravel(), minlength=max(STRUCTURES.values()) + 1)
    voxel_ml = float(np.prod(spacing)) / 1000.0
    return {name: float(counts[label]) * voxel_ml for name, label in STRUCTURES.items()}


def ejection_fraction(edv_ml: float, esv_ml: float) -> float:
    """Stroke volume over end-diastolic volume, in %; NaN where there is no end-diastolic volume."""
    return 100.0 * (edv_ml - esv_ml) / edv_ml if edv_ml > 0 else np.nan


def share_outside(mask_ZHW: Labels, spacing: Spacing, config: PreprocessConfig) -> dict[str, float]:
    """How much of each structure lies where the network does not look, as a share of its voxels (0 to 1).

    `mask_ZHW` (slices, rows, columns) and `spacing` (mm) are of the native grid. 0 too where a structure is absent.
    """
    seen = []
    for n, scale in zip(mask_ZHW.shape[1:], working_scales(spacing[1], spacing[2], config), strict=True):
        drawn = resampling_matrix(config.size, even(n), 1.0 / scale).sum(axis=1) > 0
        seen.append(np.pad(drawn, (0, n - len(drawn))))
    inside = seen[0][:, None] & seen[1][None]
    total, lost = (np.bincount(m.ravel(), minlength=4) for m in (mask_ZHW, mask_ZHW[:, ~inside]))
    return {name: float(lost[label] / max(total[label], 1)) for name, label in STRUCTURES.items()}


def cardiac_function(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Volumes and what follows from them, predicted and reference, from rows of `cases.csv`.

    Rows: arm, seed, subject, vendor, centre, measure (a key of `MEASURES`), unit, reference, predicted. EDV and the
    LV's mass (myocardium, 1.05 g/ml) are taken at ED, ESV at ES, EF from both; a phase that was not scored gives no
    row. A missed structure is 0 ml. EF is NaN where the end-diastolic volume is 0.
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
    """Measure to (reference, predicted), for what ED and ES allow."""
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
    """One row a subject, arm and measure: the rows of `cardiac_function` with the predictions averaged over seeds.

    A value that some seed cannot give (NaN) stays NaN.
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

    Rows: arm, measure, unit, n, bias (mean of predicted minus reference), sd, low, high (bias ± 1.96 sd; NaN for one
    subject), undefined (subjects left out since a value is NaN). Seeds are averaged within a subject first.
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
