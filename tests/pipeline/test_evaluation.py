"""Scores against closed forms, medpy and a brute-force search, and what happens where a structure is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from pipeline.evaluation import (
    CASE_FIELDS,
    StructureScore,
    bootstrap_interval,
    case_rows,
    read_cases,
    score_volume,
    subject_dice,
    summarise,
    surface_distances,
    write_cases,
)
from storage.errors import InputError

SPACING = (8.0, 1.5, 1.25)


def _ball(
    shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing: tuple[float, ...]
) -> npt.NDArray[np.bool_]:
    grid = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing, strict=True)), indexing="ij")
    distance: npt.NDArray[np.bool_] = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
    return distance


def _hearts(seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A reference and a displaced, ragged prediction with all three structures, (6, 64, 56)."""
    noise = np.random.default_rng(seed)
    volumes = []
    for shift in (0.0, float(noise.uniform(1, 4))):
        mask = np.zeros((6, 64, 56), dtype=np.uint8)
        mask[_ball(mask.shape, (20, 40 + shift, 50), 22, SPACING)] = 3
        mask[_ball(mask.shape, (20, 48, 28 + shift), 24, SPACING)] = 2
        mask[_ball(mask.shape, (20, 48, 28 + shift), 15, SPACING)] = 1
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
    assert score.dice == pytest.approx(2 * 6 / 20)
    assert score.dice_slices == pytest.approx(2 * 6 / 20)
    assert score.hd95_mm == pytest.approx(4 * 1.25, abs=1e-4)
    assert 0 < score.assd_mm < 4 * 1.25
    assert not score.missed


def test_concentric_balls_are_as_far_apart_as_their_radii() -> None:
    spacing = (0.5, 0.5, 0.5)
    inner, outer = (_ball((80, 80, 80), (20, 20, 20), radius, spacing) for radius in (10.0, 14.0))
    hd95, assd = surface_distances(inner, outer, spacing)
    assert assd == pytest.approx(4.0, abs=0.25)
    assert hd95 == pytest.approx(4.0, abs=0.6)  # surfaces are voxel centres, half a millimetre apart
    volume = score_volume(inner.astype(np.uint8), outer.astype(np.uint8), spacing)
    assert _one(volume, "LV").dice == pytest.approx(2 * 10**3 / (10**3 + 14**3), rel=0.01)


def test_concentric_discs_in_one_slice_are_as_far_apart_as_their_radii() -> None:
    inner, outer = (_ball((1, 120, 160), (0, 45, 45), radius, (10, 0.75, 0.6)) for radius in (20.0, 26.0))
    hd95, assd = surface_distances(inner, outer, (10, 0.75, 0.6))
    # One slice has nothing above or below it, so that every voxel of a disc is surface: only the outer ring is apart.
    assert hd95 == pytest.approx(5.8, abs=0.6)
    assert 0 < assd < 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_medpy_and_a_brute_force_search(seed: int) -> None:
    from medpy.metric import binary

    prediction, mask = _hearts(seed)
    for score, label in zip(score_volume(prediction, mask, SPACING), (1, 2, 3), strict=True):
        p, r = prediction == label, mask == label
        between = cdist(_surface_mm(p, SPACING), _surface_mm(r, SPACING))
        there, back = between.min(axis=1), between.min(axis=0)
        assert score.dice == pytest.approx(binary.dc(p, r), abs=1e-6)
        assert score.assd_mm == pytest.approx(binary.assd(p, r, SPACING), abs=1e-4)
        # medpy takes one percentile over both directions together, MONAI the larger of the two directions'.
        assert score.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
        assert binary.hd95(p, r, SPACING) == pytest.approx(np.percentile(np.hstack([there, back]), 95), abs=1e-4)
        assert min(np.percentile(there, 95), np.percentile(back, 95)) - 1e-4 <= binary.hd95(p, r, SPACING)
        assert binary.hd95(p, r, SPACING) <= score.hd95_mm + 1e-4


def test_empty_space_around_the_heart_changes_no_score() -> None:
    prediction, mask = _hearts(3)
    wide = ((2, 3), (30, 11), (7, 40))
    assert score_volume(np.pad(prediction, wide), np.pad(mask, wide), SPACING) == score_volume(
        prediction, mask, SPACING
    )


def test_a_perfect_mask_scores_one_and_zero_distance() -> None:
    _, mask = _hearts(0)
    for score in score_volume(mask, mask, SPACING):
        assert (score.dice, score.dice_slices, score.hd95_mm, score.assd_mm, score.missed) == (1, 1, 0, 0, False)


@pytest.mark.parametrize("invented", [False, True])
def test_a_missed_or_invented_structure_is_a_failure_at_infinite_distance(invented: bool) -> None:
    _, mask = _hearts(0)
    without = np.where(mask == 3, 0, mask).astype(np.uint8)
    score = _one(score_volume(mask, without, SPACING) if invented else score_volume(without, mask, SPACING), "RV")
    assert score == StructureScore("RV", 0.0, np.inf, np.inf, True, 0.0)


