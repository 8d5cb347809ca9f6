"""Untrained networks that find some of every structure, and studies to apply them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from pipeline.networks.config import UNetConfig
from pipeline.networks.files import save_model
from pipeline.networks.unet import UNet
from pipeline.samples.preprocess import PreprocessConfig

PREPROCESS = PreprocessConfig(size=32, field=48)


def tiny_unet(seed: int) -> UNet:
    """In eval mode; every class has the largest logit somewhere."""
    torch.manual_seed(seed)
    model = UNet(4, 4)
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        for _ in range(30):
            model(images)  # running statistics
        logits = model.eval()(images)
        model.head.bias.sub_(logits.mean((0, 2, 3)))  # type: ignore[union-attr,operator]
    return model


def write_unet(folder: Path, seed: int = 3, preprocess: PreprocessConfig = PREPROCESS, **about: Any) -> str:
    model = tiny_unet(seed)
    save_model(str(folder), model, UNetConfig(width=4), preprocess.model_dump(mode="json"), ["terms"], [], about)
    return str(folder)


def volume_zhw(seed: int, shape: tuple[int, int, int] = (5, 61, 50)) -> npt.NDArray[np.int16]:
    """Smooth noise in whole numbers."""
    noise = np.random.default_rng(seed).random(shape).cumsum(axis=1).cumsum(axis=2)
    return np.asarray((1000 * noise / noise.max()).round(), dtype=np.int16)


def write_cine(path: Path, seed: int, frames: int = 3) -> Path:
    """A 4D file on an oblique grid, sform and qform of different codes."""
    data = np.stack([volume_zhw(seed + frame) for frame in range(frames)]).transpose(3, 2, 1, 0)
    turn, (x, y, z) = np.deg2rad(20), (1.25, 1.4, 8.0)
    affine = np.array(
        [
            [-x * np.cos(turn), 0, z * np.sin(turn), 12.5],
            [0, -y, 0, -30.25],
            [x * np.sin(turn), 0, z * np.cos(turn), 7.75],
            [0, 0, 0, 1],
        ]
    )
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((x, y, z, 0.04))
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="scanner")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path
