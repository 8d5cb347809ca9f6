"""The verb `predict`: studies in, masks, volumes and pictures out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from experiments.tracking.model import VOLUMES
from storage import fs
from storage.errors import InputError

if TYPE_CHECKING:
    from experiments.progress import Progress
    from pipeline.inference.find_studies import Study
    from pipeline.inference.predictor import InferenceConfig
    from pipeline.inference.study import Outcome


def model_folders(places: Sequence[str]) -> list[str]:
    """Folders of networks: each place itself, or the seeds of the arm whose folder it is.

    Raises InputError if there is no network in a place, or one is named twice.
    """
    from pipeline.networks.files import CONFIG, read_config

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
    """What became of each study, as they get done: one worker runs in this process, several on Ray.

    Raises InputError, before anything is written, for networks that cannot be used.
    """
    from pipeline.inference.predictor import load_predictor
    from pipeline.inference.study import attempt
    from pipeline.networks.files import read_config

    names = [str(read_config(folder)["fingerprint"]) for folder in folders]
    predictor = load_predictor(folders, config)
    if workers > 1 and len(studies) > 1:
        from actors.predict_studies import predict_studies
        from actors.resources import start_ray

        del predictor  # the actors load their own; here it was to find out whether it can be
        with progress.stage("start Ray"):
            cluster = start_ray()
        outcomes = predict_studies(cluster, folders, names, config, studies, workers)
    else:
        outcomes = (attempt(predictor, study, names) for study in studies)
    with progress.stage("predict") as step:
        for done, outcome in enumerate(outcomes, start=1):
            step.update(outcome.study.name, done, len(studies))
            yield outcome


def rows(folder: str, images: Sequence[str], params: dict[str, Any]) -> list[dict[str, Any]]:
    """What the MLflow model answers: a row for each image, in order; `params` as its signature has them.

    Each image is a study of its own. Volumes that are not known are NaN.
    """
    from pipeline.inference.find_studies import check_targets, find_studies
    from pipeline.inference.predictor import InferenceConfig, load_predictor
    from pipeline.inference.study import attempt
    from pipeline.networks.files import read_config

    area = float(params.get("pixel_area") or 0.0)
    config = InferenceConfig(
        pixel_area=area or None, flips=params.get("flips", False), keep_largest=params.get("keep_largest", True)
    )
    out = str(params.get("out") or "predictions")
    studies = [found for image in images for found in find_studies([image], out)[0]]
    check_targets(studies)
    predictor, name = load_predictor([folder], config), str(read_config(folder)["fingerprint"])
    return [_row(attempt(predictor, study, [name])) for study in studies]


def _row(outcome: Outcome) -> dict[str, Any]:
    study, report = outcome.study, outcome.report
    row: dict[str, Any] = {"image": study.images[0], "mask": "", "report": "", "error": outcome.failure}
    values: dict[str, Any] = {}
    if report is not None:
        row |= {"mask": study.mask(study.images[0]), "report": study.report}
        for side in ("lv", "rv"):
            values |= {f"{side}_{name}": value for name, value in (report[side] or {}).items()}
        values["lv_mass_g"] = report["lv_mass_g"]
    return row | {name: math.nan if values.get(name) is None else float(values[name]) for name in VOLUMES}
