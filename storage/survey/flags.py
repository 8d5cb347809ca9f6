"""Flags what looks wrong in a survey, or unlike the rest: few checks, each with a number and why it matters.

A flag does not stop a subject from entering; the subjects that do not enter are in `Survey.skipped`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from storage.layouts.structures import MaskContents, NeverDrawn, declaring, described, never_drawn
from storage.subjects import ALL_STRUCTURES
from storage.survey.survey import SubjectFacts

Range = tuple[float, float]

# A limit without a source is our choice: wider than M&Ms, ACDC and Sunnybrook, so that a value outside deserves a look.
PIXEL_AREA_MM2: Range = (0.3, 4.0)
SEEN_AREA_TOLERANCE = 0.1  # part of an area; 5 % of a length
ANISOTROPY = 0.02  # longer pixel side over the shorter one, minus 1
SLICE_DISTANCE_MM: Range = (4.0, 15.0)
SLICES: Range = (6, 20)  # M&Ms' own (Campello et al. 2021)
LV_ED_ML: Range = (30.0, 500.0)
MYO_ED_ML: Range = (20.0, 450.0)
BLOOD_TO_MUSCLE = 1.1  # mean intensity of LV over MYO; 1.4 to 3.4 in 58 ACDC volumes

MODIFIED_Z = 3.5  # Iglewicz & Hoaglin 1993, on 1.4826 × the median absolute deviation
MAD_TO_SIGMA = 1.4826
LEAST_GROUP = 8  # subjects; with fewer, neither median nor range says what is usual


@dataclass(frozen=True)
class Check:
    """What was looked at (`about`), what was found, and why it matters, in a few words each."""

    about: str
    finding: str
    why: str


@dataclass(frozen=True)
class Flag:
    """What a check found in one subject. `number` is `value` as text; `unit` follows it when it is shown."""

    check: Check
    subject: str
    vendor: str
    centre: str
    value: float
    number: str
    unit: str = ""


@dataclass(frozen=True)
class Quantity:
    """A positive number of each subject, which `of` computes. It is compared with the median of the subject's group.

    Values within a factor `least` of the median are never flagged. Otherwise, if all others are equal, a difference by
    rounding would be flagged.
    """

    about: str
    unit: str
    of: Callable[[SubjectFacts], float]
    least: float
    why: str


QUANTITIES = (
    Quantity("pixel area", "mm²", lambda s: s.pixel_area_mm2, 1.5, "another protocol, or a wrong header"),
    Quantity("slice distance", "mm", lambda s: s.spacing_mm[0], 1.5, "another protocol, or a wrong header"),
    Quantity("slices", "", lambda s: s.volumes[0].slices, 1.6, "a cut stack, or other planes in it"),
    Quantity("intensity p99.5", "", lambda s: s.p995, 4.0, "written or clipped by other software than the rest"),
    Quantity("contrast", "", lambda s: s.contrast, 1.6, "clipped or damaged intensities, or another sequence"),
)


def short(value: float) -> str:
    """A positive number in about three digits. From 100 on it is a whole number, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def flags(subjects: Sequence[SubjectFacts], ra_range_mm2: Range) -> list[Flag]:
    """All flags, sorted by check and then by subject.

    `ra_range_mm2` is the range of pixel areas, in mm², to which resolution augmentation rescales.
    """
    seen = [s.pixel_area_mm2 for s in subjects if s.labelled and s.split == "train"]
    seen_range = (min(seen), max(seen)) if len(seen) >= LEAST_GROUP else None
    found = [f for s in subjects for f in _phases(s)]
    undrawn = never_drawn([mask for s in subjects for mask in mask_contents(s)])
    found += _undrawn_flags(subjects, undrawn)
    seem_undrawn = {(u.vendor, u.centre, *pair) for u in undrawn for pair in u.absent}
    found += [f for s in subjects for f in _masks(s, seem_undrawn)]
    found += _orientation_flags(subjects)
    found += [f for s in subjects for f in _pixels(s, ra_range_mm2, seen_range)]
    found += [f for s in subjects for f in _stack(s)]
    told = {(f.subject, f.check.about) for f in found}
    for quantity in QUANTITIES:
        found += [f for f in _unlike(subjects, quantity) if (f.subject, f.check.about) not in told]
    order = {check: i for i, check in enumerate(dict.fromkeys(f.check for f in found))}
    return sorted(found, key=lambda f: (order[f.check], f.subject))


