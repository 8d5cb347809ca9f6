"""Five thousand samples of a plan: the same bytes however many actors make them, wherever they run, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from pipeline.samples.plan import PlanConfig
from pipeline.samples.stream_config import StreamConfig
from tests.actors.tiny_runs import PREPROCESS, own_processes, write_run, write_sdnet
from tests.integration.nodes import Nodes

SAMPLES, RESUMED_AT = 5000, 1234  # two samples a step, one of them labelled
DRIVER = """
import hashlib, json, logging, sys
import ray
from actors.extraction import ExtractionActors, extract
from actors.extractor import ExtractionSpec
from actors.ray_start import start_ray
from pipeline.samples.stream_config import StreamConfig
from actors.streaming import batches
from pipeline.samples.preprocess import PreprocessConfig
told = json.loads(sys.argv[1])
if told["address"]:
    ray.init(address=told["address"], log_to_driver=False, logging_level=logging.ERROR)
else:
    start_ray(cpus=4)
stream = StreamConfig.model_validate(told["stream"])
if told["sdnet"]:
    spec = ExtractionSpec(stream.run, told["sdnet"], stream.bank, stream.preprocess, shard_slices=4)
    extract(spec, ExtractionActors(cpus=0.5))
for batch in batches(stream, range(told["first"], told["last"]), actors=told["actors"], cpus=told["cpus"]):
    found = hashlib.sha256()
    for name in ("image", "mask", "labelled", "slice_id"):
        found.update(batch[name].numpy().tobytes())
    print(found.hexdigest(), flush=True)
print({node["NodeID"] for node in ray.nodes()}, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StreamConfig:
    folder = tmp_path_factory.mktemp("stream")
    plan = PlanConfig(pairs="vendor_balanced", flips="both")
    shape = {"semi_supervised": True, "ra": True, "fa": True, "batch_size": 1}
    run, bank = write_run(folder), str(folder / "bank.zarr")
    return StreamConfig(run=run, bank=bank, preprocess=PREPROCESS, plan=plan, seed=3, **shape)


def started(stream: StreamConfig, address: str | None = None, **told: Any) -> subprocess.Popen[str]:
    words = {"address": address, "stream": stream.model_dump(), "sdnet": None, "actors": 1, "cpus": 0.5}
    words |= {"first": 0, "last": SAMPLES // 2} | told
    command = [sys.executable, "-c", DRIVER, json.dumps(words)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def digests(process: subprocess.Popen[str]) -> list[str]:
    # not `communicate`: it misses what `readline` has read ahead
    assert process.stdout is not None and process.stderr is not None
    lines, complaints = process.stdout.read().splitlines(), process.stderr.read()
    assert process.wait(timeout=300) == 0, complaints
    return [line for line in lines if len(line) == 64]  # Ray says there too that a worker died


@pytest.fixture(scope="module")
def undisturbed(stream: StreamConfig, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A digest a step, as one actor makes them."""
    found = digests(started(stream, sdnet=write_sdnet(tmp_path_factory.mktemp("sdnet"), seed=0)))
    assert len(found) == SAMPLES // 2 and len(set(found)) == len(found)
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("actors", [2, 4])
def test_any_number_of_actors_makes_the_same_samples(stream: StreamConfig, undisturbed: list[str], actors: int) -> None:
    assert digests(started(stream, actors=actors)) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stream_resumed_in_the_middle_gives_the_samples_that_come_next(
    stream: StreamConfig, undisturbed: list[str]
) -> None:
    assert digests(started(stream, first=RESUMED_AT // 2)) == undisturbed[RESUMED_AT // 2 :]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_actor_delays_the_stream_and_changes_nothing(stream: StreamConfig, undisturbed: list[str]) -> None:
    process = started(stream, actors=2)
    assert process.stdout is not None
    first = [process.stdout.readline().strip() for _ in range(20)]
    victims: list[int] = []
    until = time.monotonic() + 60
    while not victims and time.monotonic() < until:
        victims = own_processes("ray::SampleMaker")
    os.kill(victims[0], signal.SIGKILL)
    assert first + digests(process) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_make_the_same_samples(stream: StreamConfig, undisturbed: list[str]) -> None:
    nodes = Nodes()
    try:
        process = started(stream, nodes.address, actors=2, cpus=1.0)  # an actor fills a node
        assert digests(process) == undisturbed
    finally:
        nodes.end()
