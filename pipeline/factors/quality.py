"""How good a bank's factors are: the contrast of the myocardium they keep, and how far a swap of codes moves greys.

If a reconstruction D(a, z) loses the myocardium, training on it teaches a wrong heart under a right mask. If swapping
codes does not move grey levels as far as two vendors differ, the codes cannot stand in for a scanner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from pipeline.samples.drawing import Drawing
from pipeline.samples.plan import PlanConfig, generator
from pipeline.samples.preprocess import PreprocessConfig, working_slice
from storage.bank.anatomy_codec import unpack
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.bank.node_cache import BankView
from storage.bank.styles import modality_donors
from storage.errors import InputError
from storage.parquet import text_array
from storage.slices.store import SliceStore
from storage.subjects import STRUCTURES

FEWEST = 20  # pixels that a region needs to count in a slice
REST = "rest"  # all that is no structure
Labels = npt.NDArray[np.uint8]
Image = npt.NDArray[np.float32]
Regions = dict[str, npt.NDArray[np.bool_]]  # (H, W) each


@dataclass(frozen=True)
class Kept:
    """How well the reconstructions D(a, z) of one vendor's slices keep the image.

    error: mean absolute error in images of [-1, 1]. lv_myo, rv_myo: the contrast of LV and RV to the myocardium, over
    that of the real images; 1 means that all of it is kept. thin: as lv_myo, for the third of the slices with the
    thinnest wall.
    """

    vendor: str
    slices: int
    error: float
    lv_myo: float
    rv_myo: float
    thin: float


@dataclass(frozen=True)
class Moved:
    """Differences in the mean grey level of one region between two vendors. Images are in [-1, 1].

    region: a structure, `rest`, or the rest in one anatomy channel, such as `rest, channel 3`. real: the real images of
    `target` minus those of `source`. moved: the change of `source` images when they are drawn with codes of `target`.
    The change is the same for whole and residual drawing, before clipping.
    """

    source: str
    target: str
    region: str
    real: float
    moved: float


@dataclass(frozen=True)
class _Slice:
    vendor: str
    image: Image
    mask: Labels
    anatomy: Labels  # packed, channel c in bit c
    code: npt.NDArray[np.float32]
    drawn: Image


def quality(run: str, bank: FactorBank, a_vendor: int = 150) -> tuple[list[Kept], list[Moved]]:
    """Measure a bank with the images of its run: one `Kept` a vendor, and one `Moved` a vendor pair and region.

    Uses up to `a_vendor` labelled slices of each vendor, spread over the bank, in which LV, MYO and RV have at least 20
    pixels each. A channel that has 20 pixels of the rest in no slice of one of the vendors is left out.
    Raises InputError if the run shares no such slice with the bank.
    """
    store, preprocess = SliceStore.open(run), PreprocessConfig(**bank.spec.preprocess)
    draw = Drawing(bank, modality_donors(bank), PlanConfig())
    found = _slices(store, bank, preprocess, draw, a_vendor)
    vendors = sorted({one.vendor for one in found})
    if not vendors:
        problem = "has no labelled slice with LV, MYO and RV that is in the run"
        raise InputError(bank.uri, problem, "give the run that the bank was made from")
    of = {vendor: [one for one in found if one.vendor == vendor] for vendor in vendors}
    kept = [_kept(vendor, of[vendor]) for vendor in vendors]
    pairs = [(a, b) for a in vendors for b in vendors if a != b]
    return kept, [row for a, b in pairs for row in _moved(a, b, of[a], of[b], draw, bank.spec.channels)]


def _slices(
    store: SliceStore, bank: FactorBank, preprocess: PreprocessConfig, draw: Drawing, a_vendor: int
) -> list[_Slice]:
    slice_of, view = rows_of(store.table, bank.index), BankView(bank)
    vendors = text_array(bank.index["vendor"]).tolist()
    usable: dict[str, list[int]] = {}
    for row in np.flatnonzero((slice_of >= 0) & bank.index["labelled"].to_numpy()).tolist():
        if _has_all(view.mask[row]):
            usable.setdefault(vendors[row], []).append(row)
    out = []
    for vendor, rows in usable.items():
        for row in sorted({rows[k * len(rows) // a_vendor] for k in range(a_vendor)}):
            working = working_slice(store, int(slice_of[row]), preprocess)
            anatomy, code = view.anatomy[row], view.modality[row]
            drawn = draw.decoded(anatomy, code)
            out.append(_Slice(vendor, working.image, working.mask, anatomy, code, drawn))
    return out


def _has_all(mask: Labels) -> bool:
    counts = np.bincount(mask.ravel(), minlength=4)
    return bool((counts[1:4] >= FEWEST).all())


def _structures(mask: Labels) -> Regions:
    return {name: mask == label for name, label in STRUCTURES.items()} | {REST: mask == 0}


def _regions(one: _Slice, channels: int) -> Regions:
    """The structures, the rest, and the rest in each of the anatomy's channels."""
    found = _structures(one.mask)
    apart = enumerate(unpack(one.anatomy, channels).astype(bool))
    return found | {f"{REST}, channel {c}": found[REST] & there for c, there in apart}


