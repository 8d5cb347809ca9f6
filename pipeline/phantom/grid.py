"""The pixel grid of one study in the patient's own coordinates, and smooth random textures on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.phantom.shapes import Plane

TEXTURE_MM = (1.3, 2.6, 6.0, 16.0)  # mm: standard deviation of each texture's smoothing


@dataclass(frozen=True)
class Grid:
    """The coordinates of pixels: `x` and `y` (h, w) float32 in mm, with the origin on the left ventricle's axis.

    `pixel` is the side of a pixel in mm.
    """

    x: Plane
    y: Plane
    pixel: float

    def crop(self, rows: slice, columns: slice) -> Grid:
        """A window of the grid."""
        return Grid(
            np.ascontiguousarray(self.x[rows, columns]), np.ascontiguousarray(self.y[rows, columns]), self.pixel
        )


def make_grid(shape: tuple[int, int], pixel: float, origin: tuple[float, float], rotation: float) -> Grid:
    """Make a grid of (h, w) square pixels of `pixel` mm.

    `origin` (x, y) is the patient's origin in mm from the image's centre, `rotation` is in radians.
    """
    height, width = shape
    across = (np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)) * np.float32(pixel) - np.float32(
        origin[0]
    )
    down = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)) * np.float32(pixel) - np.float32(
        origin[1]
    )
    cos, sin = np.float32(math.cos(rotation)), np.float32(math.sin(rotation))
    return Grid(across[None] * cos + down[:, None] * sin, down[:, None] * cos - across[None] * sin, pixel)


class Texture:
    """Smooth periodic Gaussian noise with mean 0 and variance 1: one field for each of `TEXTURE_MM`."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int], pixel: float) -> None:
        from scipy import fft

        noise = fft.rfft2(rng.standard_normal((len(TEXTURE_MM), *shape), dtype=np.float32))
        fy = np.asarray(np.fft.fftfreq(shape[0]), dtype=np.float32)[:, None]
        fx = np.asarray(np.fft.rfftfreq(shape[1]), dtype=np.float32)[None]
        square = -2 * np.float32(math.pi) ** 2 * (fy * fy + fx * fx)
        fields = []
        for plane, sigma in zip(noise, TEXTURE_MM, strict=True):
            field = fft.irfft2(plane * np.exp(square * np.float32((sigma / pixel) ** 2)), s=shape)
            fields.append(((field - field.mean()) / field.std()).astype(np.float32))
        self._fields: npt.NDArray[np.float32] = np.stack(fields)

    def rolled(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """The fields (4, h, w) float32, shifted by a random amount; the pixels wrap around."""
        height, width = self._fields.shape[1:]
        moved: npt.NDArray[np.float32] = np.roll(
            self._fields, (int(rng.integers(height)), int(rng.integers(width))), axis=(1, 2)
        )
        return moved
