"""A Ray that does not come up on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest


def _raylets(driver: int) -> list[psutil.Process]:
    below = psutil.Process(driver).children(recursive=True)
    return [process for process in below if process.name() == "raylet"]


@pytest.mark.slow  # Ray waits half a minute for its node
def test_a_ray_that_does_not_answer_is_one_line_and_nothing_of_it_stays(
    tmp_path: Path, mnms_folder: Callable[[dict[str, tuple[str, str]]], Path]
) -> None:
    data, run = mnms_folder({"A0A0A0": ("Training/Labeled", "A")}), tmp_path / "run"
    driver = subprocess.Popen(
        [sys.executable, "-m", "experiments", "ingest", str(data), "--run", str(run)],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (stopped := _raylets(driver.pid)):
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    for raylet in stopped:  # as on a machine that is too busy to run it
        raylet.send_signal(signal.SIGSTOP)
    try:
        _, said = driver.communicate(timeout=120)
        psutil.wait_procs(stopped, timeout=10)
        left = [p for p in stopped if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        for process in (driver, *stopped):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert driver.returncode == 2
    assert said.splitlines()[-1].startswith("error: Ray: did not start on this machine (")
    assert "/ray/session_latest/logs" in said
    assert "Traceback" not in said
    assert left == []
    assert not (run / ".lock").exists()
