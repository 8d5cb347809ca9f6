"""Turns and bends of a slice, image and mask alike, that keep a heart a heart.

A bend is a smooth displacement whose strain stays below one everywhere: the map is then continuous and one to one (the
identity plus a contraction), so that nothing tears, folds or merges, and a cavity stays within its wall. Mirrors are
not among them: they exchange the two ventricles.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

from pipeline.samples.plan import Sample
from pipeline.samples.preprocess import WorkingSlice
from pipeline.samples.smooth import smooth_field

Places = npt.NDArray[np.float64]

BEND_MM = 40.0  # between the bumps of a displacement: a wall moves as a whole, the two ventricles on their own


def moved(source: WorkingSlice, sample: Sample, elastic: float) -> WorkingSlice:
    """The slice turned by `sample.turn` and bent by at most the strain `elastic`, on its own grid.

    The image, in [-1, 1], is interpolated linearly, with its minimum beyond its edges; the mask takes the nearest
    pixel, background beyond the edges.
    """
    places = sources(source.mask.shape, sample, elastic, float(np.sqrt(source.area)))
    if places is None:
        return source
    fill = float(source.image.min())
    image = map_coordinates(source.image, places, order=1, mode="grid-constant", cval=fill, output=np.float32)
    mask = map_coordinates(source.mask, places, order=0, mode="grid-constant", cval=0, output=np.uint8)
    return WorkingSlice(image, mask, source.area)


def sources(shape: tuple[int, ...], sample: Sample, elastic: float, pixel_mm: float) -> Places | None:
    """(2, H, W), the row and column that each pixel comes from; None where each stays in its place."""
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
    """(2, H, W) in pixels, without a shift as a whole. Its strain, the Frobenius norm of its derivatives, is at most
    a number between 0 and `elastic`."""
    rng = np.random.Generator(np.random.Philox(seed))
    field = np.stack([smooth_field(shape, spacing, rng) for _ in shape])
    down, across = (np.square(np.gradient(field, axis=axis)) for axis in (1, 2))  # (2, H, W) each
    strain = float(np.sqrt((down + across).sum(0).max()))
    scaled: Places = (field - field.mean((1, 2), keepdims=True)) * (elastic * rng.random() / max(strain, 1e-12))
    return scaled
