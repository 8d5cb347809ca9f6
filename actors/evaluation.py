"""Score a trained network on the test subjects' native grids."""

from __future__ import annotations

from typing import Any

from storage import uri
from storage.slice_store import SliceStore

CASES = "cases.csv"


def evaluate_job(run: str, out: str, arm: str, seed: int, threads: int, precision: str) -> int:
    """Predict every labelled test volume with the network in `out`, write `cases.csv` there; returns the volumes
    scored."""
    import torch

    from pipeline.evaluation import case_rows, score_volume, write_cases
    from pipeline.inference import predict_volume
    from pipeline.networks.files import default_device, load_model
    from pipeline.preprocess import PreprocessConfig

    torch.set_num_threads(threads)
    store = SliceStore.open(run)
    model, document = load_model(out)
    model.to(default_device())
    preprocess = PreprocessConfig(**document["preprocess"])
    cases: list[dict[str, Any]] = []
    volumes = [v for v in store.volumes("test") if v.labelled]
    for volume in volumes:
        images, mask = store.volume(volume.rows)
        stats = store.statistics(volume.rows[0])
        found = predict_volume(model, images, stats, volume.spacing, preprocess, precision)
        cases += case_rows(
            score_volume(found, mask, volume.spacing),
            arm=arm,
            seed=seed,
            subject=volume.subject,
            vendor=volume.vendor,
            centre=volume.centre,
            phase=volume.phase,
        )
    write_cases(uri.join(out, CASES), cases)
    return len(volumes)
