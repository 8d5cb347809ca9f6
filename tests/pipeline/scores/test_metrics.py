"""Scores against MONAI, medpy, closed forms and a brute-force search, and what happens where a structure is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from scipy.ndimage import binary_dilation, binary_erosion, shift
from scipy.spatial.distance import cdist

from pipeline.scores.metrics import StructureScore, score_slices, score_volume, slice_positions, surface_distances
from storage.errors import InputError

SPACING = (8.0, 1.5, 1.25)
Labels = npt.NDArray[np.uint8]


def _ball(
    shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing: tuple[float, ...]
) -> npt.NDArray[np.bool_]:
    grid = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing, strict=True)), indexing="ij")
    distance: npt.NDArray[np.bool_] = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
    return distance


def _hearts(seed: int) -> tuple[Labels, Labels]:
    """A displaced, ragged prediction and its reference with all three structures, (6, 64, 56)."""
    noise = np.random.default_rng(seed)
    volumes = []
    for offset in (0.0, float(noise.uniform(1, 4))):
        mask = np.zeros((6, 64, 56), dtype=np.uint8)
        mask[_ball(mask.shape, (20, 40 + offset, 50), 22, SPACING)] = 3
        mask[_ball(mask.shape, (20, 48, 28 + offset), 24, SPACING)] = 2
        mask[_ball(mask.shape, (20, 48, 28 + offset), 15, SPACING)] = 1
        volumes.append(mask)
    volumes[1][noise.random(volumes[1].shape) < 0.03] = 0
    return volumes[1], volumes[0]


def _one(scores: list[StructureScore], structure: str) -> StructureScore:
    return next(score for score in scores if score.structure == structure)


def _surface_mm(mask: npt.NDArray[np.bool_], spacing: tuple[float, ...]) -> npt.NDArray[np.float64]:
    surface: npt.NDArray[np.float64] = np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing)
    return surface


def test_displaced_boxes_have_the_distances_that_geometry_gives() -> None:
    mask, prediction = (np.zeros((10, 40, 40), dtype=np.uint8) for _ in range(2))
    mask[2:8, 10:20, 10:20] = 1
    prediction[2:8, 10:20, 14:24] = 1  # four columns of 1.25 mm
    score = _one(score_volume(prediction, mask, SPACING), "LV")
    assert score.dice == score.dice_slices == pytest.approx(2 * 6 / 20)
    assert (score.hd_mm, score.hd95_mm) == (pytest.approx(4 * 1.25, abs=1e-4), pytest.approx(4 * 1.25, abs=1e-4))
    assert 0 < score.assd_mm < 4 * 1.25
    assert score.reference_ml == score.predicted_ml == pytest.approx(6 * 10 * 10 * 8 * 1.5 * 1.25 / 1000)
    assert not score.missed


def test_one_stray_voxel_moves_the_hausdorff_distance_and_hardly_the_95th_percentile() -> None:
    mask = np.zeros((10, 60, 60), dtype=np.uint8)
    mask[2:8, 10:30, 10:30] = 1
    prediction = mask.copy()
    prediction[4, 10, 49] = 1  # 20 columns from the box
    score = _one(score_volume(prediction, mask, SPACING), "LV")
    assert score.hd_mm == pytest.approx(20 * 1.25)
    assert score.hd95_mm == 0


def test_concentric_balls_are_as_far_apart_as_their_radii() -> None:
    spacing = (1.0, 0.5, 0.4)
    inner, outer = (_ball((41, 81, 101), (20, 20, 20), radius, spacing) for radius in (10.0, 14.0))
    hd, hd95, assd = surface_distances(inner, outer, spacing)
    assert assd == pytest.approx(4.0, abs=0.3)
    assert hd95 == pytest.approx(4.0, abs=0.8) and hd == pytest.approx(4.0, abs=1.0)  # surfaces are voxel centres
    score = _one(score_volume(inner.astype(np.uint8), outer.astype(np.uint8), spacing), "LV")
    assert score.dice == pytest.approx(2 * 10**3 / (10**3 + 14**3), rel=0.01)
    assert score.reference_ml == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.01)


def test_concentric_discs_in_one_slice_are_as_far_apart_as_their_radii() -> None:
    inner, outer = (_ball((1, 120, 160), (0, 45, 45), radius, (10, 0.75, 0.6)) for radius in (20.0, 26.0))
    _, hd95, assd = surface_distances(inner, outer, (10, 0.75, 0.6))
    # One slice has nothing above or below it, so that every voxel of a disc is surface: only the outer ring is apart.
    assert hd95 == pytest.approx(5.8, abs=0.6)
    assert 0 < assd < 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_a_brute_force_search(seed: int) -> None:
    prediction, mask = _hearts(seed)
    for score, label in zip(score_volume(prediction, mask, SPACING), (1, 2, 3), strict=True):
        between = cdist(_surface_mm(prediction == label, SPACING), _surface_mm(mask == label, SPACING))
        there, back = between.min(axis=1), between.min(axis=0)
        assert score.hd_mm == pytest.approx(max(there.max(), back.max()), abs=1e-4)
        assert score.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
        assert score.assd_mm == pytest.approx(np.concatenate([there, back]).mean(), abs=1e-4)


ERRORS: dict[str, Callable[[Labels], Labels]] = {
    "shifted": lambda mask: shift(mask, (0, 2, -3), order=0).astype(np.uint8),
    "eroded": lambda mask: np.where(binary_erosion(mask > 0, np.ones((1, 3, 3))), mask, 0).astype(np.uint8),
    "swollen": lambda mask: np.where((mask == 0) & binary_dilation(mask == 3, iterations=2), 3, mask).astype(np.uint8),
    "without its base": lambda mask: np.concatenate([np.zeros_like(mask[:2]), mask[2:]]),
    "with an island": lambda mask: np.pad(mask[:, 4:, 4:], ((0, 0), (4, 0), (4, 0)), constant_values=2),
}


@pytest.mark.parametrize(("subject", "phase"), [("patient002", 0), ("patient023", 1)])
def test_scores_of_real_masks_with_errors_equal_monai_and_medpy(real_acdc: Path, subject: str, phase: int) -> None:
    from medpy.metric import binary

    for path in sorted((real_acdc / subject).glob("*_gt.nii.gz"))[phase : phase + 1]:
        image = nib.load(path)
        raw = np.asarray(image.dataobj).transpose(2, 1, 0).astype(np.uint8)
        y, x = (slice(hit.min() - 8, hit.max() + 9) for hit in np.nonzero(raw.any(axis=0)))  # the rest is only slow
        mask = np.array([0, 3, 2, 1], dtype=np.uint8)[raw[:, y, x]]  # ACDC's labels run the other way
        spacing = tuple(float(mm) for mm in image.header.get_zooms()[2::-1])
        assert len(spacing) == 3
        for name, spoil in ERRORS.items():
            prediction = spoil(mask)
            for score, label in zip(score_volume(prediction, mask, spacing), (1, 2, 3), strict=True):
                p, r = prediction == label, mask == label
                one = [torch.from_numpy(m)[None, None] for m in (p, r)]
                mm, what = list(spacing), f"{path.name} {name} {score.structure}"
                monai = (
                    compute_dice(*one, include_background=True),
                    compute_hausdorff_distance(*one, include_background=True, spacing=mm),
                    compute_hausdorff_distance(*one, include_background=True, percentile=95, spacing=mm),
                    compute_average_surface_distance(*one, include_background=True, symmetric=True, spacing=mm),
                )
                ours = (score.dice, score.hd_mm, score.hd95_mm, score.assd_mm)
                assert ours == pytest.approx([float(value) for value in monai], abs=1e-4), what
                # medpy takes one 95th percentile over both directions together, MONAI the larger of the two.
                both = np.hstack([_directed(p, r, spacing), _directed(r, p, spacing)])
                medpy = (binary.dc(p, r), binary.hd(p, r, spacing), binary.assd(p, r, spacing))
                assert (score.dice, score.hd_mm, score.assd_mm) == pytest.approx(medpy, abs=1e-4), what
                assert binary.hd95(p, r, spacing) == pytest.approx(np.percentile(both, 95), abs=1e-4), what
                directed = [np.percentile(_directed(*pair, spacing), 95) for pair in ((p, r), (r, p))]
                assert score.hd95_mm == pytest.approx(max(directed), abs=1e-4), what


def _directed(
    one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], spacing: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """medpy's own distances, which its metrics are made of."""
    from medpy.metric.binary import __surface_distances as surface  # type: ignore[attr-defined]

    found: npt.NDArray[np.float64] = surface(one, other, spacing)
    return found


