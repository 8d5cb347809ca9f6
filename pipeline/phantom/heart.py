"""The beating heart in one plane: pericardial fat, both ventricles, papillary muscles and trabeculae.

Masks are computed from the same distances as the picture, at pixel centres. As in masks of annotators, papillary
muscles and trabeculae belong to the left ventricle's blood pool, and planes above the base (atria, great vessels) have
no label.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipeline.phantom.anatomy import Patient, Section, section
from pipeline.phantom.grid import Grid
from pipeline.phantom.shapes import Plane, ellipse, inside, paint, union
from pipeline.phantom.vendors import TissueSignal

LV, MYO, RV = 1, 2, 3
_NOWHERE = 1e3  # mm: distance to a structure that is not in the plane
_RV_WALL = 3.0  # mm


class Heart:
    """Paints the heart over a window of the thorax, one slice and frame at a time."""

    def __init__(self, grid: Grid, patient: Patient, signal: TissueSignal, thickness_mm: float) -> None:
        self._grid, self._patient, self._signal = grid, patient, signal
        self._thickness = thickness_mm
        self._edge = max(grid.pixel, 1.0)

    def paint(
        self,
        canvas: Plane,
        s: float,
        squeeze: float,
        texture: npt.NDArray[np.float32],
        breath: tuple[float, float] = (0.0, 0.0),
    ) -> npt.NDArray[np.uint8]:
        """Paint the heart into `canvas`, in place, cut `s` mm below the diastolic base. Returns its mask (h, w) uint8.

        `squeeze` in [0, 1] is the contraction. `texture` is (4, h, w). `breath` (x, y) is the shift of the heart in mm
        by this slice's breath-hold.
        """
        cut = section(self._patient, s, squeeze)
        mask = np.zeros(canvas.shape, dtype=np.uint8)
        # A thick slice across the base plane averages ventricle and atrium.
        share = min(1.0, max(0.0, 0.5 - cut.above_base_mm / self._thickness))
        if share < 1:
            above = canvas.copy() if share > 0 else canvas
            self._above_base(
                above, section(self._patient, self._patient.descent * squeeze + 0.1, squeeze), texture, breath
            )
        if share > 0:
            shape = _Ventricles(self._grid, self._patient, cut, s, self._thickness, self._edge, breath)
            self._ventricles(canvas, shape, texture)
            if share < 1:
                canvas += np.float32(1 - share) * (above - canvas)
            if cut.level >= 0:
                mask = shape.mask()
        return mask

    def _ventricles(self, canvas: Plane, v: _Ventricles, texture: npt.NDArray[np.float32]) -> None:
        signal, edge, cut = self._signal, self._edge, v.cut
        if cut.epi <= 0:
            return
        self._pericardium(canvas, v.whole, texture)
        myocardium = signal.myocardium * (1 + 0.06 * texture[1] + 0.05 * texture[3])
        if cut.rv[0] > 3:
            self._right(canvas, v, myocardium, texture)
        self._coronaries(canvas, v)
        paint(canvas, inside(v.epi, v.edge_epi), myocardium)
        if cut.endo <= 0:
            return
        # Trabeculae make the blood's edge ragged towards the apex. Near the base and along the septum it is smooth.
        ragged = (1.0 + 3.2 * max(0.0, cut.level)) * (0.55 - 0.45 * v.septal)
        pool = v.endo + ragged * np.clip(0.8 * texture[1] + 0.5 * texture[0] + 0.3, 0, 2.2)
        blood = signal.blood * (1 + 0.035 * texture[3] + 0.02 * texture[2])
        paint(canvas, inside(pool, v.edge_endo), blood)
        self._papillary(canvas, v, myocardium, edge)

    def _pericardium(self, canvas: Plane, whole: Plane, texture: npt.NDArray[np.float32]) -> None:
        """Paint the epicardial fat, thick in the grooves, and the thin pericardium around it."""
        thick = self._patient.epicardial_fat_mm * (1 + 0.9 * texture[3] + 0.25 * texture[2])
        paint(canvas, inside(whole - thick - 1.6, self._edge), self._signal.muscle)
        paint(canvas, inside(whole - np.maximum(thick, 0), self._edge), -0.85 * self._signal.fat)

    def _right(self, canvas: Plane, v: _Ventricles, myocardium: Plane, texture: npt.NDArray[np.float32]) -> None:
        signal, edge, cut = self._signal, self._edge, v.cut
        paint(canvas, inside(v.rv_free - _RV_WALL, edge), myocardium)
        blood = signal.blood * (0.95 + 0.05 * texture[3] + 0.03 * texture[2])
        paint(canvas, inside(v.rv_free, v.edge_rv), blood)
        level = max(0.0, cut.level)
        free = np.clip(1 + v.rv_free / (7 + 6 * level), 0, 1)  # 1 at the free wall, 0 deep in the cavity
        grain = 0.8 * texture[1] + 0.5 * texture[0]
        strands = np.clip((grain + (0.5 + 0.9 * level) * free - 1.1) * 1.8, 0, 1) * (v.rv_free < 0)
        paint(canvas, strands * np.clip(free * 2, 0, 0.85), myocardium)
        if 0.45 < level < 0.75:  # moderator band
            band = np.abs(v.across - np.float32(6)) - np.float32(1.6)
            paint(canvas, inside(band, 1.5) * (v.rv_free < 0) * np.float32(0.7), myocardium)

    def _coronaries(self, canvas: Plane, v: _Ventricles) -> None:
        """Paint the descending coronary branches, surrounded by fat, in the grooves before and behind the septum."""
        cut, g = v.cut, self._grid
        if cut.level > 0.8 or cut.rv[0] <= 3:
            return
        for side in (-1.15, 1.1):
            angle = self._patient.septum_angle - side
            far = cut.epi + 3.2
            centre = (v.centre[0] + far * math.cos(angle), v.centre[1] + far * math.sin(angle))
            paint(canvas, inside(ellipse(g.x, g.y, centre, (4.2, 3.6)), 1.5), -0.8 * self._signal.fat)
            paint(canvas, inside(ellipse(g.x, g.y, centre, (1.6, 1.5)), self._edge), 0.8 * self._signal.blood)

    def _papillary(self, canvas: Plane, v: _Ventricles, myocardium: Plane, edge: float) -> None:
        cut, g, (first, second, size_a, size_b) = v.cut, self._grid, self._patient.papillary
        weight = min(1.0, max(0.0, (cut.level - 0.18) / 0.15)) * min(1.0, max(0.0, (0.86 - cut.level) / 0.1))
        if weight <= 0 or cut.endo < 6:
            return
        for angle, size in ((first, size_a), (second, size_b)):
            size = min(size * (1 + 0.15 * cut.contraction), 0.3 * cut.endo)
            # High in the cavity the heads are free. Lower down they are attached to the wall.
            far = max(0.0, cut.endo - size * (1.5 - 0.9 * max(0.0, cut.level - 0.3)))
            centre = (v.centre[0] + far * math.cos(angle), v.centre[1] + far * math.sin(angle))
            head = ellipse(g.x, g.y, centre, (size * 1.15, size * 0.85), angle)
            paint(canvas, inside(head, edge) * np.float32(weight), myocardium)

    def _above_base(
        self, canvas: Plane, cut: Section, texture: npt.NDArray[np.float32], breath: tuple[float, float]
    ) -> None:
        """Paint left atrium, aortic root, and the right heart's in- and outflow: bright, thin-walled, without label."""
        signal, edge, g = self._signal, self._edge, self._grid
        v = _Ventricles(g, self._patient, cut, self._patient.descent * cut.contraction, self._thickness, edge, breath)
        self._pericardium(canvas, v.whole, texture)
        c = v.centre
        grow = 1 + 0.12 * cut.contraction  # atria fill while the ventricles empty
        blood = signal.blood * (0.95 + 0.05 * texture[3])
        tall, wide = 0.62 * cut.epi * grow, 0.8 * cut.epi * grow
        atrium = ellipse(g.x, g.y, (c[0] + 6, c[1] + 9), (wide, tall), 0.35) + 1.5 * texture[3]
        appendage = ellipse(g.x, g.y, (c[0] + 20, c[1] - 20), (9, 6), 0.9)
        root = ellipse(g.x, g.y, (c[0] - 15, c[1] - 11), (14.0, 13.0), 0.5)
        right = union(
            ellipse(g.x, g.y, (c[0] - 47, c[1] + 10), (18 * grow, 27 * grow), 0.25),
            ellipse(g.x, g.y, (c[0] - 33, c[1] - 27), (18, 14), -0.6),
            14.0,
        )
        for shape, wall, flow in (
            (right + 1.5 * texture[3], 2.2, 0.95),
            (union(atrium, appendage, 8.0), 1.6, 0.97),
            (root, 2.4, 1.05),
        ):
            paint(canvas, inside(shape - wall, edge), signal.myocardium)
            paint(canvas, inside(shape, edge), flow * blood)


