"""The verb `predict`: it reads studies and writes masks, volumes and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from experiments.tracking.model_rows import rows
from storage import fs
from storage.errors import InputError

__all__ = ["model_folders", "rows", "segmented"]  # models that were logged earlier call `rows` here

if TYPE_CHECKING:
    from experiments.progress import Progress
    from pipeline.inference.config import InferenceConfig
    from pipeline.inference.find_studies import Study
    from pipeline.inference.study import Outcome


def model_folders(places: Sequence[str]) -> list[str]:
    """The folders of the networks in these places. A place is a network's folder, or an arm's with a folder per seed.

    Raises InputError if there is no network in a place, or one is named twice.
    """
    from pipeline.networks.description import CONFIG, read_config

    found: list[str] = []
    for place in map(fs.absolute, places):
        seeds = [fs.join(place, name) for name in fs.list_names(place) if name.startswith("seed")]
        own = [place] if fs.exists(fs.join(place, CONFIG)) else []
        found += own or [seed for seed in seeds if fs.exists(fs.join(seed, CONFIG))] or [place]
    for folder in found:
        read_config(folder)
        if found.count(folder) > 1:
            raise InputError(fs.base_name(folder), "is named twice", "name each network of an ensemble once")
    return found


def segmented(
    folders: Sequence[str], studies: Sequence[Study], config: InferenceConfig, workers: int, progress: Progress
) -> Iterator[Outcome]:
    """Yield what became of each study, as the studies get done. One worker runs in this process, several on Ray.

    Raises InputError, before anything is written, if the networks cannot be used.
    """
    from pipeline.inference.predictor import load_predictor
    from pipeline.inference.study import attempt
    from pipeline.networks.description import read_config

    names = [str(read_config(folder)["fingerprint"]) for folder in folders]
    predictor = load_predictor(folders, config)
    if workers > 1 and len(studies) > 1:
        from actors.predict_studies import predict_studies
        from actors.ray_start import start_ray
        from actors.waiting import Patience

        del predictor  # the actors load their own; this one shows that the networks can be used
        with progress.stage("start Ray"):
            cluster = start_ray()
        outcomes = predict_studies(cluster, folders, names, config, studies, workers, Patience(say=progress.say))
    else:
        outcomes = (attempt(predictor, study, names) for study in studies)
    with progress.stage("predict") as step:
        for done, outcome in enumerate(outcomes, start=1):
            step.update(outcome.study.name, done, len(studies))
            yield outcome
