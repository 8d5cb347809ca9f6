"""The best, the median and the worst case of an evaluation, with a few slices of each for the report."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.scores.metrics import POSITIONS, StructureScore, slice_positions

Bytes = npt.NDArray[np.uint8]

MARGIN = 0.25  # shown around the heart, as a share of its extent
KINDS = ("best", "median", "worst")


@dataclass(frozen=True)
class Example:
    """Up to three slices of a case, cut to the heart: the middle one of the basal, of the mid and of the apical slices.

    image: (n, side, side) uint8, where 0 and 255 are the volume's 1 and 99.5 percentiles. reference, prediction:
    (n, side, side) uint8 labels (LV 1, MYO 2, RV 3). slices: numbers in the volume, from 0. pixel_mm: (row, column).
    """

    subject: str
    vendor: str
    phase: str
    slices: tuple[int, ...]
    pixel_mm: tuple[float, float]
    image: Bytes
    reference: Bytes
    prediction: Bytes


def mean_dice(scores: Sequence[StructureScore]) -> float:
    """Mean Dice of a volume's structures, without NaN. NaN if no structure has a score."""
    dice = [score.dice for score in scores if not np.isnan(score.dice)]
    return float(np.mean(dice)) if dice else np.nan


def example(
    subject: str,
    vendor: str,
    phase: str,
    spacing: tuple[float, float, float],
    image_ZHW: npt.NDArray[np.float32],
    reference_ZHW: Bytes,
    prediction_ZHW: Bytes,
) -> Example:
    """Make the example of one volume. All arrays have one shape; `spacing` is (slice, row, column) in mm.

    If the reference has neither LV nor myocardium, the middle slice is shown.
    """
    positions = slice_positions(reference_ZHW)
    slices = []
    for position in POSITIONS[:3]:
        there = [z for z, p in enumerate(positions) if p == position]
        slices += there[len(there) // 2 : len(there) // 2 + 1]
    slices = slices or [len(positions) // 2]
    low, high = np.percentile(image_ZHW, (1.0, 99.5))
    box = _square((reference_ZHW > 0) | (prediction_ZHW > 0))
    grey = np.clip((image_ZHW[slices] - low) * (255.0 / max(high - low, 1e-8)), 0, 255).astype(np.uint8)
    return Example(
        subject, vendor, phase, tuple(slices), (spacing[1], spacing[2]),
        _cut(grey, box), _cut(reference_ZHW[slices], box), _cut(prediction_ZHW[slices], box),
    )  # fmt: skip


def choose(dice: Sequence[float]) -> dict[str, int]:
    """The numbers of the best, the median and the worst case. NaN is never chosen, and no case is chosen twice."""
    order = [i for i in np.argsort(dice, kind="stable").tolist() if not np.isnan(dice[i])]
    if not order:
        return {}
    picked = {"best": order[-1], "worst": order[0], "median": order[len(order) // 2]}
    first = {i: kind for kind, i in reversed(picked.items())}
    return {kind: picked[kind] for kind in KINDS if first[picked[kind]] == kind}


def pack(examples: Mapping[str, Example]) -> bytes:
    """Pack examples, by kind (`KINDS`), into the bytes of an .npz file without pickled objects."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for kind, one in examples.items():
        facts = {name: getattr(one, name) for name in ("subject", "vendor", "phase", "slices", "pixel_mm")}
        arrays |= {f"{kind}_{name}": getattr(one, name) for name in ("image", "reference", "prediction")}
        arrays[f"{kind}_facts"] = np.array(json.dumps(facts))
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(data: bytes) -> dict[str, Example]:
    """Read the examples from the bytes of `pack`."""
    found = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for kind in KINDS:
            if f"{kind}_facts" in arrays:
                facts = json.loads(str(arrays[f"{kind}_facts"]))
                facts["slices"], facts["pixel_mm"] = tuple(facts["slices"]), tuple(facts["pixel_mm"])
                images = {name: arrays[f"{kind}_{name}"] for name in ("image", "reference", "prediction")}
                found[kind] = Example(**facts, **images)
    return found


def _square(heart_ZHW: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """(top, left, side) of a square around the heart of all slices, with a margin. It may extend beyond the image.

    Without a heart, the square holds the whole image.
    """
    at = np.argwhere(heart_ZHW.any(axis=0))
    if not len(at):
        height, width = heart_ZHW.shape[1:]
        side = max(height, width)
        return (height - side) // 2, (width - side) // 2, side
    low, high = at.min(axis=0), at.max(axis=0) + 1
    side = int(np.ceil((high - low).max() * (1 + 2 * MARGIN)))
    top, left = ((low + high - side) // 2).tolist()
    return top, left, side


def _cut(stack: Bytes, box: tuple[int, int, int]) -> Bytes:
    """Cut the square out of each slice: (n, side, side), with 0 beyond the image."""
    top, left, side = box
    out = np.zeros((len(stack), side, side), dtype=np.uint8)
    rows, cols = (
        slice(max(0, start), min(start + side, n)) for start, n in zip((top, left), stack.shape[1:], strict=True)
    )
    out[:, rows.start - top : rows.stop - top, cols.start - left : cols.stop - left] = stack[:, rows, cols]
    return out
