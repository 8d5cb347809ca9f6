"""Dice on held-out volumes after an epoch, on the network's grid; chooses the epoch whose weights are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.networks.sdnet import SDNet
from pipeline.networks.unet import UNet
from pipeline.training.step import autocast
from storage.subjects import STRUCTURES


@dataclass(frozen=True)
class ValidationVolume:
    """A held-out volume as the network sees it: image (Z, S, S) float32, mask (Z, S, S) uint8."""

    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]


def validate(model: UNet | SDNet, volumes: list[ValidationVolume], precision: str, chunk: int = 16) -> dict[str, float]:
    """Mean volume Dice on the network's grid: `dice` over structures, `dice_LV`, `dice_MYO`, `dice_RV`; 0 to 1.

    A structure absent from mask and prediction is left out.
    """
    model.eval()
    device = next(model.parameters()).device
    scores: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for volume in volumes:
        parts = []
        with torch.inference_mode(), autocast(device, precision):
            for i in range(0, len(volume.image), chunk):
                image = torch.from_numpy(volume.image[i : i + chunk, None]).to(device)
                parts.append(model(image.contiguous(memory_format=torch.channels_last)).argmax(1).cpu().numpy())
        found = np.concatenate(parts)
        for name, label in STRUCTURES.items():
            ours, theirs = found == label, volume.mask == label
            size = int(ours.sum() + theirs.sum())
            if size:
                scores[name].append(2.0 * int((ours & theirs).sum()) / size)
    means = {f"dice_{name}": float(np.mean(values)) if values else 0.0 for name, values in scores.items()}
    return {"dice": float(np.mean(list(means.values()))), **means}
