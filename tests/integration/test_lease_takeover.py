"""Drivers of one run in a bucket (moto's, on loopback): one that is stopped past its lease, and one that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import config
from pipeline.phantom import write_phantom
from storage import fs
from tests.integration.s3_faults import FAULTS
from tests.integration.test_ablation import TINY
from tests.integration.test_object_store import environment

DATA, RUN = "s3://bucket/takeover/phantom", "s3://bucket/takeover/run"
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


def driver(endpoint: str, data: str, run: str, home: Path) -> subprocess.Popen[str]:
    sets = [part for assignment in (*TINY, "train.epochs=4", "resources.lanes=1") for part in ("--set", assignment)]
    words = ["ablate", "demo", "--data", data, "--run", run, "--arms", ",".join(ARMS), *sets]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(endpoint) | {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"},
        cwd=home,
    )


def wait_until(seen: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if seen():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.25)
    raise TimeoutError


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_in_a_bucket_goes_on_under_another_driver_and_gives_the_table_of_an_undisturbed_local_one(
    s3_proxy: Any, tmp_path: Path
) -> None:
    folder, local = tmp_path / "phantom", str(tmp_path / "local")
    settings = config.override(config.demo(), [a for a in TINY if a.startswith("phantom.")])
    write_phantom(folder, settings.phantom)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fs.write_bytes(fs.join(DATA, str(path.relative_to(folder))), path.read_bytes())
    undisturbed = driver(s3_proxy.url, str(folder), local, tmp_path)
    told = undisturbed.communicate(timeout=500)
    assert undisturbed.returncode == 0, told

    first = driver(s3_proxy.url, DATA, RUN, tmp_path)
    wait_until(lambda: fs.exists(f"{RUN}/arms/unet_ra/seed0/history.jsonl"), first)
    first.send_signal(signal.SIGSTOP)  # its workers go on
    second = driver(s3_proxy.url, DATA, RUN, tmp_path)
    wait_until(lambda: str(second.pid) in fs.read_text(f"{RUN}/.lock"), second)
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 1, (out, err)
    assert f"failed: run: its lease ran out and process {second.pid} on" in err.splitlines()[-1]
    assert "Traceback" not in err

    wait_until(lambda: fs.exists(f"{RUN}/arms/ss_sdnet_ra_fa/seed0/history.jsonl"), second)
    second.kill()
    second.communicate()
    s3_proxy.fault = lambda number, method: FAULTS[number // 20 % len(FAULTS)] if number % 20 == 0 else None
    try:
        third = driver(s3_proxy.url, DATA, RUN, tmp_path)
        out, err = third.communicate(timeout=600)
    finally:
        s3_proxy.mend()
    assert third.returncode == 0, (out, err)
    assert f"run: held by process {second.pid} on" in out + err
    for arm in ARMS:
        weights = f"arms/{arm}/seed0/model.safetensors"
        assert fs.read_bytes(f"{RUN}/{weights}") == fs.read_bytes(f"{local}/{weights}")
    assert fs.read_bytes(f"{RUN}/report/table.csv") == fs.read_bytes(f"{local}/report/table.csv")
    assert not fs.exists(f"{RUN}/.lock")
