"""Resolution augmentation (RA): rescale, crop, pad and flip in one resampling.

Along each axis, an output pixel is a weighted sum of a few neighbouring input pixels, its *taps*. Image and mask are
sampled on exactly the same grid. The centre stays the centre, without a half-pixel drift from a rounded shape.
Shrinking is antialiased. Each pixel is summed in a fixed order, so its bytes do not depend on other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def source_offsets(n_out: int, scale: float) -> npt.NDArray[np.float64]:
    """The offsets (n_out,) of the output pixels' centres from the centre that both axes share, in input pixels."""
    return np.asarray((np.arange(n_out) + 0.5 - n_out / 2) / scale, dtype=np.float64)


def taps(offsets: npt.NDArray[np.float64], n_in: int, scale: float) -> tuple[Indices, Floats]:
    """Input pixels (n_out, k) and weights (n_out, k) of linear interpolation, antialiased if `scale` < 1.

    The weights form a triangle of half-width max(1, 1 / scale), cut off at the ends of the axis of `n_in` pixels. They
    add up to 1, or to 0 for an output pixel out of reach of the input.
    """
    support = max(1.0, 1.0 / scale)
    # an open interval of this width contains at most k whole numbers
    k = int(np.ceil(2.0 * support))
    at = offsets + (n_in - 1) / 2
    first = np.floor(at - support) + 1.0
    pixels = first[:, None] + np.arange(k)
    weights = 1.0 - np.abs(at[:, None] - pixels) * (1.0 / support)
    np.maximum(weights, 0.0, out=weights)
    if first.min() < 0.0 or first.max() + k > n_in:
        weights[(pixels < 0) | (pixels > n_in - 1)] = 0.0
        np.clip(pixels, 0, n_in - 1, out=pixels)
    total = weights.sum(1, keepdims=True)
    total[total == 0.0] = 1.0
    return pixels.astype(np.int64), (weights / total).astype(np.float32)


@lru_cache(maxsize=64)
def resampling_matrix(n_in: int, n_out: int, scale: float, shift: float = 0.0) -> Floats:
    """The taps of a whole axis as a read-only matrix (n_out, n_in) float32, for grids that many slices share.

    Rows add up to 1, or to 0 if the output pixel's centre lies outside the input. For `n_out == n_in * scale` the
    matrix equals `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`. `shift` is the way from the
    input's centre to the output's, in input pixels towards higher indices.
    """
    offsets = source_offsets(n_out, scale) + shift
    pixels, weights = taps(offsets, n_in, scale)
    weights[np.abs(offsets) > n_in / 2] = 0.0
    matrix = np.zeros((n_out, n_in), dtype=np.float32)
    np.add.at(matrix, (np.arange(n_out)[:, None], pixels), weights)
    matrix.setflags(write=False)  # the cache shares it
    return matrix


def resized(image: Floats, rows: Floats, cols: Floats) -> Floats:
    """Resample (h, w) or (C, h, w) with matrices (h', h) and (w', w)."""
    out: Floats = np.asarray(rows @ image @ cols.T, dtype=np.float32)
    return out


def resized_labels(mask: npt.NDArray[np.uint8], rows: Floats, cols: Floats, classes: int = 4) -> npt.NDArray[np.uint8]:
    """Resample labels by the largest class share: (…, h, w) uint8 → (…, h', w') uint8. Outside is background."""
    shares = resized(np.stack([mask == c for c in range(classes)]).astype(np.float32), rows, cols)
    labels: npt.NDArray[np.uint8] = shares.argmax(0).astype(np.uint8)
    return labels


def linear_scale(source_area: float, target_area: float, measure: Literal["area", "length"] = "area") -> float:
    """The linear factor that changes pixels of `source_area` mm² to `target_area` mm²: √(source / target).

    With the measure `length`, the factor is the ratio itself, as in the authors' published code.
    """
    ratio = source_area / target_area
    return float(ratio if measure == "length" else np.sqrt(ratio))


