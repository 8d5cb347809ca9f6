"""Region looks: every region of an image gets a gain and a shift of its own, as if each tissue were drawn anew.

SLAug's location-scale augmentation (Su et al., AAAI 2023) takes the regions from label masks. Those of the anatomy
factor need none, so that unlabelled slices have them too; quantiles of grey are the control that knows no anatomy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Image = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]

GAIN = 0.3  # standard deviation of the logarithm of a region's gain
SHIFT = 0.2  # standard deviation of a region's shift, in an image of [-1, 1]
EDGE = 0.7  # pixels, standard deviation by which the regions' edges are smoothed
PLANES = 8


def region_looks(image_HW: Image, regions_HW: Bits, rng: np.random.Generator) -> Image:
    """An image in [-1, 1] whose regions are brighter or darker, in [-1, 1]; region c is where bit c is set.

    Where regions overlap their gains multiply and their shifts add up.
    """
    normal = rng.standard_normal((2, PLANES)).astype(np.float32)
    of_byte = (np.arange(256)[:, None] >> np.arange(PLANES) & 1).astype(np.float32)  # (256, PLANES)
    # smoothing is linear, so that one pass over each sum does for all regions
    gain, shift = (gaussian_filter((of_byte @ n).take(regions_HW), EDGE, mode="nearest") for n in normal)
    out: Image = (image_HW * np.exp(GAIN * gain) + SHIFT * shift).clip(-1.0, 1.0).astype(np.float32)
    return out


def label_regions(mask_HW: npt.NDArray[np.uint8]) -> Bits:
    """Each label of a mask (0 to 7) as a region."""
    return np.left_shift(1, mask_HW, dtype=np.uint8)


def grey_regions(image_HW: Image) -> Bits:
    """Eight regions of equally many pixels, by the quantiles of grey."""
    edges = np.quantile(image_HW, np.arange(1, PLANES) / PLANES)
    return np.left_shift(1, np.searchsorted(edges, image_HW, side="right").astype(np.uint8), dtype=np.uint8)
