"""The table of a results folder: a row a study, whatever commands filled the folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.find_studies import Study
from pipeline.inference.volumes_table import NO_PHASES, TABLE, write_table

LV = {"edv_ml": 120.5, "esv_ml": 50.25, "sv_ml": 70.25, "ef_percent": 58.3}
RV = {"edv_ml": 0.0, "esv_ml": 0.0, "sv_ml": 0.0, "ef_percent": None}


def write_report(path: Path, **changes: Any) -> None:
    report = {
        "study": path.name.removesuffix("_pred.json"),
        **{"ed": 0, "es": 9, "lv": LV, "rv": RV, "lv_mass_g": 90.0},
        **{"warnings": [], "models": ["ab12", "cd34"], "made_by": "cardiomix 0.2.0"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | changes))


def table(out: Path) -> list[dict[str, str]]:
    with (out / TABLE).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def study(out: Path, name: str) -> Study:
    return Study(name.rpartition("/")[2], (f"/data/{name}.nii.gz",), f"{out}/{name}")


def test_a_row_holds_a_study_s_volumes_with_units_and_its_warnings(tmp_path: Path) -> None:
    warnings = ["no RV found in cine.nii.gz frame 0; look", "1.4 × 1.4 mm, “odd”"]
    dice = {"ED": {"LV": 0.9, "MYO": 0.8, "RV": 0.7}, "ES": {"LV": 0.9, "MYO": 0.6, "RV": 0.75}}
    write_report(tmp_path / "sub" / "cine_pred.json", warnings=warnings, expected_dice=dice)
    write_table(str(tmp_path))
    assert (
        (tmp_path / TABLE).read_bytes().startswith(b"\xef\xbb\xbfstudy,LV EDV (ml),LV ESV (ml),LV EF (%),RV EDV (ml)")
    )
    (row,) = table(tmp_path)
    assert row == {
        "study": "sub/cine",
        **{"LV EDV (ml)": "120.5", "LV ESV (ml)": "50.25", "LV EF (%)": "58.3"},
        **{"RV EDV (ml)": "0.0", "RV ESV (ml)": "0.0", "RV EF (%)": "", "LV mass (g)": "90.0"},
        **{"ED frame (from 0)": "0", "ES frame (from 0)": "9", "expected Dice": "0.75"},
        **{"warnings": " | ".join(warnings), "failure": "", "models": "ab12 cd34"},
    }


def test_studies_of_earlier_commands_stay_in_the_table(tmp_path: Path) -> None:
    write_report(tmp_path / "a_pred.json")
    write_table(str(tmp_path))
    write_report(tmp_path / "b" / "a_pred.json")
    write_table(str(tmp_path))
    assert [row["study"] for row in table(tmp_path)] == ["a", "b/a"]


def test_a_failed_study_has_its_reason_and_no_volumes_of_an_earlier_command(tmp_path: Path) -> None:
    write_report(tmp_path / "a_pred.json")
    reason = "a.nii.gz: the file is cut off; copy it again"
    write_table(str(tmp_path), [(study(tmp_path, "a"), reason), (study(tmp_path, "sub/c"), "c.nii.gz: it is 2D")])
    first, second = table(tmp_path)
    assert (first["study"], first["failure"], first["LV EDV (ml)"]) == ("a", reason, "")
    assert (second["study"], second["failure"]) == ("sub/c", "c.nii.gz: it is 2D")


def test_a_folder_in_which_every_study_failed_has_its_table(tmp_path: Path) -> None:
    out = tmp_path / "new"
    write_table(str(out), [(study(out, "a"), "a.nii.gz: it is 2D")])
    assert [row["failure"] for row in table(out)] == ["a.nii.gz: it is 2D"]


def test_a_study_without_ed_and_es_says_why_it_has_no_edv(tmp_path: Path) -> None:
    write_report(tmp_path / "ed_pred.json", ed=None, es=None, lv=None, rv=None, lv_mass_g=None, warnings=["cut"])
    write_table(str(tmp_path))
    (row,) = table(tmp_path)
    assert row["LV EDV (ml)"] == row["ED frame (from 0)"] == "" and row["warnings"] == f"cut | {NO_PHASES}"


@pytest.mark.parametrize("text", ["{", "[1]", '{"study": "x"}'])
def test_other_programs_files_and_linked_folders_are_left_out(tmp_path: Path, text: str) -> None:
    write_report(tmp_path / "out" / "a_pred.json")
    (tmp_path / "out" / "theirs_pred.json").write_text(text)
    write_report(tmp_path / "elsewhere" / "b_pred.json")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "round").symlink_to(tmp_path / "out")
    write_table(str(tmp_path / "out"))
    assert [row["study"] for row in table(tmp_path / "out")] == ["a"]
