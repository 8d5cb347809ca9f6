"""The driver's log against a real MLflow on SQLite: what it holds, and that a failure costs training nothing."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from experiments.tracking.lineage import job_inputs, job_tags
from experiments.tracking.run_log import RunLog
from experiments.tracking.store import tracking_uri_of
from experiments.tracking.system_metrics import SPOOL, SystemSampler
from experiments.tracking.writer import LogWriter
from tests.experiments.logged_runs import contents, make_run, runs_of, write_epochs, write_result
from tests.storage.banks import made


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")


def test_a_run_in_mlflow_is_what_the_run_folder_holds_and_says_where_it_comes_from(tmp_path: Path) -> None:
    run, settings, arms = make_run(tmp_path)
    said: list[str] = []
    log = RunLog(run, "name", settings, said.append)
    log.require()
    time.sleep(0.5)  # a sample or two of the machine
    for arm in arms:
        for epochs in (1, 3):
            write_epochs(arm.job, epochs)
            assert len(log.follow(arm.arm, arm.seed, arm.job)) == epochs
        write_result(arm, dice=0.5 + 0.1 * arm.seed)
        log.finish_arm(arm, failed=False)
    log.close("FINISHED")
    for _ in range(2):  # the next driver finds all of it there, and leaves it so
        log = RunLog(run, "name", settings, said.append)
        for arm in arms:
            log.finish_arm(arm, failed=False)
        log.close("FINISHED")
    assert said == []
    client = MlflowClient(tracking_uri=tracking_uri_of(run))
    seen = contents(client, "name")
    assert set(seen) == {"ablation", "unet_ra seed 0", "unet_ra seed 1"}
    assert {each["status"] for each in seen.values()} == {"FINISHED"}
    assert seen["ablation"]["artifacts"] == ["config.yaml"]
    child = seen["unet_ra seed 1"]
    assert child["metrics"]["loss/total"] == [(10, 1.0), (20, 0.5), (30, pytest.approx(1 / 3))]
    assert child["metrics"]["samples_per_s"] == [(10, 21.0), (20, 22.0), (30, 23.0)]
    assert {"queue_depth", "actor_utilisation", "missed/D/RV"} <= set(child["metrics"])
    assert child["metrics"]["dice/D/LV"] == child["metrics"]["dice/mean"] == [(0, 0.6)]
    assert child["inputs"] == [("slices", arms[1].job.data_fingerprint)]
    assert child["artifacts"] == ["cases.csv"] and child["models"] == 1
    wanted = {"arm": "unet_ra", "seed": "1", "preset": "demo", "data_fingerprint": arms[1].job.data_fingerprint}
    assert child["tags"].items() >= wanted.items() and child["tags"]["git_commit"]
    # An axis a value: numbers as numbers, nothing long, nothing unset, names as in config.yaml.
    params = child["params"]
    assert params["train.learning_rate"] == "0.001" and params["plan.area_range_mm2.1"] == "2.692"
    assert (params["arm"], params["seed"], params["ra"], params["fa"]) == ("unet_ra", "1", "True", "False")
    assert "None" not in params.values() and max(map(len, params.values())) < 20
    (given,) = client.get_run(_id(client, "unet_ra seed 1")).inputs.dataset_inputs
    profile = json.loads(given.dataset.profile)
    assert profile["num_rows"] == 22 and profile["subjects"]["B train"] == profile["subjects"]["D test"] == 1
    assert "system/cpu_utilization_percentage" in client.get_run(_id(client, "ablation")).data.metrics
    assert str(tmp_path) not in str([r.to_dictionary() for r in runs_of(client, "name")]).replace(
        str(_artifacts(run)), ""
    )


def test_an_arm_of_mixed_factors_names_its_bank_and_the_network_that_made_it(tmp_path: Path) -> None:
    _, _, arms = make_run(tmp_path)
    bank = made(tmp_path / "bank.zarr")
    stream = arms[0].job.stream.model_copy(update={"fa": True, "bank": bank.uri})
    job = arms[0].job.model_copy(update={"stream": stream, "bank_fingerprint": bank.fingerprint})
    tags = job_tags(job)
    assert tags["bank_fingerprint"] == bank.fingerprint and tags["sdnet_fingerprint"] == bank.spec.sdnet_fingerprint
    slices, factors = (given.dataset for given in job_inputs(job))
    assert (slices.digest, factors.digest) == (job.data_fingerprint, bank.fingerprint)
    assert json.loads(factors.profile)["slices"] == {"A": 5, "B": 5}
    assert str(tmp_path) not in f"{tags}{slices.to_dictionary()}{factors.to_dictionary()}"


def test_an_arm_that_failed_or_was_stopped_says_so_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    run, settings, arms = make_run(tmp_path)
    client = None
    for outcome, epochs in (("FAILED", 1), ("KILLED", 2), ("FINISHED", 3)):
        log = RunLog(run, "name", settings, print)
        write_epochs(arms[0].job, epochs)
        log.follow("unet_ra", 0, arms[0].job)
        if outcome != "KILLED":
            log.finish("unet_ra", 0, arms[0].job, outcome)
        log.close("KILLED" if outcome == "KILLED" else "FINISHED")
        client = MlflowClient(tracking_uri=tracking_uri_of(run))
        child = contents(client, "name")["unet_ra seed 0"]
        assert child["status"] == outcome and len(child["metrics"]["loss/total"]) == epochs


def test_a_driver_that_fails_before_training_leaves_no_run(tmp_path: Path) -> None:
    run, settings, _ = make_run(tmp_path)
    log = RunLog(run, "name", settings, print)
    log.start()
    log.close("KILLED")
    assert MlflowClient(tracking_uri=tracking_uri_of(run)).get_experiment_by_name("name") is None


def test_the_machine_is_not_sampled_where_mlflow_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    before = set(threading.enumerate())
    sampler = SystemSampler(str(tmp_path), lambda: None)
    sampler.start()
    assert set(threading.enumerate()) == before


def test_samples_that_could_not_be_logged_wait_for_the_next_driver(tmp_path: Path) -> None:
    came, logged = threading.Event(), []

    def refuse(samples: object) -> None:
        raise ConnectionError

    for _ in range(2):  # two drivers in a row that meet no server
        sampler = SystemSampler(str(tmp_path), came.set)
        sampler.start()
        assert came.wait(60)
        came.clear()
        sampler.stop()
        with pytest.raises(ConnectionError):
            sampler.flush(refuse)
        sampler.keep()
    kept = len((tmp_path / SPOOL).read_text().splitlines())
    SystemSampler(str(tmp_path), came.set).flush(logged.extend)
    assert len(logged) == kept >= 2 and not (tmp_path / SPOOL).exists()
    assert all(0 <= numbers["system/cpu_utilization_percentage"] <= 100 for _, numbers in logged)
    assert sorted(logged) == logged


def test_the_writer_carries_out_each_newest_state_in_order_whatever_fails_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experiments.tracking.writer.FIRST_WAIT_S", 0.01)
    done: list[str] = []
    changes: list[BaseException | None] = []
    away, resets = threading.Event(), []

    def reach(state: str, refused: bool = False) -> None:
        if away.is_set():
            raise ConnectionError
        if refused and not resets:
            raise ValueError(state)
        done.append(state)

    writer = LogWriter(lambda: resets.append(1), lambda e: isinstance(e, ConnectionError), changes.append)
    writer.post("a", lambda: reach("a1"))
    assert writer.wait("a") is None and done == ["a1"]
    away.set()
    writer.post("a", lambda: reach("a2"))
    assert isinstance(writer.wait("a"), ConnectionError)
    for state in ("a3", "a4"):
        writer.post("a", lambda state=state: reach(state))  # type: ignore[misc]
    writer.post("b", lambda: reach("b1"))
    assert writer.close(0.0) == ["a", "b"] and done == ["a1"]

    resets.clear()
    changes.clear()
    writer = LogWriter(lambda: resets.append(1), lambda e: isinstance(e, ConnectionError), changes.append)
    away.clear()
    writer.post("refused at first", lambda: reach("r", refused=True))
    writer.post("b", lambda: reach("b2"))
    assert writer.close(60.0) == [] and sorted(done) == ["a1", "b2", "r"]
    assert [type(change) for change in changes] == [ValueError, type(None)]


def test_a_closing_writer_gives_a_server_that_answers_again_all_the_time_it_needs() -> None:
    away, began, done = threading.Event(), threading.Event(), list[int]()
    away.set()

    def slow(number: int) -> None:
        if away.is_set():
            raise ConnectionError
        done.append(number)
        began.set()
        time.sleep(0.4)

    writer = LogWriter(lambda: None, lambda e: isinstance(e, ConnectionError), lambda _: None)
    for number in range(5):
        writer.post(str(number), partial(slow, number))
    assert isinstance(writer.wait("0"), ConnectionError)
    away.clear()
    assert began.wait(30)
    assert writer.close(0.5) == []  # five tasks take longer
    assert done == list(range(5))


def _id(client: MlflowClient, name: str) -> str:
    (run,) = [run for run in runs_of(client, "name") if run.info.run_name == name]
    return str(run.info.run_id)


def _artifacts(run: str) -> str:
    return (Path(run) / "mlartifacts").as_uri()
