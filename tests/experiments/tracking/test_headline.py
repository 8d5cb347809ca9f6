"""What the parent run and each child say at a glance, on a real MLflow database."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from experiments.tracking.headline import VIEW_TAG, mean_dice, standing, view
from experiments.tracking.run_log import RunLog
from experiments.tracking.store import tracking_uri_of
from tests.experiments.logged_runs import case, make_run, runs_of, write_epochs, write_result

TABLE = "# run\n\n| arm | A LV |\n|---|---|\n| U-Net+RA | .600 |\n"


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


def test_mean_dice_is_over_subjects_each_the_mean_of_its_structures() -> None:
    cases = [
        case("x", "A", "LV", 0.9, subject="a1"),
        case("x", "A", "RV", 0.7, subject="a1", phase="ED"),
        case("x", "A", "RV", 0.5, subject="a1", phase="ES"),
        case("x", "A", "LV", 0.5, subject="a2"),
        case("x", "A", "MYO", math.nan, subject="a2"),
        case("x", "B", "LV", 0.2, subject="a1"),  # the same code, another vendor's subject
    ]
    assert mean_dice(cases) == pytest.approx({"": (0.75 + 0.5 + 0.2) / 3, "A": 0.625, "B": 0.2})
    assert mean_dice([case("x", "A", "LV", math.nan)]) == {} == mean_dice([])


def test_the_best_arm_is_that_of_the_highest_mean_over_seeds() -> None:
    one: Any = {"dice/mean": 0.8, "dice/worst": 0.7, "dice/A/mean": 0.9, "dice/D/mean": 0.7, "dice/A/LV": 0.9}
    two: Any = {"dice/mean": 0.6, "dice/worst": 0.4, "dice/A/mean": 0.4, "dice/D/mean": 0.8}
    metrics, tags = standing([("p", one), ("p", two), ("q", {**two, "dice/mean": 0.65}), ("r", {"val/dice": 1.0})])
    assert tags == {"best_arm": "p", "worst_vendor": "A"}
    assert metrics == pytest.approx(
        {
            **{"dice/mean": 0.7, "dice/worst": 0.65, "dice/A/mean": 0.65, "dice/D/mean": 0.75},
            **{"dice_by_arm/p/mean": 0.7, "dice_by_arm/p/worst": 0.65},
            **{"dice_by_arm/p/A/mean": 0.65, "dice_by_arm/p/D/mean": 0.75},
            **{"dice_by_arm/q/mean": 0.65, "dice_by_arm/q/worst": 0.4},
            **{"dice_by_arm/q/A/mean": 0.4, "dice_by_arm/q/D/mean": 0.8},
        }
    )
    assert standing([("r", {"val/dice": 1.0})]) == ({}, {})


def test_the_view_has_dice_first_and_room_for_the_longest_name() -> None:
    saved = json.loads(view(["unet_ra seed 0", "a" * 50], ["D", "A"], 5))
    assert (saved["name"], saved["createdAt"]) == ("Dice", 5)
    state = json.loads(saved["state"])
    assert state["selectedColumns"] == [
        f"metrics.`dice/{name}`" for name in ("mean", "worst", "A/mean", "D/mean")
    ] == state["columnOrder"][1:]  # fmt: skip
    assert state["orderByKey"] == "metrics.`dice/mean`" and state["columnWidths"]["attributes.`Run Name`"] > 400


def test_parent_and_children_open_on_dice(tmp_path: Path) -> None:
    run, settings, arms = make_run(tmp_path)
    report = Path(run) / "report"
    report.mkdir()
    (report / "table.md").write_text(TABLE)
    log = RunLog(run, "name", settings, print)
    log.require()
    for arm in arms:
        for epochs in (1, 2):
            write_epochs(arm.job, epochs)
            log.follow(arm.arm, arm.seed, arm.job)
        write_result(arm, dice=0.5 + 0.2 * arm.seed)
        log.finish_arm(arm, failed=False)
    log.report()
    log.close("FINISHED")

    client = MlflowClient(tracking_uri=tracking_uri_of(run))
    by_name = {str(each.info.run_name): each for each in runs_of(client, "name")}
    parent, child = by_name["ablation"], by_name["unet_ra seed 1"]
    assert parent.data.metrics["dice/mean"] == parent.data.metrics["dice_by_arm/unet_ra/D/mean"] == pytest.approx(0.6)
    assert parent.data.tags.items() >= {"best_arm": "unet_ra", "arms": "unet_ra", "seeds": "2"}.items()
    assert parent.data.tags["mlflow.note.content"] == TABLE
    assert parent.data.params["train.learning_rate"] == "0.001" and "data" not in parent.data.params
    assert [given.dataset.name for given in parent.inputs.dataset_inputs] == ["slices"]
    assert {"report", "config.yaml"} == {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert child.data.metrics["dice/mean"] == child.data.metrics["dice/worst"] == child.data.metrics["dice/A/mean"]
    # The compare page opens on the metric that the store gives first.
    assert next(iter(child.data.metrics)) == "val/dice" and next(iter(parent.data.metrics)) == "dice/mean"
    experiment = client.get_experiment(parent.info.experiment_id)
    assert "`dice/mean`" in experiment.tags[VIEW_TAG]


def test_a_table_too_long_for_a_tag_is_cut_at_a_line(tmp_path: Path) -> None:
    from experiments.tracking.tracker import Tracker

    tracker = Tracker(str(tmp_path / "run"), "name")
    tracker.note("\n".join(f"| line {number} | {'x' * 80} |" for number in range(200)))
    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    note = client.get_run(tracker.run_id).data.tags["mlflow.note.content"]
    shown, _, rest = note.partition("\n\n…")
    assert len(note) <= 8000 and "table.md" in rest and all(line.endswith("x |") for line in shown.splitlines())
