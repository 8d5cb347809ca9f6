"""From a stored slice to what a network sees: intensities in [-1, 1] on the working grid.

On the *working grid*, pixels are square, and every image is shrunk by one constant linear factor (`size / field`). So a
small input covers the same field of view as the paper's 224 × 224, and the resolution gap between vendors stays. If
`size == field` and the pixels are square, the working grid is the native grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.samples.rescale import resampling_matrix, resized, resized_labels
from storage.identity import added
from storage.nifti.header import Spacing
from storage.slices.foreground import ForegroundStatistics, foreground_box, foreground_statistics
from storage.slices.intensities import Statistics, statistics

if TYPE_CHECKING:
    from typing import Self

    from storage.slices.store import SliceStore

T = TypeVar("T", bound=np.generic)

CANVAS_MULTIPLE = 16  # the network halves an image four times


class PreprocessConfig(BaseModel):
    """Intensity normalisation and working grid; part of a bank's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(224, ge=32, multiple_of=16, description="network input, pixels a side")
    field: int = Field(224, ge=32, description="native pixels that `size` stands for (paper: 224)")
    normalisation: Literal["zscore", "minmax", "percentile", "foreground"] = Field(
        "zscore", description="foreground: z-score over the central 160 mm, which padding and hot pixels do not move"
    )
    statistics: Literal["volume", "slice"] = Field(
        "volume", description="what intensities are normalised by; `slice` as in the authors' code"
    )
    centre: Literal["image", "mask"] = added(
        "image",
        description="middle of what a network is trained on: the image's, or (mask) the heart's where a volume is "
        "labelled",
    )
    clip_sigma: float = Field(3.0, gt=0, description="zscore, foreground: clip at ± this many σ, then divide by it")

    @property
    def factor(self) -> float:
        """Linear scale from native to working pixels, dimensionless; below 1 the image shrinks."""
        return self.size / self.field

    @model_validator(mode="after")
    def _check_foreground(self) -> Self:
        if self.normalisation == "foreground" and self.statistics == "slice":
            raise ValueError("normalisation foreground has statistics of the volume; leave out statistics=slice")
        return self


def volume_statistics(volume_ZHW: npt.NDArray[Any], spacing: Spacing, config: PreprocessConfig) -> Statistics:
    """The statistics for normalising a volume (Z, H, W) of raw intensities. `spacing`: (slice, row, column) in mm."""
    if config.normalisation == "foreground":
        return foreground_statistics(volume_ZHW, spacing)
    return statistics(volume_ZHW)


def stored_statistics(store: SliceStore, i: int, config: PreprocessConfig) -> Statistics:
    """The statistics for normalising slice `i` of a store."""
    return store.foreground(i) if config.normalisation == "foreground" else store.statistics(i)


def normalise(image: npt.NDArray[np.float32], stats: Statistics, config: PreprocessConfig) -> npt.NDArray[np.float32]:
    """Map the intensities of a slice (H, W) or a volume (Z, H, W) to [-1, 1]: float32 of the same shape.

    `stats` come from `volume_statistics` or `stored_statistics`; with `config.statistics` `slice`, each slice uses its
    own instead. Results are clipped to [-1, 1], the range of tanh.

    - `zscore` (Baumgartner et al. 2017, which the paper cites): mean 0, and `clip_sigma` standard deviations are 1.
    - `minmax`, `percentile`: the whole range, or 0.5 % to 99.5 %, becomes [-1, 1].
    - `foreground`: as `zscore`, with the foreground's statistics. Intensities below its 0.5 % percentile are raised to
      that value, so that a background of -1024 is as dark as air. Constant padding becomes the slice's minimum.

    Raises ValueError if `foreground` gets other statistics than the foreground's.
    """
    if config.normalisation == "foreground":
        return _normalised_foreground(image, stats, config)
    if config.statistics == "slice":
        if image.ndim > 2:
            return np.stack([normalise(one, stats, config) for one in image])
        stats = statistics(image)
    if config.normalisation == "zscore":
        scaled = (image - stats.mean) / (max(stats.std, 1e-8) * config.clip_sigma)
    else:
        low, high = (stats.minimum, stats.maximum) if config.normalisation == "minmax" else (stats.p005, stats.p995)
        scaled = (image - low) * (2.0 / max(high - low, 1e-8)) - 1.0
    clipped: npt.NDArray[np.float32] = np.clip(scaled, -1.0, 1.0).astype(np.float32)
    return clipped


def _normalised_foreground(
    image: npt.NDArray[np.float32], stats: Statistics, config: PreprocessConfig
) -> npt.NDArray[np.float32]:
    if not isinstance(stats, ForegroundStatistics):
        raise ValueError("normalisation foreground needs the statistics of the foreground, see volume_statistics")
    if image.ndim > 2:
        return np.stack([_normalised_foreground(one, stats, config) for one in image])
    box = foreground_box(image) if stats.padding else (slice(None), slice(None))
    inside = image[box] if box is not None else np.full((1, 1), stats.p005, dtype=np.float32)
    scaled = (np.maximum(inside, np.float32(stats.p005)) - stats.mean) / (max(stats.std, 1e-8) * config.clip_sigma)
    scaled = np.clip(scaled, -1.0, 1.0).astype(np.float32)
    out = np.full(image.shape, scaled.min(), dtype=np.float32)
    if box is not None:
        out[box] = scaled
    return out


@dataclass(frozen=True)
class WorkingSlice:
    """One slice on the working grid: image (h, w) float32 in [-1, 1], mask (h, w) uint8, and a pixel's area in mm²."""

    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]
    area: float


