"""From tissue to stored integers: coil, off-resonance bands, point spread, Rician noise, scaling.

What differs between vendors is in `vendors.VENDORS`; the numbers here hold for all of them and are choices by eye where
nothing else is said.
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
_BREATH_MM = 1.0  # standard deviation of a slice's shift: every slice is a breath-hold of its own
_ABOVE_BASE_MM = (0.0, 6.0)  # how far above the base a stack begins, as planned by hand
_COIL_MM = 105.0  # from the heart to the anterior coil: through the chest wall
_COIL_ANGLE = (-2.2, 0.25)  # mean and deviation in radians of where the coil lies: up and left
_COIL_JITTER = (0.85, 1.15)  # of its reach, from patient to patient
_DRIFT = 0.12  # standard deviation of the log gain over _DRIFT_MM, from the other coils
_DRIFT_MM = 120.0
_FULL_SCALE = 1.6  # magnitude that is stored as the vendor's `maximum`: about that of fat under the coil
_HEART_HALF_MM = 92.0  # half side of the window around the heart that is painted anew in every frame
_EDGE_MM = 6.0  # rim of that window given up to the blur


@dataclass(frozen=True)
class Protocol:
    """Geometry of one study: pixel side and slice distance in mm, counts, and the frames of ED and ES (0-based)."""

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
    """`image` (T, Z, H, W) int16 and `mask` (2, Z, H, W) uint8 at ED and ES."""

    image: npt.NDArray[np.int16]
    mask: npt.NDArray[np.uint8]


def squeeze_at(protocol: Protocol, frame: int) -> float:
    """Contraction in [0, 1] of a frame: exactly 0 at ED, and at its largest at ES."""
    step = ((protocol.es - protocol.ed) % protocol.frames) / protocol.frames
    return contraction(((frame - protocol.ed) % protocol.frames) / protocol.frames, step)


def acquire(rng: np.random.Generator, patient: Patient, vendor: Vendor, protocol: Protocol) -> Cine:
    """Scan a patient: every slice's surroundings once, the heart in every frame."""
    from scipy.ndimage import gaussian_filter

    p = protocol
    shape = (p.height, p.width)
    # The ventricles' common centre, left of the left ventricle's axis, goes near the middle of the image.
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
    """Multiplicative bias field (h, w), 1 at the heart: brighter towards the anterior chest wall, plus a slow drift."""
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
    """bSSFP off-resonance bands (h, w) in (0, 1]: none in the shimmed middle, dark lines crowding towards the rim.

    Balanced SSFP loses its signal wherever off-resonance reaches half a cycle a repetition time; how the field strays
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
    """Two channels (2, h, w) of noise with the vendor's deviation and correlation; wraps around."""
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
    """Magnitude with Rician noise, the vendor's curve, and integers of the vendor's range."""
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
    """Rows and columns around the heart, whose middle lies left of the grid's origin."""
    near = (np.abs(grid.x + 20) < _HEART_HALF_MM) & (np.abs(grid.y) < _HEART_HALF_MM * 0.85)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _inner(plane: Plane, rim: int) -> Plane:
    return plane[rim:-rim, rim:-rim]
