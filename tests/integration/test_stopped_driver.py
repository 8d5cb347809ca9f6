"""SIGTERM, with which job servers and preempted machines end a driver, and Ctrl-C, from the first second on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


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
    assert done.returncode == 128 + signal.SIGTERM
    assert "went on" not in done.stdout
    assert done.stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    assert not (run / ".lock").exists()


STOPPED_AGAIN_AT_EXIT = """
import atexit, os, signal, sys, time
from experiments.cli.run import driving
from experiments.config import demo

@atexit.register
def end():  # as Ray's own end, which takes seconds
    os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(0.1)
    print("ended")

with driving(sys.argv[1], demo()):
    os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(20)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_while_the_process_ends_already_tears_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", STOPPED_AGAIN_AT_EXIT, str(tmp_path / "first"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == "stopped; the same command goes on from here\n"
    assert (done.stdout, done.returncode) == ("ended\n", 128 + number)


STOPPED_WHILE_RAY_RUNS = """
import sys, time
from actors.ray_start import start_ray
from experiments.cli.run import driving
from experiments.config import demo

with driving(sys.argv[1], demo()):
    start_ray(2)
    import ray

    task = ray.remote(lambda: time.sleep(600)).remote()
    ray.wait([task], timeout=2)
    print("waits", flush=True)
    ray.get(task)
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_prints_one_line_and_no_stack_of_rays(tmp_path: Path, number: signal.Signals, times: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", STOPPED_WHILE_RAY_RUNS, str(tmp_path / "first")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    assert driver.stdout is not None and driver.stdout.readline() == "waits\n", driver.communicate()
    for _ in range(times):  # an impatient user
        os.killpg(driver.pid, number)  # as a terminal does: all processes of the foreground
        time.sleep(0.05)
    _, said = driver.communicate(timeout=120)
    assert said == "stopped; the same command goes on from here\n"
    assert driver.returncode == 128 + number
