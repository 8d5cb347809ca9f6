"""Implicit shapes in mm: signed distances (negative inside), soft edges, and painting over a canvas."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]  # (h, w)


def ellipse(x: Plane, y: Plane, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Plane:
    """Signed distance (mm) to an ellipse with semi-axes `radii`, turned by `angle` radians. Exact near the edge."""
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    a, b = np.float32(max(radii[0], 0.1)), np.float32(max(radii[1], 0.1))
    u, v = (dx * cos + dy * sin) / a, (dy * cos - dx * sin) / b
    k0 = np.sqrt(u * u + v * v) + np.float32(1e-6)
    k1 = np.sqrt((u / a) ** 2 + (v / b) ** 2) + np.float32(1e-6)
    distance: Plane = k0 * (k0 - 1) / k1
    return distance


def inside(distance: Plane, width: float) -> Plane:
    """Coverage in [0, 1]: 1 inside, 0 outside, with a linear ramp `width` mm wide across the edge (partial volume)."""
    coverage: Plane = np.clip(np.float32(0.5) - distance * np.float32(1.0 / width), 0, 1)
    return coverage


def union(a: Plane, b: Plane, radius: float) -> Plane:
    """Smooth minimum of two distances: the union of two shapes, with grooves filled up to about `radius` mm."""
    h = np.clip(np.float32(0.5) + (b - a) * np.float32(0.5 / radius), 0, 1)
    joined: Plane = b + (a - b) * h - np.float32(radius) * h * (1 - h)
    return joined


def paint(canvas: Plane, coverage: Plane, value: float | Plane) -> None:
    """Blend `value` into the canvas, in place, with `coverage` in [0, 1] as opacity."""
    canvas += coverage * (np.asarray(value, dtype=np.float32) - canvas)