def test_a_structure_absent_from_both_has_no_score() -> None:
    _, mask = _hearts(0)
    without = np.where(mask == 3, 0, mask).astype(np.uint8)
    score = _one(score_volume(without, without, SPACING), "RV")
    assert np.isnan([score.dice, score.dice_slices, score.hd95_mm, score.assd_mm]).all()
    assert not score.missed


def test_dice_per_slice_averages_only_slices_where_the_structure_is() -> None:
    mask, prediction = (np.zeros((5, 10, 10), dtype=np.uint8) for _ in range(2))
    mask[1:3, 2:6, 2:6] = 2
    prediction[1, 2:6, 2:6] = 2  # right in one slice, missed in the next, slices 0, 3 and 4 empty
    assert _one(score_volume(prediction, mask, SPACING), "MYO").dice_slices == pytest.approx(0.5)
    assert _one(score_volume(prediction, mask, SPACING), "MYO").dice == pytest.approx(2 / 3)


def test_masks_on_different_grids_and_impossible_spacings_are_refused() -> None:
    mask = np.ones((3, 8, 8), dtype=np.uint8)
    with pytest.raises(InputError, match="same grid"):
        score_volume(mask[:2], mask, SPACING)
    with pytest.raises(InputError, match="voxel size"):
        score_volume(mask, mask, (8.0, 0.0, 1.0))


def _case(subject: str, dice: float, **changes: Any) -> dict[str, Any]:
    missed = dice == 0
    base = {"arm": "fs_sdnet", "seed": 0, "subject": subject, "vendor": "A", "centre": "1", "phase": "ED"}
    distances = {"hd95_mm": np.inf if missed else 3.0, "assd_mm": np.inf if missed else 1.0}
    score = {"structure": "LV", "dice": dice, "missed": missed, "dice_slices": dice}
    return base | distances | score | changes


def test_cases_survive_the_csv_with_infinity_and_nan(tmp_path: Path) -> None:
    _, mask = _hearts(0)
    only_lv = np.where(mask == 1, 1, 0).astype(np.uint8)
    scores = score_volume(only_lv, np.where(mask == 3, 0, mask).astype(np.uint8), SPACING)
    rows = case_rows(scores, arm="fs_sdnet", seed=1, subject='A0, "x"', vendor="A", centre="1", phase="ES")
    path = str(tmp_path / "cases.csv")
    write_cases(path, rows)
    back = read_cases(path)
    assert tuple(back[0]) == CASE_FIELDS
    np.testing.assert_equal(back, rows)  # equal, NaN included
    assert back[1]["hd95_mm"] == np.inf and np.isnan(back[2]["dice"])


def test_a_file_that_is_not_a_case_table_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("arm,seed\nfs_sdnet,0\n")
    with pytest.raises(InputError, match="line 2"):
        read_cases(str(path))


def test_a_subject_counts_once_however_many_seeds_and_phases_it_has() -> None:
    cases = [_case("a", 0.9, seed=s, phase=p) for s in (0, 1) for p in ("ED", "ES")] + [_case("b", 0.5)]
    (row,) = summarise(cases)
    assert (row["n"], row["volumes"]) == (2, 5)
    assert row["dice_mean"] == pytest.approx(0.7)


def test_phases_weigh_the_same_when_one_was_run_with_fewer_seeds() -> None:
    cases = [_case("a", 0.8, seed=s) for s in (0, 1, 2)] + [_case("a", 0.4, phase="ES")]
    assert subject_dice(cases) == {"a": pytest.approx(0.6)}


def test_a_failure_lowers_the_mean_and_lifts_the_median_distance() -> None:
    good = [_case(str(i), 0.9) for i in range(3)]
    (clean,), (failed,) = (
        summarise(good),
        summarise([*good, *(_case(name, 0.0) for name in "wxyz")]),
    )
    assert failed["dice_mean"] < clean["dice_mean"]
    assert failed["missed"] == 4
    assert failed["hd95_median_mm"] == np.inf


def test_a_structure_absent_from_both_is_left_out_of_the_mean_and_counted() -> None:
    (row,) = summarise([_case("a", 0.9), _case("b", np.nan, hd95_mm=np.nan, assd_mm=np.nan)])
    assert (row["n"], row["dice_mean"], row["absent"], row["missed"]) == (1, pytest.approx(0.9), 1, 0)
    (nothing,) = summarise([_case("b", np.nan, hd95_mm=np.nan, assd_mm=np.nan)])
    assert nothing["n"] == 0 and np.isnan(nothing["dice_mean"])


def test_the_interval_is_the_same_each_time_and_holds_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.05, 40)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low < values.mean() < high
    # For a mean of 40 the bootstrap agrees with ± 1.96 standard errors to a few parts in a thousand.
    error = values.std() / np.sqrt(40)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.004)
    assert np.isnan(bootstrap_interval(values[:1])).all()
