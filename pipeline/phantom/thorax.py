"""The surroundings of the heart in a short-axis plane: chest wall, lungs, liver, stomach, spleen, spine, great vessels.

As in a clinical short-axis view, anterior is up and to the left, the liver is lower left, and the spine lower right.
Water is painted positive and fat negative, because bSSFP shows them in opposite phase. In this way, blurring and
then taking the magnitude gives the dark line between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.phantom.anatomy import Patient
from pipeline.phantom.grid import Grid
from pipeline.phantom.shapes import Plane, ellipse, inside, paint, union
from pipeline.phantom.vendors import TissueSignal

_CENTRE = (14.0, 14.0)
_CAVITY_RADII = (96.0, 106.0)


@dataclass(frozen=True)
class Habitus:
    """Random numbers of one thorax, drawn once for a patient and used in all slices. Lengths are in mm."""

    wobble: tuple[float, ...]
    ribs: tuple[tuple[float, float, float], ...]  # direction and half length in radians, relative thickness
    liver: tuple[float, float]
    spine: tuple[float, float]
    stomach_air: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Habitus:
        """Draw the numbers of one thorax."""
        return cls(
            tuple(float(v) for v in rng.normal(size=8)),
            tuple(
                (
                    2 * math.pi * i / 9 + float(rng.normal(0, 0.12)),
                    float(rng.uniform(0.06, 0.15)),
                    float(rng.uniform(0.7, 1.1)),
                )
                for i in range(9)
            ),
            (float(rng.normal(0, 6)), float(rng.normal(0, 5))),
            (float(rng.normal(0, 5)), float(rng.normal(0, 4))),
            float(rng.random()),
        )


class Thorax:
    """Paints the static surroundings of a study, slice by slice."""

    def __init__(self, grid: Grid, patient: Patient, habitus: Habitus, signal: TissueSignal) -> None:
        size = np.float32(1 / patient.scale)
        self._x, self._y = grid.x * size, grid.y * size
        self._edge = max(grid.pixel, 1.2)
        self._patient, self._habitus, self._signal = patient, habitus, signal
        w = habitus.wobble
        dx, dy = self._x - np.float32(_CENTRE[0] + 4 * w[7]), self._y - np.float32(_CENTRE[1] + 4 * w[2])
        self._rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
        theta = np.arctan2(dy, dx)
        self._cos, self._sin = cos, sin = dx / self._rho, dy / self._rho
        oval = (np.abs(cos / _CAVITY_RADII[0]) ** 2.3 + np.abs(sin / _CAVITY_RADII[1]) ** 2.3) ** np.float32(-1 / 2.3)
        self._radius = oval * (
            1 + np.float32(0.04 * w[0]) * np.cos(2 * theta + 0.5) + np.float32(0.025 * w[1]) * np.cos(3 * theta + w[2])
        )
        # Muscle is thick towards the shoulder (up and right) and the back (down), thin over the anterior ribs.
        shoulder, back = np.clip(np.cos(theta + np.float32(0.9)), 0, 1), np.clip(sin, 0, 1)
        self._muscle = 14 + 14 * shoulder**3 + 12 * back**3 + 2 * np.cos(3 * theta + np.float32(w[5]))
        # Fat is thick over the breast and the flank.
        self._fat = np.float32(patient.fat_mm) * (
            1.15
            + 0.35 * np.cos(theta - 2.7 + 0.2 * w[3])
            + 0.3 * np.cos(2 * theta + 0.8 * w[4])
            + 0.15 * np.cos(3 * theta + w[6])
        )

    def paint(self, z: float, texture: npt.NDArray[np.float32]) -> Plane:
        """The signed signal (h, w) float32 at `z`, the share of the way from base to apex. `texture` is (4, h, w)."""
        canvas = np.zeros_like(self._x)
        cavity = self._rho - self._radius * np.float32(1 - 0.04 * (z - 0.5)) - 1.2 * texture[3]
        muscle = self._chest_wall(canvas, cavity, z, texture)
        self._lung(canvas, cavity, texture)
        self._abdomen(canvas, cavity, z, texture)
        self._spine(canvas, inside(muscle + 1, 3), texture)
        self._vessels(canvas, z, texture)
        return canvas

    def _chest_wall(self, canvas: Plane, cavity: Plane, z: float, texture: npt.NDArray[np.float32]) -> Plane:
        """Paint skin, fat, layered muscle and ribs.

        `cavity` is the distance to the thoracic cavity in mm. Returns the distance to the inner edge of the fat.
        """
        s, edge = self._signal, self._edge
        muscle: Plane = cavity - self._muscle - 1.5 * texture[3]
        skin = cavity - self._muscle - self._fat
        paint(canvas, inside(skin - 1.8, edge), s.muscle)
        septa = 1 - 0.5 * np.clip(2 * (texture[1] - 1.7), 0, 1)
        paint(canvas, inside(skin, edge), -s.fat * (1 + 0.05 * texture[3] + 0.03 * texture[2]) * septa)
        paint(canvas, inside(muscle, edge), s.muscle * (1 + 0.15 * texture[1] + 0.08 * texture[2]))
        # Fat planes between the layers lie where a slow wave across the muscle crosses zero.
        plane = (
            np.abs(np.sin(cavity * np.float32(0.36) + 1.3 * texture[3] + 2 * self._sin)) * 3 - 0.5 - 0.5 * texture[3]
        )
        paint(canvas, inside(plane, 0.8) * inside(muscle + 1, 2) * inside(9 - cavity, 3), -0.85 * s.fat)
        lobules = np.clip((texture[2] - 1.5) * 2, 0, 1) * inside(muscle, 2)
        paint(canvas, lobules * inside(3 - cavity, 2), -0.8 * s.fat)
        flat = ((cavity - np.float32(5.5)) / np.float32(4.6)) ** 2
        for direction, length, thickness in self._habitus.ribs:
            middle = direction + 0.25 * z
            chord = 2 - 2 * (self._cos * np.float32(math.cos(middle)) + self._sin * np.float32(math.sin(middle)))
            rib = np.sqrt(np.abs(chord) / np.float32(length**2) + flat / np.float32(thickness**2)) - 1
            paint(canvas, inside(rib * 4, 1.5), 0.05)
            paint(canvas, inside((rib + 0.3) * 4, 1.5), -0.42 * s.fat * (1 + 0.25 * texture[1]))
        return muscle

    def _lung(self, canvas: Plane, cavity: Plane, texture: npt.NDArray[np.float32]) -> None:
        s, edge = self._signal, self._edge
        # The lung is denser towards the back, where it is compressed.
        density = 1 + 0.25 * texture[1] + 0.35 * texture[3] + np.clip(self._y / 70, -0.3, 1.2)
        paint(canvas, inside(cavity + 1.5, edge), s.lung * np.clip(density, 0.2, None))
        # Vessels branch from the hilum, to the right of and above the heart: tubes near it, then fewer and fewer dots.
        near = np.exp(-np.sqrt((self._x - 46) ** 2 + (self._y + 8) ** 2) / 38)
        dots = np.clip((texture[0] - (2.75 - 1.3 * near)) * 1.6, 0, 1) + np.clip(
            (texture[1] - 2.5 + 1.1 * near) * 1.2, 0, 1
        )
        tubes = inside(np.abs(texture[2]) * 6 - 2.2 * near, 1.2) * np.clip(1.2 * texture[1] + 2 * near - 1.1, 0, 1)
        paint(canvas, np.clip(dots + tubes, 0, 1) * inside(cavity + 4, edge), 0.6 * s.blood)

    def _spine(self, canvas: Plane, within: Plane, texture: npt.NDArray[np.float32]) -> None:
        s, edge, (ox, oy) = self._signal, self._edge, self._habitus.spine
        x, y, cx, cy = self._x, self._y, 46 + ox, 94 + oy
        back = union(ellipse(x, y, (cx, cy + 18), (64, 44), 0.15), ellipse(x, y, (cx - 6, cy - 22), (30, 26)), 14)
        paint(canvas, inside(back + 2 * texture[3], 2) * within, s.muscle * (1.05 + 0.15 * texture[1]))
        streak = np.abs(np.sin((x + 0.5 * y) * np.float32(0.22) + 1.4 * texture[3])) * 4 - 0.9
        streak += 1.5 * np.clip(0.6 - texture[2], 0, 2)
        paint(canvas, inside(streak, 1.6) * inside(back + 9, 4) * inside(cy + 14 - y, 6) * within, -0.7 * s.fat)
        around = ellipse(x, y, (cx - 2, cy - 12), (25, 20)) + 2.5 * texture[2] + 3
        paint(canvas, inside(around, 2), -0.6 * s.fat)
        body = ellipse(x, y, (cx, cy - 4), (20, 15.5)) + 0.6 * texture[3]
        paint(canvas, inside(body, edge), 0.04)
        paint(canvas, inside(body + 1.8, edge), s.marrow * (1 + 0.12 * texture[1] + 0.06 * texture[2]))
        canal = ellipse(x, y, (cx + 3, cy + 19), (9, 7.5))
        paint(canvas, inside(canal - 1.6, edge), 0.05)
        paint(canvas, inside(canal, edge), s.fluid)
        paint(canvas, inside(ellipse(x, y, (cx + 3, cy + 19), (4.6, 3.8)), edge), 0.45 * s.fluid)
        process = ellipse(x, y, (cx + 5, cy + 40), (3.5, 13), -0.12)
        paint(canvas, inside(process, edge), 0.06)
        paint(canvas, inside(process + 1.6, edge), s.marrow)

    def _abdomen(self, canvas: Plane, cavity: Plane, z: float, texture: npt.NDArray[np.float32]) -> None:
        """Paint the liver below the right ventricle, and stomach, spleen and fat, which rise towards the apex."""
        s, edge, (lx, ly) = self._signal, self._edge, self._habitus.liver
        x, y = self._x, self._y
        within = inside(cavity + 2, edge)
        rise = np.float32(28) * min(1.0, max(0.0, (z - 0.15) / 0.7))
        floor = 78 - rise - y + 0.0016 * (x - 25) ** 2 + 1.5 * texture[3]
        paint(canvas, inside(floor, 2) * within * inside(20 - x, 10), -0.8 * s.fat * (1 + 0.12 * texture[2]))
        bowel = np.abs(texture[3]) * 7 - 5.5
        paint(
            canvas,
            inside(bowel, 1.5) * inside(floor + 10, 6) * within * inside(20 - x, 10),
            s.spleen * (1 + 0.3 * texture[2]),
        )
        grown = min(1.0, max(0.0, (z - 0.2) / 0.5))
        if grown > 0.05:
            spleen = ellipse(x, y, (98, 92 - 14 * z), (22 * grown, 40 * grown), 0.35)
            paint(canvas, inside(spleen, edge) * within, s.spleen * (1 + 0.05 * texture[2]))
            stomach = ellipse(x, y, (48, 84 - 26 * z), (36 * grown, 21 * grown), -0.1) + 2.5 * texture[3]
            paint(canvas, inside(stomach, edge) * within, 1.1 * s.muscle)
            content = s.lung if self._habitus.stomach_air > 0.65 else 0.55 * s.fluid
            paint(canvas, inside(stomach + 4, 2) * within, content * (1 + 0.25 * texture[1] + 0.3 * texture[2]))
        dome = union(
            ellipse(x, y, (-48 + lx, 104 + ly - 16 * z), (66, 60 + 8 * z), -0.15),
            ellipse(x, y, (-16 + lx, 82 + ly - 24 * z), (40, 30 + 4 * z), 0.12),
            18,
        )
        paint(
            canvas,
            inside(dome + 0.8 * texture[3], edge) * within,
            s.liver * (1 + 0.05 * texture[1] + 0.05 * texture[3]),
        )
        # Hepatic and portal veins are dots, and tubes along the zero lines of a smooth field.
        dots = np.clip((texture[1] - 2.1) * 1.5, 0, 1) + np.clip((texture[2] - 2.1) * 2.0, 0, 1)
        tubes = inside(np.abs(texture[3]) * 16 - 1.7, 1.4) * np.clip(1.4 * texture[2] + 0.1, 0, 1)
        paint(canvas, np.clip(dots + tubes, 0, 0.75) * inside(dome + 9, 4) * within, 0.7 * s.blood)

    def _vessels(self, canvas: Plane, z: float, texture: npt.NDArray[np.float32]) -> None:
        """Paint the descending aorta beside the spine, the inferior caval vein at the liver's edge, the oesophagus."""
        s, edge, (ox, oy) = self._signal, self._edge, self._habitus.spine
        x, y = self._x, self._y
        for centre, radius, value in (
            ((56 + ox - 8 * z, 64 + oy + 4 * z), 11.0, s.blood),
            ((8 + ox, 70 + oy - 4 * z), 9.5, 0.8 * s.blood),
        ):
            tube = ellipse(x, y, centre, (radius, radius * 1.08))
            paint(canvas, inside(tube - 1.5, edge), 0.5 * s.myocardium)
            paint(canvas, inside(tube, edge), value * (1 + 0.04 * texture[2]))
        gullet = ellipse(x, y, (38 + ox, 58 + oy), (7, 5), 0.3)
        paint(canvas, inside(gullet, edge), s.muscle * 1.2)
        paint(canvas, inside(gullet + 3.2, edge), 0.05)
