"""The four scanners of the phantom, as one table, with the source of each number.

Below, "choice" means that no public source was found. "ACDC" means 30 of its Siemens studies (Bernard et al. 2018) and
"Sunnybrook" four of its GE studies; both were measured for this table. The columns of `VENDORS`:

* `code`, `name`, `centres`: from M&Ms (Campello et al. 2021). A is Siemens, centre 1; B is Philips, centres 2 and 3; C
  is GE, centre 4; D is Canon, centre 5.
* `areas` (pixel area, mm²): from Liu et al. 2020, Fig. 2 and section 3.3. All training data lie in 0.954–2.692; 32 of
  75 subjects of A are around 2.000; 24 of 25 of C are 2.203. D has 0.63, as native Canon headers of M&Ms do. Everything
  else (B over the low half, the rest of A over the whole range) was read off the histograms.
* `field_mm` (width of the field of view): choice. C's upper end is 256 pixels of its 2.203 mm². ACDC has 350–450,
  Sunnybrook 330–350.
* `aspect` (height / width): A has the median of ACDC, 0.84. The others have squares, as Sunnybrook's GE does.
* `circular`: C's images end in a circle, like gradient-unwarped images and two of the four Sunnybrook studies. That the
  others do not is a choice.
* `thickness_mm`, `gap_mm`: M&Ms' slices are 5–10 mm apart. The division into thickness and gap is a choice.
* `signal`: see `TissueSignal` below.
* `gamma`: choice. Vendors' reconstructions differ by a monotone curve. D's makes dark tissue brighter.
* `coil` (the gain under the anterior coil over that far from it, minus 1), `coil_reach_mm`: choices. C has the steepest
  gain, as Sunnybrook has. B has the flattest, like a reconstruction that corrects for the coil.
* `blur_mm`: standard deviation of the in-plane point spread, about 0.45 × the *acquired* pixel. A size of 1.7–2.2 mm
  for that pixel is a choice. D's pixels are interpolated by zero filling, so its blur spans several of them.
* `noise`: Rician standard deviation relative to blood. It is a choice that makes noise visible: blood has a
  signal-to-noise ratio of 28 to 45, while 29 ± 7 is reported for *myocardium* in conventional cines (PMC8147553,
  Table 1).
* `noise_corr_px`: standard deviation in pixels of the smoothing of noise by zero filling. It is 0 without interpolation
  and largest for D. The amounts are choices.
* `maximum`: the integer that stores a magnitude of 1.6, which is about that of fat under the coil. In M&Ms some volumes
  end at about 300 and others at 7,000. Raw ACDC ends at 445–4,025, Sunnybrook at 840–1,583. The assignment to vendors
  is a choice.

The columns of `TissueSignal`: balanced SSFP shows tissues in the order of T2/T1, and fat in opposite phase to water
(Scheffler and Hennig, MRM 49:395, 2003). Textbook T2/T1 at 1.5 T are `fluid` 0.5, `fat` 0.3, `blood` 0.15, `liver` 0.08
and `muscle` 0.06. Every scanner here has fluid > blood > spleen > myocardium ≥ liver > muscle > lung. The levels were
set by eye, and the place of fat among them is a choice.

* `blood`, `myocardium`: A and C were set by eye beside ACDC and Sunnybrook. In ACDC, the medians of myocardium and left
  cavity have a ratio of 0.35 (10th to 90th percentile 0.30 to 0.54). In written phantom files, A has 0.34, C 0.30 and,
  by choice, B 0.41 and D 0.54.
* `fat`, `muscle`, `liver`, `spleen`, `marrow`, `lung`, `fluid`: A and C were set by eye beside the same cines, which
  have no masks of these tissues. B and D are choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class TissueSignal:
    """The magnitude of each tissue before coil, noise and `gamma`: dimensionless, 0 to 1.

    `marrow` is that of the vertebrae, `fluid` that around the spinal cord. `fat` is painted in opposite phase.
    """

    blood: float
    myocardium: float
    fat: float
    muscle: float
    liver: float
    spleen: float
    marrow: float
    lung: float
    fluid: float


@dataclass(frozen=True)
class Vendor:
    """One scanner. The module's docstring has the units and sources of all fields.

    `areas` are pieces (share, low, high) of the distribution of pixel areas in mm², in ascending order. Pairs are the
    limits of a uniform distribution.
    """

    code: str
    name: str
    centres: tuple[int, ...]
    areas: tuple[tuple[float, float, float], ...]
    field_mm: tuple[float, float]
    aspect: float
    circular: bool
    thickness_mm: tuple[float, float]
    gap_mm: tuple[float, float]
    signal: TissueSignal
    gamma: float
    coil: float
    coil_reach_mm: float
    blur_mm: float
    noise: float
    noise_corr_px: float
    maximum: tuple[float, float]

    def pixel_area(self, quantile: float) -> float:
        """Pixel area in mm² at a quantile in [0, 1) of this vendor's distribution."""
        below = 0.0
        for share, low, high in self.areas:
            if quantile < below + share:
                return low + (high - low) * (quantile - below) / share
            below += share
        return self.areas[-1][2]


