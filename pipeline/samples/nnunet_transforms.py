"""nnU-Net's augmentation, with its own package `batchgeneratorsv2` (`pip install 'cardiomix[nnunet]'`).

The transforms, their order, probabilities and ranges are those of `nnUNetTrainer.get_training_transforms` for square 2D
patches (nnU-Net v2, Isensee et al. 2021). They act on the whole slice instead of a patch: rotation by any angle, scale,
noise, blur, brightness, contrast, lower resolution, gamma and, if `mirrors` is set, mirrors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from pipeline.samples.preprocess import WorkingSlice


def nnunet(source: WorkingSlice, seed: int, mirrors: bool) -> WorkingSlice:
    """Apply nnU-Net's transforms to a slice. Its image is in [-1, 1] before and after.

    The result depends on the slice, the seed and `mirrors` alone. The transforms see the image with mean 0 and standard
    deviation 1, as nnU-Net normalises MR. Pixels from beyond the edges are the mean.
    """
    mean, std = float(source.image.mean()), max(float(source.image.std()), 1e-6)
    image = torch.from_numpy((source.image[None] - mean) / std)
    transforms = _transforms((source.mask.shape[0], source.mask.shape[1]), mirrors)
    with _Seeded(seed):
        made = transforms(image=image, segmentation=torch.from_numpy(source.mask[None].astype(np.int16)))
    moved = (made["image"][0].numpy() * std + mean).clip(-1.0, 1.0).astype(np.float32)
    return WorkingSlice(moved, made["segmentation"][0].numpy().astype(np.uint8), source.area)


class _Seeded:
    """Seeds the two global generators that the package uses, and restores them at the end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._numpy, self._torch = np.random.get_state(), torch.default_generator.get_state()
        np.random.seed(self.seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)


@cache
def _transforms(size: tuple[int, int], mirrors: bool) -> Any:
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    def gamma(invert: int) -> Any:
        return GammaTransform(BGContrast((0.7, 1.5)), invert, False, 1, 1)

    turn = {"p_rotation": 0.2, "rotation": (-np.pi, np.pi), "p_rot_per_axis": 1}
    scale = {"p_scaling": 0.2, "scaling": (0.7, 1.4), "p_synchronize_scaling_across_axes": 1}
    with_chance = [
        (GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        # `benchmark` would choose between two methods by timing, and the last bits would depend on it
        (GaussianBlurTransform((0.5, 1.0), False, False, p_per_channel=0.5, benchmark=False), 0.2),
        (MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), False, 1), 0.15),
        (ContrastTransform(BGContrast((0.75, 1.25)), True, False, 1), 0.15),
        (SimulateLowResolutionTransform((0.5, 1), False, True, None, None, p_per_channel=0.5), 0.25),
        (gamma(1), 0.1),
        (gamma(0), 0.3),
    ]
    spatial = SpatialTransform(size, 0, False, p_elastic_deform=0, **turn, **scale)
    chosen = [spatial, *(RandomTransform(transform, chance) for transform, chance in with_chance)]
    return ComposeTransforms([*chosen, MirrorTransform((0, 1))] if mirrors else chosen)
