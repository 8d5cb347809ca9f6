"""From tissue to stored integers: coil, off-resonance bands, point spread, Rician noise, scaling.

Numbers that differ between vendors are in `vendors.VENDORS`. The numbers here hold for all vendors. Without a stated
source they were chosen by eye.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.phantom.anatomy import Patient, contraction
from pipeline.phantom.grid import Grid, Texture, make_grid
from pipeline.phantom.heart import Heart
from pipeline.phantom.shapes import Plane
from pipeline.phantom.thorax import Habitus, Thorax
from pipeline.phantom.vendors import Vendor

SYSTOLE = 0.36  # share of the beat from ED to ES; in nine ACDC studies, median 0.37 (0.29 to 0.50)
_BREATH_MM = 1.0  # standard deviation of a slice's shift, since every slice is a separate breath-hold
_ABOVE_BASE_MM = (0.0, 6.0)  # range of the distance above the base at which a stack begins
_COIL_MM = 105.0  # from the heart through the chest wall to the anterior coil
_COIL_ANGLE = (-2.2, 0.25)  # mean and standard deviation of the coil's direction in radians: up and to the left
_COIL_JITTER = (0.85, 1.15)  # range of the factor on the coil's reach, for each patient
_DRIFT = 0.12  # standard deviation of the log gain over _DRIFT_MM, caused by the other coils
_DRIFT_MM = 120.0
_FULL_SCALE = 1.6  # magnitude that is stored as the vendor's `maximum`: about that of fat under the coil
_HEART_HALF_MM = 92.0  # half side of the window around the heart, which is painted again in every frame
_EDGE_MM = 6.0  # rim of that window that is not used, because the blur spoils it


@dataclass(frozen=True)
class Protocol:
    """Geometry of one study: lengths in mm, counts, and the frames of ED and ES, from 0.

    `spacing_mm` is the distance of slices from centre to centre.
    """

    pixel_mm: float
    height: int
    width: int
    slices: int
    thickness_mm: float
    spacing_mm: float
    frames: int
    ed: int
    es: int


@dataclass(frozen=True)
class Cine:
    """A scanned study: `image` (T, Z, H, W) int16, and `mask` (2, Z, H, W) uint8 at ED and at ES."""

    image: npt.NDArray[np.int16]
    mask: npt.NDArray[np.uint8]


def squeeze_at(protocol: Protocol, frame: int) -> float:
    """The contraction in [0, 1] of a frame: 0 at ED, 1 at ES."""
    step = ((protocol.es - protocol.ed) % protocol.frames) / protocol.frames
    return contraction(((frame - protocol.ed) % protocol.frames) / protocol.frames, step)


def acquire(rng: np.random.Generator, patient: Patient, vendor: Vendor, protocol: Protocol) -> Cine:
    """Scan a patient. In every slice, the thorax is painted once, the heart in every frame."""
    from scipy.ndimage import gaussian_filter

    p = protocol
    shape = (p.height, p.width)
    # The common centre of both ventricles, left of the left ventricle's axis, is placed near the image's centre.
    origin = (patient.shift[0] + 20.0, patient.shift[1])
    grid = make_grid(shape, p.pixel_mm, origin, patient.rotation)
    texture = Texture(rng, shape, p.pixel_mm)
    thorax = Thorax(grid, patient, Habitus.draw(rng), vendor.signal)
    rows, columns = _window(grid)
    heart = Heart(grid.crop(rows, columns), patient, vendor.signal, p.thickness_mm)
    gain = coil_gain(rng, grid, vendor) * bands(rng, grid)
    scale = float(rng.uniform(*vendor.maximum)) / _FULL_SCALE
    sigma = vendor.blur_mm / p.pixel_mm
    rim = max(1, math.ceil(_EDGE_MM / p.pixel_mm))
    first = -float(rng.uniform(*_ABOVE_BASE_MM))
    image = np.empty((p.frames, p.slices, *shape), dtype=np.int16)
    mask = np.zeros((2, p.slices, *shape), dtype=np.uint8)
    visible = _visible(vendor, grid, shape)
    for k in range(p.slices):
        s = first + k * p.spacing_mm
        fields = texture.rolled(rng)
        background = thorax.paint(s / patient.length, fields)
        blurred = gaussian_filter(background, sigma, truncate=3.0)
        noise = _noise(rng, shape, vendor)
        breath = (float(rng.normal(0, _BREATH_MM)), float(rng.normal(0, _BREATH_MM)))
        near = np.ascontiguousarray(fields[:, rows, columns])
        for t in range(p.frames):
            window = background[rows, columns].copy()
            labels = heart.paint(window, s, squeeze_at(p, t), near, breath)
            picture = blurred.copy()
            _inner(picture[rows, columns], rim)[...] = _inner(gaussian_filter(window, sigma, truncate=3.0), rim)
            move = (int(rng.integers(p.height)), int(rng.integers(p.width)))
            image[t, k] = _store(picture, gain, np.roll(noise, move, axis=(1, 2)), vendor, scale, visible)
            if t in (p.ed, p.es):
                mask[0 if t == p.ed else 1, k][rows, columns] = labels
    return Cine(image, mask)


def coil_gain(rng: np.random.Generator, grid: Grid, vendor: Vendor) -> Plane:
    """Multiplicative bias field (h, w), 1 at the heart: brighter towards the anterior chest wall, with a slow drift."""
    angle = float(rng.normal(*_COIL_ANGLE))
    x, y = _COIL_MM * math.cos(angle), _COIL_MM * math.sin(angle)
    far = np.sqrt((grid.x - np.float32(x)) ** 2 + (grid.y - np.float32(y)) ** 2)
    reach = vendor.coil_reach_mm * float(rng.uniform(*_COIL_JITTER))
    gain = 1 + np.float32(vendor.coil) * np.exp(-((far / np.float32(reach)) ** 2))
    drift = float(rng.normal(0, _DRIFT)) * grid.x / _DRIFT_MM + float(rng.normal(0, _DRIFT)) * grid.y / _DRIFT_MM
    at_heart = 1 + vendor.coil * math.exp(-((_COIL_MM / reach) ** 2))
    field: Plane = (gain * np.exp(drift) / np.float32(at_heart)).astype(np.float32)
    return field


def bands(rng: np.random.Generator, grid: Grid) -> Plane:
    """bSSFP off-resonance bands (h, w) in (0, 1]: none in the shimmed centre, more and more dark lines towards the rim.

    Balanced SSFP loses its signal where off-resonance reaches half a cycle per repetition time. How the field changes
    towards the rim is a choice, since no vendor's shim is public.
    """
    angle = float(rng.uniform(-0.4, 1.2))
    across = grid.x * np.float32(math.cos(angle)) + grid.y * np.float32(math.sin(angle))
    far = np.sqrt((grid.x + 15) ** 2 + (grid.y - 10) ** 2)
    phase = (
        np.clip(far / 118 - 0.75, 0, None) ** 2 * np.float32(16)
        + np.clip(np.abs(across) / 150 - 0.7, 0, None) ** 2 * 30
    )
    dip = np.abs(np.cos(phase))
    kept: Plane = np.minimum(1, 0.12 + 1.9 * dip).astype(np.float32)
    return kept


def _noise(rng: np.random.Generator, shape: tuple[int, int], vendor: Vendor) -> npt.NDArray[np.float32]:
    """Periodic noise (2, h, w), real and imaginary part, with the vendor's standard deviation and correlation."""
    from scipy.ndimage import gaussian_filter

    noise = rng.standard_normal((2, *shape), dtype=np.float32)
    if vendor.noise_corr_px > 0:
        noise = gaussian_filter(noise, (0, vendor.noise_corr_px, vendor.noise_corr_px), mode="wrap", truncate=3.0)
        noise /= noise.std()
    noise *= np.float32(vendor.noise * vendor.signal.blood)
    return noise


