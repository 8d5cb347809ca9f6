"""Many studies at a time: a pool of actors that load the networks once and segment one study after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from actors.crew import Crew
from actors.pool import Pool
from actors.resources import Cluster, Node
from actors.waiting import PATIENCE, Patience
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import Study
from pipeline.inference.predictor import load_predictor
from pipeline.inference.study import Outcome, attempt
from storage.errors import InputError, StageError

FRACTIONS = (0.5, 0.25, 0.1)  # of a CPU, where there are more actors than CPUs


class _Segmenter:
    """Loads the networks when it starts."""

    def __init__(self, models: Sequence[str], names: Sequence[str], config: InferenceConfig, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._predictor, self._names = load_predictor(models, config), names

    def segment(self, study: Study) -> Outcome:
        """Segment and write one study."""
        return attempt(self._predictor, study, self._names)


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

    `models` are the networks' folders, named `names` in the reports. A study at which actors die again and again has
    failed alone. Ray must run. Raises InputError if the cluster is too small, or an actor cannot use the networks;
    FinalError if no node has room for an actor; StageError if actors cannot start.
    """
    workers = min(workers, len(studies))
    booked = booking(cluster, workers)
    crew = Crew[Study](
        stage="predict",
        what="a prediction actor",
        make=_Segmenter,
        arguments=(models, names, config, max(1, int(booked["num_cpus"]))),
        method="segment",
        size=workers,
        cpus=booked["num_cpus"],
        gpus=booked["num_gpus"],
        named=lambda study: study.name,
        remedy="use fewer --workers or a machine with more memory",
        failed=_failed,
    )
    with Pool(crew, patience) as pool:
        for _, outcome in pool.run(studies):
            yield outcome


def _failed(study: Study, error: StageError) -> Outcome:
    return Outcome(study, None, str(error))


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
