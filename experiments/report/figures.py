"""The style of all figures, and the figures of images and resolutions, each as PNG bytes.

The first colours are those of Okabe and Ito, which differ for colour-blind readers too. An arm has the same colour and
marker in every figure. Nothing here changes matplotlib's global state or needs a display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.report.paper_table import ARM_LABELS, BEYOND_LABELS, FACTOR_LABELS, FIELD_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The range of pixel areas in the paper's training data, from which RA draws.
RA_RANGE_MM2 = (0.954, 2.692)

_PAPER_STYLE = dict(
    zip(
        ARM_LABELS,
        (("#6E6E6E", "s"), ("#E69F00", "o"), ("#0072B2", "^"), ("#009E73", "D"), ("#CC79A7", "v")),
        strict=True,
    )
)
_OTHER_COLOURS = ("#56B4E9", "#D55E00", "#332288", "#882255")
_OTHER_STYLES = tuple((_OTHER_COLOURS[i % 4], marker) for i, marker in enumerate("PX<>*phHd8"))
_BEYOND_STYLE = dict(zip(BEYOND_LABELS, _OTHER_STYLES, strict=True))
_SPARE_STYLES = ((c, m) for m in "oDv^sPX<>*phHd8" for c in _OTHER_COLOURS if (c, m) not in _OTHER_STYLES)
_FACTOR_STYLE = dict(zip(FACTOR_LABELS, _SPARE_STYLES, strict=False))  # more pairs than arms
_FIELD_STYLES = ((c, m) for m in "oDv^sPX<>*" for c in ("#117733", "#AA4499"))
_FIELD_STYLE = dict(zip(FIELD_LABELS, _FIELD_STYLES, strict=False))  # more pairs than arms
OUTLINES = (("#D55E00", "solid"), ("#56B4E9", "dashed"), ("#F0E442", "dotted"))  # of LV, MYO, RV
_VENDOR_COLOUR = "#3B6EA5"
INK, MUTED, GRID = "#1F2933", "#6B7280", "#E5E7EB"
_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#B8BEC7",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm, the same in every figure. An unknown arm gets a pair that depends on its name."""
    known = _PAPER_STYLE | _BEYOND_STYLE | _FACTOR_STYLE | _FIELD_STYLE
    return known.get(arm) or _OTHER_STYLES[sum(arm.encode()) % len(_OTHER_STYLES)]


def resolution_histograms(areas: Mapping[str, Sequence[float]]) -> bytes:
    """Histograms of pixel area (mm²) by vendor, a value per subject, as in the paper's Fig. 2; RA's range is shaded."""
    vendors = sorted(areas)
    everything = np.concatenate([np.asarray(areas[vendor], dtype=np.float64) for vendor in vendors])
    bins = np.linspace(min(everything.min(), RA_RANGE_MM2[0]) - 0.1, max(everything.max(), RA_RANGE_MM2[1]) + 0.1, 28)
    with drawing(max(4.0, 2.9 * len(vendors)), 2.6, 1, len(vendors), sharex=True) as (figure, axes, png):
        for vendor, axis in zip(vendors, axes.flat, strict=True):
            axis.axvspan(*RA_RANGE_MM2, color="#F3F4F6", zorder=0)
            axis.hist(
                np.asarray(areas[vendor]), bins=bins.tolist(), color=_VENDOR_COLOUR, edgecolor="white", linewidth=0.8
            )
            axis.set_title(f"{vendor}  ·  {_plural(len(areas[vendor]), 'subject')}")
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.grid(axis="x", visible=False)
        axes.flat[0].set_ylabel("subjects")
        figure.supxlabel("pixel area, mm²   (shaded: the range the paper rescales to)", fontsize=9, color=MUTED)
    return png.getvalue()


