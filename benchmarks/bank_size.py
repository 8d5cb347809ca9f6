"""Bytes of a factor bank against the same factors as raw float32, padding left out of the raw side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


def run() -> dict[str, Any]:
    """A bank of the phantom, made by an untrained SDNet, whose maps are noisier than a trained one's."""
    import ray

    from actors.extraction import extract
    from actors.ingest import ingest
    from actors.resources import start_ray
    from pipeline.networks.files import save_model
    from pipeline.networks.sdnet import SDNet, SDNetConfig
    from pipeline.phantom import PhantomConfig, write_phantom
    from pipeline.preprocess import PreprocessConfig
    from storage.factor_bank import FactorBank

    config, preprocess = SDNetConfig(anatomy_width=8, modality_width=8, segmentor_width=8), PreprocessConfig(size=224)
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        run, bank_uri = f"{folder}/run", f"{folder}/run/bank.zarr"
        write_phantom(
            Path(folder) / "data", PhantomConfig(labelled_a=3, labelled_b=3, unlabelled_c=2, testing=1, frames=3)
        )
        ingest([f"{folder}/data"], run, num_cpus=0.5)
        torch.manual_seed(0)
        save_model(f"{run}/sdnet", SDNet(config), config, preprocess.model_dump(), [])
        extract(run, f"{run}/sdnet", bank_uri, preprocess, actors=2, num_cpus=0.5)
        index = FactorBank.open(bank_uri).index
        extent = index["height"].to_numpy().astype(np.int64) * index["width"].to_numpy()
        raw = int(extent.sum()) * 8 * 4 + len(extent) * 8 * 4
        ours = sum(p.stat().st_size for p in Path(bank_uri).rglob("*") if p.is_file())
    ray.shutdown()
    return {"ratio": round(raw / ours, 1), "ours": ours, "reference": raw, "unit": "bytes"}
