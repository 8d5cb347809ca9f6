"""Dice on held-out volumes after an epoch, on the network's grid. The epoch with the highest Dice is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.networks.sdnet import SDNet
from pipeline.networks.unet import UNet
from pipeline.scores.metrics import volume_dice
from pipeline.training.step import autocast
from storage.subjects import ALL_STRUCTURES


@dataclass(frozen=True)
class ValidationVolume:
    """A held-out volume as the network sees it: image (Z, S, S) float32 in [-1, 1], mask (Z, S, S) uint8.

    `structures` are those that are drawn in the mask.
    """

    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]
    structures: tuple[str, ...] = ALL_STRUCTURES


def volume_scores(
    model: UNet | SDNet, volumes: Sequence[ValidationVolume], precision: str, chunk: int = 16
) -> list[dict[str, float]]:
    """For every volume, Dice (0 to 1) by structure, on the network's grid. Sets the model to eval mode.

    A structure is left out if it is absent from both mask and prediction, or if nobody drew it.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = []
    for volume in volumes:
        parts = []
        with torch.inference_mode(), autocast(device, precision):
            for i in range(0, len(volume.image), chunk):
                image = torch.from_numpy(volume.image[i : i + chunk, None]).to(device)
                parts.append(model(image.contiguous(memory_format=torch.channels_last)).argmax(1).cpu().numpy())
        dice = volume_dice(np.concatenate(parts), volume.mask, volume.structures)
        scores.append({name: value for name, value in dice.items() if not np.isnan(value)})
    return scores


def mean_scores(scores: Sequence[dict[str, float]], structures: Sequence[str] = ALL_STRUCTURES) -> dict[str, float]:
    """The means over volumes, `dice_LV`, `dice_MYO` and `dice_RV`, and their mean `dice`, each in [0, 1].

    Only `structures`, those drawn in some volume, have a mean. It is 0 if no volume has a score of the structure.
    """
    by_name = {name: [dice[name] for dice in scores if name in dice] for name in structures}
    means = {f"dice_{name}": float(np.mean(values)) if values else 0.0 for name, values in by_name.items()}
    return {"dice": float(np.mean(list(means.values()))), **means}
