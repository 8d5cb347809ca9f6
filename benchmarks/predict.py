"""Studies a minute of two prediction actors against one, one thread each, after warm-up: masks, volumes and pictures
written, by an SDNet of the `cpu` preset. The 30 ACDC subjects where they are present, else 16 of the phantom.

The network is untrained: what it finds is noise, of which more is connected, counted and drawn than of hearts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from actors.predict_studies import predict_studies
from actors.resources import Cluster, Node
from benchmarks import cluster, data
from experiments.config import cpu
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import Study, find_studies
from pipeline.networks.files import save_model
from pipeline.networks.sdnet import SDNet

WARM_UP = 4  # studies


def run() -> dict[str, Any]:
    """Two workers against one."""
    with TemporaryDirectory() as scratch, cluster.local(2):
        place = Path(scratch)
        model, folder = _network(place), _folder(place)
        cluster.start_workers(2)
        found = {n: _studies_a_minute(model, folder, place / str(n), n) for n in (1, 2)}
    print(f"{Path(folder).name}: 1 worker {found[1]:.0f}, 2 workers {found[2]:.0f} studies/minute", file=sys.stderr)
    ratio = round(found[2] / found[1], 2)
    return {"ratio": ratio, "ours": round(found[2], 1), "reference": round(found[1], 1), "unit": "studies/minute"}


def _network(place: Path) -> str:
    settings = cpu()
    torch.manual_seed(0)
    folder = str(place / "model")
    save_model(folder, SDNet(settings.sdnet), settings.sdnet, settings.preprocess.model_dump(mode="json"), [])
    return folder


def _folder(place: Path) -> str:
    real = data.real_folders()
    if real:
        return real[0]
    data.phantom(place / "phantom", 16, 2)
    return str(place / "phantom")


def _studies_a_minute(model: str, folder: str, out: Path, workers: int) -> float:
    """Of the folder's studies; the first few are segmented once before, while the actors start."""
    studies = find_studies([folder], str(out / "timed"))[0]
    before: list[Study] = find_studies([folder], str(out / "before"))[0][:WARM_UP]
    booked = Cluster((Node(float(workers)),))  # one CPU, hence one thread, for each
    outcomes = predict_studies(booked, [model], ["untrained"], InferenceConfig(), [*before, *studies], workers)
    for _ in before:
        next(outcomes)
    began = time.perf_counter()
    failed = [outcome.failure for outcome in outcomes if outcome.report is None]
    if failed:
        raise RuntimeError(failed[0])
    return 60 * len(studies) / (time.perf_counter() - began)
