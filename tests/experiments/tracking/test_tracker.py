"""Tracking against a real MLflow on SQLite: what repeats must not double."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.tracking.store import ui_command
from experiments.tracking.tracker import Tracker
from storage.errors import InputError
from tests.experiments.logged_runs import case

HISTORY = [
    {
        "epoch": e,
        "step": 10 * (e + 1),
        "loss/total": 1.0 / (e + 1),
        "val/dice": 0.2 * e,
        "loss/latent": None,
        "phase": "x",
    }
    for e in range(3)
]
SCORES: list[dict[str, Any]] = [
    case("fs_sdnet", "D (new)", "RV", 0.5, hd95_mm=math.inf, missed=True),
    case("unet_ra", "A", "LV", 0.9),
]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _log_everything(run: Path) -> Tracker:
    tracker = Tracker(str(run), "demo", tags={"git_commit": "abc"})
    child = tracker.child(
        "fs_sdnet", 0, "c0ffee", {"bank_fingerprint": "f00"}, {"train.lr": "0.001", "train.batch": "4"}
    )
    child.log_history(HISTORY)
    child.log_scores(SCORES)
    child.log_text("arm,seed", "cases.csv")
    child.finish("FINISHED", "mark")
    tracker.finish()
    return tracker


def test_an_ablation_logged_twice_is_there_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    run = tmp_path / "run"
    _log_everything(run)
    tracker = _log_everything(run)

    assert (run / "mlflow.db").is_file()
    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    runs = client.search_runs([tracker.experiment_id])
    parent = client.get_run(tracker.run_id)
    (child,) = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == tracker.run_id]
    assert len(runs) == 2
    assert parent.info.run_name == "ablation" and parent.data.tags["git_commit"] == "abc"
    assert {key: child.data.tags[key] for key in ("arm", "seed", "config_hash", "bank_fingerprint")} == {
        "arm": "fs_sdnet", "seed": "0", "config_hash": "c0ffee", "bank_fingerprint": "f00",
    }  # fmt: skip
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert child.data.params == {"train.lr": "0.001", "train.batch": "4"}
    history = client.get_metric_history(child.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(10, 1.0), (20, 0.5), (30, pytest.approx(1 / 3))]
    assert child.data.metrics["dice/D _new_/RV"] == 0.5 and child.data.metrics["missed/D _new_/RV"] == 1
    assert len(client.get_metric_history(child.info.run_id, "dice/D _new_/RV")) == 1
    assert not any(key.startswith("hd95") or "/A/" in key for key in child.data.metrics)
    assert [item.path for item in client.list_artifacts(child.info.run_id)] == ["cases.csv"]
    assert list((run / "mlartifacts").rglob("cases.csv"))
    assert str(tmp_path) not in str([r.data.tags for r in runs])
    assert "alembic" not in capfd.readouterr().err
    assert (
        ui_command(str(run), tracker.tracking_uri)
        == f"mlflow ui --backend-store-uri sqlite:///{run / 'mlflow.db'} --host 127.0.0.1"
    )
    assert [(r["arm"], r["seed"], r["status"]) for r in tracker.runs()] == [("fs_sdnet", 0, "FINISHED")]


def test_a_resumed_arm_adds_only_what_is_new(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(str(tmp_path), "demo")
    tracker.child("fs_sdnet", 0, "c0ffee").log_history(HISTORY[:2])
    resumed = tracker.child("fs_sdnet", 0, "c0ffee")
    # A killed worker repeats an epoch: step 20 comes again, with another value.
    resumed.log_history([HISTORY[0], HISTORY[1] | {"loss/total": 9.0}, HISTORY[2]])
    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    history = client.get_metric_history(resumed.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(10, 1.0), (20, 0.5), (30, pytest.approx(1 / 3))]

    resumed.log_scores(SCORES)
    resumed.log_scores([SCORES[0] | {"dice": 0.6}])
    scores = client.get_metric_history(resumed.run_id, "dice/D _new_/RV")
    assert [(m.step, m.value) for m in scores] == [(0, 0.5), (1, 0.6)]
    # Its end is remembered, with what was logged; nothing is missing, so nobody opens it again.
    resumed.finish("FINISHED", "all of it")
    assert tracker.is_logged("fs_sdnet", 0, "c0ffee", "all of it")
    assert not tracker.is_logged("fs_sdnet", 0, "c0ffee", "more") and not tracker.is_logged("fs_sdnet", 1, "c0ffee", "")
    # Another seed or another configuration is another run.
    others = {tracker.child("fs_sdnet", 1, "c0ffee").run_id, tracker.child("fs_sdnet", 0, "beef").run_id}
    assert len(others | {resumed.run_id}) == 3


def test_two_runs_in_one_shared_database_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    trackers: list[Tracker] = [Tracker(str(tmp_path / name), "same name") for name in ("one", "two", "one")]
    assert trackers[0].run_id == trackers[2].run_id != trackers[1].run_id
    assert not (tmp_path / "one" / "mlflow.db").exists()


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"not a database" * 100)])
def test_a_store_that_cannot_be_opened_is_one_clear_line(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "bad.db")
    with pytest.raises(InputError, match=r"bad\.db.*MLflow store"):
        Tracker(str(tmp_path / "run"), "demo", tracking_uri=f"sqlite:///{tmp_path / 'bad.db'}")


def test_an_unreachable_server_is_one_clear_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://\*\*\*@127\.0\.0\.1:9") as caught:
        Tracker(str(tmp_path), "demo", tracking_uri="http://me:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_what_an_earlier_driver_left_open_ends_with_the_parent(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), "demo")
    tracker.child("fs_sdnet", 0, "of an earlier configuration")
    tracker.child("fs_sdnet", 0, "c0ffee").finish()
    tracker.finish()
    assert [(r["config_hash"], r["status"]) for r in tracker.runs()] == [
        ("c0ffee", "FINISHED"),
        ("of an earlier configuration", "KILLED"),
    ]


def test_samples_of_the_machine_that_come_twice_are_there_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(str(tmp_path), "demo")
    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    began = client.get_run(tracker.run_id).info.start_time
    samples = [(began + 1000 * k, {"system/cpu_utilization_percentage": 10.0 * k}) for k in range(4)]
    for part in (samples[:3], samples[1:], samples):
        tracker.log_system(part)
    history = client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0)]
