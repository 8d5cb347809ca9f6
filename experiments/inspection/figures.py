"""Pictures of the inspection page: coordinates for inline SVG, and grey PNG.

They are drawn without matplotlib, because importing it takes longer than reading thirty subjects.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.subjects import STRUCTURES
from storage.survey.flags import short
from storage.survey.survey import PICTURE_PIXELS, SubjectFacts

LEFT, RIGHT, TOP, BOTTOM = 26, 238, 8, 122  # axes of a histogram in a box of 242 × 142 SVG units
MOST_BINS, FINEST_BIN = 32, 0.05  # the narrowest bin is 0.05 mm² wide, or a ratio of 1.12
STEPS = (1, 2, 5)  # round numbers are these, times a power of ten


@dataclass(frozen=True)
class Histogram:
    """One vendor's histogram in SVG units. `bars` are (x, y, width, height), ticks are (position, label)."""

    title: str
    description: str
    bars: tuple[tuple[float, float, float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    shaded: tuple[float, float] | None  # x and width


@dataclass(frozen=True)
class Thumbnail:
    """A picture. `outlines` maps a structure to an SVG path, `labels` to the (x, y) of its name, in pixels."""

    subject: str
    caption: str
    description: str
    source: str
    size: int
    outlines: dict[str, str]
    labels: dict[str, tuple[float, float]]


def histogram(
    vendor: str,
    values: Sequence[float],
    everything: Sequence[float],
    noun: str,
    unit: str,
    log: bool,
    shaded: tuple[float, float] | None,
) -> Histogram:
    """The histogram of `values`, on an axis that holds `everything` and the range `shaded`.

    `unit` is that of the values, such as mm². With `log`, all bins have the same ratio.
    """
    edges = _edges([*everything, *(shaded or ())], log)
    held = np.clip([_scaled(v, log) for v in values], edges[0], edges[-1])  # clipped because of rounding
    counts: list[int] = np.histogram(held, edges)[0].tolist()
    most = max(counts)

    def x(scaled: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (scaled - edges[0]) / (edges[-1] - edges[0]), 1)

    def y(count: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * count / most, 1)

    bars = [
        (x(left), y(n), round(x(right) - x(left) - 0.8, 1), round(BOTTOM - y(n), 1))
        for left, right, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    ]
    middle = float(np.median(values))
    numbers = f"median {short(middle)}, {short(min(values))} to {short(max(values))} {unit}".rstrip()
    band = None if shaded is None else [x(_scaled(value, log)) for value in shaded]
    return Histogram(
        title=f"{vendor} · {len(values)} {noun if len(values) != 1 else noun[:-1]}",
        description=f"Histogram of {vendor}: {len(values)} {noun}, {numbers}",
        bars=tuple(bars),
        x_ticks=tuple((x(_scaled(value, log)), f"{value:g}") for value in _ticks(edges[0], edges[-1], log)),
        y_ticks=tuple((y(count), str(count)) for count in (0, most)),
        shaded=None if band is None else (band[0], round(band[1] - band[0], 1)),
    )


def thumbnail(subject: SubjectFacts) -> Thumbnail:
    """The picture of a subject for the page, as PNG with outlines of LV, MYO and RV."""
    picture = subject.picture
    inside = {name: picture.mask == label for name, label in STRUCTURES.items()}
    present = [name for name, region in inside.items() if region.any()]
    where = f"{picture.phase}, slice {picture.slice + 1}" if picture.phase != "-" else f"slice {picture.slice + 1}"
    shown = f"with {', '.join(present)} outlined" if present else "without labels"
    return Thumbnail(
        subject=subject.subject,
        caption=where + ("" if present else ", no labels"),
        description=f"{subject.subject}: {where}, {shown}",
        source="data:image/png;base64," + base64.b64encode(png(picture.image)).decode(),
        size=PICTURE_PIXELS,
        outlines={name: outline(inside[name]) for name in ("MYO", "RV", "LV") if name in present},
        # MYO surrounds LV, so its middle is LV's: it gets no name.
        labels={name: _middle(inside[name]) for name in ("LV", "RV") if name in present},
    )


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """The image (H, W) uint8 as a grey 8-bit PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", optimize=True)
    return out.getvalue()


def outline(region: npt.NDArray[np.bool_]) -> str:
    """SVG path along the pixel edges that bound a region (H, W). A pixel covers x = column to + 1, y = row to + 1."""
    padded = np.pad(region, 1)
    across = padded[:, 1:] != padded[:, :-1]  # [row + 1, x]: an edge that runs down at x
    along = padded[1:] != padded[:-1]  # [y, column + 1]: an edge that runs right at y
    down = (f"M{x} {start - 1}v{length}" for x, start, length in _runs(across.T))
    right = (f"M{start - 1} {y}h{length}" for y, start, length in _runs(along))
    return "".join([*down, *right])


def _runs(lines: npt.NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(line, start, length) of every run of True along the second axis."""
    steps = np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(line), int(start), int(end - start)) for (line, start), (_, end) in zip(starts, ends, strict=True)]


def _middle(region: npt.NDArray[np.bool_]) -> tuple[float, float]:
    rows, cols = np.nonzero(region)
    return round(float(cols.mean()) + 0.5, 1), round(float(rows.mean()) + 0.5, 1)


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _edges(values: Sequence[float], log: bool) -> list[float]:
    """The edges (after `_scaled`) of at most 34 bins that hold all values. The width of a bin is a round number."""
    low, high = _scaled(min(values), log), _scaled(max(values), log)
    step = _round_step(max((high - low) / MOST_BINS, FINEST_BIN))
    return [i * step for i in range(math.floor(low / step), math.floor(high / step) + 2)]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between two ends (after `_scaled`). On a short logarithmic axis they have equal distances."""
    if log and high - low > 0.5:
        steps = STEPS if high - low < 2.5 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        return [m * 10.0**k for k in powers for m in steps if low <= math.log10(m) + k <= high]
    first, last = (10**low, 10**high) if log else (low, high)
    step = _round_step((last - first) / 6)
    return [i * step for i in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (*STEPS, 10) if m * power >= least * (1 - 1e-9))