def fa_mosaic(
    anatomy_AHW: npt.NDArray[np.floating[Any]],
    modality_MHW: npt.NDArray[np.floating[Any]] | None,
    generated: Mapping[str, npt.NDArray[np.floating[Any]]],
    anatomy_titles: Sequence[str],
    modality_titles: Sequence[str],
) -> bytes:
    """Factor-based augmentation as a matrix, as in the paper's Fig. 1(c): rows give the anatomy, columns the modality.

    `generated` is {title: (A, M, H, W)}, one matrix for each way of rendering; the matrices stand side by side. Images
    are floats on one scale (here [-1, 1]) and share one grey window: the 0.5 to 99.5 percentiles of the originals.
    If `modality_MHW` is None, a column has only its title, because a donor's image may not be shown to everybody.
    """
    a, m = len(anatomy_AHW), len(modality_titles)
    originals = [anatomy_AHW.ravel()] + ([] if modality_MHW is None else [modality_MHW.ravel()])
    window = np.percentile(np.concatenate(originals), (0.5, 99.5))
    top_row = 0.4 if modality_MHW is None else 1.0  # height of the top row, in cells
    # A narrow empty row, and an empty column before each block, separate the originals from the generated images.
    widths, columns = [1.0] + [0.12, *[1.0] * m] * len(generated), 1 + (m + 1) * len(generated)
    gaps = {"width_ratios": widths, "height_ratios": [top_row, 0.12] + [1] * a, "wspace": 0.04, "hspace": 0.04}
    cell, margin, head = 1.5, 0.35, 0.6  # inches
    width = margin + cell * (sum(widths) + 0.1)
    height = head + cell * (a + 0.2 + top_row) * anatomy_AHW.shape[1] / anatomy_AHW.shape[2]
    with drawing(width, height, a + 2, columns, layout=None, gridspec_kw=gaps) as (figure, axes, png):
        figure.subplots_adjust(left=margin / width, right=0.995, top=1 - head / height, bottom=0.005)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, image in enumerate(anatomy_AHW):
            _picture(axes[row + 2, 0], image, window, side=anatomy_titles[row])
        for block, (title, made_AMHW) in enumerate(generated.items()):
            first = 2 + block * (m + 1)
            for column, name in enumerate(modality_titles):
                if modality_MHW is None:
                    axes[0, first + column].set_title(name, fontsize=9, fontweight="bold", y=0.0)
                else:
                    _picture(axes[0, first + column], modality_MHW[column], window, top=name)
                for row in range(a):
                    _picture(axes[row + 2, first + column], made_AMHW[row, column], window)
            axes[0, first].text(
                0.0, 1 + 0.28 / top_row, title, ha="left", color=INK, transform=axes[0, first].transAxes
            )
        axes[0, 0].text(0.98, 0.62, "modality  →", ha="right", va="center", color=MUTED, transform=axes[0, 0].transAxes)
        axes[0, 0].text(0.5, 0.02, "anatomy  ↓", ha="center", va="bottom", color=MUTED, transform=axes[0, 0].transAxes)
    return png.getvalue()


def labelled_grid(
    cells: Sequence[tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8] | None, str]], columns: int
) -> bytes:
    """Images (S, S) in [-1, 1], `columns` in a row, each with its title. If an image has a mask (S, S), its structures
    are outlined: LV solid, MYO dashed, RV dotted."""
    rows = -(-len(cells) // columns)
    window = np.percentile(np.stack([image for image, _, _ in cells]), (0.5, 99.5))
    with drawing(2.1 * columns, 2.5 * rows, rows, columns) as (_, axes, png):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (image, mask, title) in zip(axes.flat, cells, strict=False):
            _picture(axis, image, window)
            axis.set_title(title, fontsize=8, fontweight="normal", pad=4)
            for label, (colour, line) in enumerate(OUTLINES, start=1):
                if mask is not None and (mask == label).any():
                    axis.contour(mask == label, levels=[0.5], colors=colour, linestyles=line, linewidths=1.1)
    return png.getvalue()


def _picture(axis: Axes, image: npt.NDArray[Any], window: npt.NDArray[Any], top: str = "", side: str = "") -> None:
    axis.set_axis_on()
    axis.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(top, fontsize=9, fontweight="bold", pad=4)
    axis.set_ylabel(side, fontsize=9, fontweight="bold", labelpad=4)


@contextmanager
def drawing(
    width: float, height: float, rows: int, columns: int, *, layout: str | None = "constrained", **subplots: Any
) -> Iterator[tuple[Figure, npt.NDArray[Any], io.BytesIO]]:
    """A figure of this size in inches, its 2D array of axes, and a buffer. After the block the buffer holds the PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout=layout, facecolor="white")  # type: ignore[arg-type]
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False, **subplots), png
        # By default matplotlib writes its version here; a fixed entry keeps the bytes equal between versions.
        figure.savefig(png, format="png", dpi=150, metadata={"Software": "cardiomix"})


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
