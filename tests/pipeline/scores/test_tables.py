"""The tables of an evaluation: what is written is read again, and how volumes become numbers per vendor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.scores.metrics import score_slices, score_volume
from pipeline.scores.tables import (
    CASE_FIELDS,
    case_rows,
    position_dice,
    read_cases,
    read_slices,
    read_trust,
    slice_rows,
    subject_dice,
    summarise,
    write_cases,
    write_slices,
    write_trust,
)
from storage.errors import InputError

Labels = npt.NDArray[np.uint8]


def _case(subject: str, dice: float, **changes: Any) -> dict[str, Any]:
    missed = dice == 0
    base = {"arm": "fs_sdnet", "seed": 0, "subject": subject, "vendor": "A", "centre": "1", "phase": "ED"}
    distances = {"hd95_mm": np.inf if missed else 3.0, "assd_mm": np.inf if missed else 1.0}
    score = {"structure": "LV", "dice": dice, "missed": missed, "dice_slices": dice, "hd_mm": distances["hd95_mm"]}
    volumes = {"reference_ml": 100.0, "predicted_ml": 0.0 if missed else 90.0, "outside": 0.0}
    return base | distances | score | volumes | changes


def _masks() -> tuple[Labels, Labels]:
    """A prediction that has only the LV, and a reference without RV."""
    mask = np.zeros((4, 20, 20), dtype=np.uint8)
    mask[1:, 4:14, 4:14] = 2
    mask[1:, 6:12, 6:12] = 1
    return np.where(mask == 1, 1, 0).astype(np.uint8), mask


WHOSE = {"arm": "fs_sdnet", "seed": 1, "subject": 'A0, "x"', "vendor": "A", "centre": "1", "phase": "ES"}


def test_cases_and_slices_survive_the_csv_with_infinity_and_nan(tmp_path: Path) -> None:
    scores = score_volume(*_masks(), (8.0, 1.5, 1.25))
    rows = case_rows(scores, {"LV": 0.0, "MYO": 0.25, "RV": 0.0}, WHOSE)
    path = str(tmp_path / "cases.csv")
    write_cases(path, rows)
    back = read_cases(path)
    assert tuple(back[0]) == CASE_FIELDS
    np.testing.assert_equal(back, rows)  # equal, NaN included
    assert back[1]["hd95_mm"] == np.inf and np.isnan(back[2]["dice"]) and back[1]["outside"] == 0.25
    slices = slice_rows(score_slices(*_masks()), WHOSE)
    write_slices(str(tmp_path / "slices.csv"), slices)
    assert read_slices(str(tmp_path / "slices.csv")) == slices
    assert [row["position"] for row in slices if row["structure"] == "LV"] == ["basal", "mid", "apical"]


def test_a_table_of_an_earlier_version_has_no_calibration_errors(tmp_path: Path) -> None:
    path, row = str(tmp_path / "trust.csv"), WHOSE | {"dice": 0.5, "expected_dice": 0.75}
    write_trust(path, [row | {"ece": 0.125, "ece_tempered": 0.0625}])
    assert read_trust(path) == [row | {"ece": 0.125, "ece_tempered": 0.0625}]
    lines = (tmp_path / "trust.csv").read_text().splitlines()
    (tmp_path / "trust.csv").write_text("\n".join(line.rsplit(",", 2)[0] for line in lines))
    np.testing.assert_equal(read_trust(path), [row | {"ece": np.nan, "ece_tempered": np.nan}])


def test_the_columns_that_others_read_stay_where_they_are() -> None:
    promised = "arm,seed,subject,vendor,centre,phase,structure,dice,hd95_mm,assd_mm,missed,"
    assert ",".join(CASE_FIELDS).startswith(promised)


def test_dice_by_position_weighs_subjects_not_slices() -> None:
    many = [{"arm": "x", "position": "mid", "structure": "LV", "subject": "a", "dice": 0.9}] * 3
    one = [{"arm": "x", "position": "mid", "structure": "LV", "subject": "b", "dice": 0.5}]
    assert position_dice([*many, *one]) == {("x", "mid", "LV"): pytest.approx(0.7)}


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