def test_empty_space_around_the_heart_changes_no_score() -> None:
    prediction, mask = _hearts(3)
    wide = ((2, 3), (30, 11), (7, 40))
    assert score_volume(np.pad(prediction, wide), np.pad(mask, wide), SPACING) == score_volume(
        prediction, mask, SPACING
    )


def test_a_perfect_mask_scores_one_and_zero_distance() -> None:
    _, mask = _hearts(0)
    for s in score_volume(mask, mask, SPACING):
        assert (s.dice, s.dice_slices, s.hd_mm, s.hd95_mm, s.assd_mm, s.missed) == (1, 1, 0, 0, 0, False)


@pytest.mark.parametrize("invented", [False, True])
def test_a_missed_or_invented_structure_is_a_failure_at_infinite_distance(invented: bool) -> None:
    _, mask = _hearts(0)
    without = np.where(mask == 3, 0, mask).astype(np.uint8)
    score = _one(score_volume(mask, without, SPACING) if invented else score_volume(without, mask, SPACING), "RV")
    ml = (mask == 3).sum() * np.prod(SPACING) / 1000
    volumes = (0.0, ml) if invented else (ml, 0.0)
    assert score == StructureScore("RV", 0.0, np.inf, np.inf, True, 0.0, np.inf, *map(pytest.approx, volumes))


