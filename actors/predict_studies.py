"""Segment many studies at a time: the actors of a pool load the networks once and segment one study after another."""

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

FRACTIONS = (0.5, 0.25, 0.1)  # CPUs that an actor may book, if there are more actors than CPUs


class _Segmenter:
    """The object in a prediction actor. It loads the networks when it is made."""

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
    """Yield what became of each study, as the studies get done. Ray must be initialised.

    `workers` actors share the cluster's cores and GPUs. `models` are the folders of the networks; `names` are their
    names in the reports. If actors die repeatedly while they segment a study, only that study fails.
    Raises InputError if the cluster is too small, or an actor cannot use the networks; FinalError if no node has room
    for an actor; StageError if actors cannot start.
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
    """What each of `workers` actors books, {"num_cpus": …, "num_gpus": …}: the most for which all of them have a place.

    If there are fewer GPUs than actors, actors share them. Raises InputError if the actors do not fit: an actor without
    a place would wait for ever, together with its study.
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
