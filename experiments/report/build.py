"""Write the report of a run: verdicts, tables beside the paper's Table 1, figures, and one self-contained HTML page.

Everything is read from the run folder (a path or a URI). So a report can be made while a run is still under way, or if
some arms failed: it shows what is there and names what is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report import figures, result_figures
from experiments.report.findings import Findings, work_out
from experiments.report.first_screen import first_screen
from experiments.report.page import page
from experiments.report.paper_table import ARM_LABELS, arm_order
from experiments.report.run_files import RunFiles, collect
from experiments.report.tables import markdown_table, number
from experiments.report.verdicts import sentences
from pipeline.scores.compare_arms import COMPARISON_FIELDS, RANKING_FIELDS
from pipeline.scores.tables import TABLE_FIELDS, write_cases, write_slices, write_trust
from pipeline.scores.volumes import subject_measures
from storage import fs
from storage.csv_table import csv_text

FUNCTION_FIELDS = ("arm", "seed", "subject", "vendor", "centre", "measure", "unit", "reference", "predicted")
SHARED_BANK = "seeds_share_bank"  # key of the note: the seeds of arms that use factors share an SDNet and a bank
AGREEMENT_FIELDS = ("arm", "measure", "unit", "n", "bias", "sd", "low", "high", "undefined")


@dataclass(frozen=True)
class ReportPaths:
    """The places of a report's parts: paths if the run was given as a path, otherwise URIs."""

    html: str
    table_csv: str
    cases_csv: str
    table_md: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]


def build_report(
    run_uri: str,
    title: str,
    note: Mapping[str, Any],
    mosaic: bytes | None = None,
    *,
    arms: Sequence[str] = tuple(ARM_LABELS),
    runs: Collection[tuple[str, int]] | None = None,
    problems: Mapping[str, str] | None = None,
) -> ReportPaths:
    """Write `<run>/report/`: index.html, table.md, the tables as CSV, the figures as PNG. Each is replaced atomically.

    note: facts to show (machine, date, versions, configuration hash, …). `data: "phantom"` in it adds the warning that
    no patient was measured; `seeds_share_bank` adds the sentence on what the seeds share. mosaic: the PNG of
    `figures.fa_mosaic`. arms: those that the run should have, so that a missing one is named. runs: the (arm, seed)
    whose scores count; None for all that are there. problems: {arm: why it failed, in words}.
    """
    run = collect(run_uri, runs)
    found = work_out(run.cases)
    pictures = _draw(run, found, mosaic)
    folder = fs.join(run_uri, "report")
    tables = {
        "comparisons.csv": csv_text(COMPARISON_FIELDS, found.comparisons),
        "ranking.csv": csv_text(RANKING_FIELDS, found.ranking),
        "function.csv": csv_text(FUNCTION_FIELDS, found.function),
        "agreement.csv": csv_text(AGREEMENT_FIELDS, found.agreement),
    }
    paths = ReportPaths(
        html=fs.join(folder, "index.html"),
        table_csv=fs.join(folder, "table.csv"),
        cases_csv=fs.join(folder, "cases.csv"),
        table_md=fs.join(folder, "table.md"),
        tables=tuple(fs.join(folder, name) for name in (*tables, "slices.csv", *(["trust.csv"] if run.trust else []))),
        figures=tuple(fs.join(folder, f"{name}.png") for name in pictures),
    )
    for path, png in zip(paths.figures, pictures.values(), strict=True):
        fs.write_bytes(path, png)
    for name, text in tables.items():
        fs.write_text(fs.join(folder, name), text)
    write_slices(fs.join(folder, "slices.csv"), run.slices)
    if run.trust:
        write_trust(fs.join(folder, "trust.csv"), run.trust)
    write_cases(paths.cases_csv, run.cases)
    fs.write_text(paths.table_csv, csv_text(TABLE_FIELDS, found.summary))
    first = first_screen(found.ranking, shared_bank=SHARED_BANK in note)
    spoken = sentences(found.comparisons) if found.summary else []
    fs.write_text(paths.table_md, markdown_table(found.summary, title, note, first, spoken))
    fs.write_text(paths.html, page(run, found, title, note, first, pictures, arms, problems or {}))
    return paths


def _draw(run: RunFiles, found: Findings, mosaic: bytes | None) -> dict[str, bytes]:
    pictures: dict[str, bytes] = {}
    if run.cases:
        pictures["dice"] = result_figures.dice_per_subject(run.cases)
    gallery = _gallery(run)
    if gallery:
        pictures["cases"] = result_figures.case_gallery(gallery)
    if found.function:
        pictures["agreement"] = result_figures.bland_altman(subject_measures(found.function), found.agreement)
    if any(run.histories.values()):
        pictures["learning"] = result_figures.learning_curves(run.histories)
    if mosaic is not None:
        pictures["mosaic"] = mosaic
    if run.subjects:
        areas: dict[str, list[float]] = {}
        for row in run.subjects:
            areas.setdefault(row["vendor"], []).append(row["pixel_area_mm2"])
        pictures["resolutions"] = figures.resolution_histograms(areas)
    return pictures


def _gallery(run: RunFiles) -> dict[str, dict[str, tuple[Any, str]]]:
    """{arm: {kind: (case, caption)}}, from the first seed of each arm that has cases to show."""
    shown: dict[str, dict[str, tuple[Any, str]]] = {}
    for (arm, seed), cases in sorted(run.examples.items(), key=lambda item: (arm_order(item[0][0]), item[0][1])):
        if arm in shown or not cases:
            continue
        own = [case for case in run.cases if (case["arm"], case["seed"]) == (arm, seed)]
        shown[arm] = {}
        for kind, one in cases.items():
            scores = [case for case in own if (case["subject"], case["phase"]) == (one.subject, one.phase)]
            dice = "  ".join(f"{case['structure']} {number(case['dice'], 2)}" for case in scores)
            where = "" if one.vendor in one.subject else f" ({one.vendor})"
            shown[arm][kind] = one, f"{one.subject}{where} {one.phase}\n{dice}"
    return shown
