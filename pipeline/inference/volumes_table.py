"""`volumes.csv`: one row for each study in a results folder, for a spreadsheet.

The rows come from the studies' reports (`NAME_pred.json`). So the table is complete after several commands into one
folder, even if one of them was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.inference.find_studies import REPORT_ENDING, Study
from pipeline.inference.trust import mean_dice
from storage import fs
from storage.csv_table import csv_text

TABLE = "volumes.csv"
# column → (side, key) in a report
VENTRICLES = {
    f"{side} {name} ({unit})": (side.lower(), key)
    for side in ("LV", "RV")
    for name, unit, key in (("EDV", "ml", "edv_ml"), ("ESV", "ml", "esv_ml"), ("EF", "%", "ef_percent"))
}
MASS, ED, ES = "LV mass (g)", "ED frame (from 0)", "ES frame (from 0)"
DICE = "expected Dice"  # the lower of those of ED and ES; each is the mean of LV, MYO and RV
FIELDS = ("study", *VENTRICLES, MASS, ED, ES, DICE, "warnings", "failure", "models")
BYTE_ORDER_MARK = "\ufeff"  # without it, Excel does not read the file as UTF-8
BETWEEN_WARNINGS = " | "
NO_PHASES = "no EDV and no EF: fewer than two frames with an LV; each frame's volumes are in the JSON"


def write_table(out: str, failures: Iterable[tuple[Study, str]] = ()) -> None:
    """Write `volumes.csv` of a results folder, atomically, from all reports in or below it and the failed studies.

    A failed study has the reason and no volumes, even if an earlier command left a report of it.
    """
    out = fs.absolute(out)
    rows = {_name(path, out): path for path in _reports(out)}
    failed = {_name(study.report, out): {"failure": reason} for study, reason in failures}
    done = [name for name in rows if name not in failed]
    documents = fs.map_concurrently(out, lambda name: _report(rows[name]), done)
    known = {name: _row(report) for name, report in zip(done, documents, strict=True) if report is not None}
    lines = [{"study": name, **row} for name, row in sorted((known | failed).items())]
    fs.write_text(fs.join(out, TABLE), BYTE_ORDER_MARK + csv_text(FIELDS, lines))


def _name(report: str, out: str) -> str:
    """A study's name, preceded by its folder below `out`."""
    return report.removeprefix(out).lstrip("/").removesuffix(REPORT_ENDING)


def _reports(folder: str) -> Iterator[str]:
    """Yield the reports in and below a folder. Links to folders are not followed."""
    for name in fs.list_names(folder):
        path = fs.join(folder, name)
        if name.endswith(REPORT_ENDING):
            yield path
        elif not name.startswith(".") and fs.is_folder(path) and not _is_link(path):
            yield from _reports(path)


def _is_link(path: str) -> bool:
    return fs.is_local(path) and os.path.islink(fs.local_path(path))


def _report(path: str) -> dict[str, Any] | None:
    """Read a study's report. None if the file is not one of cardiomix."""
    try:
        report = json.loads(fs.read_text(path))
    except ValueError:
        return None
    return report if isinstance(report, dict) and str(report.get("made_by")).startswith("cardiomix") else None


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    ventricles = {column: report[side][key] for column, (side, key) in VENTRICLES.items() if report[side] is not None}
    warnings = [*report["warnings"], *([] if report["ed"] is not None else [NO_PHASES])]
    return {
        **ventricles,
        MASS: report["lv_mass_g"],
        ED: report["ed"],
        ES: report["es"],
        DICE: min(
            (round(mean_dice(dice), 3) for dice in report.get("expected_dice", {}).values() if dice), default=None
        ),
        "warnings": BETWEEN_WARNINGS.join(warnings),
        "models": " ".join(report["models"]),
    }
