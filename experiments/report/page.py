"""The report as one HTML page that needs no network and no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from experiments.page_template import environment
from experiments.report import figures
from experiments.report.findings import Findings
from experiments.report.paper_table import ALL_CONTRASTS, REFERENCE_NOTE, arm_label, arm_order, phantom_note
from experiments.report.run_files import RunFiles, arm_states, cut_off, failures, split_counts
from experiments.report.tables import (
    best_cells,
    counts_sentence,
    is_phantom,
    number,
    paper_cells,
    plain,
    signed,
    signed_tenth,
    table_columns,
    tenth,
)
from experiments.report.verdicts import MARKS, count_text, evenness, not_compared, p_text, verdicts
from pipeline.inference.trust import DOUBTFUL, foretold
from pipeline.scores.compare_arms import ALL, FEWEST_SEEDS, across_vendors, trainings
from pipeline.scores.metrics import POSITIONS
from pipeline.scores.tables import position_dice
from pipeline.scores.volumes import MEASURES
from storage.subjects import STRUCTURES

TEMPLATE = "page.html.j2"
LONGEST = 40  # most rows of a list on the page; cases.csv has all


def page(
    run: RunFiles,
    found: Findings,
    title: str,
    note: Mapping[str, Any],
    first: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    arms: Sequence[str],
    problems: Mapping[str, str],
) -> str:
    """The HTML of the page. The arguments are those of `build.build_report`, and what it made from the run."""
    templates = environment(Path(__file__).parent)
    templates.filters |= {
        "number": number,
        "signed": signed,
        "p": p_text,
        "counts": count_text,
        "tenth": tenth,
        "signed_tenth": signed_tenth,
    }
    template = templates.get_template(TEMPLATE)
    return template.render(
        title=title,
        note={key: plain(value) for key, value in note.items()},
        phantom=phantom_note(bool(paper_cells(found.summary, note))) if is_phantom(note) else "",
        first=first,
        images={name: _image(png) for name, png in pictures.items()},
        alt=_alternatives(run, found),
        states=arm_states(run, arms, problems),
        splits=split_counts(run.splits),
        skipped=[row | {"file": PurePosixPath(row.get("file", "")).name} for row in run.skipped],
        networks=[(f"{arm_label(arm)}, seed {seed}", name) for (arm, seed), name in run.networks.items()],
        configuration=run.configuration,
        failed=failures(run.cases),
        cut_off=cut_off(run.cases),
        longest=LONGEST,
        measures=MEASURES,
        agreed={(row["arm"], row["measure"]): row for row in found.agreement},
        positions=POSITIONS,
        by_position=position_dice(run.slices),
        trust=[
            row | {"label": arm_label(row["arm"])}
            for row in sorted(foretold(run.trust), key=lambda row: (arm_order(row["arm"]), row["vendor"]))
        ],
        doubtful=DOUBTFUL,
        **_tables(run, found, note),
    )


def _tables(run: RunFiles, found: Findings, note: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables for the verdicts and the tables of arms."""
    rows = found.summary
    arms = sorted({row["arm"] for row in rows}, key=arm_order)
    vendors = list(dict.fromkeys(vendor for vendor, _ in table_columns(rows)))
    across = across_vendors(rows)
    compared = {(r["arm"], r["baseline"], r["vendor"], r["structure"]): r for r in found.comparisons}
    return {
        "verdicts": verdicts(found.comparisons),
        "marks": MARKS,
        "not_compared": not_compared(found.comparisons),
        "reference": REFERENCE_NOTE,
        "counts": counts_sentence(rows),
        "structures": list(STRUCTURES),
        "vendors": [_vendor_facts(vendor, rows, run.subjects) for vendor in vendors],
        "arms": [{"name": arm, "label": arm_label(arm), "colour": figures.arm_style(arm)[0]} for arm in arms],
        "cells": {(row["arm"], row["vendor"], row["structure"]): row for row in rows},
        "best": best_cells(rows),
        "paper": paper_cells(rows, note),
        "several_seeds": any(row["seeds"] > 1 for row in rows),
        "across": {row["arm"]: row for row in across},
        "evenness": evenness(across),
        "steps": [(title, arm, baseline) for _, title, arm, baseline in ALL_CONTRASTS if {arm, baseline} <= set(arms)],
        "ranking": [row | {"label": arm_label(row["arm"])} for row in found.ranking],
        "compared": compared,
        "few_seeds": sorted({trainings(row["seeds"]) for row in found.comparisons} - {""}),
        "tested": any(row["seeds"] >= FEWEST_SEEDS for row in found.summary),
        "ALL": ALL,
    }


