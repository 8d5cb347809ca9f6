"""The ablation by `ray job submit` on three raylets, while nodes, drivers, servers and workers die: the same table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.integration.processes import train_workers
from tests.integration.test_job_submit import RAY, ROOT, JobServer, statuses
from tests.integration.test_mlflow_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ARMS = ("ss_sdnet_ra_fa", "unet_ra")  # in the order in which one lane takes them
DEATHS = 4  # of train workers: three in a row fail an arm, and the first may be the last of what came before


class Cluster(JobServer):
    """A head that takes no work, and two nodes of one CPU each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, cpus=0, alone=False)
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        # nodes of one machine share the folder of jobs' packages, and each of them clears it
        self.here = folder / "runtime_env.yaml"
        self.here.write_text(f"env_vars:\n  PYTHONPATH: {ROOT}\n  PYTHONUNBUFFERED: '1'\n")
        self.runtime_env = str(self.here)

    def wait(self) -> None:
        super().wait()
        until = time.monotonic() + 120
        while not (self._folder / "ray" / "ray_current_cluster").exists():
            assert time.monotonic() < until, "the head does not say where it is"
            time.sleep(0.1)
        for nodes in (2, 3):  # one after the other: at once they may take each other's ports
            self.add_node()
            while self.alive() < nodes:
                assert time.monotonic() < until, "a node does not join"
                time.sleep(0.5)

    def alive(self) -> int:
        """How many nodes there are."""
        command = [RAY, "list", "nodes", "--address", self.address, "--format", "json", "--filter", "state=ALIVE"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return len(json.loads(done.stdout)) if done.returncode == 0 else 0

    def add_node(self) -> None:
        options = ("--num-cpus=1", "--object-store-memory=150000000", "--dashboard-agent-listen-port=0")
        address = (self._folder / "ray" / "ray_current_cluster").read_text().strip()
        command = [RAY, "start", f"--address={address}", "--block", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._nodes.append(subprocess.Popen(command, env=self.environment, **quiet))  # type: ignore[call-overload]

    def end(self) -> None:
        for node in self._nodes:
            node.send_signal(signal.SIGTERM)
        for node in self._nodes:
            node.wait(60)
        super().end()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets want a short path
    started = Cluster(folder)
    try:
        started.wait()
        yield started
    finally:
        started.end()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("jobs") / "run"
    said = cluster.ablate(run)
    assert said.endswith("exit status 0"), said
    return run


def assert_same(run: Path, undisturbed: Path) -> None:
    for name in ("report/table.csv", *(f"arms/{arm}/seed0/model.safetensors" for arm in ARMS)):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name


def assert_logged_once(tracking_uri: str, experiment: str) -> None:
    """Every run has ended, and no metric has two values for a step."""
    client = MlflowClient(tracking_uri=tracking_uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert len({r.data.tags["arm"] for r in runs if "arm" in r.data.tags}) == 3  # pretrain too
    for run in runs:
        for name in (n for n in run.data.metrics if not n.startswith("system/")):
            steps = [m.step for m in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), name


def submitted(cluster: Cluster, run: Path, disturb: Callable[[Callable[[], bool]], None], *data: str) -> str:
    """What a submission prints while `disturb` goes on beside it; that is told whether the job still runs."""
    answers: list[str] = []
    job = threading.Thread(target=lambda: answers.append(cluster.ablate(run, *data)))
    job.start()
    disturb(job.is_alive)
    job.join()
    return answers[0]


def wait_until(what: Callable[[], Any], alive: Callable[[], bool]) -> Any:
    until = time.monotonic() + 600
    while not (found := what()):
        assert alive() and time.monotonic() < until, "the job ended before it could be disturbed"
        time.sleep(0.1)
    return found


def epochs(run: Path, arm: str) -> int:
    path = run / "arms" / arm / "seed0" / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_lost_worker_node_changes_nothing(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    run, killed = tmp_path / "run", []

    def disturb(alive: Callable[[], bool]) -> None:
        wait_until(lambda: epochs(run, ARMS[0]) == 1, alive)
        worker = wait_until(lambda: train_workers(os.getpid()), alive)[0]
        killed.append(parent(worker))  # the raylet of the node that trains
        os.kill(killed[0], signal.SIGKILL)
        cluster.add_node()

    said = submitted(cluster, run, disturb, "--data", str(undisturbed / "phantom"))
    assert said.endswith("exit status 0") and killed, said
    assert_same(run, undisturbed)
    assert_logged_once(f"sqlite:///{run / 'mlflow.db'}", "run")


def test_a_killed_driver_leaves_a_run_that_the_next_job_finishes(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def driver() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # gone meanwhile
                continue
            if words[1:3] == ["-m", "experiments"] and str(run) in words:
                found.append(int(folder.name))
        return found

    def disturb(alive: Callable[[], bool]) -> None:
        wait_until(lambda: epochs(run, ARMS[0]) == 1, alive)
        for pid in wait_until(driver, alive):
            os.kill(pid, signal.SIGKILL)

    data = ("--data", str(undisturbed / "phantom"))
    assert submitted(cluster, run, disturb, *data).endswith("exit status 1")
    assert not (run / "report").exists()
    said = cluster.ablate(run, *data)
    assert said.endswith("exit status 0"), said
    assert_same(run, undisturbed)
    assert_logged_once(f"sqlite:///{run / 'mlflow.db'}", "run")


def test_two_arms_that_fail_once_are_tried_again(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    run, killed = tmp_path / "run", set[int]()

    def disturb(alive: Callable[[], bool]) -> None:
        before = run / "sdnet" / "done.json"
        for number, arm in enumerate(ARMS, start=1):
            wait_until(before.exists, alive)
            while len(killed) < number * DEATHS:
                for worker in set(wait_until(lambda: train_workers(os.getpid()), alive)) - killed:
                    os.kill(worker, signal.SIGKILL)
                    killed.add(worker)
            before = run / "arms" / arm / "seed0" / "cases.csv"

    said = submitted(cluster, run, disturb, "--data", str(undisturbed / "phantom"))
    assert said.endswith("exit status 0"), said
    assert len(killed) == DEATHS * len(ARMS)
    assert_same(run, undisturbed)
    assert set(statuses(run).values()) == {"FINISHED"}


def test_an_mlflow_server_that_dies_and_comes_back_misses_nothing(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    run, server = tmp_path / "run", Server(tmp_path)
    server.start()
    environment = tmp_path / "runtime_env.yaml"
    environment.write_text(
        cluster.here.read_text().replace("env_vars:\n", f"env_vars:\n  MLFLOW_TRACKING_URI: {server.url}\n")
    )
    cluster.runtime_env = str(environment)

    def disturb(alive: Callable[[], bool]) -> None:
        wait_until(lambda: epochs(run, ARMS[0]) == 1, alive)
        server.kill()
        wait_until((run / "arms" / ARMS[0] / "seed0" / "cases.csv").exists, alive)
        server.start()

    try:
        said = submitted(cluster, run, disturb, "--data", str(undisturbed / "phantom"))
        assert said.endswith("exit status 0"), said
        assert_same(run, undisturbed)
        assert_logged_once(server.url, "run")
    finally:
        cluster.runtime_env = str(cluster.here)
        server.kill()
