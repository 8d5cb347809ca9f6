"""Smooth random fields over an image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WIDTH = 0.6  # standard deviation of a bump, in spacings; bumps of equal height then add up to a constant, within 1 %

Field = npt.NDArray[np.float64]


def smooth_field(shape: tuple[int, ...], spacing: float, rng: np.random.Generator) -> Field:
    """(H, W) float64: a sum of Gaussian bumps with normally distributed heights, on a grid of `spacing` pixels."""
    rows, columns = (_bumps(n, spacing) for n in shape)
    field: Field = rows @ rng.standard_normal((rows.shape[1], columns.shape[1])) @ columns.T
    return field


def _bumps(n: int, spacing: float) -> Field:
    """The bumps along one axis, (n, bumps) float64. The grid extends beyond both ends, to make them like the middle."""
    count = int(np.ceil(n / spacing)) + 3
    centres = (np.arange(count) - (count - 1) / 2) * spacing + (n - 1) / 2
    bumps: Field = np.exp(-0.5 * ((np.arange(n)[:, None] - centres) / (WIDTH * spacing)) ** 2)
    return bumps
