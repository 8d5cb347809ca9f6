"""NIfTI in, mask NIfTI on the same grid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from storage import nifti
from storage.errors import InputError
from storage.intensities import statistics


def predict_files(
    model_folder: str, images: Sequence[str], out: Path, progress: Callable[[int, int], None]
) -> list[Path]:
    """Segment every frame of 3D or 4D files; each frame is normalised by its own statistics, as in training.

    Raises InputError before anything is written if a header cannot be used or two images would give the same mask.
    """
    from pipeline.inference import predict_volume
    from pipeline.networks.files import default_device, load_model
    from pipeline.preprocess import PreprocessConfig

    model, document = load_model(model_folder)
    model.to(default_device())
    config = PreprocessConfig(**document["preprocess"])
    headers = [nifti.read_header(path) for path in images]
    targets = [out / f"{Path(path).name.removesuffix('.gz').removesuffix('.nii')}_pred.nii.gz" for path in images]
    if len(set(targets)) < len(targets):
        raise InputError(str(out), "two images have the same file name", "predict them into different folders")
    for done, (path, header, target) in enumerate(zip(images, headers, targets, strict=True)):
        frames: list[int | None] = list(range(header.shape[3])) if len(header.shape) == 4 else [None]
        masks = []
        for frame in frames:
            volume, spacing = nifti.read_frame(path, frame)
            masks.append(predict_volume(model, volume, statistics(volume), spacing, config))
        mask = np.stack(masks) if len(header.shape) == 4 else masks[0]
        nifti.write_mask_like(str(target), mask, path)
        progress(done + 1, len(images))
    return targets
