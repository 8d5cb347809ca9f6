"""What `cardiomix inspect` shows of data folders: tables for a terminal and one self-contained HTML page.

Both show subject codes and base names only. The page holds no date and no path, so that equal data give equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.inspection.figures import Histogram, Thumbnail, histogram, thumbnail
from experiments.page_template import environment
from experiments.report.figures import RA_RANGE_MM2
from storage import fs
from storage.errors import InputError
from storage.subjects import SPLITS
from storage.survey.flags import Check, Flag, flags, short
from storage.survey.survey import SubjectFacts, Survey

if TYPE_CHECKING:
    import rich.table

COLUMNS = 120  # width of the tables if they are not printed to a terminal
SHOWN_SUBJECTS = 4  # subjects named in a line of the terminal; the page names all
SHOWN_SKIPPED = 20  # skipped subjects listed in the terminal; the page lists all
PER_VENDOR = 4  # pictures on the page


Spread = tuple[str, str]  # (median, range); the range is empty if all values are the same


@dataclass(frozen=True)
class Group:
    """The subjects of one vendor and centre, or all.

    labelled: number of labelled slices. slice_mm: distance of slices. matrix: rows and columns, each a number or a
    range. p995: 99.5 % percentile of the intensities of a volume. splits: subjects in each of `SPLITS`.
    """

    vendor: str
    centre: str
    subjects: int
    volumes: int
    slices: int
    labelled: int
    pixel_area_mm2: Spread
    slice_mm: Spread
    matrix: tuple[str, str]
    p995: Spread
    splits: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """What one check found in one vendor and centre: in which subjects, of how many, and the number or its range."""

    check: Check
    vendor: str
    centre: str
    subjects: tuple[str, ...]
    of: int
    number: str


def groups(subjects: Sequence[SubjectFacts]) -> list[Group]:
    """One row per vendor and centre. If there are several, one more row over all."""
    keys = sorted({(s.vendor, s.centre) for s in subjects})
    rows = [_group(*key, [s for s in subjects if (s.vendor, s.centre) == key]) for key in keys]
    return [*rows, _group("all", "", subjects)] if len(rows) > 1 else rows


def findings(subjects: Sequence[SubjectFacts]) -> list[Finding]:
    """What the checks flag: one finding for each check, vendor and centre."""
    sizes = Counter((s.vendor, s.centre) for s in subjects)
    lines: dict[tuple[Check, str, str], list[Flag]] = {}
    for flag in flags(subjects, RA_RANGE_MM2):
        lines.setdefault((flag.check, flag.vendor, flag.centre), []).append(flag)
    return [
        Finding(check, vendor, centre, tuple(f.subject for f in found), sizes[vendor, centre], _numbers(found))
        for (check, vendor, centre), found in lines.items()
    ]


def terminal_tables(survey: Survey) -> list[rich.table.Table]:
    """Tables of what is there, what would be skipped, and what is flagged. They fit into 120 columns."""
    tables = [_groups_table(survey)] if survey.subjects else []
    tables += [_skipped_table(survey)] if survey.skipped else []
    found = findings(survey.subjects)
    return [*tables, _findings_table(found)] if found else tables


def page(survey: Survey, folders: Sequence[str], images: bool = True) -> str:
    """The HTML page. `folders` are base names. Without `images` it holds no pixel of the data set."""
    templates = environment(Path(__file__).parent)
    subjects = survey.subjects
    vendors = sorted({s.vendor for s in subjects})
    return templates.get_template("page.html.j2").render(
        folders=", ".join(folders),
        counts=counts(survey),
        groups=groups(subjects),
        vendors=vendors,
        matrices={vendor: _matrices([s for s in subjects if s.vendor == vendor]) for vendor in vendors},
        areas=_histograms(
            {v: [s.pixel_area_mm2 for s in subjects if s.vendor == v] for v in vendors}, "subjects", "mm²"
        ),
        intensities=_histograms(
            {v: [f.p995 for s in subjects if s.vendor == v for f in s.volumes] for v in vendors},
            "volumes",
            "",
            log=True,
        ),
        ra_range=RA_RANGE_MM2,
        findings=findings(subjects),
        skipped=survey.skipped,
        pictures=_pictures(subjects) if images else {},
    )


def show(survey: Survey) -> None:
    """Print the tables of a survey."""
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else COLUMNS)  # a pipe has no width
    for table in terminal_tables(survey):
        console.print(table)


def write_page(out: str, survey: Survey, data: Sequence[str], images: bool) -> None:
    """Write the page of these data folders to `out`. Raises InputError if it cannot be written."""
    folders = [fs.base_name(fs.absolute(folder)) for folder in data]
    try:
        fs.write_text(out, page(survey, folders, images))
    except OSError as error:
        raise InputError(fs.base_name(out), f"cannot be written ({error.strerror})", "choose another --out") from error


def counts(survey: Survey) -> str:
    """One line that says how much is there."""
    volumes = [v for s in survey.subjects for v in s.volumes]
    slices, labelled = (sum(v.slices for v in volumes if v.mask is not None or not only) for only in (False, True))
    return (
        f"{_plural(len(survey.subjects), 'subject')}, {_plural(len(volumes), 'volume')}, "
        f"{_plural(slices, 'slice')}, of which {labelled} labelled; "
        f"{len(survey.skipped) or 'none'} would be skipped"
    )


def _group(vendor: str, centre: str, subjects: Sequence[SubjectFacts]) -> Group:
    volumes = [v for s in subjects for v in s.volumes]
    splits = Counter(s.split for s in subjects)
    height, width = (_range([getattr(s, side) for s in subjects]) for side in ("height", "width"))
    return Group(
        vendor=vendor,
        centre=centre,
        subjects=len(subjects),
        volumes=len(volumes),
        slices=sum(v.slices for v in volumes),
        labelled=sum(v.slices for v in volumes if v.mask is not None),
        pixel_area_mm2=_spread([s.pixel_area_mm2 for s in subjects], "{:.2f}".format),
        slice_mm=_spread([s.spacing_mm[0] for s in subjects]),
        matrix=(height, width),
        p995=_spread([v.p995 for v in volumes]),
        splits=tuple(splits[name] for name in SPLITS),
    )


def _spread(values: Sequence[float], text: Callable[[float], str] = short) -> Spread:
    low, middle, high = (text(v) for v in (min(values), float(np.median(values)), max(values)))
    return middle, "" if low == high else f"{low}–{high}"


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}–{max(values)}" if len(set(values)) > 1 else str(values[0])


def _matrices(subjects: Sequence[SubjectFacts]) -> list[str]:
    """Each rows × columns with its number of subjects, the most frequent first."""
    sizes = Counter((s.height, s.width) for s in subjects)
    ordered = sorted(sizes, key=lambda size: (-sizes[size], size))
    return [f"{height} × {width} ({sizes[height, width]})" for height, width in ordered]


def _numbers(found: Sequence[Flag]) -> str:
    low, high = min(found, key=lambda f: f.value), max(found, key=lambda f: f.value)
    text = low.number if len({f.number for f in found}) == 1 else f"{low.number} to {high.number}"
    return f"{text} {found[0].unit}".rstrip()


def _histograms(values: dict[str, list[float]], noun: str, unit: str, log: bool = False) -> list[Histogram]:
    """One histogram per vendor, on a common axis. The axis of pixel areas also shows the whole range of RA."""
    everything = [v for found in values.values() for v in found]
    if not everything:
        return []
    log = log and min(everything) > 0
    shaded = RA_RANGE_MM2 if unit else None
    return [histogram(vendor, found, everything, noun, unit, log, shaded) for vendor, found in values.items()]


def _pictures(subjects: Sequence[SubjectFacts]) -> dict[str, list[Thumbnail]]:
    """Pictures of up to `PER_VENDOR` subjects of each vendor, evenly spaced by name; labelled subjects come first."""
    chosen: dict[str, list[Thumbnail]] = {}
    for vendor in sorted({s.vendor for s in subjects}):
        own = [s for s in subjects if s.vendor == vendor]
        labelled, others = [s for s in own if s.labelled], [s for s in own if not s.labelled]
        taken = _spaced(labelled, PER_VENDOR)
        taken += _spaced(others, PER_VENDOR - len(taken))
        chosen[vendor] = [thumbnail(s) for s in taken]
    return chosen


def _spaced(subjects: Sequence[SubjectFacts], wanted: int) -> list[SubjectFacts]:
    taken = min(wanted, len(subjects))
    return [subjects[i * len(subjects) // taken] for i in range(taken)]


def _groups_table(survey: Survey) -> rich.table.Table:
    table = _table(counts(survey))
    table.add_column("vendor", overflow="fold")
    table.add_column("centre", overflow="fold")
    for heading in ("sub-\njects", "vol-\numes", "slices", "label-\nled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("pixel area\nmm²", "slice\nmm", "intensity\np99.5", "matrix\n"):
        table.add_column(heading, no_wrap=True)
    for name in ("train", "val.", "test", "excl."):
        table.add_column(name, justify="right", no_wrap=True)
    for g in groups(survey.subjects):
        numbers = [str(n) for n in (g.subjects, g.volumes, g.slices, g.labelled)]
        spreads = ["\n".join(filter(None, spread)) for spread in (g.pixel_area_mm2, g.slice_mm, g.p995)]
        matrix = "\n× ".join(g.matrix)
        splits = [str(n or "–") for n in g.splits]
        _add(table, g.vendor, g.centre, *numbers, *spreads, matrix, *splits)
    return table


def _skipped_table(survey: Survey) -> rich.table.Table:
    table = _table(f"{len(survey.skipped)} would be skipped", "subject", "file", "reason", "remedy")
    for skipped in survey.skipped[:SHOWN_SKIPPED]:
        _add(table, skipped.subject, skipped.file, skipped.reason, skipped.remedy)
    if len(survey.skipped) > SHOWN_SKIPPED:
        _add(table, f"and {len(survey.skipped) - SHOWN_SKIPPED} more", "", "all of them are on the page", "")
    return table


def _findings_table(found: Sequence[Finding]) -> rich.table.Table:
    headings = ("vendor, centre", "subjects", "what", "number", "why it matters")
    table = _table("Worth a look (nothing here keeps a subject out)", *headings)
    for f in found:
        names = ", ".join(f.subjects[:SHOWN_SUBJECTS])
        more = len(f.subjects) - SHOWN_SUBJECTS
        names += f" and {more} more" if more > 0 else ""
        what = f"{f.check.about} {f.check.finding}"
        _add(table, f"{f.vendor}, {f.centre}", f"{names} ({len(f.subjects)} of {f.of})", what, f.number, f.check.why)
    return table


def _table(title: str, *headings: str) -> rich.table.Table:
    import rich.table
    from rich.text import Text

    table = rich.table.Table(
        *headings, box=None, padding=(0, 2, 0, 0), title=Text(f"\n{title}"), title_justify="left", title_style="bold"
    )
    return table


def _add(table: rich.table.Table, *cells: str) -> None:
    """Add a row of plain text: a subject's name is not markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
