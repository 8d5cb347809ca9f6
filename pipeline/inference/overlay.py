"""Draw a study as a picture: all slices of its frames, cropped to the heart, with the structures outlined.

It uses Pillow, because importing matplotlib would take as long as segmenting a study.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from storage.subjects import STRUCTURES

CELL, GAP, PER_LINE = 150, 4, 12  # pixels, pixels, most slices in a line
MARGIN = 0.3  # shown around the heart, as a share of its extent
LINE, LETTER = 18, 8  # pixels: height of a line of text, width of a letter at most on average
INK, PAPER, MUTED, DOUBT = (31, 41, 51), (255, 255, 255), (107, 114, 128), (200, 30, 30)
# Okabe and Ito's colours. LV is solid, MYO dashed and RV dotted, so that they can be told apart without colour.
OUTLINES = {"LV": ((213, 94, 0), 1, 1), "MYO": ((86, 180, 233), 6, 4), "RV": ((240, 228, 66), 4, 2)}


@dataclass(frozen=True)
class Row:
    """One frame: image (Z, H, W) of any intensities, mask (Z, H, W) uint8, and a title. `doubtful`: draw a border."""

    title: str
    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]
    doubtful: bool = False


def study_png(rows: Sequence[Row], lines: Sequence[str]) -> bytes:
    """The PNG of a study's frames below lines of text. Row 0 of an image is at the top, as stored."""
    slices = max(len(row.image) for row in rows)
    per_line = -(-slices // -(-slices // PER_LINE))
    width = max(per_line, 5) * (CELL + GAP) + GAP
    lines = [part for line in lines for part in textwrap.wrap(line, width // LETTER)]
    heights = [LINE + -(-len(row.image) // per_line) * (CELL + GAP) for row in rows]
    picture = Image.new("RGB", (width, GAP + (len(lines) + 1) * LINE + sum(heights)), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    top = GAP
    for line in lines:
        draw.text((GAP, top), line, INK, font)
        top += LINE
    _legend(draw, font, top)
    top += LINE
    for row, height in zip(rows, heights, strict=True):
        draw.text((GAP, top), row.title, INK, font)
        box = _box(row.mask)
        low, high = np.percentile(row.image, (1.0, 99.5))
        for z, (image, mask) in enumerate(zip(row.image, row.mask, strict=True)):
            cell = _cell(image[box], mask[box], float(low), float(high))
            y, x = divmod(z, per_line)
            at = (GAP + x * (CELL + GAP), top + LINE + y * (CELL + GAP))
            picture.paste(cell, at)
            draw.text((at[0] + 4, at[1] + 2), str(z), PAPER, font)
        if row.doubtful:
            draw.rectangle((0, top, width - 1, top + height - 2), outline=DOUBT, width=GAP - 1)
        top += height
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=3)  # the highest level would take as long as the network
    return out.getvalue()


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, top: int) -> None:
    left = GAP
    for name, (colour, period, on) in OUTLINES.items():
        for x in range(left, left + 28):
            if x % period < on:
                draw.rectangle((x, top + 7, x, top + 9), colour)
        draw.text((left + 34, top), name, MUTED, font)
        left += 84
    draw.text((left, top), "numbers: slice, from 0", MUTED, font)


def _box(mask_ZHW: npt.NDArray[np.uint8]) -> tuple[slice, slice]:
    """A square around the heart of all slices, with a margin, within the image. Without a heart, the whole slice."""
    shape = mask_ZHW.shape[1:]
    found = np.argwhere(mask_ZHW.any(0))
    if not len(found):
        return slice(0, shape[0]), slice(0, shape[1])
    low, high = found.min(0), found.max(0) + 1
    side = int(np.ceil((high - low).max() * (1 + 2 * MARGIN)))
    first = [max(0, min(int((a + b - side) // 2), n - side)) for a, b, n in zip(low, high, shape, strict=True)]
    return slice(first[0], first[0] + side), slice(first[1], first[1] + side)


def _cell(image: npt.NDArray[np.float32], mask: npt.NDArray[np.uint8], low: float, high: float) -> Image.Image:
    """Draw one slice, with its mask outlined, centred on a square of `CELL` pixels."""
    grey = np.clip((image - low) * (255.0 / max(high - low, 1e-8)), 0, 255).astype(np.uint8)
    scale = CELL / max(grey.shape)
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    drawn = np.array(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB"))
    labels = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    y, x = np.indices(labels.shape)
    for name, (colour, period, on) in OUTLINES.items():
        edge = _edge(labels == STRUCTURES[name])
        drawn[edge & ((x + y) % period < on)] = colour
    cell = Image.new("RGB", (CELL, CELL))
    cell.paste(Image.fromarray(drawn), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _edge(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The region's pixels with a neighbour above, below, left or right that is not in it."""
    p = np.pad(region, 1)
    return region & ~(p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:])
