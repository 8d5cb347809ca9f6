"""`ray job submit` of the whole ablation, from the checkout to a real cluster that wants a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_ablation import TINY

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
RUNTIME_ENV = "docs/operations/runtime_env.yaml"
# One arm after another, so that as many threads train it whatever is left to do; in fp32, so that its table is exact.
SETS = (*TINY, "resources.lanes=1", "train.precision=fp32", "pretrain.precision=fp32")
ARMS = "unet_ra,ss_sdnet_ra_fa"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class JobServer:
    """A head on loopback, started as a user starts one, and `ray job` against it."""

    def __init__(self, folder: Path, cpus: int = 2, alone: bool = True) -> None:
        self.runtime_env = RUNTIME_ENV
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        self.stranger = kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = self.stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment["CARDIOMIX_CACHE"] = str(folder / "cache")
        dashboard, client = free_ports(2)
        self.address = f"http://127.0.0.1:{dashboard}"
        listen = {"dashboard-host": "127.0.0.1", "dashboard-port": dashboard, "dashboard-agent-listen-port": 0}
        listen |= {"port": 0, "ray-client-server-port": client, "temp-dir": folder / "ray"}
        options = [f"--{name}={value}" for name, value in listen.items()]
        self._head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", "--object-store-memory=200000000", *options],
            # with nothing to join it, all of it is on loopback
            env=self.environment | ({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if alone else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Until it takes jobs."""
        until = time.monotonic() + 120
        while self.job("list").returncode:
            assert self._head.poll() is None and time.monotonic() < until, "no job server"

    def job(self, verb: str, *arguments: str, stranger: bool = False) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", verb, "--address", self.address, *arguments]
        environment = self.stranger if stranger else self.environment
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    def ablate(self, run: Path, *arguments: str, options: tuple[str, ...] = (), stranger: bool = False) -> str:
        """What a submission prints, and last its exit status."""
        sets = [part for assignment in SETS for part in ("--set", assignment)]
        driver = ("python", "-m", "experiments", "ablate", "demo", "--run", str(run), "--arms", ARMS, *sets, *arguments)
        done = self.job("submit", "--runtime-env", self.runtime_env, *options, "--", *driver, stranger=stranger)
        return f"{done.stdout}{done.stderr}\nexit status {done.returncode}"

    def end(self) -> None:
        self._head.send_signal(signal.SIGTERM)
        self._head.wait(60)


# A driver on the same machine, whose own Ray has the usual ports.
DRIVER = "from actors.ray_start import start_ray; start_ray(1); print(flush=True); input()"


@pytest.fixture(scope="module")
def beside() -> Iterator[None]:
    """A driver that has started its Ray before the head, and is there until the last test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=kept) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == b"\n"
        yield
        driver.communicate(b"\n", timeout=60)


@pytest.fixture(scope="module")
def server(beside: None) -> Iterator[JobServer]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets want a short path
    started = JobServer(folder)
    try:
        started.wait()
        yield started
    finally:
        started.end()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(server: JobServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ablation that a job made."""
    folder = tmp_path_factory.mktemp("jobs") / "first"
    said = server.ablate(folder)
    assert said.endswith("exit status 0"), said
    assert "succeeded" in said
    for line in ("✓ ingest", "✓ pretrain", "✓ extract", "✓ arms", "1 arm at a time", "SS SDNet+RA+FA"):
        assert line in said, said
    return folder


def statuses(run: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    return {str(r.info.run_name): str(r.info.status) for r in client.search_runs([experiment.experiment_id])}


def test_a_job_takes_along_code_alone(server: JobServer, run: Path) -> None:
    (package,) = (p for p in Path(server.environment["RAY_AUTH_TOKEN_PATH"]).parent.rglob("_ray_pkg_*") if p.is_dir())
    names = {p.name for p in package.iterdir()}
    assert {"storage", "pipeline", "actors", "experiments", "constraints.txt"} <= names
    assert names & {".git", ".venv", "runs", "data", "tests", "docs"} == set()
    assert sum(p.stat().st_size for p in package.rglob("*") if p.suffix != ".pyc") < 2_000_000


def test_nobody_submits_without_the_token(server: JobServer, tmp_path: Path) -> None:
    said = server.ablate(tmp_path / "foreign", stranger=True)
    assert said.endswith("exit status 1")
    assert not (tmp_path / "foreign").exists()


def test_a_failing_arm_fails_the_job_and_the_table_is_there(server: JobServer, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(run, folder)
    arm = folder / "arms" / "ss_sdnet_ra_fa" / "seed0"
    (arm / "done.json").unlink()
    next(arm.glob("checkpoint-*.pt")).write_bytes(b"damaged")
    said = server.ablate(folder)
    assert said.endswith("exit status 1"), said
    assert "failed with exit code 1" in said, said
    reason = json.loads((arm / "failed.json").read_text())["reason"]
    assert "is damaged" in reason and f"failed ss_sdnet_ra_fa/seed0: {reason}" in said
    assert "U-Net+RA" in said  # the table of the others
    assert reason.partition(":")[0] in (folder / "report" / "index.html").read_text()


def test_bad_input_fails_the_job_with_one_line(server: JobServer) -> None:
    said = server.ablate(Path("runs/first"))
    assert said.endswith("exit status 1")
    assert "error: runs/first: is relative to a job's own folder" in said
    assert "failed with exit code 2" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_stopped_job_leaves_a_run_that_the_next_one_finishes_with_the_same_table(
    server: JobServer, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "first"
    data = ("--data", str(run / "phantom"), "--arms", "unet_ra")
    said = server.ablate(folder, *data, options=("--no-wait", "--submission-id", "stopped"))
    assert said.endswith("exit status 0"), said
    until = time.monotonic() + 600
    while not list(folder.glob("arms/*/seed0/history.jsonl")):
        assert time.monotonic() < until, server.job("logs", "stopped").stdout
        time.sleep(0.2)
    stopped = server.job("stop", "stopped")
    assert "was stopped" in stopped.stdout + stopped.stderr
    assert "stopped; the same command goes on from here" in server.job("logs", "stopped").stdout
    left = statuses(folder)
    assert left["ablation"] == "KILLED" and "RUNNING" not in left.values()
    assert not (folder / ".lock").exists() and not (folder / "report").exists()
    said = server.ablate(folder, *data)
    assert said.endswith("exit status 0"), said
    ours, undisturbed = ((r / "report" / "table.csv").read_text().splitlines() for r in (folder, run))
    assert len(ours) > 4 and ours[1:] == [line for line in undisturbed if line.startswith("unet_ra,")]
    assert set(statuses(folder).values()) == {"FINISHED"}
