"""One patient: body habitus, pose, ventricles and how they beat. Lengths are in mm, angles in radians.

The left ventricle is a pair of half ellipsoid-like shells along the long axis `s`, which is 0 at the base in end
diastole and grows towards the apex. In systole the base plane descends, and the epicardial apex stays. The volume of
the myocardium is constant and gives the outer radius at any time. So walls thicken only because the cavity shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

PATHOLOGIES: Final = ("NOR", "DCM", "HCM")  # healthy, dilated, hypertrophic; subjects get them in turn

_TAPER = 0.07  # share by which the radius narrows towards the mitral annulus
_RV_END = 0.9  # end of the right ventricle, as a share of the left ventricle's length


@dataclass(frozen=True)
class Patient:
    """The properties of a patient, which do not depend on the scanner. `pathology` is M&Ms' code."""

    pathology: str
    sex: str
    age: int
    height_cm: float
    weight_kg: float
    scale: float  # linear size of the thorax, about 1
    rotation: float  # in-plane, of heart and thorax
    shift: tuple[float, float]  # of the heart from the image's centre
    tilt: tuple[float, float]  # drift of the left ventricle's centre from base to apex
    fat_mm: float  # subcutaneous
    epicardial_fat_mm: float
    length: float  # base to epicardial apex in end diastole
    radius_ed: float  # of the cavity at its widest
    wall_ed: float
    apex_wall: float
    septal_bulge: float  # extra septal thickness, as a share of the wall
    ejection: float
    descent: float  # of the base plane in systole
    rv_size: tuple[float, float]  # semi-axes of the right ventricle's free-wall ellipse at the base
    rv_squeeze: float  # share of its short axis lost in systole
    septum_angle: float  # direction from the left to the right ventricle
    harmonics: tuple[float, ...]  # cos 2θ, sin 2θ, cos 3θ, sin 3θ of the contour
    papillary: tuple[float, float, float, float]  # two angles, two radii


def draw_patient(rng: np.random.Generator, pathology: str) -> Patient:
    """Draw a patient with this pathology ("NOR", "DCM" or "HCM"). Sizes follow published normal and diseased ranges."""
    sex = "M" if rng.random() < 0.55 else "F"
    height = rng.normal(177 if sex == "M" else 164, 6)
    bmi = float(np.clip(rng.normal(26, 3.5), 18, 38))
    scale = float(height / 171 * (1 + 0.03 * rng.normal()))
    heart = scale * (1.03 if sex == "M" else 0.96)
    radius, wall, ejection, bulge, descent = {
        "NOR": (24.5, 8.2, 0.61, 0.06, 12.0),
        "DCM": (32.0, 7.8, 0.29, 0.0, 6.0),
        "HCM": (22.5, 13.5, 0.68, 0.32, 10.0),
    }[pathology]
    jitter = rng.normal(size=16)
    return Patient(
        pathology=pathology,
        sex=sex,
        age=int(np.clip(rng.normal(52, 15), 18, 84)),
        height_cm=round(float(height), 1),
        weight_kg=round(bmi * (float(height) / 100) ** 2, 1),
        scale=scale,
        rotation=0.2 * float(np.clip(jitter[0], -2, 2)),
        shift=(8.0 * float(np.clip(jitter[1], -1.8, 1.8)), 8.0 * float(np.clip(jitter[2], -1.8, 1.8))),
        tilt=(5.0 * float(jitter[3]) + 4.0, 4.0 * float(jitter[4]) + 3.0),
        fat_mm=float(np.clip(11 + 1.5 * (bmi - 26) + (4 if sex == "F" else 0), 6, 34)),
        epicardial_fat_mm=float(np.clip(2.4 + 0.25 * (bmi - 26) + 0.5 * jitter[5], 1.0, 6.5)),
        length=heart * (88.0 + (6.0 if pathology == "DCM" else 0.0) + 2.5 * float(jitter[6])),
        radius_ed=heart * (radius + 1.3 * float(np.clip(jitter[7], -1.8, 1.8))),
        wall_ed=heart * (wall + 0.6 * float(np.clip(jitter[8], -1.8, 1.8))),
        apex_wall=heart * 0.75 * wall,
        septal_bulge=bulge * float(1 + 0.4 * np.clip(jitter[9], -1.5, 1.5)),
        ejection=float(np.clip(ejection + 0.04 * jitter[10], 0.15, 0.75)),
        descent=heart * descent * float(1 + 0.12 * np.clip(jitter[11], -2, 2)),
        rv_size=(heart * (32.5 + 2.5 * float(np.clip(jitter[12], -2, 2))), heart * (40 + 2 * float(jitter[13]))),
        rv_squeeze=(0.22 if pathology == "DCM" else 0.42) + 0.03 * float(np.clip(jitter[14], -2, 2)),
        septum_angle=math.pi + 0.14 * float(np.clip(jitter[15], -2, 2)) + 0.12,
        harmonics=tuple(float(h) for h in rng.normal(size=4) * (0.025, 0.025, 0.012, 0.012)),
        papillary=(
            float(-0.75 + 0.15 * rng.normal()),
            float(1.25 + 0.15 * rng.normal()),
            heart * float(rng.uniform(4.0, 5.6)),
            heart * float(rng.uniform(4.0, 5.6)),
        ),
    )