def resample_crop(
    image: Floats,
    mask: npt.NDArray[np.uint8],
    scale: float,
    size: int,
    fill: float,
    flip: tuple[bool, bool] = (False, False),
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Rescale, centre-crop or pad to (size, size), and flip. The image is interpolated, the mask takes nearest pixels.

    image: (h, w) float32, finite. mask: (h, w) uint8. scale: linear, above 0. fill: the value outside the image. flip:
    whether rows and columns are reversed. Returns image (size, size) float32 and mask (size, size) uint8, 0 outside, on
    one grid.
    """
    height, width = image.shape
    y, x = Axis(height, size, scale, flip[0]), Axis(width, size, scale, flip[1])
    drawn = _weighted_rows(_weighted_rows(image, y).T, x).T
    near = mask.take(y.nearest, 0).take(x.nearest, 1)
    if near.shape == (size, size):
        return np.ascontiguousarray(drawn), near
    within = (y.inside, x.inside)
    out, labels = np.full((size, size), fill, dtype=np.float32), np.zeros((size, size), dtype=np.uint8)
    out[within], labels[within] = drawn[within], near
    return out, labels


class Axis:
    """The sources of the `n_out` pixels of an axis.

    pixels, weights: the taps, (n_out, k). inside: the output pixels that lie in the input. nearest: the nearest input
    pixel of each of these.
    """

    def __init__(self, n_in: int, n_out: int, scale: float, flip: bool) -> None:
        offsets = source_offsets(n_out, scale)
        if flip:
            offsets = offsets[::-1]
        self.pixels, self.weights = taps(offsets, n_in, scale)
        inside = np.abs(offsets) <= n_in / 2
        low = int(inside.argmax())
        self.inside = slice(low, low + int(inside.sum()))
        self.nearest = _nearest(offsets[self.inside], n_in)


def _nearest(offsets: npt.NDArray[np.float64], n_in: int) -> npt.NDArray[np.intp]:
    """The pixel that contains each offset; on an edge the one nearer to the centre, so that no side is favoured."""
    from_centre = np.ceil(np.abs(offsets) - (n_in % 2) / 2)
    return np.where(offsets > 0, (n_in - 1) // 2 + from_centre, n_in // 2 - from_centre).astype(np.intp)


def _weighted_rows(image: Floats, axis: Axis) -> Floats:
    """Resample the rows of an image (h, w): (n_out, w)."""
    import torch

    table = torch.from_numpy(np.require(image, np.float32, ["C", "W"]))  # torch warns of read-only memory
    out: Floats = _bags(table, torch.from_numpy(axis.pixels), torch.from_numpy(axis.weights)).numpy()
    return out


def _bags(table: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (n, w) of rows of a table (rows, w). `pixels` (n, k) are row numbers, `weights` (n, k) float32."""
    import torch

    # An embedding bag is a weighted sum of a few rows of a table, just like resampling. It is ten times as fast as a
    # dense matrix and sums in a fixed order.
    return torch.nn.functional.embedding_bag(pixels, table, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True)
class Axes:
    """The `Axis` of N images, as tensors on a device.

    pixels: (N, S, k) int64. weights: (N, S, k) float32. inside: (N, S) bool, which output pixels lie in the image.
    nearest: (N, S) int64, the nearest input pixel of these, 0 for others.
    """

    pixels: Tensor
    weights: Tensor
    inside: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, axes: Sequence[Axis], device: torch.device) -> Axes:
        """Stack the axes of images that are resampled together."""
        from pipeline.samples.canvas import upload

        shape = (len(axes), *np.max([axis.pixels.shape for axis in axes], axis=0))
        pixels, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        inside, nearest = np.zeros(shape[:2], dtype=bool), np.zeros(shape[:2], dtype=np.int64)
        for k, axis in enumerate(axes):  # missing taps have the weight 0
            pixels[k, :, : axis.pixels.shape[1]], weights[k, :, : axis.pixels.shape[1]] = axis.pixels, axis.weights
            inside[k, axis.inside], nearest[k, axis.inside] = True, axis.nearest
        return cls(*(upload(array, device) for array in (pixels, weights, inside, nearest)))

    def __getitem__(self, some: slice) -> Axes:
        return Axes(self.pixels[some], self.weights[some], self.inside[some], self.nearest[some])


def resample_together(image_NHW: Tensor, rows: Axes, columns: Axes, fill_N: Tensor) -> Tensor:
    """`resample_crop` of N images at once, on their device: (N, S, S) float32.

    Each image is in the top left corner of its canvas (H, W). `fill_N` is its value outside.
    """
    across = _along_rows(image_NHW, rows)  # (N, S, W)
    drawn = _along_rows(across.transpose(1, 2), columns).transpose(1, 2)
    return drawn.where(inside(rows, columns), fill_N[:, None, None])


def nearest_together(labels_NHW: Tensor, rows: Axes, columns: Axes) -> Tensor:
    """`resample_crop` of N label maps at once, as in `resample_together`: (N, S, S) uint8, 0 outside."""
    import torch

    which = torch.arange(len(labels_NHW), device=labels_NHW.device)[:, None, None]
    return labels_NHW[which, rows.nearest[:, :, None], columns.nearest[:, None, :]] * inside(rows, columns)


def inside(rows: Axes, columns: Axes) -> Tensor:
    """Which output pixels lie in the image: (N, S, S) bool."""
    return rows.inside[:, :, None] & columns.inside[:, None, :]


def _along_rows(image_NHW: Tensor, rows: Axes) -> Tensor:
    """Resample the rows of N images: (N, H, W) → (N, S, W)."""
    import torch

    count, height, width = image_NHW.shape
    size = rows.pixels.shape[1]
    first = height * torch.arange(count, device=image_NHW.device)[:, None, None]
    pixels, weights = ((first + rows.pixels).reshape(count * size, -1), rows.weights.reshape(count * size, -1))
    return _bags(image_NHW.reshape(count * height, width), pixels, weights).reshape(count, size, width)
