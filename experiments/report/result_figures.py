"""The report's figures of results, each as PNG bytes: Dice per subject, learning curves, agreement, cases.

Arms, vendors and masks never differ by colour alone, but also by marker, label, line style, or fill against outline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.report.figures import INK, MUTED, OUTLINES, arm_style, drawing
from experiments.report.paper_table import arm_label, arm_order
from pipeline.scores.tables import subject_dice
from storage.subjects import STRUCTURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.scores.examples import Example

# The measures in the figure of agreement. The table has all measures.
DRAWN_MEASURES = ("LV EDV", "LV EF", "RV EDV", "RV EF", "LV mass")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_VENDOR_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), (INK, "P"))


def dice_per_subject(cases: Sequence[Mapping[str, Any]]) -> bytes:
    """Dice of every subject (mean over phases and seeds) by vendor, structure and arm: dots, the mean as a bar, and a
    box if there are at least 5 subjects.

    `cases` are rows of `cases.csv`. A structure that was missed counts as 0 and is drawn there.
    """
    vendors = sorted({case["vendor"] for case in cases})
    arms = sorted({case["arm"] for case in cases}, key=arm_order)
    size = (max(5.0, 0.9 + len(vendors) * (0.9 + 0.42 * len(arms))), 7.4)
    with drawing(*size, len(STRUCTURES), len(vendors), sharex=True, sharey=True) as (_, axes, png):
        for row, structure in enumerate(STRUCTURES):
            for column, vendor in enumerate(vendors):
                axis = axes[row, column]
                here = [c for c in cases if c["vendor"] == vendor and c["structure"] == structure]
                for x, arm in enumerate(arms):
                    _subject_strip(axis, x, list(subject_dice(c for c in here if c["arm"] == arm).values()), arm)
                axis.set(xlim=(-0.6, len(arms) - 0.4), ylim=(-0.03, 1.03))
                axis.grid(axis="x", visible=False)
                axis.tick_params(length=0)
            axes[row, 0].set_ylabel(f"{structure}  Dice", fontweight="bold")
        for column, vendor in enumerate(vendors):
            axes[0, column].set_title(vendor)
            axes[-1, column].set_xticks(range(len(arms)), map(arm_label, arms), rotation=40, ha="right", color=INK)
            axes[-1, column].tick_params(axis="x", rotation=40)
    return png.getvalue()


def _subject_strip(axis: Axes, x: int, values: list[float], arm: str) -> None:
    if not values:
        return
    colour, marker = arm_style(arm)
    # The dots are spread by the golden ratio: they stay apart, and the figure is the same each time.
    spread = (np.arange(len(values)) * 0.618034 % 1.0 - 0.5) * 0.5
    if len(values) >= 5:
        box = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.0, "alpha": 0.7}
        quiet = {"color": colour, "linewidth": 1.0, "alpha": 0.7}
        axis.boxplot(
            [values], positions=[x], widths=0.62, showfliers=False, patch_artist=True, manage_ticks=False,
            boxprops=box, whiskerprops=quiet, capprops=quiet, medianprops=quiet,
        )  # fmt: skip
    axis.scatter(x + spread, values, s=13, marker=marker, color=colour, alpha=0.65, linewidths=0, zorder=3)
    axis.hlines(float(np.mean(values)), x - 0.36, x + 0.36, color=colour, linewidth=2.6, zorder=4)


def learning_curves(histories: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> bytes:
    """Validation Dice and training loss over steps, one line per (arm, seed), from the records of `history.jsonl`."""
    arms = sorted({arm for arm, _ in histories}, key=arm_order)
    with drawing(9.6, 3.4, 1, 2) as (figure, axes, png):
        for axis, key, title in zip(
            axes.flat, ("val/dice", "loss/total"), ("validation Dice", "training loss"), strict=True
        ):
            for arm, seed in sorted(histories, key=lambda pair: (arm_order(pair[0]), pair[1])):
                points = [
                    (r.get("step", r.get("epoch")), r[key]) for r in histories[arm, seed] if r.get(key) is not None
                ]
                if points:
                    style = _line_style(arm, arms) | {"linewidth": 1.4, "alpha": 0.9}
                    axis.plot(*zip(*points, strict=True), **style)
            axis.set_title(title, loc="left")
            axis.set_xlabel("optimiser steps", color=MUTED)
            axis.set_xlim(left=0)
        axes.flat[0].set_ylim(0, 1)
        _legend(figure, [(arm_label(arm), _line_style(arm, arms)) for arm in arms])
    return png.getvalue()


def _line_style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    colour, marker = arm_style(arm)
    line = _LINES[list(arms).index(arm) % len(_LINES)]
    return {"color": colour, "marker": marker, "markersize": 3.5, "linestyle": line}


def bland_altman(measured: Sequence[Mapping[str, Any]], agreed: Sequence[Mapping[str, Any]]) -> bytes:
    """Bland–Altman plots: predicted minus reference over their mean, one marker per subject. Each arm has a row of
    panels, each measure a column.

    `measured` are rows of `volumes.subject_measures`. `agreed` are rows of `volumes.agreement`: the bias is a solid
    line, the limits of agreement are dashed lines.
    """
    arms = sorted({row["arm"] for row in measured}, key=arm_order)
    measures = [m for m in DRAWN_MEASURES if any(row["measure"] == m for row in measured)]
    vendors = sorted({row["vendor"] for row in measured})
    styles = {v: _VENDOR_STYLES[i % len(_VENDOR_STYLES)] for i, v in enumerate(vendors)}
    limits = {(row["arm"], row["measure"]): row for row in agreed}
    size = (0.7 + 2.15 * len(measures), 0.7 + 1.75 * len(arms))
    with drawing(*size, len(arms), len(measures), sharex="col", sharey="col") as (figure, axes, png):
        for i, arm in enumerate(arms):
            for j, measure in enumerate(measures):
                axis, unit = axes[i, j], limits[arm, measure]["unit"]
                for vendor in vendors:
                    rows = [r for r in measured if (r["arm"], r["measure"], r["vendor"]) == (arm, measure, vendor)]
                    pairs = np.array([(r["reference"], r["predicted"]) for r in rows]).reshape(-1, 2)
                    colour, marker = styles[vendor]
                    axis.scatter(
                        pairs.mean(axis=1), pairs[:, 1] - pairs[:, 0],
                        s=18, marker=marker, color=colour, alpha=0.75, linewidths=0,
                    )  # fmt: skip
                _limits(axis, limits[arm, measure])
                if i == 0:
                    axis.set_title(f"{measure}, {unit}")
            axes[i, 0].set_ylabel(arm_label(arm), fontweight="bold")
        axes[-1, len(measures) // 2].set_xlabel("mean of predicted and reference", color=MUTED)
        figure.supylabel("predicted less reference", fontsize=9, color=MUTED)
        if len(vendors) > 1:
            _legend(figure, [(v, {"color": c, "marker": m, "linestyle": "none"}) for v, (c, m) in styles.items()])
    return png.getvalue()


def _limits(axis: Axes, row: Mapping[str, Any]) -> None:
    axis.axhline(0, color=MUTED, linewidth=0.6)
    if np.isfinite(row["bias"]):
        axis.axhline(row["bias"], color=INK, linewidth=1.3)
    if np.isfinite(row["low"]):
        for value in (row["low"], row["high"]):
            axis.axhline(value, color=INK, linewidth=1.0, linestyle="--")


def case_gallery(shown: Mapping[str, Mapping[str, tuple[Example, str]]]) -> bytes:
    """Cases with both masks. Each arm has a row; the slices of a case stand side by side.

    `shown` is {arm: {kind: (case, caption)}}, with the kinds best, median and worst. The reference is outlined, the
    prediction is filled; LV, MYO and RV have the colours of `OUTLINES`.
    """
    kinds = [kind for kind in ("best", "median", "worst") if any(kind in cases for cases in shown.values())]
    columns = max(len(one.slices) for cases in shown.values() for one, _ in cases.values())
    ratios = ([1.0] * columns + [0.08]) * len(kinds)
    size = (0.4 + 1.32 * columns * len(kinds), 0.5 + 1.72 * len(shown))
    gaps = {"width_ratios": ratios[:-1], "wspace": 0.02, "hspace": 0.02}
    with drawing(*size, len(shown), len(ratios) - 1, gridspec_kw=gaps) as (figure, axes, png):
        for axis in axes.flat:
            axis.set_axis_off()
        for i, (arm, cases) in enumerate(shown.items()):
            for j, kind in enumerate(kinds):
                if kind in cases:
                    one, caption = cases[kind]
                    own = axes[i, j * (columns + 1) : j * (columns + 1) + columns]
                    for axis, at in zip(own, range(len(one.slices)), strict=False):
                        _overlay(axis, one, at)
                    own[0].set_title(f"{kind}: {caption}", loc="left", fontsize=8)
            axes[i, 0].text(
                -0.08, 0.5, arm_label(arm), rotation=90, ha="right", va="center", fontweight="bold",
                transform=axes[i, 0].transAxes,
            )  # fmt: skip
        names = dict(zip(STRUCTURES, OUTLINES, strict=True))
        _legend(figure, [(name, {"color": colour, "linewidth": 3}) for name, (colour, _) in names.items()])
    return png.getvalue()


def _overlay(axis: Axes, one: Example, at: int) -> None:
    aspect = one.pixel_mm[0] / one.pixel_mm[1]
    axis.imshow(one.image[at], cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect=aspect)
    for label, (colour, _) in enumerate(OUTLINES, start=1):
        predicted, reference = one.prediction[at] == label, one.reference[at] == label
        if predicted.any():
            axis.contourf(predicted, levels=[0.5, 1.5], colors=[colour], alpha=0.38)
        if reference.any():
            axis.contour(reference, levels=[0.5], colors=[colour], linewidths=1.1)
    axis.text(0.03, 0.97, str(one.slices[at]), color="white", fontsize=7, va="top", transform=axis.transAxes)


def _legend(figure: Figure, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style) for label, style in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, max(1, len(handles))))