def _levels(image: Image, regions: Regions) -> dict[str, float]:
    """The mean grey level of each region; NaN where a region has fewer than `FEWEST` pixels."""
    return {n: float(image[r].mean()) if np.count_nonzero(r) >= FEWEST else np.nan for n, r in regions.items()}


def _wall(mask: Labels) -> float:
    """Mean thickness of the myocardium in pixels.

    In a strip, the thickness is four times the mean distance to the edge. The distance transform measures to the
    nearest pixel outside, which lies half a pixel beyond the edge.
    """
    inside = mask == STRUCTURES["MYO"]
    return 4.0 * (float(distance_transform_edt(inside)[inside].mean()) - 0.5)


def _kept(vendor: str, slices: Sequence[_Slice]) -> Kept:
    structures = [_structures(one.mask) for one in slices]
    real = [_levels(one.image, regions) for one, regions in zip(slices, structures, strict=True)]
    drawn = [_levels(one.drawn, regions) for one, regions in zip(slices, structures, strict=True)]
    walls = np.array([_wall(one.mask) for one in slices])
    thin = np.flatnonzero(walls <= np.quantile(walls, 1 / 3))

    def share(structure: str, chosen: Sequence[int]) -> float:
        contrasts = [np.mean([levels[k][structure] - levels[k]["MYO"] for k in chosen]) for levels in (drawn, real)]
        return float(contrasts[0] / contrasts[1])

    every = range(len(slices))
    error = float(np.mean([np.abs(one.drawn - one.image).mean() for one in slices]))
    return Kept(vendor, len(slices), error, share("LV", every), share("RV", every), share("LV", thin.tolist()))


def _moved(
    source: str, target: str, ours: Sequence[_Slice], theirs: Sequence[_Slice], draw: Drawing, channels: int
) -> list[Moved]:
    rng = generator(0, "quality")
    changes = []
    for one in ours:
        code, regions = theirs[int(rng.integers(len(theirs)))].code, _regions(one, channels)
        swapped, own = _levels(draw.decoded(one.anatomy, code), regions), _levels(one.drawn, regions)
        changes.append({name: swapped[name] - own[name] for name in regions})
    real = [[_levels(o.image, _regions(o, channels)) for o in of] for of in (ours, theirs)]
    at_source, at_target, moved = (_means(levels) for levels in (*real, changes))
    there = [name for name in moved if name in at_source and name in at_target]
    return [Moved(source, target, name, at_target[name] - at_source[name], moved[name]) for name in there]


def _means(levels: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each region over the slices in which it counts. A region that counts in none is left out."""
    found = {name: [one[name] for one in levels if not np.isnan(one[name])] for name in levels[0]}
    return {name: float(np.mean(values)) for name, values in found.items() if values}
