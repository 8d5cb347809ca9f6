"""Warnings of `predict` about implausible numbers, with the limits of `inspect`.

A volume is a number of voxels times the header's voxel size. So if a header lost its voxel size, a right mask gives
wrong volumes, and the picture does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.trust import DOUBTFUL, in_words, mean_dice
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.scores.volumes import MYOCARDIUM_G_PER_ML
from storage import fs
from storage.nifti.header import Header
from storage.survey.flags import LV_ED_ML, MYO_ED_ML, PIXEL_AREA_MM2, SLICE_DISTANCE_MM, Range, short

# Limits without a source are our choice, wide enough for dilated, failing and hypertrophied hearts.
EDV_ML: dict[str, Range] = {"LV": LV_ED_ML, "RV": LV_ED_ML}
EF_PERCENT: Range = (10.0, 85.0)
LV_MASS_G: Range = (MYOCARDIUM_G_PER_ML * MYO_ED_ML[0], MYOCARDIUM_G_PER_ML * MYO_ED_ML[1])
LONGEST_STACK_MM = 200.0  # 20 slices, the most in M&Ms, 10 mm apart
ONE_VALUE = 0.3  # share of an image's voxels; at most .26 in 170 volumes of M&Ms and ACDC
SCALE_TOLERANCE = 0.1  # relative; sheared transforms, which are not orthonormal, differ by some per cent


def header_warnings(header: Header) -> list[str]:
    """Warnings about sizes in a header that contradict each other or do not fit a short-axis stack; may be empty."""
    name, out = fs.base_name(header.path), []
    slice_mm, row_mm, col_mm = header.spacing_mm
    transform = _transform_scale(header)
    if transform is not None and not np.allclose(transform, (col_mm, row_mm, slice_mm), rtol=SCALE_TOLERANCE):
        pixdim, scale = (" × ".join(f"{mm:.3g}" for mm in size) for size in ((col_mm, row_mm, slice_mm), transform))
        out.append(
            f"{name}: its header contradicts itself: pixdim gives voxels of {pixdim} mm, the transform {scale} mm; "
            "volumes follow pixdim; if that is wrong, use --spacing"
        )
    for what, value, limits, unit in (
        ("the distance of slices", slice_mm, SLICE_DISTANCE_MM, "mm"),
        ("the area of a pixel", row_mm * col_mm, PIXEL_AREA_MM2, "mm²"),
    ):
        if _outside(value, limits):
            remedy = "volumes follow from it; if it is wrong, use --spacing"
            out.append(f"{name}: {what} is {value:.3g} {unit}, outside {_span(limits)}; {remedy}")
    slices = header.volume_shape[0]
    if slices * slice_mm > LONGEST_STACK_MM:
        remedy = "if they are frames of one slice, store the file as x, y, 1, frame"
        out.append(f"{name}: its {slices} slices span {slices * slice_mm:.0f} mm, more than a heart; {remedy}")
    return out


def padding_warnings(name: str, frame_ZHW: npt.NDArray[Any], config: PreprocessConfig) -> list[str]:
    """A warning if over 30 % of a frame is one value, such as padding, which distorts the volume's statistics.

    Empty for networks that are normalised by the foreground or by each slice.
    """
    if config.normalisation == "foreground" or config.statistics == "slice":
        return []
    values = {frame_ZHW[at] for at in product((0, -1), repeat=3)} | {frame_ZHW.min()}  # corners, and the darkest
    share = max(float(np.mean(frame_ZHW == value)) for value in values)
    if share <= ONE_VALUE:
        return []
    return [
        f"{name}: {100 * share:.0f} % of its voxels are one value, such as padding; this network is normalised by all "
        "voxels, and its masks may be wrong: cut the padding off, or train with preprocess.normalisation=foreground"
    ]


def volume_warnings(report: Mapping[str, Any]) -> list[str]:
    """Warnings about a report's EDV, EF and LV mass or, if ED and ES are unknown, about its largest LV.

    A structure that was not found (0 ml) gets a warning elsewhere.
    """
    if report["lv"] is None:
        largest = max((frame["ml"]["LV"] for frame in report["frames"] if frame["ml"] is not None), default=0.0)
        return [_volume_line("LV", largest, LV_ED_ML)] if largest > LV_ED_ML[1] else []
    out = []
    for side in ("LV", "RV"):
        values = report[side.lower()]
        edv, esv, ef = values["edv_ml"], values["esv_ml"], values["ef_percent"]
        if esv > edv:
            out.append(f"{side} is larger at ES ({esv:.0f} ml) than at ED ({edv:.0f} ml): its EF is not to be used")
        elif ef is not None and _outside(ef, EF_PERCENT):
            where = "frames that are not ED and ES, or a wrong mask"
            out.append(f"{side} EF is {ef:.0f} %, outside {_span(EF_PERCENT)} %: {where}")
        if edv > 0 and _outside(edv, EDV_ML[side]):
            out.append(_volume_line(f"{side} at ED", edv, EDV_ML[side]))
    if report["lv_mass_g"] > 0 and _outside(report["lv_mass_g"], LV_MASS_G):
        mass = short(report["lv_mass_g"])
        out.append(f"LV mass is {mass} g, outside {_span(LV_MASS_G)} g: a wrong voxel size or a wrong mask")
    return out


def doubtful_warnings(expected: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Warnings about frames with a mean expected Dice below .70. `expected`: frame name → structure → expected Dice."""
    out = []
    for name, dice in expected.items():
        if dice and mean_dice(dice) < DOUBTFUL:
            parts = ", ".join(f"{structure} {in_words(value)}" for structure, value in dice.items())
            out.append(
                f"doubtful mask of {name}: expected Dice {in_words(mean_dice(dice))} ({parts}); look at the picture "
                "before you use its numbers"
            )
    return out


def _volume_line(what: str, ml: float, limits: Range) -> str:
    return f"{what} is {short(ml)} ml, outside {_span(limits)} ml: a wrong voxel size or a wrong mask"


def _transform_scale(header: Header) -> tuple[float, ...] | None:
    """Voxel size (x, y, z) in mm by the header's transform. None if there is no transform, or if it has no scale.

    ACDC's files have a transform without a scale, beside a correct voxel size.
    """
    if header.affine is None:
        return None
    scale = np.linalg.norm(np.array(header.affine)[:, :3], axis=0)
    return None if np.allclose(scale, 1) or not (scale > 0).all() else tuple(float(mm) for mm in scale)


def _outside(value: float, limits: Range) -> bool:
    return not limits[0] <= value <= limits[1]


def _span(limits: Range) -> str:
    return f"{limits[0]:g} to {limits[1]:g}"
