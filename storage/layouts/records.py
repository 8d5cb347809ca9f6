"""Rows of a CSV, Parquet or Excel file as dictionaries of trimmed text, column names in lower case."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from storage import uri
from storage.errors import InputError

Record = dict[str, str]
SUFFIXES = (".csv", ".parquet", ".xlsx")


def read_records(source: str) -> list[Record]:
    """All rows that hold anything. Columns without a name, such as a saved index, are dropped. Raises InputError."""
    name = uri.base_name(source)
    try:
        if name.lower().endswith(".parquet"):
            return _parquet(source)
        rows = _excel(source) if name.lower().endswith(".xlsx") else _csv(source)
    except FileNotFoundError as error:
        raise InputError(name, "no such file", "check the path") from error
    except (OSError, ValueError, KeyError, csv.Error) as error:
        problem = f"cannot be read as a table ({_first_line(error)})"
        raise InputError(name, problem, "save it again as UTF-8 CSV") from error
    return _named(rows)


def need_columns(source: str, records: Sequence[Record], needed: Iterable[str]) -> None:
    """Raise InputError, naming them, if columns are missing or there is no row."""
    if not records:
        raise InputError(uri.base_name(source), "has no rows", "write a header line and one row a subject")
    missing = [column for column in needed if column not in records[0]]
    if missing:
        raise InputError(
            uri.base_name(source),
            f"has no column {', '.join(missing)} (it has {', '.join(records[0])})",
            "add the column; cells may be empty where there is nothing to say",
        )


def _csv(source: str) -> Iterable[Sequence[object]]:
    text = uri.read_text(source)
    header = text.partition("\n")[0]
    # Excel in half of Europe writes semicolons.
    delimiter = max(",;\t", key=header.count)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _excel(source: str) -> Iterable[Sequence[object]]:
    from zipfile import BadZipFile

    import openpyxl

    try:
        book = openpyxl.load_workbook(io.BytesIO(uri.read_bytes(source)), read_only=True, data_only=True)
    except BadZipFile as error:
        raise ValueError("not an Excel file") from error
    return list(book.worksheets[0].iter_rows(values_only=True))


def _parquet(source: str) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(uri.read_bytes(source)))
    return _named([table.column_names, *(row.values() for row in table.to_pylist())])


def _named(rows: Iterable[Iterable[object]]) -> list[Record]:
    lines = [[_text(cell) for cell in row] for row in rows]
    if not lines:
        return []
    names = [name.lower() for name in lines[0]]
    repeated = {n for n in names if n and names.count(n) > 1}
    if repeated:
        raise InputError("table", f"has the column {', '.join(sorted(repeated))} twice", "rename one of them")
    filled = (line + [""] * (len(names) - len(line)) for line in lines[1:] if any(line))
    return [{name: cell for name, cell in zip(names, line, strict=False) if name} for line in filled]


def _text(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    return str(cell).strip()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
