"""Can a study's numbers be true? Warnings for `predict`, with the limits that `inspect` has.

A volume is a count of voxels times the header's voxel size. So a header that lost its voxel size gives wrong volumes
from a right mask, and nothing in the picture shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage import fs
from storage.nifti.header import Header
from storage.survey.flags import LV_ED_ML, PIXEL_AREA_MM2, SLICE_DISTANCE_MM, Range

SCALE_TOLERANCE = 0.1  # relative; sheared transforms, which are not orthonormal, differ by some per cent


def header_warnings(header: Header) -> list[str]:
    """What is strange about a header's voxel size; nothing if it agrees with itself and with short-axis stacks."""
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
    return out


def volume_warnings(report: Mapping[str, Any]) -> list[str]:
    """What is strange about a report's EDV and EF; nothing where ED and ES are not known."""
    out = []
    for side in ("LV", "RV"):
        values = report[side.lower()]
        if values is not None and values["esv_ml"] > values["edv_ml"]:
            ed, es = (f"{values[name]:.0f}" for name in ("edv_ml", "esv_ml"))
            out.append(f"{side} is larger at ES ({es} ml) than at ED ({ed} ml): its EF is not to be used")
    if report["lv"] is not None and _outside(report["lv"]["edv_ml"], LV_ED_ML):
        edv = f"{report['lv']['edv_ml']:.3g}"
        out.append(f"LV at ED is {edv} ml, outside {_span(LV_ED_ML)} ml: a wrong voxel size or a wrong mask")
    return out


def _transform_scale(header: Header) -> tuple[float, ...] | None:
    """Voxel size (x, y, z) by the header's transform; None if there is none, or if it is the identity's.

    ACDC's files have a transform without a scale beside a true voxel size.
    """
    if header.affine is None:
        return None
    scale = np.linalg.norm(np.array(header.affine)[:, :3], axis=0)
    return None if np.allclose(scale, 1) or not (scale > 0).all() else tuple(float(mm) for mm in scale)


def _outside(value: float, limits: Range) -> bool:
    return not limits[0] <= value <= limits[1]


def _span(limits: Range) -> str:
    return f"{limits[0]:g} to {limits[1]:g}"