def _store(
    picture: Plane, gain: Plane, noise: npt.NDArray[np.float32], vendor: Vendor, scale: float, visible: Plane | None
) -> npt.NDArray[np.int16]:
    """The stored image (h, w) int16: the magnitude with Rician noise, the vendor's curve, and the vendor's range."""
    real = picture * gain + noise[0]
    magnitude = np.sqrt(real * real + noise[1] * noise[1])
    if vendor.gamma != 1:
        magnitude **= np.float32(vendor.gamma)
    if visible is not None:
        magnitude *= visible
    magnitude *= np.float32(scale)
    stored: npt.NDArray[np.int16] = np.clip(np.rint(magnitude), 0, 32767).astype(np.int16)
    return stored


def _visible(vendor: Vendor, grid: Grid, shape: tuple[int, int]) -> Plane | None:
    if not vendor.circular:
        return None
    y, x = np.ogrid[: shape[0], : shape[1]]
    radius = np.hypot(y - (shape[0] - 1) / 2, x - (shape[1] - 1) / 2)
    circle: Plane = (radius < min(shape) / 2).astype(np.float32)
    return circle


def _window(grid: Grid) -> tuple[slice, slice]:
    """The rows and columns around the heart, whose centre lies left of the grid's origin."""
    near = (np.abs(grid.x + 20) < _HEART_HALF_MM) & (np.abs(grid.y) < _HEART_HALF_MM * 0.85)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _inner(plane: Plane, rim: int) -> Plane:
    return plane[rim:-rim, rim:-rim]