def working_scales(row_mm: float, col_mm: float, config: PreprocessConfig) -> tuple[float, float]:
    """Linear scales (rows, columns) from native to working pixels. They make pixels square, with the same area."""
    side = float(np.sqrt(row_mm * col_mm))
    return config.factor * row_mm / side, config.factor * col_mm / side


def even(n: int) -> int:
    """The largest even number up to `n`. At scale 1, even grids with one centre also share their pixel centres."""
    return n - n % 2


def working_shape(height: int, width: int, row_mm: float, col_mm: float, config: PreprocessConfig) -> tuple[int, int]:
    """The size (h, w) in working pixels, both even, of a native slice (height, width) with pixels in mm."""
    scale_y, scale_x = working_scales(row_mm, col_mm, config)
    return 2 * max(1, round(even(height) * scale_y / 2)), 2 * max(1, round(even(width) * scale_x / 2))


def working_slice(store: SliceStore, i: int, config: PreprocessConfig) -> WorkingSlice:
    """Slice `i` of a store, normalised (see `normalise`) and on the working grid."""
    image = normalise(store.image(i), stored_statistics(store, i, config), config)
    image = moved(image, middle(store, i, config), float(image.min()))
    grid = _grid(store, i, image.shape, config)
    image = image[: even(image.shape[0]), : even(image.shape[1])]
    mask, area = working_mask(store, i, config)
    return WorkingSlice(image if grid is None else resized(image, *grid), mask, area)


def working_mask(store: SliceStore, i: int, config: PreprocessConfig) -> tuple[npt.NDArray[np.uint8], float]:
    """The mask (h, w) uint8 of slice `i` on the working grid, and a pixel's area in mm². The image is not read."""
    mask = moved(store.mask(i), middle(store, i, config), 0)
    grid = _grid(store, i, mask.shape, config)
    mask = mask[: even(mask.shape[0]), : even(mask.shape[1])]
    area = float(store.column("row_mm")[i]) * float(store.column("col_mm")[i]) / config.factor**2
    return mask if grid is None else resized_labels(mask, *grid), area


def middle(store: SliceStore, i: int, config: PreprocessConfig) -> tuple[int, int]:
    """Native rows and columns from the centre of slice `i` to the point that a network sees in the middle."""
    return store.heart(i) if config.centre == "mask" else (0, 0)


def moved(array: npt.NDArray[T], shift: tuple[int, int], fill: float) -> npt.NDArray[T]:
    """Move an array (H, W) so that the point `shift` rows and columns from the centre becomes the centre.

    Pixels from outside are `fill`.
    """
    if shift == (0, 0):
        return array
    out = np.full_like(array, fill)
    take, put = [], []
    for n, by in zip(array.shape, shift, strict=True):
        take.append(slice(max(0, by), n + min(0, by)))
        put.append(slice(max(0, -by), n + min(0, -by)))
    out[put[0], put[1]] = array[take[0], take[1]]
    return out


def _grid(
    store: SliceStore, i: int, native: tuple[int, ...], config: PreprocessConfig
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """The matrices that resample the rows and columns of slice `i`, or None if its native grid is the working grid."""
    height, width = even(native[0]), even(native[1])
    row_mm, col_mm = float(store.column("row_mm")[i]), float(store.column("col_mm")[i])
    shape = working_shape(height, width, row_mm, col_mm, config)
    if shape == (height, width):
        return None
    scale_y, scale_x = working_scales(row_mm, col_mm, config)
    return resampling_matrix(height, shape[0], scale_y), resampling_matrix(width, shape[1], scale_x)


def working_shapes(
    store: SliceStore, slice_ids: Sequence[int] | npt.NDArray[np.int64], config: PreprocessConfig
) -> npt.NDArray[np.int64]:
    """The sizes (N, 2) in working pixels of these slices of a store; see `working_shape`."""
    grids = np.column_stack(
        [store.column(name)[np.asarray(slice_ids)] for name in ("height", "width", "row_mm", "col_mm")]
    )
    different, which = np.unique(grids, axis=0, return_inverse=True)  # many slices, few grids
    shapes = [working_shape(int(h), int(w), row, col, config) for h, w, row, col in different.tolist()]
    return np.array(shapes, dtype=np.int64)[which.reshape(-1)]


def canvas_size(
    store: SliceStore, slice_ids: Sequence[int] | npt.NDArray[np.int64], config: PreprocessConfig
) -> tuple[int, int]:
    """The smallest canvas (H, W) for all given slices' working images: multiples of 16, at least the input size."""
    largest = working_shapes(store, slice_ids, config).max(axis=0).tolist()
    height, width = (-(-max(n, config.size) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for n in largest)
    return height, width


def centre_on(array: npt.NDArray[T], canvas: tuple[int, int], fill: float) -> tuple[npt.NDArray[T], int, int]:
    """Place (h, w) centred on a (H, W) canvas of `fill`; returns the canvas and the offset (top, left)."""
    height, width = array.shape
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    out = np.full(canvas, fill, dtype=array.dtype)
    out[top : top + height, left : left + width] = array
    return out, top, left


def centre_crop(array: npt.NDArray[T], size: int, fill: float) -> npt.NDArray[T]:
    """The central (size, size) of (h, w), padded with `fill` where the array is smaller."""
    out = np.full((size, size), fill, dtype=array.dtype)
    take, put = [], []
    for n in array.shape:
        length = min(n, size)
        take.append(slice((n - length) // 2, (n - length) // 2 + length))
        put.append(slice((size - length) // 2, (size - length) // 2 + length))
    out[put[0], put[1]] = array[take[0], take[1]]
    return out
