"""The report of a run: per-vendor tables beside the paper's Table 1, figures, and one self-contained HTML page.

Everything is read from the run folder (a path or a URI), so that a report can be made of a run that is still under way,
or of which some arms failed: what is there is shown, what is missing is named.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import figures
from experiments.paper_table import (
    ARM_LABELS,
    CONTRASTS,
    PHANTOM_NOTE,
    REFERENCE_NOTE,
    arm_label,
    arm_order,
    paper_dice,
)
from pipeline.evaluation import (
    STRUCTURES,
    TABLE_FIELDS,
    paired_differences,
    read_cases,
    summarise,
    write_cases,
)
from storage import uri

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class ReportPaths:
    """Where the parts of a report are: paths or URIs, as the run was given."""

    html: str
    table_csv: str
    cases_csv: str
    table_md: str
    figures: tuple[str, ...]


@dataclass
class _Run:
    """What a run folder holds that a report needs."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    histories: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)
    evaluated: dict[str, list[int]] = field(default_factory=dict)  # arm -> seeds that have cases
    subjects: list[dict[str, Any]] = field(default_factory=list)  # subject, vendor, split, labelled, pixel_area_mm2
    skipped: list[dict[str, str]] = field(default_factory=list)
    splits: list[dict[str, str]] = field(default_factory=list)


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
    """Write `<run>/report/`: index.html, table.csv, cases.csv, table.md and the figures as PNG; each file is replaced
    atomically.

    `note` holds facts to show (machine, date, versions, configuration hash, …); `data: "phantom"` in it adds the
    warning that no patient was measured. `mosaic` is the PNG of `figures.fa_mosaic`. `arms` are those that the run was
    meant to have, so that a missing one is named; `runs` are the arms and seeds whose scores count, None for all that
    are there; `problems` says in words why an arm failed.
    """
    run = _collect(run_uri, runs)
    rows = sorted(summarise(run.cases), key=lambda row: arm_order(row["arm"]))
    pictures = _draw(run, mosaic)
    folder = uri.join(run_uri, "report")
    paths = ReportPaths(
        html=uri.join(folder, "index.html"),
        table_csv=uri.join(folder, "table.csv"),
        cases_csv=uri.join(folder, "cases.csv"),
        table_md=uri.join(folder, "table.md"),
        figures=tuple(uri.join(folder, f"{name}.png") for name in pictures),
    )
    for path, png in zip(paths.figures, pictures.values(), strict=True):
        uri.write_bytes(path, png)
    write_cases(paths.cases_csv, run.cases)
    uri.write_text(paths.table_csv, _table_csv(rows))
    uri.write_text(paths.table_md, markdown_table(rows, title, note))
    uri.write_text(paths.html, _page(run, rows, title, note, pictures, arms, problems or {}))
    return paths


def markdown_table(rows: Sequence[Mapping[str, Any]], title: str, note: Mapping[str, Any]) -> str:
    """The rows of `pipeline.evaluation.summarise` as a Markdown table, ours / the paper's where it has the vendor."""
    columns = _columns(rows)
    best = _best(rows)
    lines = [f"# {title}", "", " · ".join(f"{key}: {_text(value)}" for key, value in note.items()), ""]
    headings = (f"{vendor} {structure}".replace("|", "\\|") for vendor, structure in columns)
    lines += ["| arm | " + " | ".join(headings) + " |"]
    lines += ["|---|" + "---|" * len(columns)]
    cells = {(row["arm"], row["vendor"], row["structure"]): row for row in rows}
    for arm in sorted({row["arm"] for row in rows}, key=arm_order):
        shown = []
        for vendor, structure in columns:
            row = cells.get((arm, vendor, structure))
            ours = _number(row["dice_mean"]) if row else "–"
            ours = f"**{ours}**" if (arm, vendor, structure) in best else ours
            theirs = paper_dice(arm, vendor, structure)
            shown.append(ours if theirs is None else f"{ours} / {_number(theirs)}")
        lines.append(f"| {arm_label(arm)} | " + " | ".join(shown) + " |")
    beside = any(paper_dice(row["arm"], row["vendor"], row["structure"]) is not None for row in rows)
    lines += [
        "",
        f"Mean Dice per volume on the native grid{', ours / the paper' if beside else ''}; best of ours in bold.",
    ]
    lines += [_counts_sentence(rows)]
    lines += ["", REFERENCE_NOTE] if beside else []
    lines += ["", PHANTOM_NOTE if beside else PHANTOM_NOTE.split(" The paper's")[0]] if _is_phantom(note) else []
    return "\n".join(lines) + "\n"


