"""The table of a run beside the paper's Table 1, as Markdown and for a terminal; and how numbers are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.report.paper_table import REFERENCE_NOTE, arm_label, arm_order, paper_dice, phantom_note
from pipeline.scores.compare_arms import trainings
from storage.subjects import STRUCTURES

if TYPE_CHECKING:
    import rich.table

Cell = tuple[str, str, str]  # arm, vendor, structure


def markdown_table(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    note: Mapping[str, Any],
    first: Mapping[str, Any],
    verdicts: Sequence[str],
) -> str:
    """The rows of `pipeline.scores.tables.summarise` as a Markdown table, below the first screen and the verdicts.

    A cell holds our mean Dice; with several seeds, ± their standard deviation; and if the paper has this cell (see
    `paper_cells`), the paper's Dice and the difference. `first` is that of `first_screen`.
    """
    columns = table_columns(rows)
    paper = paper_cells(rows, note)
    best = best_cells(rows)
    lines = [f"# {title}", "", " · ".join(f"{key}: {plain(value)}" for key, value in note.items()), ""]
    if first:
        lines += [f"**{first['title']}: {first['best']}, {number(first['dice'])}.** {first['answer']}", ""]
        lines += [" ".join(first["further"]), ""] if first["further"] else []
    lines += [f"- {verdict}" for verdict in verdicts] + ([""] if verdicts else [])
    headings = (f"{vendor} {structure}".replace("|", "\\|") for vendor, structure in columns)
    lines += ["| arm | " + " | ".join(headings) + " |"]
    lines += ["|---|" + "---|" * len(columns)]
    cells = {(row["arm"], row["vendor"], row["structure"]): row for row in rows}
    for arm in sorted({row["arm"] for row in rows}, key=arm_order):
        shown = [_markdown_cell((arm, *column), cells, best, paper) for column in columns]
        lines.append(f"| {arm_label(arm)} | " + " | ".join(shown) + " |")
    beside = bool(paper)
    several = " ± standard deviation between seeds" if any(row["seeds"] > 1 for row in rows) else ""
    against = ", ours / the paper's (difference)" if beside else ""
    lines += ["", f"Mean Dice per volume on the native grid{several}{against}; best of ours in bold."]
    lines += [counts_sentence(rows)]
    lines += ["", REFERENCE_NOTE] if beside else []
    lines += ["", phantom_note(beside)] if is_phantom(note) else []
    return "\n".join(lines) + "\n"


def _markdown_cell(
    key: Cell, cells: Mapping[Cell, Mapping[str, Any]], best: set[Cell], paper: Mapping[Cell, float]
) -> str:
    row = cells.get(key)
    if row is None:
        return "–"
    ours = number(row["dice_mean"])
    ours = f"**{ours}**" if key in best else ours
    ours += f" ± {number(row['dice_seed_sd'])}" if row["seeds"] > 1 else ""
    theirs = paper.get(key)
    return ours if theirs is None else f"{ours} / {number(theirs)} ({signed(row['dice_mean'] - theirs)})"


def render_terminal_table(summary: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """The summary for a terminal: a row for each arm, a column for each vendor and structure, the best in bold."""
    import rich.table
    from rich.text import Text

    columns, best = table_columns(summary), best_cells(summary)
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0), title="mean Dice per volume", title_justify="left")
    table.add_column("\narm", no_wrap=True)
    for vendor, structure in columns:
        first = structure == next(iter(STRUCTURES))
        heading = Text(f"{vendor if first else ''}\n{structure}")
        table.add_column(heading, justify="right", no_wrap=True, min_width=5 if first else 4)
    cells = {(row["arm"], row["vendor"], row["structure"]): row["dice_mean"] for row in summary}
    for arm in sorted({row["arm"] for row in summary}, key=arm_order):
        numbers = [
            Text(number(cells.get((arm, *column), np.nan)), style="bold" if (arm, *column) in best else "")
            for column in columns
        ]
        table.add_row(Text(arm_label(arm)), *numbers)
    missed = sum(row["missed"] for row in summary)
    seeds = [row["seeds"] for row in summary if row["seeds"]]
    few = trainings(min(seeds)) if seeds else ""
    said = [few] if few else []
    said += [f"{missed} missed or invented structures count as Dice 0"] if missed else []
    table.caption, table.caption_justify = "; ".join(said) or None, "left"
    return table


def table_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(vendor, structure) of each column; vendors are sorted by name."""
    return [(vendor, structure) for vendor in sorted({row["vendor"] for row in rows}) for structure in STRUCTURES]


def paper_cells(rows: Sequence[Mapping[str, Any]], note: Mapping[str, Any]) -> dict[Cell, float]:
    """The paper's Dice for the rows that it has; empty if `note` names a protocol: then the paper's was another."""
    if "protocol" in note:
        return {}
    keys = [(row["arm"], row["vendor"], row["structure"]) for row in rows]
    return {key: dice for key in keys if (dice := paper_dice(*key)) is not None}


def best_cells(rows: Sequence[Mapping[str, Any]]) -> set[Cell]:
    """(arm, vendor, structure) of the highest printed mean in each column. Ties are all best; a lone arm is not."""
    best = set()
    for vendor, structure in table_columns(rows):
        column = {
            row["arm"]: round(row["dice_mean"], 3)
            for row in rows
            if (row["vendor"], row["structure"]) == (vendor, structure) and np.isfinite(row["dice_mean"])
        }
        if len(column) > 1:
            best |= {(arm, vendor, structure) for arm, value in column.items() if value == max(column.values())}
    return best


def counts_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on how many structures were scored, missed or invented, and left out."""
    if not rows:
        return "No arm has been evaluated yet."
    missed, absent, volumes = (sum(row[key] for row in rows) for key in ("missed", "absent", "volumes"))
    sentence = f"{missed} of {volumes} scored structures were missed or invented (each counts as Dice 0, HD95 ∞)"
    return sentence + (f"; {absent} were absent from both masks and are left out." if absent else ".")


def is_phantom(note: Mapping[str, Any]) -> bool:
    """Whether the data are the phantom, so that no patient was measured."""
    return str(note.get("data", "")).lower() == "phantom"


def plain(value: Any) -> str:
    """A value of the note as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def number(value: float, digits: int = 3) -> str:
    """A number as the paper prints Dice, such as .905; a dash for NaN, ∞ for infinity."""
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def signed(value: float, digits: int = 3) -> str:
    """`number` with a sign (a true minus sign), but without one if it is printed as zero; a dash for NaN."""
    if np.isnan(value) or round(value, digits) == 0:
        return number(abs(value), digits)
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + number(abs(value), digits)


def tenth(value: float) -> str:
    """A number with one decimal, for mm, ml, % or g, such as 0.9; a dash for NaN, ∞ for infinity."""
    return f"{value:.1f}" if np.isfinite(value) else number(value)


def signed_tenth(value: float) -> str:
    """`tenth` with a sign, but without one if it is printed as zero."""
    if np.isnan(value) or round(value, 1) == 0:
        return tenth(abs(value))
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + tenth(abs(value))
