"""Many studies at a time: a pool of actors that load the networks once and segment one study after another."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from actors.resources import Cluster, Node
from actors.waiting import PATIENCE, Patience, Wait
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import Study
from pipeline.inference.predictor import load_predictor
from pipeline.inference.study import Outcome, attempt
from storage.errors import InputError

MOST_DEATHS = 2  # of actors on one study
FRACTIONS = (0.5, 0.25, 0.1)  # of a CPU, where there are more actors than CPUs


class _Segmenter:
    """Loads the networks when it starts."""

    def __init__(self, models: Sequence[str], config: InferenceConfig, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._predictor = load_predictor(models, config)

    def segment(self, study: Study, names: Sequence[str]) -> Outcome:
        """Segment and write one study."""
        return attempt(self._predictor, study, names)


def predict_studies(
    cluster: Cluster,
    models: Sequence[str],
    names: Sequence[str],
    config: InferenceConfig,
    studies: Sequence[Study],
    workers: int,
    patience: Patience = PATIENCE,
) -> Iterator[Outcome]:
    """What became of each study, as they get done, with `workers` actors that share the cluster's cores and GPUs.

    `models` are the networks' folders, named `names` in the reports. A study at which an actor dies is tried again; if
    its actors die `MOST_DEATHS` times, that study alone has failed. Ray must run. Raises InputError if the cluster is
    too small; FinalError if no node has room for an actor.
    """
    import ray

    workers = min(workers, len(studies))
    booked = booking(cluster, workers)
    remote: Any = ray.remote(**booked)(_Segmenter)  # type: ignore[call-overload]
    threads = max(1, int(booked["num_cpus"]))
    actors: list[Any] = []

    def hire() -> Any:
        actors.append(remote.remote(models, config, threads))
        return actors[-1]

    need = {"CPU": booked["num_cpus"], "GPU": booked["num_gpus"]}
    try:
        wait = Wait(patience, "predict", "a prediction actor", need)
        yield from _outcomes(hire, [hire() for _ in range(workers)], deque(studies), names, wait)
    finally:
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor)


def _outcomes(
    hire: Callable[[], Any], idle: list[Any], waiting: deque[Study], names: Sequence[str], wait: Wait
) -> Iterator[Outcome]:
    """Give the studies that are waiting to the actors that are idle, until all have their outcome."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    deaths: Counter[str] = Counter()
    running: dict[Any, tuple[Any, Study | None]] = {}  # None: a successor that starts
    while waiting or any(study is not None for _, study in running.values()):
        while waiting and idle:
            actor, given = idle.pop(), waiting.popleft()
            running[actor.segment.remote(given, names)] = actor, given
        done = wait.first({reference: actor for reference, (actor, _) in running.items()})
        actor, study = running.pop(done)
        if study is None:
            idle.append(actor)  # if its start has failed, its first study says so
            continue
        try:
            outcome: Outcome = ray.get(done)
        except RayTaskError as error:  # nothing that another try would mend
            outcome = Outcome(study, None, f"{study.name}: failed ({type(error.cause).__name__})")
            idle.append(actor)
        except RayError as error:
            ray.kill(actor)
            deaths[study.out] += 1
            again = deaths[study.out] < MOST_DEATHS
            if again:
                waiting.appendleft(study)
            if waiting:  # no study for it before it has a place: the others may well be free before that
                successor = hire()
                running[successor.__ray_ready__.remote()] = successor, None
            if again:
                continue
            outcome = Outcome(study, None, f"{study.name}: {_reason(error)}")
        else:
            idle.append(actor)
        yield outcome


def booking(cluster: Cluster, workers: int) -> dict[str, float]:
    """CPUs and GPUs of each of so many actors, as many as all of them find a place for; fewer GPUs are shared.

    Raises InputError if there is no place for them: one left over would wait for ever, with the study that it has.
    """
    gpus = sum(int(node.gpus) for node in cluster.nodes)
    on_one = math.ceil(workers / gpus) if gpus else 0

    def places(node: Node, cpus: float) -> int:
        fit = int(node.cpus / cpus + 1e-6)
        return min(fit, int(node.gpus) * on_one) if gpus else fit

    for cpus in (*range(int(cluster.cpus / workers), 0, -1), *FRACTIONS):
        if sum(places(node, cpus) for node in cluster.nodes) >= workers:
            return {"num_cpus": cpus, "num_gpus": int(100 / on_one) / 100 if gpus else 0.0}
    raise InputError("--workers", f"{workers} are too many for {cluster}", "ask for fewer")


def _reason(error: Exception) -> str:
    from ray.exceptions import OutOfMemoryError

    lack = "ran out of memory" if isinstance(error, OutOfMemoryError) else "died, perhaps for want of memory,"
    return f"its worker {lack} {MOST_DEATHS} times; use fewer --workers or a machine with more memory"
