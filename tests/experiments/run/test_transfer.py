"""Vendor to vendor: the table from known scores, and a whole transfer, cut short and continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.cli.main import app
from experiments.run.transfer import BOTH, markdown, rows, subject_means
from pipeline.scores.statistics import crossed_interval
from storage.errors import InputError
from tests.integration.test_ablation import TINY, cardiomix

RNG = np.random.default_rng(0)
BASE = {d: RNG.uniform(0.6, 0.8, (3, n)) for d, n in (("A → others", 7), ("B → others", 9))}
SCORES = {d: {"base": base, "better": base + 0.05, "half": base[:1]} for d, base in BASE.items()}


def test_differences_are_paired_by_seed_and_subject_and_averaged_over_directions() -> None:
    table = {(r["arm"], r["direction"]): r for r in rows(SCORES, ["base"])}
    for direction in (*BASE, BOTH):
        row = table["better", direction]
        assert row["difference"] == pytest.approx(0.05) and row["seeds"] == 3
        assert row["low"] == pytest.approx(0.05) and row["high"] == pytest.approx(0.05)
    both = table["base", BOTH]
    assert both["dice"] == pytest.approx(np.mean([base.mean() for base in BASE.values()]))
    assert both["subjects"] == 16 and np.isnan(both["difference"])
    assert table["half", BOTH]["seeds"] == 1 and table["half", BOTH]["difference"] == 0


def test_intervals_are_those_of_seeds_and_subjects() -> None:
    other = {d: {"base": base, "arm": base + RNG.normal(0.01, 0.02, base.shape)} for d, base in BASE.items()}
    row = next(r for r in rows(other, ["base"]) if r["arm"] == "arm" and r["direction"] == BOTH)
    expected = crossed_interval([other[d]["arm"] - base for d, base in BASE.items()])
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(expected[:3])


def test_a_structure_that_one_seed_invents_counts_for_every_seed() -> None:
    lv, rv = ("p1", "ED", "LV"), ("p1", "ED", "RV")
    seeds = [{lv: 0.8, rv: 0.0, ("p2", "ED", "LV"): 0.5}, {lv: 0.9, rv: np.nan, ("p2", "ED", "LV"): 0.7}]
    np.testing.assert_allclose(subject_means(seeds), [[0.4, 0.5], [0.45, 0.7]])
    only_one = [{lv: np.nan, ("p2", "ED", "LV"): 0.5}, {lv: 0.0, ("p2", "ED", "LV"): 0.7}]
    np.testing.assert_allclose(subject_means(only_one), [[0.0, 0.5], [0.0, 0.7]])


def test_an_arm_without_any_baseline_is_told_with_its_dice_alone() -> None:
    (row,) = rows({"A → others": {"fs_sdnet": np.array([[0.5, 0.7]])}}, ["unet_ra", "unet_ra_bigaug"])
    assert (row["dice"], row["baseline"]) == (pytest.approx(0.6), "") and np.isnan(row["difference"])
    assert markdown([row], "note").splitlines()[::2] == ["| arm | A → others |", "| fs_sdnet | 0.600 |", "note"]


def test_an_arm_that_is_not_there_in_one_direction_has_no_mean_of_all() -> None:
    scores = {d: dict(of) for d, of in SCORES.items()}
    del scores["B → others"]["better"]
    table = rows(scores, ["base"])
    assert [r["direction"] for r in table if r["arm"] == "better"] == ["A → others"]
    text = markdown(table, "note")
    line = next(line for line in text.splitlines() if line.startswith("| better"))
    assert line.count("–") == 4  # Dice and difference of two directions
    assert "| base | A → others | less base |" not in text and text.endswith("note\n")


@pytest.mark.parametrize("setting", ["layouts.adapt_fraction=0.5", "layouts.labelled_subjects=6"])
def test_a_setting_may_need_the_one_vendor_that_a_direction_trains_on(tmp_path: Path, setting: str) -> None:
    command = ["transfer", "demo", "--out", str(tmp_path), "--data", "anywhere"]
    command += ["--vendors", "A,B", "--arms", "unet_ra"]
    done = CliRunner().invoke(app, [*command, "--set", setting, "--table"])
    assert isinstance(done.exception, InputError) and "has no scored arm" in str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_transfer_trains_in_both_directions_on_nothing_of_the_other_and_goes_on(tmp_path: Path) -> None:
    fields = [part for a in TINY if a.startswith("phantom.") for part in ("--set", a.removeprefix("phantom."))]
    fields += ["--set", "testing=4", "--set", "labelled_a=4", "--set", "labelled_b=4"]
    assert cardiomix("phantom", str(tmp_path / "data"), *fields).returncode == 0
    command = ["transfer", "demo", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--vendors", "A,B"]
    command += ["--baselines", "unet_ra", *(part for a in TINY for part in ("--set", a))]
    done = cardiomix(*command, "--arms", "unet_ra")
    assert done.returncode == 0, done.stderr
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("arms/*/seed0/model.safetensors")}
    assert len(weights) == 2
    done = cardiomix(*command, "--arms", "unet_ra,unet_ra_regions,unet_ra_fa_residual_step")
    assert done.returncode == 0, done.stderr
    assert all(p.stat().st_mtime_ns == then for p, then in weights.items())
    for vendor in "AB":
        index = json.loads((tmp_path / "out" / f"from-{vendor}" / "sdnet" / "model.json").read_text())
        assert set(index["about"]["data"]["train"]) == {vendor}
    with (tmp_path / "out" / "transfer.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(r["arm"], r["direction"]) for r in table} >= {
        (arm, d)
        for arm in ("unet_ra", "unet_ra_regions", "unet_ra_fa_residual_step")
        for d in ("A → others", "B → others", BOTH)
    }
    confirm = cardiomix(*command, "--arms", "unet_ra", "--half", "confirm", "--table")
    assert confirm.returncode == 2 and "has no scored arm" in confirm.stderr and "Traceback" not in confirm.stderr
