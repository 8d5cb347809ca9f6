"""How good a mask is, for each structure: overlap and surface distances in 3D, volumes, and overlap in each slice.

If only one of the two masks has a structure (it was missed or invented), its Dice is 0, its distances are infinite, and
it counts as a failure. So a failure can never improve a mean. If both masks lack a structure, it has no score (NaN): it
is left out of the means, and its volumes are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.scores.volumes import volumes_ml
from storage.errors import InputError
from storage.nifti.header import Spacing
from storage.subjects import ALL_STRUCTURES, LV, MYO, STRUCTURES

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

POSITIONS = ("basal", "mid", "apical", "beyond")


@dataclass(frozen=True)
class StructureScore:
    """The scores of one structure of one volume: Dice in [0, 1], distances in mm, volumes in ml.

    `missed` marks a failure: the structure was missed if `predicted_ml` is 0, else it was invented. `dice_slices` is
    the mean 2D Dice over the slices in which either mask has the structure. The module's docstring explains NaN and
    infinity.
    """

    structure: str
    dice: float
    hd95_mm: float
    assd_mm: float
    missed: bool
    dice_slices: float
    hd_mm: float
    reference_ml: float
    predicted_ml: float


@dataclass(frozen=True)
class SliceScore:
    """The score of one structure of one slice: 2D Dice in [0, 1], 0 if the structure was missed or invented.

    `slice` is the slice's number in the volume, from 0. `position` is one of `POSITIONS`.
    """

    slice: int
    position: str
    structure: str
    dice: float
    missed: bool


def score_volume(
    prediction_ZHW: Labels, mask_ZHW: Labels, spacing: Spacing, structures: Sequence[str] = ALL_STRUCTURES
) -> list[StructureScore]:
    """Score a predicted mask against the reference mask, for those `structures` that are drawn in the reference.

    Both masks are (slices, rows, columns) uint8 on one grid: 0 background, LV 1, MYO 2, RV 3. `spacing` is (slice, row,
    column) in mm. Distances are MONAI's, between surface voxels in 3D: HD is the largest, HD95 the larger of the two
    directed 95th percentiles, and ASSD the mean over the surface voxels of both masks.

    Raises `InputError` if the shapes differ, a mask is not 3D, or a spacing is not a positive number.
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
    predicted_ml, reference_ml = volumes_ml(prediction_ZHW, spacing), volumes_ml(mask_ZHW, spacing)
    scores = []
    for name in structures:
        label = STRUCTURES[name]
        dice, hd, hd95, assd, dice_slices = _score_structure(prediction_ZHW == label, mask_ZHW == label, spacing)
        failed = (predicted_ml[name] > 0) != (reference_ml[name] > 0)
        scores.append(
            StructureScore(name, dice, hd95, assd, failed, dice_slices, hd, reference_ml[name], predicted_ml[name])
        )
    return scores


def volume_dice(
    prediction_ZHW: Labels, mask_ZHW: Labels, structures: Sequence[str] = ALL_STRUCTURES
) -> dict[str, float]:
    """Dice in [0, 1] of each structure of a volume, without distances. NaN if neither mask has the structure."""
    out = {}
    for name in structures:
        ours, theirs = prediction_ZHW == STRUCTURES[name], mask_ZHW == STRUCTURES[name]
        size = int(ours.sum()) + int(theirs.sum())
        out[name] = 2 * int((ours & theirs).sum()) / size if size else np.nan
    return out


def _score_structure(
    predicted: Mask, reference: Mask, spacing: Spacing
) -> tuple[float, float, float, float, float]:  # Dice, HD, HD95, ASSD, mean Dice of slices
    in_prediction, in_reference = bool(predicted.any()), bool(reference.any())
    if not (in_prediction or in_reference):
        return np.nan, np.nan, np.nan, np.nan, np.nan
    if in_prediction != in_reference:
        return 0.0, np.inf, np.inf, np.inf, 0.0
    overlap_Z = (predicted & reference).sum(axis=(1, 2))
    size_Z = predicted.sum(axis=(1, 2)) + reference.sum(axis=(1, 2))
    present = size_Z > 0
    return (
        float(2 * overlap_Z.sum() / size_Z.sum()),
        *surface_distances(predicted, reference, spacing),
        float(np.mean(2 * overlap_Z[present] / size_Z[present])),
    )


def surface_distances(predicted: Mask, reference: Mask, spacing: Sequence[float]) -> tuple[float, float, float]:
    """HD, HD95 and ASSD in mm (MONAI) of two non-empty masks of one shape, 2D or 3D. `spacing`: mm along each axis."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    # Outside the box both masks are background, and the surface extraction assumes background beyond an array's border.
    # So cropping saves time and changes no distance.
    box = _bounding_box(predicted | reference)
    p, r = (torch.from_numpy(np.ascontiguousarray(m[box]))[None, None] for m in (predicted, reference))
    mm = [float(size) for size in spacing]  # MONAI refuses a mixture of number types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls itself with an argument that it deprecates
        hd = compute_hausdorff_distance(p, r, include_background=True, spacing=mm)
        hd95 = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=mm)
        assd = compute_average_surface_distance(p, r, include_background=True, symmetric=True, spacing=mm)
    return float(hd), float(hd95), float(assd)


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def score_slices(
    prediction_ZHW: Labels, mask_ZHW: Labels, structures: Sequence[str] = ALL_STRUCTURES
) -> list[SliceScore]:
    """2D Dice of each structure in each slice, ordered by slice, then structure. Arguments are as in `score_volume`.

    If neither mask has a structure in a slice, it has no score there.
    """
    where = slice_positions(mask_ZHW)
    scores = []
    for z, (prediction, mask) in enumerate(zip(prediction_ZHW, mask_ZHW, strict=True)):
        for name in structures:
            p, r = prediction == STRUCTURES[name], mask == STRUCTURES[name]
            sizes = int(p.sum()), int(r.sum())
            if any(sizes):
                dice = 2 * int((p & r).sum()) / sum(sizes)
                scores.append(SliceScore(z, where[z], name, dice, not all(sizes)))
    return scores


def slice_positions(mask_ZHW: Labels) -> list[str]:
    """The position of each slice of a reference mask (slices, rows, columns) along the heart's long axis.

    The slices with LV or myocardium are divided into thirds: basal, mid, apical. If there are two, one is basal and one
    apical; a single one is mid. All other slices are `beyond`. Files run in either direction, so the base is the half
    with more LV and myocardium. If both halves hold the same, the first slice is at the base.
    """
    left = ((mask_ZHW == LV) | (mask_ZHW == MYO)).sum(axis=(1, 2))
    held = np.flatnonzero(left)
    positions = [POSITIONS[3]] * len(mask_ZHW)
    half = len(held) // 2
    upside_down = half > 0 and left[held[-half:]].sum() > left[held[:half]].sum()
    for rank, z in enumerate(held[::-1] if upside_down else held):
        positions[z] = POSITIONS[int(3 * (rank + 0.5) / len(held))]
    return positions
