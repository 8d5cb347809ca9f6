"""Extraction on a cluster of two nodes, whose actors, raylets and drivers are killed at random moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.bank.bank import FactorBank
from storage.bank.verify import verify
from tests.actors.tiny_runs import PREPROCESS, Made, digests, own_processes, write_run, write_sdnet
from tests.integration.nodes import Nodes

RUNS = 20
SHARD, SHARDS = 2, 20
SUBJECTS: list[Made] = [
    (f"s{k}", "ABC"[k % 3], "train", k % 3 < 2, 5, (180 + 16 * k, 176), (1.4, 1.4)) for k in range(8)
]
DRIVER = """
import json, logging, sys
import ray
from actors.extraction import ExtractionActors, extract
from actors.extractor import ExtractionSpec
from pipeline.samples.preprocess import PreprocessConfig
from storage.errors import InputError, StageError
address, run, sdnet, bank, preprocess, shard = json.loads(sys.argv[1])
ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
try:
    spec = ExtractionSpec(run, sdnet, bank, PreprocessConfig(**preprocess), shard_slices=shard)
    extract(spec, ExtractionActors(2, 1.0))
except (InputError, StageError) as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.end()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run and an SDNet that takes about 0.1 s a shard."""
    folder = tmp_path_factory.mktemp("sources")
    return write_run(folder, made=SUBJECTS), write_sdnet(folder / "sdnet", seed=1, width=16)


def driver(nodes: Nodes, sources: tuple[str, str], bank: Path) -> subprocess.Popen[str]:
    words = json.dumps([nodes.address, *sources, str(bank), PREPROCESS.model_dump(), SHARD])
    command = [sys.executable, "-c", DRIVER, words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, sources: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    bank = tmp_path_factory.mktemp("undisturbed") / "bank.zarr"
    ended(driver(nodes, sources, bank))
    opened = FactorBank.open(str(bank))
    assert (opened.shards(), verify(opened)) == (SHARDS, [])
    return bank


def wait_for(process: subprocess.Popen[str], bank: Path, shards: int) -> bool:
    """Whether so many shards are committed before the driver ends."""
    ledger = bank / "ledger"
    while process.poll() is None:
        if own_processes("ray::Extractor") and len(list(ledger.glob("shard-*.json"))) >= shards:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(RUNS))
def test_bank_is_byte_identical_whatever_was_killed(
    nodes: Nodes, sources: tuple[str, str], undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    rng, bank = np.random.default_rng(seed), tmp_path / "bank.zarr"
    killed = []
    process = driver(nodes, sources, bank)
    victims = ("actor", "raylet", "driver")
    # the first in turn, so that each is killed in a third of the runs at least
    for number, victim in enumerate([victims[seed % 3], *rng.choice(victims, size=2)]):
        if not wait_for(process, bank, int(rng.integers(number * 6, number * 6 + 6))):
            break
        time.sleep(rng.uniform(0, 0.2))
        killed.append(str(victim))
        if victim == "actor":
            for pid in rng.permutation(own_processes("ray::Extractor"))[:1]:
                os.kill(pid, signal.SIGKILL)
        elif victim == "raylet":
            nodes.lose_one()
        else:
            process.kill()
            process.wait()
            process = driver(nodes, sources, bank)
    ended(process)
    assert killed
    assert digests(bank) == digests(undisturbed), killed
    assert verify(FactorBank.open(str(bank))) == []
    assert [p.name for p in bank.parent.iterdir()] == ["bank.zarr"]
    print(f"run {seed}: killed {', '.join(killed)}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_shard_whose_actors_die_again_and_again_is_named(
    nodes: Nodes, sources: tuple[str, str], tmp_path: Path
) -> None:
    process, over = driver(nodes, sources, tmp_path / "bank.zarr"), threading.Event()

    def kill() -> None:
        while not over.is_set():
            for pid in own_processes("ray::Extractor.extract"):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        _, said = process.communicate(timeout=240)
    finally:
        over.set()
        killer.join()
    assert process.returncode == 1
    (line,) = said.strip().splitlines()
    assert line.startswith("bank.zarr, shard ") and " frame 0 slice " in line and "its process died 3 times" in line