VENDORS: Final[dict[str, Vendor]] = {
    "A": Vendor(
        code="A",
        name="Siemens",
        centres=(1,),
        areas=((0.12, 1.20, 1.50), (0.15, 1.50, 1.95), (0.45, 1.96, 2.04), (0.28, 2.05, 2.692)),
        field_mm=(320.0, 350.0),
        aspect=0.84,
        circular=False,
        thickness_mm=(8.0, 8.0),
        gap_mm=(1.0, 2.0),
        signal=TissueSignal(0.85, 0.27, 0.88, 0.20, 0.23, 0.34, 0.36, 0.035, 0.95),
        gamma=1.00,
        coil=1.0,
        coil_reach_mm=85.0,
        blur_mm=0.80,
        noise=0.022,
        noise_corr_px=0.0,
        maximum=(280.0, 620.0),
    ),
    "B": Vendor(
        code="B",
        name="Philips",
        centres=(2, 3),
        areas=((0.45, 0.954, 1.25), (0.35, 1.25, 1.60), (0.20, 1.60, 1.90)),
        field_mm=(310.0, 340.0),
        aspect=1.0,
        circular=False,
        thickness_mm=(8.0, 8.0),
        gap_mm=(0.0, 2.0),
        signal=TissueSignal(0.90, 0.33, 0.74, 0.27, 0.31, 0.40, 0.38, 0.05, 0.92),
        gamma=0.92,
        coil=0.35,
        coil_reach_mm=120.0,
        blur_mm=0.75,
        noise=0.028,
        noise_corr_px=0.6,
        maximum=(900.0, 2400.0),
    ),
    "C": Vendor(
        code="C",
        name="GE",
        centres=(4,),
        areas=((0.04, 1.80, 1.90), (0.96, 2.203, 2.203)),
        field_mm=(340.0, 380.0),
        aspect=1.0,
        circular=True,
        thickness_mm=(8.0, 8.0),
        gap_mm=(0.0, 2.0),
        signal=TissueSignal(0.74, 0.24, 0.95, 0.22, 0.24, 0.38, 0.40, 0.03, 0.82),
        gamma=1.12,
        coil=1.25,
        coil_reach_mm=85.0,
        blur_mm=0.95,
        noise=0.034,
        noise_corr_px=0.5,
        maximum=(1200.0, 4200.0),
    ),
    "D": Vendor(
        code="D",
        name="Canon",
        centres=(5,),
        areas=((1.0, 0.63, 0.63),),
        field_mm=(300.0, 320.0),
        aspect=1.0,
        circular=False,
        thickness_mm=(8.0, 8.0),
        gap_mm=(0.0, 2.0),
        signal=TissueSignal(0.76, 0.36, 0.66, 0.31, 0.36, 0.46, 0.40, 0.08, 0.80),
        gamma=0.88,
        coil=0.8,
        coil_reach_mm=100.0,
        blur_mm=1.0,
        noise=0.036,
        noise_corr_px=1.1,
        maximum=(3000.0, 7000.0),
    ),
}
