"""Region looks: every region of an image gets its own gain and shift, as if each tissue had another contrast.

SLAug's location-scale augmentation (Su et al., AAAI 2023) takes the regions from label masks. Here they can also be the
channels of the anatomy factor, which unlabelled slices have too. Quantiles of grey are a control without anatomy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Image = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]

GAIN = 0.3  # standard deviation of the logarithm of a region's gain
SHIFT = 0.2  # standard deviation of a region's shift, in an image of [-1, 1]
EDGE = 0.7  # pixels: standard deviation of the smoothing at the regions' edges
PLANES = 8  # most regions


def region_looks(image_HW: Image, regions_HW: Bits, rng: np.random.Generator) -> Image:
    """Make each region of an image in [-1, 1] brighter or darker: (H, W) float32 in [-1, 1].

    Region c is where bit c of `regions_HW` is set. Where regions overlap, their gains multiply and their shifts add up.
    """
    normal = rng.standard_normal((2, PLANES)).astype(np.float32)
    of_byte = (np.arange(256)[:, None] >> np.arange(PLANES) & 1).astype(np.float32)  # (256, PLANES)
    # smoothing is linear, so smoothing each sum once is enough for all regions
    gain, shift = (gaussian_filter((of_byte @ n).take(regions_HW), EDGE, mode="nearest") for n in normal)
    out: Image = (image_HW * np.exp(GAIN * gain) + SHIFT * shift).clip(-1.0, 1.0).astype(np.float32)
    return out


def label_regions(mask_HW: npt.NDArray[np.uint8]) -> Bits:
    """Make each label of a mask (0 to 7) a region: (H, W) uint8 bits."""
    return np.left_shift(1, mask_HW, dtype=np.uint8)


def grey_regions(image_HW: Image) -> Bits:
    """Make eight regions with equally many pixels, by quantiles of grey: (H, W) uint8 bits."""
    edges = np.quantile(image_HW, np.arange(1, PLANES) / PLANES)
    return np.left_shift(1, np.searchsorted(edges, image_HW, side="right").astype(np.uint8), dtype=np.uint8)
