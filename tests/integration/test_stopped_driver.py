"""SIGTERM, with which job servers and preempted machines end a driver, at any time from the first second on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_a_driver_that_is_told_to_stop_gives_the_lock_up_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "first"
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    driver = subprocess.Popen(
        [sys.executable, "-m", "experiments", "ablate", "demo", "--run", str(run), "--set", "phantom.frames=50"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list(run.glob("phantom/**/*.nii.gz")):  # minutes before Ray is started
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    assert (run / ".lock").exists()
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode not in (0, 1, 2)  # neither done nor failed
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in said
    assert not (run / ".lock").exists()


STOPPED_IN_A_DESTRUCTOR = """
import os, signal, sys, time
from experiments.cli.run import driving
from experiments.config import demo

class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

with driving(sys.argv[1], demo()):
    Gone()
    time.sleep(20)
    print("went on")
"""


def test_a_driver_stops_where_python_swallows_the_exception(tmp_path: Path) -> None:
    run = tmp_path / "first"
    command = [sys.executable, "-c", STOPPED_IN_A_DESTRUCTOR, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == signal.SIGTERM
    assert "went on" not in done.stdout
    assert done.stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    assert not (run / ".lock").exists()
