"""The database that a run keeps in itself: under any name, after a move, and in a bucket (a real S3 server)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow import MlflowClient

from experiments.tracking import compare, own_database
from experiments.tracking.model import log_model
from experiments.tracking.run_log import RunLog
from experiments.tracking.store import open_client, tracking_uri_of, ui_command
from experiments.tracking.tracker import Tracker
from storage import fs
from storage.errors import InputError, StageError
from tests.experiments.logged_runs import contents, make_run, runs_of, write_epochs, write_result
from tests.tiny_networks import write_unet


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


def test_a_run_of_any_name_has_its_own_database_inside_it(tmp_path: Path) -> None:
    names = ["cohort?1", "cohort?2", "ws%2Fbranch #3"]
    trackers = [Tracker(str(tmp_path / name), "exp") for name in names]
    assert len({tracker.run_id for tracker in trackers}) == len(names)
    for name, tracker in zip(names, trackers, strict=True):
        tracker.log_text("arm,seed", "cases.csv")
        assert (tmp_path / name / "mlflow.db").is_file()
        assert len(list((tmp_path / name / "mlartifacts").rglob("cases.csv"))) == 1
        assert [item.path for item in open_client(tracker.tracking_uri).list_artifacts(tracker.run_id)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "file:mlruns"])
def test_a_database_that_ray_would_remove_with_the_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri_of(str(tmp_path / "run")) == uri
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "of_a_job"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"relative to a job's own folder.*give a full path, or a server's address"):
        tracking_uri_of(str(tmp_path / "run"))
    for kept in (f"sqlite:///{tmp_path}/mlflow.db", "http://127.0.0.1:5000", str(tmp_path / "mlruns")):
        assert tracking_uri_of(str(tmp_path / "run"), kept) == kept


@pytest.mark.parametrize("name", ["run", "new name?"], ids=["moved", "moved and renamed"])
def test_a_moved_run_logs_where_it_is_and_its_model_loads(tmp_path: Path, name: str) -> None:
    before = tmp_path / "here" / "run"
    tracker = Tracker(str(before), "run")
    child = tracker.child("unet_ra", 0, "c0ffee")
    child.log_text("old", "cases.csv")
    log_model(child.run_id, tracker.tracking_uri, write_unet(tmp_path / "net"), child.files)
    after = tmp_path / "there" / name
    after.parent.mkdir()
    shutil.move(before, after)

    moved = Tracker(str(after), name)
    assert moved.run_id == tracker.run_id and moved.child("unet_ra", 0, "c0ffee").run_id == child.run_id
    moved.log_text("new", "new.txt")
    assert not before.exists() and len(list(after.rglob("new.txt"))) == 1
    client = MlflowClient(tracking_uri=moved.tracking_uri)
    assert [each.name for each in client.search_experiments() if each.name != "Default"] == [name]
    assert [item.path for item in client.list_artifacts(child.run_id)] == ["cases.csv"]
    (model,) = client.search_logged_models([moved.experiment_id])
    mlflow.set_tracking_uri(moved.tracking_uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    assert loaded.metadata.signature.inputs.input_names() == ["image"]


def test_a_copy_leaves_the_run_it_was_copied_from_alone(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path / "one"), "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    # by a process of its own: MLflow remembers for a process where the files of a run, which both have, go
    code = "import sys; from experiments.tracking.tracker import Tracker; "
    code += "Tracker(sys.argv[1], 'two').log_text('x', 'of the copy.txt')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "two")], check=True, timeout=200)
    again = Tracker(str(tmp_path / "one"), "one")
    again.log_text("x", "of the first.txt")
    assert again.run_id == tracker.run_id
    assert [path.name for path in (tmp_path / "one" / "mlartifacts").rglob("*.txt")] == ["of the first.txt"]
    assert [path.name for path in (tmp_path / "two" / "mlartifacts").rglob("*.txt")] == ["of the copy.txt"]


def test_a_shared_database_keeps_files_beside_itself(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'team' / 'shared.db'}"
    (tmp_path / "team").mkdir()
    for folder in ("one", "two"):  # of one name: one experiment
        Tracker(str(tmp_path / folder / "run"), "run", address).log_text(folder, "a.txt")
    assert len(list((tmp_path / "team" / "mlartifacts").rglob("a.txt"))) == 2


def test_a_run_in_a_bucket_keeps_its_database_there_and_the_next_driver_goes_on(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, settings, arms = make_run(tmp_path / "made")
    write_epochs(arms[0].job, 2)
    write_result(arms[0], 0.5)
    run = "s3://bucket/tracked"
    monkeypatch.chdir(tmp_path)
    work = set(tmp_path.iterdir())

    log = RunLog(run, "tracked", settings, print)
    assert ui_command(run, log.tracking_uri).startswith("copy s3://bucket/tracked/mlflow.db to this machine")
    log.require()
    assert not fs.exists(f"{run}/mlflow.db")
    log.finish_arm(arms[0], failed=False)
    assert log._writer.wait(arms[0].label) is None
    assert fs.exists(f"{run}/mlflow.db")  # though the driver has not ended, and may die
    own_database.let_go(run)

    said: list[str] = []
    log = RunLog(run, "tracked", settings, said.append)  # the next driver, which has no file of the first
    write_epochs(arms[1].job, 3)
    write_result(arms[1], 0.7)
    for arm in arms:
        log.finish_arm(arm, failed=False)
    log.close("FINISHED")
    assert said == [] and set(tmp_path.iterdir()) == work  # nothing beside the process

    (found,) = compare.find([run])
    assert found.dice["unet_ra", "D", "LV"] == (0.5, 0.7)
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_endpoint)
    copy = tmp_path / "mlflow.db"  # as a user looks at it, with MLflow's own driver
    copy.write_bytes(fs.read_bytes(f"{run}/mlflow.db"))
    client = MlflowClient(tracking_uri=f"sqlite:///{copy}")
    seen = contents(client, "tracked")
    assert set(seen) == {"ablation", "unet_ra seed 0", "unet_ra seed 1"}
    assert {each["status"] for each in seen.values()} == {"FINISHED"}
    assert seen["unet_ra seed 0"]["artifacts"] == ["cases.csv"] and seen["unet_ra seed 0"]["models"] == 1
    assert seen["ablation"]["metrics"]["dice/mean"] == [(0, 0.5), (1, pytest.approx(0.6))]
    (child,) = [each for each in runs_of(client, "tracked") if each.info.run_name == "unet_ra seed 0"]
    text = mlflow.artifacts.load_text(f"{child.info.artifact_uri}/cases.csv")
    assert text == (Path(arms[0].job.out) / "cases.csv").read_text() and local

    own_database.let_go(run)
    fs.remove(f"{run}/mlflow.db")
    assert not Path(tracking_uri_of(run).removeprefix("sqlite:///")).exists()


def test_a_bucket_that_does_not_take_the_snapshot_is_told_and_the_rest_goes_on(
    tmp_path: Path, s3_proxy: object, s3_impatient: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.tracking.run_log.PATIENCE_S", 0.5)
    _, settings, arms = make_run(tmp_path)
    write_epochs(arms[0].job, 1)
    said: list[str] = []
    log = RunLog("s3://bucket/refused", "refused", settings, said.append)
    log.require()
    s3_proxy.fault = lambda number, method: "503" if method == "PUT" else None  # type: ignore[attr-defined]
    log.finish("unet_ra", 0, arms[0].job, "FAILED")
    assert isinstance(log._writer.wait(arms[0].label), StageError)
    log.close("FAILED")
    assert "the object store failed" in said[-1] and "the run's MLflow lacks" in said[-1] and "server" not in said[-1]
