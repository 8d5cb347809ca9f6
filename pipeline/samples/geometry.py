"""Turn and bend a slice, image and mask alike, so that a heart stays a heart.

A bend is a smooth displacement whose strain is below 1 everywhere. The map is then the identity plus a contraction, so
it is continuous and one to one: nothing tears, folds or merges, and a cavity stays within its wall. There are no
mirrors, since they would exchange the two ventricles.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

from pipeline.samples.plan import Sample
from pipeline.samples.preprocess import WorkingSlice
from pipeline.samples.smooth import smooth_field

Places = npt.NDArray[np.float64]

BEND_MM = 40.0  # mm between the bumps of a displacement: a wall moves as a whole, but the two ventricles differently


def moved(source: WorkingSlice, sample: Sample, elastic: float) -> WorkingSlice:
    """The slice turned by `sample.turn` degrees and bent with a strain of at most `elastic`, on its own grid.

    The image, in [-1, 1], is interpolated linearly, with its minimum beyond its edges. The mask takes the nearest
    pixel, with background beyond its edges.
    """
    places = sources(source.mask.shape, sample, elastic, float(np.sqrt(source.area)))
    if places is None:
        return source
    fill = float(source.image.min())
    image = map_coordinates(source.image, places, order=1, mode="grid-constant", cval=fill, output=np.float32)
    mask = map_coordinates(source.mask, places, order=0, mode="grid-constant", cval=0, output=np.uint8)
    return WorkingSlice(image, mask, source.area)


def sources(shape: tuple[int, ...], sample: Sample, elastic: float, pixel_mm: float) -> Places | None:
    """(2, H, W) float64: the row and column that each pixel comes from. None if no pixel moves."""
    if sample.turn == 0.0 and elastic == 0.0:
        return None
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))
    if elastic > 0.0:
        grid = grid + displacement(shape, elastic, BEND_MM / pixel_mm, sample.bend)
    angle = np.deg2rad(sample.turn)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(shape)[:, None, None] - 1) / 2
    places: Places = np.einsum("ij,jhw->ihw", turn, grid) + centre
    return places


def displacement(shape: tuple[int, ...], elastic: float, spacing: float, seed: int) -> Places:
    """A random smooth displacement (2, H, W) in pixels, with mean 0. `spacing` pixels lie between its bumps.

    Its strain is the Frobenius norm of its derivatives. The largest strain is uniform in [0, `elastic`).
    """
    rng = np.random.Generator(np.random.Philox(seed))
    field = np.stack([smooth_field(shape, spacing, rng) for _ in shape])
    down, across = (np.square(np.gradient(field, axis=axis)) for axis in (1, 2))  # (2, H, W) each
    strain = float(np.sqrt((down + across).sum(0).max()))
    scaled: Places = (field - field.mean((1, 2), keepdims=True)) * (elastic * rng.random() / max(strain, 1e-12))
    return scaled