def test_a_structure_absent_from_both_has_no_score() -> None:
    _, mask = _hearts(0)
    without = np.where(mask == 3, 0, mask).astype(np.uint8)
    score = _one(score_volume(without, without, SPACING), "RV")
    assert np.isnan([score.dice, score.dice_slices, score.hd_mm, score.hd95_mm, score.assd_mm]).all()
    assert not score.missed


def test_dice_per_slice_is_of_slices_where_either_mask_has_the_structure() -> None:
    mask, prediction = (np.zeros((5, 10, 10), dtype=np.uint8) for _ in range(2))
    mask[1:4, 2:6, 2:6] = 2
    prediction[1, 2:6, 2:6] = 2  # right in one slice, missed in the next two
    prediction[4, 0, 0] = 2  # invented
    rows = [(s.slice, s.position, s.structure, s.dice, s.missed) for s in score_slices(prediction, mask)]
    assert rows == [
        (1, "basal", "MYO", 1.0, False),
        (2, "mid", "MYO", 0.0, True),
        (3, "apical", "MYO", 0.0, True),
        (4, "beyond", "MYO", 0.0, True),
    ]
    assert _one(score_volume(prediction, mask, SPACING), "MYO").dice_slices == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("held", "expected"),
    [(0, ""), (1, "m"), (2, "ba"), (3, "bma"), (4, "bmma"), (5, "bbmaa"), (7, "bbmmmaa"), (9, "bbbmmmaaa")],
)
@pytest.mark.parametrize("upside_down", [False, True])
def test_positions_are_thirds_of_the_slices_that_hold_the_left_ventricle(
    held: int, expected: str, upside_down: bool
) -> None:
    mask = np.zeros((held + 3, 40, 40), dtype=np.uint8)
    mask[0, :20, :20] = 3  # a right ventricle alone does not count
    for z in range(held):  # narrower towards the apex
        mask[z + 2, : 30 - 2 * z, :10] = 2
        mask[z + 2, : 20 - 2 * z, 10:15] = 1
    found = slice_positions(mask[::-1] if upside_down else mask)
    inside = [position[0] for position in (found[::-1] if upside_down else found)][2:-1]
    assert "".join(inside) == expected
    assert found.count("beyond") == 3


def test_the_base_of_every_real_heart_is_recognised(real_acdc: Path) -> None:
    for path in sorted(real_acdc.glob("*/*_gt.nii.gz")):  # all of which run from base to apex
        mask = np.array([0, 3, 2, 1], dtype=np.uint8)[np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)]
        places = [place for place in slice_positions(mask) if place != "beyond"]
        assert (places[0], places[-1]) == ("basal", "apical"), path.name


def test_masks_on_different_grids_and_impossible_spacings_are_refused() -> None:
    mask = np.ones((3, 8, 8), dtype=np.uint8)
    with pytest.raises(InputError, match="same grid"):
        score_volume(mask[:2], mask, SPACING)
    with pytest.raises(InputError, match="voxel size"):
        score_volume(mask, mask, (8.0, 0.0, 1.0))