def _image(png: bytes) -> dict[str, Any]:
    """An inline image and its width in CSS pixels: 72 % of its own, so that text of 9 pt is 13.5 CSS pixels high."""
    return {
        "source": "data:image/png;base64," + base64.b64encode(png).decode(),
        "width": round(int.from_bytes(png[16:20], "big") * 0.72),  # a PNG's header holds its width here
    }


def _vendor_facts(
    vendor: str, rows: Sequence[Mapping[str, Any]], subjects: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A vendor's name, role in training, number of test subjects, best arm by mean Dice, and missed structures."""
    mine = [row for row in rows if row["vendor"] == vendor]
    means: dict[str, list[float]] = {}
    for row in mine:
        means.setdefault(row["arm"], []).append(row["dice_mean"])
    ranked = sorted(((float(np.mean(values)), arm) for arm, values in means.items()), reverse=True)
    trained = [row["labelled"] for row in subjects if row["vendor"] == vendor and row["split"] == "train"]
    role = "labelled in training" if any(trained) else "unlabelled in training" if trained else "unseen in training"
    return {
        "code": vendor,
        "name": f"Vendor {vendor}" if len(vendor) == 1 else vendor,
        "role": role if subjects else "",
        "n": max(row["n"] for row in mine),
        "best": arm_label(ranked[0][1]),
        "score": ranked[0][0],
        "arms": len(means),
        "missed": sum(row["missed"] for row in mine),
    }


def _alternatives(run: RunFiles, found: Findings) -> dict[str, str]:
    """A text for each figure, for readers who cannot see it."""
    means: dict[str, list[float]] = {}
    for row in found.summary:
        means.setdefault(row["arm"], []).append(row["dice_mean"])
    dice = "; ".join(f"{arm_label(arm)} {number(float(np.mean(values)))}" for arm, values in means.items())
    ends = "; ".join(
        f"{arm_label(arm)} seed {seed} {number(records[-1]['val/dice'])}"
        for (arm, seed), records in run.histories.items()
        if records and records[-1].get("val/dice") is not None
    )
    bias = "; ".join(
        f"{arm_label(row['arm'])} {row['measure']} {row['bias']:+.1f} {row['unit']}"
        for row in found.agreement
        if row["measure"].endswith("EF")
    )
    shown = "; ".join(
        f"{arm_label(arm)}: " + ", ".join(f"{kind} {one.subject} {one.phase}" for kind, one in cases.items())
        for (arm, _), cases in run.examples.items()
    )
    areas: dict[str, list[float]] = {}
    for subject in run.subjects:
        areas.setdefault(subject["vendor"], []).append(subject["pixel_area_mm2"])
    ranges = "; ".join(f"{vendor} {min(a):.2f} to {max(a):.2f} mm²" for vendor, a in sorted(areas.items()))
    return {
        "dice": f"Dice of every test subject by vendor, structure and arm. Mean over vendors and structures: {dice}",
        "learning": f"Validation Dice and training loss over optimiser steps. Last validation Dice: {ends}",
        "mosaic": "Matrices of generated images, decoded and residual: rows share an anatomy, columns share a modality",
        "resolutions": f"Histograms of pixel area by vendor: {ranges}",
        "agreement": f"Bland–Altman plots of volumes, ejection fraction and mass. Bias of EF: {bias}",
        "cases": f"Slices of the best, median and worst case of each arm with both masks. {shown}",
    }