class _Ventricles:
    """The signed distances (h, w) to the walls of one cut, negative inside, and the widths of the edges, in mm."""

    def __init__(
        self,
        grid: Grid,
        patient: Patient,
        cut: Section,
        s: float,
        thickness: float,
        edge: float,
        breath: tuple[float, float],
    ) -> None:
        self.cut = cut
        along = s / patient.length
        # In systole the ventricle moves a little towards the chest wall.
        self.centre = (
            patient.tilt[0] * (along - 0.5) + breath[0] - 2.5 * cut.contraction,
            patient.tilt[1] * (along - 0.5) + breath[1] - 1.5 * cut.contraction,
        )
        dx, dy = grid.x - np.float32(self.centre[0]), grid.y - np.float32(self.centre[1])
        rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-4)
        cos, sin = dx / rho, dy / rho
        ux, uy = math.cos(patient.septum_angle), math.sin(patient.septum_angle)
        self.septal = cos * np.float32(ux) + sin * np.float32(uy)  # 1 towards the septum, -1 at the lateral wall
        self.across = dy * np.float32(ux) - dx * np.float32(uy)
        h = patient.harmonics
        cos2, sin2 = cos * cos - sin * sin, 2 * cos * sin
        form = 1 + h[0] * cos2 + h[1] * sin2 + h[2] * (cos2 * cos - sin2 * sin) + h[3] * (sin2 * cos + cos2 * sin)
        bulge = patient.septal_bulge * (np.clip(self.septal, 0, 1) - np.float32(1 / math.pi))
        wall = (cut.epi - cut.endo) * (1 + bulge)
        nowhere = np.full_like(rho, _NOWHERE)
        self.epi = rho - cut.epi * form if cut.epi > 0 else nowhere
        # The bulge grows inwards: outside, the septum stays round.
        self.endo = rho - (cut.epi * form - wall) if cut.endo > 0 else nowhere
        far, up = cut.rv_centre
        centre = (self.centre[0] + far * ux - up * uy, self.centre[1] + far * uy + up * ux)
        free = nowhere
        if cut.rv[0] > 3:
            a, b = cut.rv
            free = ellipse(grid.x, grid.y, centre, cut.rv, patient.septum_angle)
            # The acute margin: the cavity reaches down and out where it rests on the diaphragm.
            out, down = 0.3 * a, 0.52 * b
            corner = (centre[0] + out * ux + down * uy, centre[1] + out * uy - down * ux)
            free = union(free, ellipse(grid.x, grid.y, corner, (0.55 * a, 0.42 * b), patient.septum_angle + 0.5), 8.0)
        self.rv_free = free
        self.rv = np.maximum(free, -self.epi)
        self.whole = union(self.epi, free - _RV_WALL, 9.0)
        # Across a thick slice a slanted wall smears over thickness × slope.
        self.edge_endo = math.hypot(edge, min(12.0, thickness * abs(cut.slope_endo)))
        self.edge_epi = math.hypot(edge, min(12.0, thickness * abs(cut.slope_epi)))
        self.edge_rv = math.hypot(edge, 1.0 + 1.5 * max(0.0, cut.level))

    def mask(self) -> npt.NDArray[np.uint8]:
        """Labels (h, w) uint8: LV 1, MYO 2, RV 3."""
        mask = np.zeros(self.epi.shape, dtype=np.uint8)
        mask[self.rv < 0] = RV
        mask[self.epi < 0] = MYO
        mask[self.endo < 0] = LV
        return mask
