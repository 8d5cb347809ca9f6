"""Resolution augmentation of image and mask against MONAI's RandZoomd + ResizeWithPadOrCropd, one core each.

Both sides get the same pairs in memory and the same zooms, rescale the image linearly (antialiased when shrinking) and
the mask to the nearest pixel, and crop or pad to one size. MONAI's transforms are built beforehand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.timing import rates, ratio
from pipeline.samples.rescale import resample_crop

SIZE, PAIRS = 224, 64
SCALES = np.random.default_rng(0).uniform(0.7, 1.4, PAIRS)


def run() -> dict[str, Any]:
    """Pairs a second."""
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
    from monai.transforms.spatial.dictionary import RandZoomd

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    image = rng.normal(size=(PAIRS, 256, 216)).astype(np.float32)
    mask = rng.integers(0, 4, (PAIRS, 256, 216)).astype(np.uint8)
    keys = ["image", "mask"]
    transforms = [
        Compose(
            [
                RandZoomd(
                    keys,
                    prob=1.0,
                    min_zoom=float(scale),
                    max_zoom=float(scale),
                    mode=["bilinear", "nearest"],
                    keep_size=False,
                    antialias=[bool(scale < 1), False],
                ),
                ResizeWithPadOrCropd(keys, (SIZE, SIZE)),
            ]
        )
        for scale in SCALES
    ]
    pairs = [
        {"image": torch.from_numpy(i[None]), "mask": torch.from_numpy(m[None])}
        for i, m in zip(image, mask, strict=True)
    ]

    def ours() -> int:
        for k in range(PAIRS):
            resample_crop(image[k], mask[k], float(SCALES[k]), SIZE, -1.0)
        return PAIRS

    def reference() -> int:
        for pair, transform in zip(pairs, transforms, strict=True):
            transform(pair)
        return PAIRS

    return ratio(rates({"ours": ours, "reference": reference}), "image and mask pairs/s")
