"""Rows of a CSV, Parquet or Excel file as dictionaries of trimmed text, column names in lower case."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from storage import fs
from storage.errors import InputError, one_line
from storage.parquet import read_parquet

Record = dict[str, str]
ROW = ""  # key of a row's number in its file, as a spreadsheet shows it; no column has an empty name


def read_records(source: str) -> list[Record]:
    """All rows that hold anything. Columns without a name, such as a saved index, are dropped. Raises InputError."""
    name = fs.base_name(source)
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
    return _named(rows, name)


def need_columns(source: str, records: Sequence[Record], needed: Iterable[str]) -> None:
    """Raise InputError, naming them, if columns are missing or there is no row."""
    if not records:
        raise InputError(fs.base_name(source), "has no rows", "write a header line and one row a subject")
    missing = [column for column in needed if column not in records[0]]
    if missing:
        raise InputError(
            fs.base_name(source),
            f"has no column {', '.join(missing)} (it has {', '.join(filter(None, records[0]))})",
            "add the column; cells may be empty where there is nothing to say",
        )


def _csv_lines(source: str) -> list[Sequence[object]]:
    text = fs.read_text(source)
    header = text.partition("\n")[0]
    # Excel in half of Europe writes semicolons.
    delimiter = max(",;\t", key=header.count)
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


def _excel(source: str) -> list[Sequence[object]]:
    import openpyxl

    data = io.BytesIO(fs.read_bytes(source))
    try:
        book = openpyxl.load_workbook(data, read_only=True, data_only=True)
        return list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # zip's, zlib's, the XML parser's: they have no base but this
        raise ValueError("not an Excel file") from error


def _parquet(source: str) -> list[Sequence[object]]:

    table = read_parquet(fs.read_bytes(source))
    return [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _named(rows: Sequence[Iterable[object]], source: str) -> list[Record]:
    lines = [[_text(cell) for cell in row] for row in rows]
    if not lines:
        return []
    names = [name.lower() for name in lines[0]]
    repeated = {n for n in names if n and names.count(n) > 1}
    if repeated:
        raise InputError(source, f"has the column {', '.join(sorted(repeated))} twice", "rename one of them")
    filled = ((n, line + [""] * (len(names) - len(line))) for n, line in enumerate(lines[1:], start=2) if any(line))
    return [
        {ROW: str(n), **{name: cell for name, cell in zip(names, line, strict=False) if name}} for n, line in filled
    ]


def _text(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():  # what becomes of whole numbers in a column with empty cells
        return str(int(cell))
    return str(cell).strip()