def contraction(phase: float, systole: float) -> float:
    """The contraction in [0, 1]: 0 in end diastole, 1 at the end of systole.

    `phase`, in [0, 1), and `systole`, in (0, 1), are shares of a beat. Systole is a raised cosine; rapid filling,
    diastasis and the atrial kick follow.
    """
    if phase <= systole:
        return 0.5 * (1 - math.cos(math.pi * phase / systole))
    x = (phase - systole) / (1 - systole)
    early = 0.5 * (1 + math.cos(math.pi * min(1.0, x / 0.45)))
    kick = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (x - 0.75) / 0.25))))
    return 0.8 * early + 0.2 * kick


def _profile(x: float) -> float:
    """The relative radius at a share `x` of the length from base to apex: about 1 at the widest, 0 beyond the apex."""
    if x >= 1:
        return 0.0
    taper = 1 - _TAPER * max(0.0, 1 - max(x, 0.0) / 0.3) ** 2
    return taper * math.sqrt(1 - max(x, 0.0) ** 2.4)


_VOLUME = sum(_profile((i + 0.5) / 512) ** 2 for i in range(512)) / 512


@dataclass(frozen=True)
class Section:
    """The heart, cut at one position and time.

    A radius of 0 means that the structure is not in this cut. `slope_*` are dr/ds, for the partial volume effect.
    """

    level: float  # share of the way from base to apex; negative above the base plane
    above_base_mm: float
    endo: float
    epi: float
    slope_endo: float
    slope_epi: float
    rv: tuple[float, float]  # semi-axes
    rv_centre: tuple[float, float]  # distance from the left ventricle's centre towards the septum, and across
    contraction: float


def section(patient: Patient, s: float, squeeze: float) -> Section:
    """Cut the heart of `patient` at `s` mm from the end-diastolic base, with the contraction `squeeze` in [0, 1]."""
    base = patient.descent * squeeze
    outer = patient.length - base
    thick = patient.apex_wall * (1 + 0.35 * squeeze)
    inner = outer - thick
    volume_ed = patient.radius_ed**2 * (patient.length - patient.apex_wall)
    wall_volume = (patient.radius_ed + patient.wall_ed) ** 2 * patient.length - volume_ed
    radius = math.sqrt(volume_ed * (1 - patient.ejection * squeeze) / inner)
    radius_epi = math.sqrt((wall_volume + radius**2 * inner) / outer)
    x = (s - base) / outer

    def endo(at: float) -> float:
        return radius * _profile((at - base) / inner)

    def epi(at: float) -> float:
        return radius_epi * _profile((at - base) / outer)

    y = max(0.0, x) / _RV_END
    narrow = max(0.0, 1 - y**2.2) ** 0.75
    tall = max(0.0, 1 - y**2.6) ** 0.5
    flare = max(0.0, 1 - max(0.0, x) / 0.35)
    a = patient.rv_size[0] * narrow * (1 - patient.rv_squeeze * squeeze)
    b = patient.rv_size[1] * tall * (1 - 0.45 * patient.rv_squeeze * squeeze) * (1 + 0.10 * flare)
    return Section(
        level=x,
        above_base_mm=base - s,
        endo=endo(s),
        epi=epi(s),
        slope_endo=(endo(s + 1) - endo(s - 1)) / 2,
        slope_epi=(epi(s + 1) - epi(s - 1)) / 2,
        rv=(a, b),
        rv_centre=(0.84 * epi(s), -4.0 * flare),
        contraction=squeeze,
    )
