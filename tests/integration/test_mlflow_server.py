"""A real MLflow server that is killed, comes back, or whose answers are lost, while a driver logs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from actors.stages import ArmRun
from experiments.tracking import run_log, writer
from experiments.tracking.run_log import RunLog
from experiments.tracking.store import require_answer
from storage.errors import InputError
from tests.conftest import S3Proxy
from tests.experiments.logged_runs import contents, make_run, runs_of, write_epochs, write_result

NAME, EPOCHS = "name", 4


class Server:
    """`mlflow server` on loopback with its own SQLite; it can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ("--backend-store-uri", f"sqlite:///{self._folder}/server.db")
        artifacts = ("--artifacts-destination", str(self._folder / "artifacts"))
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # processes that nothing here uses
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *place],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health").close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < until, "mlflow server does not come up"
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other sooner than in an hour's training; the machine is sampled often."""
    monkeypatch.setattr(writer, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(writer, "LONGEST_WAIT_S", 0.5)
    monkeypatch.setattr(run_log, "PATIENCE_S", 1.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.3")


def drive(log: RunLog, arms: list[ArmRun], between: Callable[[int, int], None] = lambda arm, epoch: None) -> None:
    """What the driver does while two arms train one after the other."""
    log.require()
    for number, arm in enumerate(arms):
        for epoch in range(1, EPOCHS + 1):
            between(number, epoch)
            write_epochs(arm.job, epoch)
            assert len(log.follow(arm.arm, arm.seed, arm.job)) == epoch
        write_result(arm, dice=0.5 + 0.1 * arm.seed)
        log.finish_arm(arm, failed=False)


def finish_all(log: RunLog, arms: list[ArmRun]) -> None:
    """What `cardiomix report` does."""
    for arm in arms:
        log.finish_arm(arm, failed=False)
    log.close("FINISHED")


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing came of it"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MLflow holds of such a run when nothing happens, on SQLite."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run, settings, arms = make_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/undisturbed.db")
        log = RunLog(run, NAME, settings, print)
        drive(log, arms)
        log.close("FINISHED")
    return shorn(contents(MlflowClient(tracking_uri=log.tracking_uri), NAME))


def shorn(seen: dict[str, Any]) -> dict[str, Any]:
    """Without the tag that is made of the folder's place."""
    seen["ablation"]["tags"].pop("cardiomix_run")
    return seen


@pytest.mark.slow
def test_a_killed_server_delays_logging_only_and_holds_all_of_it_in_the_end(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run, settings, arms = make_run(tmp_path)
    said: list[str] = []
    log = RunLog(run, NAME, settings, said.append)

    def disturb(arm: int, epoch: int) -> None:
        if (arm, epoch) == (0, 3):
            wait_for(lambda: any("loss/total" in r.data.metrics for r in runs_of(MlflowClient(server.url), NAME)))
            server.kill()
        if (arm, epoch) == (1, 2):  # it has missed the end of one arm and the beginning of the next
            wait_for(lambda: bool(said))
            assert "training goes on" in said[0]
            server.start()
            wait_for(lambda: len(said) == 2)
        if (arm, epoch) == (1, 4):
            server.kill()

    drive(log, arms, disturb)
    log.close("FINISHED")
    assert len(said) == 4 and "is back" in said[1] and "\n" not in said[3]
    assert "warning" in said[3] and "unet_ra/seed1 after epoch" in said[3] and "cardiomix report" in said[3]

    server.start()
    client = MlflowClient(server.url)
    assert {run.info.status for run in runs_of(client, NAME)} == {"RUNNING", "FINISHED"}
    again: list[str] = []
    finish_all(RunLog(run, NAME, settings, again.append), arms)
    assert again == []
    assert shorn(contents(client, NAME)) == undisturbed
    (parent,) = [r for r in runs_of(client, NAME) if r.info.run_name == "ablation"]
    samples = client.get_metric_history(parent.info.run_id, "system/cpu_utilization_percentage")
    assert len(samples) == len({sample.timestamp for sample in samples}) > 3
    assert not (Path(run) / "system.jsonl").exists()


@pytest.mark.slow
def test_requests_that_were_carried_out_but_never_answered_leave_one_copy(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "PATIENCE_S", 120.0)
    with S3Proxy(server.url) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        run, settings, arms = make_run(tmp_path)
        log = RunLog(run, "lost answers", settings, lambda line: None)
        log.require()
        lost: list[tuple[str, str]] = []

        def lose(number: int, method: str) -> str | None:
            """The first answer to each kind of writing request, such as (POST, runs/log-batch)."""
            place = proxy.requests[-1][1].partition("mlflow")[2].partition("?")[0]
            kind = method, re.sub(r"[0-9a-f]{32}|m-[0-9a-f]+", "ID", place.split("artifacts")[0].strip("/"))
            if method == "GET" or "search" in place or kind in lost:
                return None
            lost.append(kind)
            return "no answer"

        proxy.fault = lose
        drive(log, arms)
        log.close("FINISHED")
        proxy.shutdown()
    calls = ("runs/create", "runs/log-batch", "runs/log-inputs", "runs/set-tag", "runs/update")
    assert {("POST", call) for call in calls} <= set(lost)
    seen = contents(MlflowClient(server.url), "lost answers")
    assert shorn(seen) == undisturbed


@pytest.mark.slow
def test_a_server_is_asked_before_work_without_a_trace(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kill()
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    before = [e.experiment_id for e in MlflowClient(server.url).search_experiments()]
    require_answer(str(tmp_path / "run"))
    assert [e.experiment_id for e in MlflowClient(server.url).search_experiments()] == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_that_never_answered_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    run, settings, arms = make_run(tmp_path)
    said: list[str] = []
    log = RunLog(run, NAME, settings, said.append)
    with pytest.raises(InputError, match=r"^http://\*\*\*@127\.0\.0\.1:9: the MLflow server does not answer") as caught:
        log.require()
    log.close("KILLED")
    assert said == [] and "secret" not in str(caught.value) and "\n" not in str(caught.value)

    # A report of a finished run needs no server: one line says what is not logged.
    write_epochs(arms[0].job, 2)
    write_result(arms[0], 0.5)
    finish_all(RunLog(run, NAME, settings, said.append), arms[:1])
    (line,) = said
    assert "lacks unet_ra/seed0 after epoch 0" in line and "secret" not in line
