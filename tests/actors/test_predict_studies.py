from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.predict_studies import booking, predict_studies
from actors.resources import Cluster, Node
from actors.waiting import Patience
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import Study, find_studies
from pipeline.inference.predictor import load_predictor
from pipeline.inference.study import Outcome, attempt
from storage.errors import InputError, StageError
from tests.actors.tiny_runs import digests, own_processes
from tests.tiny_networks import write_cine, write_unet

CLUSTER, WORKER = Cluster((Node(2.0),)), "ray::_Segmenter"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_unet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cines, of which one is none."""
    place = tmp_path_factory.mktemp("studies")
    for number in range(4):
        write_cine(place / f"s{number}.nii.gz", 10 * number)
    (place / "s4.nii.gz").write_bytes(b"not a study")
    return place


def studies(folder: Path, out: Path) -> list[Study]:
    return find_studies([str(folder)], str(out))[0]


@pytest.fixture(scope="module")
def in_process(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """What one process makes of the folder, with as many threads as an actor has."""
    import torch

    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    outcomes = [attempt(load_predictor([model]), study, ["name"]) for study in studies(folder, out)]
    torch.set_num_threads(threads)
    return out, outcomes


def test_actors_write_the_bytes_that_one_process_writes(
    ray_local: None, model: str, folder: Path, in_process: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    found = list(predict_studies(CLUSTER, [model], ["name"], InferenceConfig(), studies(folder, tmp_path), 2))
    alone, wanted = in_process
    assert digests(tmp_path) == digests(alone)
    failures = {outcome.study.name: outcome.failure for outcome in wanted}
    assert {outcome.study.name: outcome.failure for outcome in found} == failures
    assert [name for name, failure in failures.items() if failure] == ["s4"]


@pytest.mark.slow
def test_studies_of_killed_actors_are_begun_again(
    ray_local: None, model: str, folder: Path, in_process: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    found = []
    for outcome in predict_studies(CLUSTER, [model], ["name"], InferenceConfig(), studies(folder, tmp_path), 2):
        if not found:
            killed = own_processes(WORKER)
            assert killed
            for process in killed:
                os.kill(process, signal.SIGKILL)
        found.append(outcome)
    assert sorted(outcome.study.name for outcome in found) == ["s0", "s1", "s2", "s3", "s4"]
    assert digests(tmp_path) == digests(in_process[0])


@pytest.mark.slow
def test_a_study_at_which_every_actor_dies_fails_alone(
    ray_local: None, model: str, folder: Path, in_process: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    """A FIFO holds the actor up until it is killed, as a file that eats all memory would."""
    place = tmp_path / "in"
    place.mkdir()
    for number in range(2):
        (place / f"s{number}.nii.gz").symlink_to(folder / f"s{number}.nii.gz")
    os.mkfifo(place / "hangs.nii.gz")
    seen: list[Outcome] = []
    todo = studies(place, tmp_path / "out")
    assert [study.name for study in todo] == ["hangs", "s0", "s1"]

    def kill() -> None:
        while len(seen) < 3:
            time.sleep(0.2)
            if sum(outcome.report is not None for outcome in seen) == 2:  # only the one that hangs is left
                for process in own_processes(f"{WORKER}.segment"):
                    os.kill(process, signal.SIGKILL)
                time.sleep(1.0)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    for outcome in predict_studies(CLUSTER, [model], ["name"], InferenceConfig(), todo, 2):
        seen.append(outcome)
    killer.join(5)
    assert [outcome.study.name for outcome in seen if outcome.report is None] == ["hangs"]
    assert "its process died 3 times" in seen[-1].failure and len(seen[-1].failure.splitlines()) == 1


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8, 64]), st.sampled_from([0, 0, 1, 2])), min_size=1, max_size=4),
    st.integers(1, 20),
)
def test_every_worker_finds_a_place(nodes: list[tuple[int, int]], workers: int) -> None:
    cluster = Cluster(tuple(Node(float(cpus), float(gpus)) for cpus, gpus in nodes))
    try:
        booked = booking(cluster, workers)
    except InputError as error:
        assert "too many" in str(error)
        gpus = sum(gpus for _, gpus in nodes)
        assert workers > (5 * gpus if gpus else 10 * sum(cpus for cpus, _ in nodes))
        return
    placed = 0
    for cpus, gpus in nodes:
        fit = int(cpus / booked["num_cpus"] + 1e-6)
        placed += min(fit, gpus * int(1 / booked["num_gpus"] + 1e-6)) if booked["num_gpus"] else fit
    assert placed >= workers


@pytest.mark.slow
def test_actors_that_no_node_has_room_for_are_given_up(no_room: None, model: str, folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    todo, patience = studies(folder, tmp_path), Patience(0.05, lines.append)
    with pytest.raises(StageError, match=r"predict: waited .* for \d CPUs? for a prediction actor"):
        list(predict_studies(CLUSTER, [model], ["name"], InferenceConfig(), todo, 2, patience))
    assert lines