def render_terminal_table(summary: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """The summary for a terminal of 80 columns: a row an arm, a column a vendor and structure, best per column bold."""
    import rich.table
    from rich.text import Text

    columns, best = _columns(summary), _best(summary)
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0), title="mean Dice per volume", title_justify="left")
    table.add_column("\narm", no_wrap=True)
    for vendor, structure in columns:
        first = structure == next(iter(STRUCTURES))
        heading = Text(f"{vendor if first else ''}\n{structure}")
        table.add_column(heading, justify="right", no_wrap=True, min_width=5 if first else 4)
    cells = {(row["arm"], row["vendor"], row["structure"]): row["dice_mean"] for row in summary}
    for arm in sorted({row["arm"] for row in summary}, key=arm_order):
        numbers = [
            Text(_number(cells.get((arm, *column), np.nan)), style="bold" if (arm, *column) in best else "")
            for column in columns
        ]
        table.add_row(Text(arm_label(arm)), *numbers)
    missed = sum(row["missed"] for row in summary)
    if missed:
        table.caption = f"{missed} missed or invented structures count as Dice 0"
    return table


def contrasts(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each step of the paper changes: rows of `paired_differences` for each of `CONTRASTS`, with its `step`."""
    return [
        {"step": step} | row for step, arm, baseline in CONTRASTS for row in paired_differences(cases, arm, baseline)
    ]


def _collect(run_uri: str, only: Collection[tuple[str, int]] | None) -> _Run:
    run = _Run()
    arms = uri.join(run_uri, "arms")
    for arm in sorted(_names(arms), key=arm_order):
        for name in _names(uri.join(arms, arm)):
            if not (name.startswith("seed") and name[4:].isdigit()):
                continue
            here, seed = uri.join(arms, arm, name), int(name[4:])
            if only is not None and (arm, seed) not in only:
                continue
            if uri.exists(uri.join(here, "history.jsonl")):
                run.histories[arm, seed] = read_history(uri.join(here, "history.jsonl"))
            if uri.exists(uri.join(here, "cases.csv")):
                run.cases += read_cases(uri.join(here, "cases.csv"))
                run.evaluated.setdefault(arm, []).append(seed)
    run.skipped, run.splits = (_read_csv(uri.join(run_uri, name)) for name in ("skipped.csv", "splits.csv"))
    run.subjects = _subjects(uri.join(run_uri, "slices.parquet"))
    return run


def read_history(source: str) -> list[dict[str, Any]]:
    """The records of a `history.jsonl`, in the order of their steps.

    A line cut short by a killed process is left out; of two records for one step (a repeated epoch) the later one
    counts.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in uri.read_text(source).splitlines():
        try:
            record = json.loads(line)
            by_step[int(record["step"] if "step" in record else record["epoch"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    return [by_step[step] for step in sorted(by_step)]


def _names(folder: str) -> list[str]:
    return sorted(PurePosixPath(name).name for name in uri.list_names(folder)) if uri.exists(folder) else []


def _read_csv(source: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(uri.read_text(source)))) if uri.exists(source) else []


def _subjects(source: str) -> list[dict[str, Any]]:
    """One row a subject from the slices' index: vendor, split, pixel area, and whether any slice has a mask."""
    if not uri.exists(source):
        return []
    from storage.parquet import read_parquet

    table = read_parquet(uri.read_bytes(source), ["subject", "vendor", "split", "labelled", "pixel_area_mm2"])
    subjects: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        seen = subjects.setdefault(row["subject"], row)
        seen["labelled"] = seen["labelled"] or row["labelled"]
    return list(subjects.values())


def _draw(run: _Run, mosaic: bytes | None) -> dict[str, bytes]:
    pictures: dict[str, bytes] = {}
    if run.cases:
        pictures["dice"] = figures.dice_per_subject(run.cases)
    if any(run.histories.values()):
        pictures["learning"] = figures.learning_curves(run.histories)
    if run.subjects:
        areas: dict[str, list[float]] = {}
        for row in run.subjects:
            areas.setdefault(row["vendor"], []).append(row["pixel_area_mm2"])
        pictures["resolutions"] = figures.resolution_histograms(areas)
    if mosaic is not None:
        pictures["mosaic"] = mosaic
    return pictures


def _page(
    run: _Run,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    note: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    arms: Sequence[str],
    problems: Mapping[str, str],
) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "signed": _signed}
    table_arms = sorted({row["arm"] for row in rows}, key=arm_order)
    vendors = list(dict.fromkeys(vendor for vendor, _ in _columns(rows)))
    return environment.get_template("report_template.html.j2").render(
        title=title,
        note={key: _text(value) for key, value in note.items()},
        phantom=PHANTOM_NOTE if _is_phantom(note) else "",
        reference=REFERENCE_NOTE,
        counts=_counts_sentence(rows),
        structures=list(STRUCTURES),
        vendors=[_vendor_facts(vendor, rows, run.subjects) for vendor in vendors],
        arms=[{"name": arm, "label": arm_label(arm), "colour": figures.arm_style(arm)[0]} for arm in table_arms],
        cells={(row["arm"], row["vendor"], row["structure"]): row for row in rows},
        best=_best(rows),
        paper={
            (a, v, s): p
            for a in table_arms
            for v in vendors
            for s in STRUCTURES
            if (p := paper_dice(a, v, s)) is not None
        },
        steps=[step for step, _, _ in CONTRASTS],
        contrasts={(row["step"], row["vendor"]): row for row in contrasts(run.cases)},
        images={name: _image(png) for name, png in pictures.items()},
        states=_arm_states(run, arms, problems),
        splits=_split_counts(run.splits),
        skipped=[row | {"file": PurePosixPath(row.get("file", "")).name} for row in run.skipped],
    )


def _image(png: bytes) -> dict[str, Any]:
    """An inline image, and its width on the page: drawn at 150 dots an inch, shown so that 9 pt text reads as such."""
    return {
        "source": "data:image/png;base64," + base64.b64encode(png).decode(),
        "width": round(int.from_bytes(png[16:20], "big") * 0.72),  # the width in a PNG's header
    }


def _vendor_facts(
    vendor: str, rows: Sequence[Mapping[str, Any]], subjects: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Name, role in training, number of test subjects, and the arm with the highest mean over the structures."""
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
        "missed": sum(row["missed"] for row in mine),
    }


def _arm_states(run: _Run, arms: Sequence[str], problems: Mapping[str, str]) -> list[dict[str, str]]:
    """Every arm that was wanted or is there, and how far it came."""
    states = []
    for arm in sorted({*arms, *run.evaluated, *(arm for arm, _ in run.histories)}, key=arm_order):
        seeds = run.evaluated.get(arm, [])
        started = [seed for name, seed in run.histories if name == arm and seed not in seeds]
        parts = [f"evaluated (seed {', '.join(map(str, seeds))})"] if seeds else []
        parts += [f"trained, not evaluated (seed {', '.join(map(str, started))})"] if started else []
        state = "failed" if arm in problems else "done" if seeds and not started else "partial" if parts else "missing"
        words = problems.get(arm) or "; ".join(parts) or "not run"
        states.append({"label": arm_label(arm), "state": state, "words": words})
    return states


def _split_counts(splits: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in splits:
        vendor = counts.setdefault(row["vendor"], dict.fromkeys(("train", "validation", "test", "excluded"), 0))
        vendor[row["split"]] = vendor.get(row["split"], 0) + 1
    return dict(sorted(counts.items()))


def _table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, TABLE_FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(vendor, structure) for vendor in sorted({row["vendor"] for row in rows}) for structure in STRUCTURES]


def _best(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """(arm, vendor, structure) with the highest mean in its column, as printed: ties are all best, one arm is not."""
    best = set()
    for vendor, structure in _columns(rows):
        column = {
            row["arm"]: round(row["dice_mean"], 3)
            for row in rows
            if (row["vendor"], row["structure"]) == (vendor, structure) and np.isfinite(row["dice_mean"])
        }
        if len(column) > 1:
            best |= {(arm, vendor, structure) for arm, value in column.items() if value == max(column.values())}
    return best


def _counts_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "No arm has been evaluated yet."
    missed, absent, volumes = (sum(row[key] for row in rows) for key in ("missed", "absent", "volumes"))
    sentence = f"{missed} of {volumes} scored structures were missed or invented (each counts as Dice 0, HD95 ∞)"
    return sentence + (f"; {absent} were absent from both masks and are left out." if absent else ".")


def _is_phantom(note: Mapping[str, Any]) -> bool:
    return str(note.get("data", "")).lower() == "phantom"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: float, digits: int = 3) -> str:
    """As the paper prints Dice: .905; a dash for no value, ∞ for infinity."""
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else ("+" if value >= 0 else "\N{MINUS SIGN}") + _number(abs(value))
