"""Drivers of one run in a bucket (moto's, on loopback): one that is stopped past its lease, and one that is killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from experiments import config
from pipeline.phantom import write_phantom
from storage import fs
from tests.integration.s3_faults import FAULTS
from tests.integration.test_ablation import TINY
from tests.integration.test_object_store import environment

BUCKET = "s3://bucket/takeover"
DATA = f"{BUCKET}/phantom"
LEASE_S = 8.0
ARMS = ("unet_ra", "ss_sdnet_ra_fa")
# The command line with short leases, on a machine whose processes are not ours.
COMMAND = f"""
import sys, uuid
from storage import lease
lease.LEASE_S, lease._processes = {LEASE_S}, lambda: uuid.uuid4().hex
from experiments.cli.main import main
main()
"""


def under_another_name(host: str) -> list[str]:
    """Words before a command that give its processes another host name, where the system allows that."""
    allowed = (
        shutil.which("unshare") and not subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode
    )
    return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host] if allowed else []


def driver(
    endpoint: str, data: str, run: str, home: Path, tracking: str | None = None, host: str | None = None
) -> subprocess.Popen[str]:
    sets = [
        part
        for assignment in (*TINY, "pretrain.epochs=3", "train.epochs=4", "resources.lanes=1")
        for part in ("--set", assignment)
    ]
    words = ["ablate", "demo", "--data", data, "--run", run, "--arms", ",".join(ARMS), *sets]
    return subprocess.Popen(
        [*(under_another_name(host) if host else []), sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(endpoint) | ({"MLFLOW_TRACKING_URI": tracking} if tracking else {}),
        cwd=home,
    )


def wait_until(seen: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if seen():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def undisturbed(s3_proxy: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in a folder that nothing disturbed, with its phantom in a folder. The same phantom is in the bucket."""
    home = tmp_path_factory.mktemp("undisturbed")
    folder, run = home / "phantom", str(home / "run")
    settings = config.override(config.demo(), [a for a in TINY if a.startswith("phantom.")])
    write_phantom(folder, settings.phantom)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fs.write_bytes(fs.join(DATA, str(path.relative_to(folder))), path.read_bytes())
    process = driver(s3_proxy.url, str(folder), run, home)
    told = process.communicate(timeout=500)
    assert process.returncode == 0, told
    return run


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """The drivers that a test has started. At its end none is left."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def every_twentieth(number: int, method: str) -> str | None:
    return FAULTS[number // 20 % len(FAULTS)] if number % 20 == 0 else None


def assert_same(run: str, expected: str) -> None:
    for arm in ARMS:
        weights = f"arms/{arm}/seed0/model.safetensors"
        assert fs.read_bytes(f"{run}/{weights}") == fs.read_bytes(f"{expected}/{weights}")
    for table in ("table.csv", "cases.csv", "slices.csv"):
        assert fs.read_bytes(f"{run}/report/{table}") == fs.read_bytes(f"{expected}/report/{table}")
    assert not fs.exists(f"{run}/.lock")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_in_a_bucket_goes_on_under_another_driver_and_gives_the_table_of_an_undisturbed_local_one(
    s3_proxy: Any, undisturbed: str, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    run, tracking = f"{BUCKET}/run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    costliest, cheapest = (
        f"{run}/arms/{arm}/seed0/history.jsonl" for arm in reversed(ARMS)
    )  # in the order of training
    first = driver(s3_proxy.url, DATA, run, tmp_path, tracking)
    started.append(first)
    wait_until(lambda: fs.exists(costliest), first)
    first.send_signal(signal.SIGSTOP)  # its workers go on
    second = driver(s3_proxy.url, DATA, run, tmp_path, tracking)
    started.append(second)
    wait_until(lambda: json.loads(fs.read_text(f"{run}/.lock"))["pid"] == second.pid, second)
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 1, (out, err)
    assert f"failed: run: its lease ran out and process {second.pid} on" in err.splitlines()[-1]
    assert "Traceback" not in err

    wait_until(lambda: fs.exists(cheapest), second)
    second.kill()
    second.communicate()
    s3_proxy.fault = every_twentieth
    try:
        third = driver(s3_proxy.url, DATA, run, tmp_path, tracking)
        started.append(third)
        out, err = third.communicate(timeout=600)
    finally:
        s3_proxy.mend()
    assert third.returncode == 0, (out, err)
    assert f"run: held by process {second.pid} on" in out + err
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_in_a_failing_bucket_survives_a_kill_in_every_stage_with_mlflows_database_in_it(
    s3_proxy: Any, undisturbed: str, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = f"{BUCKET}/killed"
    costliest, cheapest = (f"{run}/arms/{arm}/seed0" for arm in reversed(ARMS))  # in the order of training
    # When a stage is under way, and the folder that the stage after it makes.
    stages: dict[str, tuple[Callable[[], Any], str]] = {
        "ingest": (lambda: len(fs.list_names(f"{run}/slices.zarr")) > 2, "sdnet"),
        "pretrain": (lambda: fs.exists(f"{run}/sdnet/history.jsonl"), "bank.zarr"),
        "extract": (lambda: fs.list_names(f"{run}/bank.zarr/ledger"), "arms"),
        "train": (lambda: fs.exists(f"{costliest}/history.jsonl"), f"arms/{ARMS[0]}"),
        "score": (lambda: fs.exists(f"{cheapest}/model.safetensors"), "report"),
    }
    s3_proxy.fault = every_twentieth
    try:
        for stage, (under_way, after) in stages.items():
            (tmp_path / stage).mkdir()
            process = driver(s3_proxy.url, DATA, run, tmp_path / stage, host=f"host-{stage}")
            started.append(process)
            wait_until(under_way, process)
            process.kill()
            process.communicate()
            assert not fs.exists(f"{run}/{after}"), stage
        (tmp_path / "last").mkdir()
        last = driver(s3_proxy.url, DATA, run, tmp_path / "last", host="host-last")
        started.append(last)
        out, err = last.communicate(timeout=600)
    finally:
        s3_proxy.mend()
    assert last.returncode == 0, (out, err)
    assert_same(run, undisturbed)
    database = tmp_path / "taken.db"
    database.write_bytes(fs.read_bytes(f"{run}/mlflow.db"))
    assert runs_in(database) == runs_in(Path(undisturbed) / "mlflow.db")


def runs_in(database: Path) -> set[tuple[str, str, float]]:
    """(run, status, Dice of vendor C's LV) of all runs in MLflow's database that were not deleted."""
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs(experiments)
    return {(r.info.run_name or "", r.info.status, r.data.metrics.get("dice/C/LV", -1.0)) for r in found}
