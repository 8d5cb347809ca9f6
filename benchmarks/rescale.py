"""Resolution augmentation of image and mask against MONAI's RandZoomd + ResizeWithPadOrCropd, one core each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.timing import rates, ratio
from pipeline.rescale import resample_crop

SIZE, PAIRS = 224, 64
SCALES = np.random.default_rng(0).uniform(0.7, 1.4, PAIRS)


def run() -> dict[str, Any]:
    """Pairs a second; both antialias when shrinking."""
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
    from monai.transforms.spatial.dictionary import Zoomd

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    image = rng.normal(size=(PAIRS, 256, 216)).astype(np.float32)
    mask = rng.integers(0, 4, (PAIRS, 256, 216)).astype(np.uint8)

    def ours() -> int:
        for k in range(PAIRS):
            resample_crop(image[k], mask[k], float(SCALES[k]), SIZE, -1.0)
        return PAIRS

    def reference() -> int:
        for k in range(PAIRS):
            transform = Compose(
                [
                    Zoomd(
                        ["image", "mask"],
                        zoom=float(SCALES[k]),
                        mode=["bilinear", "nearest"],
                        keep_size=False,
                        antialias=[SCALES[k] < 1, False],
                    ),
                    ResizeWithPadOrCropd(["image", "mask"], (SIZE, SIZE)),
                ]
            )
            transform({"image": torch.from_numpy(image[k : k + 1]), "mask": torch.from_numpy(mask[k : k + 1]).float()})
        return PAIRS

    return ratio(rates({"ours": ours, "reference": reference}), "image and mask pairs/s")
