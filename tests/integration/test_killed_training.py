"""Training by the command line, whose processes are killed in the middle; and what it says when it cannot go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.processes import CLOCK, train_workers

EPOCHS, KILLS = 9, 5
SETTINGS = (
    "preprocess.size=64",
    "unet.width=4",
    "sdnet.anatomy_width=4",
    "sdnet.modality_width=4",
    "sdnet.segmentor_width=4",
    "sdnet.decoder_width=4",
    f"pretrain.epochs={EPOCHS}",
    "pretrain.steps_per_epoch=12",
    "pretrain.precision=fp32",
    "train.epochs=1",
    "train.steps_per_epoch=4",
)
PHANTOM = ("labelled_a=2", "labelled_b=2", "unlabelled_c=1", "testing=1", "frames=3", "slices=[3,3]")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "experiments", *words]


def with_sets(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


def cardiomix(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with slices and settings, nothing trained yet."""
    folder = tmp_path_factory.mktemp("killed")
    fields = [part for field in PHANTOM for part in ("--set", field)]
    for words in (
        ("phantom", str(folder / "data"), *fields),
        ("ingest", str(folder / "data"), "--run", str(folder / "run"), *with_sets(*SETTINGS)),
    ):
        done = cardiomix(*words)
        assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(ingested: Path) -> Path:
    """The same run, trained without a kill."""
    run = ingested.parent / "undisturbed"
    shutil.copytree(ingested, run)
    done = cardiomix("pretrain", "--run", str(run))
    assert done.returncode == 0, done.stderr
    return run


def history(run: Path) -> list[dict[str, Any]]:
    """Epoch records without what a clock measured."""
    path = run / "sdnet" / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCK} for x in lines]


@contextmanager
def pretraining(run: Path) -> Iterator[subprocess.Popen[str]]:
    words = command("pretrain", "--run", str(run))
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def wait_for_worker(driver: subprocess.Popen[str], run: Path, epochs: int, seen: set[int]) -> int:
    """Pid of a training worker not seen yet, once so many epochs are in the history."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert driver.poll() is None, f"ended before it could be killed: {driver.stderr and driver.stderr.read()}"
        fresh = [pid for pid in train_workers(driver.pid) if pid not in seen]
        if fresh and len(history(run)) >= epochs:
            return fresh[0]
        time.sleep(0.05)
    raise AssertionError("no training worker came up")


def assert_same(run: Path, undisturbed: Path) -> None:
    for name in ("model.safetensors", "last/model.safetensors", "model.json"):
        assert (run / "sdnet" / name).read_bytes() == (undisturbed / "sdnet" / name).read_bytes(), name
    assert history(run) == history(undisturbed)
    assert [record["epoch"] for record in history(run)] == list(range(1, EPOCHS + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_killed_workers_leave_the_weights_of_a_run_that_nothing_befell(ingested: Path, undisturbed: Path) -> None:
    run, rng, killed = ingested.parent / "workers", np.random.default_rng(5), set[int]()
    shutil.copytree(ingested, run)
    with pretraining(run) as driver:
        for epochs in range(KILLS):
            worker = wait_for_worker(driver, run, epochs, killed)
            time.sleep(rng.uniform(0, 1))
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
        assert driver.wait(300) == 0
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_killed_drivers_leave_the_weights_of_a_run_that_nothing_befell(ingested: Path, undisturbed: Path) -> None:
    run, rng = ingested.parent / "drivers", np.random.default_rng(6)
    shutil.copytree(ingested, run)
    for epochs in range(KILLS):
        with pretraining(run) as driver:
            wait_for_worker(driver, run, epochs, set())
            time.sleep(rng.uniform(0, 1))
            driver.kill()
    done = cardiomix("pretrain", "--run", str(run))
    assert done.returncode == 0, done.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_dies_again_and_again_in_one_epoch_is_given_up_with_advice(ingested: Path) -> None:
    run, killed = ingested.parent / "hopeless", set[int]()
    shutil.copytree(ingested, run)
    with pretraining(run) as driver:
        while driver.poll() is None:
            for worker in set(train_workers(driver.pid)) - killed:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            time.sleep(0.05)
        said = driver.stderr.read() if driver.stderr else ""
    assert driver.returncode == 1
    assert len(killed) >= 3
    last = said.strip().splitlines()[-1]
    assert last.startswith("failed: pretrain: a training worker died 3 times in a row after epoch 0 of")
    assert "lower train.batch_size" in last and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_cannot_be_trained_is_said_in_the_last_line(ingested: Path) -> None:
    run = ingested.parent / "wrong"
    shutil.copytree(ingested, run)
    done = cardiomix("train", "unet_ra", "--run", str(run), *with_sets("train.learning_rate=1e30"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("failed unet_ra/seed0: step ") and "slices [" in last
    assert "Traceback" not in done.stderr + done.stdout
    done = cardiomix("train", "unet_ra", "--run", str(run), *with_sets("resources.gpus=true"))
    if done.returncode:  # a machine without a GPU
        assert done.returncode == 2
        assert "error: resources: 1 GPUs asked for, 0 in the cluster" in done.stderr
