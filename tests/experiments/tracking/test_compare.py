"""`cardiomix compare` on real MLflow databases."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli.main import app
from experiments.tracking.compare import dice_table, difference_table, differences, find, rows
from experiments.tracking.tracker import Tracker
from storage.errors import InputError
from storage.lock import run_lock
from tests.experiments.logged_runs import case, make_run, write_epochs, write_result

TREATED = {"first": {"train.epochs": "10", "network": "unet"}, "second": {"train.epochs": "20", "network": "unet"}}
SCORES = {"first": (0.80, 0.90), "second": (0.87, 0.89), "third": (0.70,)}  # of LV on D, a seed each


def log(
    run: Path,
    seeds: tuple[float, ...],
    params: Mapping[str, str],
    arm: str = "unet_ra",
    config_hash: str = "c0ffee",
) -> None:
    tracker = Tracker(str(run), run.name, tags={})
    for seed, dice in enumerate(seeds):
        child = tracker.child(arm, seed, config_hash, {"data_fingerprint": "f00"}, {"seed": str(seed), **params})
        others = [case(arm, "A", "RV", 0.5), case(arm, "A", "MYO", 0.6)]
        child.log_scores([case(arm, "D [new]", "LV", dice), *others])
        child.finish()
    tracker.finish()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three runs, each with its own database; the third has one seed."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, seeds in SCORES.items():
            log(folder / name, seeds, TREATED.get(name, {"train.epochs": "10", "network": "unet", "unet.width": "8"}))
    return [str(folder / name) for name in SCORES]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_means_and_spreads_are_over_seeds_and_the_best_run_is_named(runs: list[str]) -> None:
    table = {row["run"]: row for row in rows(find(runs)) if row["structure"] == "LV"}
    for name, seeds in SCORES.items():
        assert table[name]["dice_mean"] == pytest.approx(statistics.fmean(seeds))
        assert table[name]["seeds"] == len(seeds)
    assert table["first"]["dice_sd"] == pytest.approx(statistics.stdev(SCORES["first"]))
    assert table["third"]["dice_sd"] is None and table["first"]["difference"] is None
    assert table["second"]["difference"] == pytest.approx(0.03) and table["third"]["difference"] == pytest.approx(-0.15)
    assert [row["best"] for row in table.values()] == [False, True, False]
    # where all are equal none is the best; structures come in the order of the field
    others = [row for row in rows(find(runs)) if row["vendor"] == "A"]
    assert not any(row["best"] for row in others)
    assert [row["structure"] for row in others] == ["MYO"] * 3 + ["RV"] * 3


def test_seeds_of_earlier_settings_are_not_averaged_with_later_ones(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log(run, (0.6, 0.7), {"train.learning_rate": "0.001", "of_an_earlier_version": "1"})
    log(run, (0.8,), {"train.learning_rate": "0.01", "of_a_later_version": "1"}, config_hash="beef")
    assert [row["seeds"] for row in rows(find([str(run)])) if row["structure"] == "LV"] == [1]
    log(run, (0.6, 0.7), {"train.learning_rate": "0.01"}, config_hash="cafe")
    (row,) = [row for row in rows(find([str(run)])) if row["structure"] == "LV"]
    assert (row["seeds"], row["dice_mean"]) == (2, pytest.approx(0.65))


def test_what_differs_is_listed_and_nothing_else(runs: list[str]) -> None:
    found = {row["field"]: row["values"] for row in differences(find(runs))}
    assert found == {
        "train.epochs": {"first": "10", "second": "20", "third": "10"},
        "unet.width": {"first": None, "second": None, "third": "8"},
    }


def test_the_terminal_shows_a_column_a_run_with_the_best_in_bold(runs: list[str]) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system="standard")
    console.print(dice_table(find(runs)))
    console.print(difference_table(find(runs)))
    (line,) = [line for line in text.getvalue().splitlines() if "LV" in line]
    assert "D _new_" in line and "0.850 ± 0.071" in line and "\x1b[1m0.880 ± 0.014 (+0.030)" in line
    assert "0.700 (-0.150)" in line
    assert "2 seeds" in text.getvalue() and "1 seed\x1b" in text.getvalue()


def test_the_verb_prints_json_alone_and_writes_a_csv(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    done = CliRunner().invoke(app, ["compare", *runs, "--csv", str(out), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert len(document["dice"]) == 9 and document["differences"][0]["arms"] == ["unet_ra"]
    with out.open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["dice_mean"]) for row in table] == [row["dice_mean"] for row in document["dice"]]
    plain = CliRunner().invoke(app, ["compare", *runs])
    assert plain.exit_code == 0 and "train.epochs" in plain.stdout
    assert "one training: descriptive; a verdict needs 3 seeds" in plain.stdout


def test_no_heading_is_empty_and_none_stands_above_nothing(runs: list[str]) -> None:
    assert [column.header for column in dice_table(find(runs)).columns][:3] == ["arm", "vendor", "structure"]
    alone = CliRunner().invoke(app, ["compare", runs[0]])
    assert "first run" not in alone.stdout and "What differs" not in alone.stdout
    assert "two trainings: descriptive" in alone.stdout
    twice = CliRunner().invoke(app, ["compare", runs[0], runs[0]])
    assert twice.stdout.rstrip().endswith("What differs\nNothing in settings, data, bank or code.")


def test_runs_of_a_shared_store_are_found_by_folder_experiment_or_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for folder in ("here", "there"):  # two folders of one name are one experiment with two parent runs
        log(tmp_path / folder / "same", (0.5,), {"folder": folder})
    log(tmp_path / "alone", (0.6,), {})
    here = find([str(tmp_path / "here" / "same"), str(tmp_path / "there" / "same"), "alone"])
    assert [run.name for run in here] == ["same", "same (2)", "alone"]
    assert [run.made["unet_ra"].get("folder") for run in here] == ["here", "there", None]
    with pytest.raises(InputError, match=r"same: the experiment holds 2 runs of cardiomix; .* ids [0-9a-f]{32}") as two:
        find(["same"])
    by_id = find([str(two.value).rpartition(" ")[2]])
    assert by_id[0].made["unet_ra"]["folder"] in ("here", "there")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert find(["alone"], store)[0].dice == here[2].dice


@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_mlflow_does_not_know_is_one_line_and_makes_nothing(
    tmp_path: Path, runs: list[str], known: bool
) -> None:
    (tmp_path / "new").mkdir()
    store = ["--tracking-uri", f"sqlite:///{runs[0]}/mlflow.db"] if known else []
    for run in (str(tmp_path / "new"), "no-such-experiment", "0" * 32):
        done = CliRunner().invoke(app, ["compare", run, *store])
        assert isinstance(done.exception, InputError) and "\n" not in str(done.exception)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.slow
def test_a_run_that_mlflow_does_not_know_is_logged_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, arms = make_run(tmp_path)
    write_epochs(arms[0].job, 2)
    write_result(arms[0], 0.5)
    done = CliRunner().invoke(app, ["compare", run, "--json"])
    assert done.exit_code == 0, done.exception
    assert "is logged from its folder" in done.stderr
    assert {row["dice_mean"] for row in json.loads(done.stdout)["dice"]} == {0.5}
    again = CliRunner().invoke(app, ["compare", run, "--json"])
    assert again.stderr == "" and again.stdout == done.stdout
    # the same in a store that is named
    store = f"sqlite:///{tmp_path}/shared.db"
    assert CliRunner().invoke(app, ["compare", run, "--tracking-uri", store]).exit_code == 0
    # while another driver holds the run, nothing is written
    (tmp_path / "run" / "mlflow.db").unlink()
    with run_lock(run):
        refused = CliRunner().invoke(app, ["compare", run])
    assert isinstance(refused.exception, InputError) and "is being worked on" in str(refused.exception)
    assert not (tmp_path / "run" / "mlflow.db").exists()


def test_a_run_without_scores_says_so(tmp_path: Path) -> None:
    Tracker(str(tmp_path / "run"), "run").child("unet_ra", 0, "c0ffee").finish()
    with pytest.raises(InputError, match=r"^run: has no scored arm in MLflow"):
        find([str(tmp_path / "run")])