def _phases(s: SubjectFacts) -> Iterator[Flag]:
    ed, es = s.mask("ED"), s.mask("ES")
    if ed is None:
        return
    if es is not None and 0 < ed.lv_ml < es.lv_ml:
        check = Check("LV", "smaller at ED than at ES", "the phases may be swapped")
        yield _flag(check, s, ed.lv_ml / es.lv_ml, f"{ed.lv_ml:.0f} < {es.lv_ml:.0f}", "ml")
    for name, ml, usual in (("LV", ed.lv_ml, LV_ED_ML), ("MYO", ed.myo_ml, MYO_ED_ML)):
        if ml > 0 and _outside(ml, usual):
            check = Check(name, f"at ED outside {_span(usual)} ml", "a wrong voxel size, or wrong labels")
            yield _flag(check, s, ml, f"{ml:.0f}", "ml")


def mask_contents(s: SubjectFacts) -> list[MaskContents]:
    """List what each of a subject's masks holds."""
    return [
        MaskContents(s.subject, s.vendor, s.centre, v.phase, v.structures, v.mask.absent)
        for v in s.volumes
        if v.mask is not None
    ]


def _undrawn_flags(subjects: Sequence[SubjectFacts], undrawn: Sequence[NeverDrawn]) -> Iterator[Flag]:
    """Flag structures that no mask of a vendor and centre has, and subjects in which not all were drawn."""
    names = [s.subject for s in subjects]
    for u in undrawn:
        why = f"scored as missed; if nobody drew it: {declaring(u, names)}, or a table's column structures"
        check = Check("mask", f"has {u.finding}", why)
        yield from (_flag(check, s, len(u.absent), u.present) for s in subjects if s.subject in u.subjects)
    for s in subjects:
        told = {v.phase: v.structures for v in s.volumes if v.mask is not None}
        if any(names != ALL_STRUCTURES for names in told.values()):
            check = Check("mask", "said to hold some structures alone", "the others are neither taught nor scored")
            yield _flag(check, s, 0, described(told))


def _masks(s: SubjectFacts, seem_undrawn: Set[tuple[str, ...]]) -> Iterator[Flag]:
    masks = [(v.phase, v.mask) for v in s.volumes if v.mask is not None]
    missing = [
        f"{name} at {mask.phase}"
        for mask in mask_contents(s)
        for name in mask.absent
        if name in mask.structures and (s.vendor, s.centre, mask.phase, name) not in seem_undrawn
    ]
    if missing:
        check = Check("mask", "without a structure", "it is learned as background; what is found there is a failure")
        yield _flag(check, s, len(missing), ", ".join(missing))
    cut = [phase for phase, mask in masks if mask.at_border]
    if cut:
        check = Check("mask", "touches the image’s border", "the heart is cut off, or the mask is shifted")
        yield _flag(check, s, len(cut), f"at {', '.join(cut)}")
    ratio = min((mask.blood_to_muscle for _, mask in masks if mask.blood_to_muscle is not None), default=math.inf)
    if ratio < BLOOD_TO_MUSCLE:
        check = Check("mask", "where blood is no brighter than muscle", "it lies beside the heart, or this is no cine")
        yield _flag(check, s, ratio, f"{ratio:.2f}", "times")


def _orientation_flags(subjects: Sequence[SubjectFacts]) -> Iterator[Flag]:
    """Flag subjects whose headers leave the orientation in doubt, or turn them unlike most others."""
    usual = Counter(s.orientation.turn for s in subjects if s.orientation.known).most_common(1)
    for s in subjects:
        found = s.orientation
        told = "as stored" if found.turn.nothing else found.turn.words
        if found.doubt:
            yield _flag(Check("orientation", "in doubt", found.doubt), s, 0, told)
        elif found.known and found.turn != usual[0][0]:
            check = Check("orientation", "by its header unlike most", "see that its heart is upright in the picture")
            yield _flag(check, s, 0, told)


