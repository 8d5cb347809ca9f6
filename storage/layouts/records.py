"""Reads the rows of a CSV, Parquet or Excel file as dictionaries: column name in lower case → trimmed text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from storage import fs
from storage.errors import InputError, one_line
from storage.parquet import read_parquet

Record = dict[str, str]
ROW = ""  # key of a row's number in its file, as a spreadsheet shows it; no column has an empty name
BEYOND = " "  # key of text after a row's last column, if there is any; no column has this name, since names are trimmed


def read_records(source: str) -> list[Record]:
    """Read all rows that are not empty. Columns without a name, such as a saved index, are dropped.

    If a row of a CSV file has text after the last column, that text is kept under `BEYOND`: see `check_row`. Raises
    InputError if the file is absent, is not a table, or has a column twice.
    """
    name = fs.base_name(source)
    is_text = not name.lower().endswith((".parquet", ".xlsx"))
    try:
        if name.lower().endswith(".parquet"):
            rows = _parquet(source)
        else:
            rows = _excel(source) if name.lower().endswith(".xlsx") else _csv_lines(source)
    except FileNotFoundError as error:
        raise InputError(name, "no such file", "check the path") from error
    except (OSError, ValueError, KeyError, csv.Error) as error:
        problem = f"cannot be read as a table ({one_line(error)})"
        raise InputError(name, problem, "save it again as UTF-8 CSV") from error
    return _named(rows, name, is_text)


def check_row(record: Record, where: str) -> None:
    """Raise InputError if a row has more cells than its table has columns: cells may be under the wrong column."""
    if BEYOND in record:
        raise InputError(
            where,
            f"has more cells than the table has columns; '{record[BEYOND]}' is left over",
            'put a cell that holds the separator into quotes, such as "LV 1, MYO 2, RV 3"',
        )


def need_columns(source: str, records: Sequence[Record], needed: Iterable[str]) -> None:
    """Raise InputError if the table has no row, or lacks a column, which the error then names."""
    if not records:
        raise InputError(fs.base_name(source), "has no rows", "write a header line and one row a subject")
    missing = [column for column in needed if column not in records[0]]
    if missing:
        raise InputError(
            fs.base_name(source),
            f"has no column {', '.join(missing)} (it has {', '.join(filter(str.strip, records[0]))})",
            "add the column; cells may be empty where there is nothing to say",
        )


def _csv_lines(source: str) -> list[Sequence[object]]:
    text = fs.read_text(source)
    header = text.partition("\n")[0]
    # In half of Europe, Excel writes semicolons.
    delimiter = max(",;\t", key=header.count)
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


def _excel(source: str) -> list[Sequence[object]]:
    import openpyxl

    data = io.BytesIO(fs.read_bytes(source))
    try:
        book = openpyxl.load_workbook(data, read_only=True, data_only=True)
        return list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # the errors of zip, zlib and the XML parser have no other common base
        raise ValueError("not an Excel file") from error


def _parquet(source: str) -> list[Sequence[object]]:

    table = read_parquet(fs.read_bytes(source))
    return [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _named(rows: Sequence[Iterable[object]], source: str, is_text: bool) -> list[Record]:
    lines = [[_text(cell) for cell in row] for row in rows]
    if not lines:
        return []
    names = [name.lower() for name in lines[0]]
    repeated = {n for n in names if n and names.count(n) > 1}
    if repeated:
        raise InputError(source, f"has the column {', '.join(sorted(repeated))} twice", "rename one of them")
    width = max((n for n, name in enumerate(names, start=1) if name), default=0)
    records = []
    for n, line in enumerate(lines[1:], start=2):
        if any(line):
            cells = line + [""] * (width - len(line))
            record = {ROW: str(n), **{name: cell for name, cell in zip(names, cells, strict=False) if name}}
            beyond = ", ".join(filter(None, line[width:])) if is_text else ""
            records.append({**record, BEYOND: beyond} if beyond else record)
    return records


def _text(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():  # a whole number, in a column that has empty cells
        return str(int(cell))
    return str(cell).strip()
