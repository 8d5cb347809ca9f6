"""Resolution augmentation: rescale, crop and pad in one resampling.

A resampling is a pair of small matrices, one an axis, so that image and mask are sampled on exactly the same grid,
centres stay centres (no half-pixel drift from rounding a resized shape) and shrinking is antialiased.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def source_coordinates(n_in: int, n_out: int, scale: float) -> npt.NDArray[np.float64]:
    """Where each of `n_out` pixel centres lies on an axis of `n_in` pixels; both axes share their centre.  (n_out,)"""
    return np.asarray((np.arange(n_out) + 0.5 - n_out / 2) / scale + n_in / 2 - 0.5, dtype=np.float64)


@lru_cache(maxsize=64)
def resampling_matrix(n_in: int, n_out: int, scale: float) -> Floats:
    """Linear interpolation, antialiased when `scale` < 1, as a matrix (n_out, n_in) float32.

    Rows sum to one, or to zero where the output pixel's centre lies outside the input. For `n_out == n_in * scale` it
    equals `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`.
    """
    at = source_coordinates(n_in, n_out, scale)
    support = max(1.0, 1.0 / scale)
    weights = np.clip(1.0 - np.abs(at[:, None] - np.arange(n_in)[None]) / support, 0.0, None)
    weights[(at < -0.5) | (at > n_in - 0.5)] = 0.0
    total = weights.sum(1, keepdims=True)
    matrix: Floats = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0).astype(np.float32)
    matrix.setflags(write=False)  # shared through the cache
    return matrix


def resized(image: Floats, rows: Floats, cols: Floats) -> Floats:
    """Resample (h, w) or (C, h, w) with matrices (h', h) and (w', w)."""
    out: Floats = np.asarray(rows @ image @ cols.T, dtype=np.float32)
    return out


def resized_labels(mask: npt.NDArray[np.uint8], rows: Floats, cols: Floats, classes: int = 4) -> npt.NDArray[np.uint8]:
    """Resample a label map by its largest class share: (h, w) uint8 → (h', w') uint8; outside is background."""
    shares = resized(np.stack([mask == c for c in range(classes)]).astype(np.float32), rows, cols)
    labels: npt.NDArray[np.uint8] = shares.argmax(0).astype(np.uint8)
    return labels


def linear_scale(source_area: float, target_area: float, measure: Literal["area", "length"] = "area") -> float:
    """Linear factor that takes pixels of `source_area` mm² to `target_area` mm²: √(source / target).

    `length` takes the ratio itself for the factor, as the authors' published code does.
    """
    ratio = source_area / target_area
    return float(ratio if measure == "length" else np.sqrt(ratio))


def resample_crop(
    image: Floats, mask: npt.NDArray[np.uint8], scale: float, size: int, fill: float
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Rescale by `scale` and centre-crop or pad to (size, size), image linearly and mask to the nearest pixel.

    Args: image (h, w) float32; mask (h, w) uint8; scale > 0, linear; fill, the value outside the image.
    Returns: image (size, size) float32, mask (size, size) uint8 (0 outside), on the same grid.
    """
    (height, width), n = image.shape, size
    rows, cols = resampling_matrix(height, n, scale), resampling_matrix(width, n, scale)
    out = resized(image, rows, cols)
    y, y_inside = _nearest(height, n, scale)
    x, x_inside = _nearest(width, n, scale)
    labels = mask[y[:, None], x[None]]
    if not (y_inside.all() and x_inside.all()):
        outside = ~(y_inside[:, None] & x_inside[None])
        out[outside], labels[outside] = fill, 0
    return out, labels


def _nearest(n_in: int, n_out: int, scale: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    at = source_coordinates(n_in, n_out, scale)
    inside = (at >= -0.5) & (at <= n_in - 0.5)
    return np.clip(np.floor(at + 0.5), 0, n_in - 1).astype(np.intp), inside