def _pixels(s: SubjectFacts, ra_range: Range, seen: Range | None) -> Iterator[Flag]:
    area, (_, row_mm, col_mm) = s.pixel_area_mm2, s.spacing_mm
    check = None
    if _outside(area, PIXEL_AREA_MM2):
        check = Check("pixel area", f"outside {_span(PIXEL_AREA_MM2)} mm²", "the header may be wrong")
    elif _outside(area, ra_range):
        check = Check("pixel area", f"outside {_span(ra_range)} mm²", "RA, as in the paper, does not reach it")
    elif seen is not None and _outside(
        area, (seen[0] * (1 - SEEN_AREA_TOLERANCE), seen[1] * (1 + SEEN_AREA_TOLERANCE))
    ):
        shown = "–".join(dict.fromkeys(f"{limit:.2f}" for limit in seen))
        finding = f"outside {shown} mm² (labelled training)"
        check = Check("pixel area", finding, "only RA shows a network such pixels with labels")
    if check is not None:
        yield _flag(check, s, area, f"{area:.2f}", "mm²")
    stretched = max(row_mm, col_mm) / min(row_mm, col_mm) - 1
    if stretched > ANISOTROPY:
        check = Check("pixels", "not square", "made square, of the same area; the header may be wrong")
        yield _flag(check, s, stretched, f"{100 * stretched:.0f}", "%")


def _stack(s: SubjectFacts) -> Iterator[Flag]:
    distance = s.spacing_mm[0]
    if _outside(distance, SLICE_DISTANCE_MM):
        check = Check("slice distance", f"outside {_span(SLICE_DISTANCE_MM)} mm", "distances in mm follow from it")
        yield _flag(check, s, distance, short(distance), "mm")
    count = next((v.slices for v in s.volumes if _outside(v.slices, SLICES)), None)
    if count is not None:
        check = Check("slices", f"outside {_span(SLICES)}", "a cut stack, or other planes in it")
        yield _flag(check, s, count, str(count))


def _unlike(subjects: Sequence[SubjectFacts], quantity: Quantity) -> Iterator[Flag]:
    """Flag robust outliers among a vendor's subjects of one centre, or all its subjects if the centre has too few."""
    measured = [(s, math.log(value)) for s in subjects if (value := quantity.of(s)) > 0]
    groups: dict[tuple[str, ...], list[float]] = {}
    for s, value in measured:
        groups.setdefault((s.vendor, s.centre), []).append(value)
        groups.setdefault((s.vendor,), []).append(value)
    usual = {key: _usual(values, quantity.least) for key, values in groups.items() if len(values) >= LEAST_GROUP}
    for s, value in measured:
        median, most = usual.get((s.vendor, s.centre)) or usual.get((s.vendor,)) or (value, 0.0)
        if abs(value - median) > most:
            check = Check(quantity.about, f"unlike its group’s {short(math.exp(median))}", quantity.why)
            yield _flag(check, s, math.exp(value), short(math.exp(value)), quantity.unit)


def _usual(values: list[float], least: float) -> tuple[float, float]:
    """The median of the logarithms `values`, and the largest distance from it that is not flagged."""
    median = float(np.median(values))
    spread = MODIFIED_Z * MAD_TO_SIGMA * float(np.median(np.abs(np.array(values) - median)))
    return median, max(spread, math.log(least))


def _flag(check: Check, s: SubjectFacts, value: float, number: str, unit: str = "") -> Flag:
    return Flag(check, s.subject, s.vendor, s.centre, value, number, unit)


def _outside(value: float, limits: Range) -> bool:
    return not limits[0] <= value <= limits[1]


def _span(limits: Range) -> str:
    return f"{limits[0]:g}–{limits[1]:g}"
