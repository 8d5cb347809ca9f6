"""The index of a factor bank: which slice each row is. The index's file alone says how many slices a bank holds.

In memory, a text column holds each different text once (`storage.parquet.REPEATED`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import fs
from storage.bank.spec import INDEX
from storage.errors import InputError
from storage.parquet import REPEATED, different_texts, read_parquet, text_codes, with_repeated
from storage.subjects import ALL_STRUCTURES, STRUCTURES_FIELD, partly_drawn, structures_text

DIGEST: Final = b"cardiomix_sha256"  # key of the file's metadata
_STRUCTURES_NAME: Final = STRUCTURES_FIELD.name.encode() + b"\0"
AT_ONCE: Final = 2**16  # rows of a column that are turned into bytes at a time
FEW: Final = 2**20  # the product of two numbers below it and one below 2**23 fits into an int64

# height, width, top, left: the image's extent on the canvas, in working pixels; pixel_area_mm2: the area of a working
# pixel; native_…: the scanner's own grid, in its pixels and mm.
_COLUMNS: Final = (
    (pa.int64(), "row"),
    (pa.string(), "subject vendor centre phase"),
    (pa.int32(), "frame slice"),
    (pa.bool_(), "labelled"),
    (pa.string(), "split"),
    (pa.float64(), "pixel_area_mm2"),
    (pa.int32(), "height width top left native_height native_width"),
    (pa.float64(), "native_row_mm native_col_mm"),
    (pa.string(), "terms"),
)
BANK_INDEX_SCHEMA: Final = pa.schema(
    [pa.field(name, kind, nullable=False) for kind, names in _COLUMNS for name in names.split()]
)
_PLACE: Final = frozenset({"row", "top", "left"})  # these say where a slice is in a bank, all others what it is
_STRUCTURES: Final = STRUCTURES_FIELD.name  # a last column, only if some mask lacks a structure that nobody drew

Key = tuple[str, int, int]


def slice_keys(table: pa.Table) -> list[Key]:
    """The key (subject, frame, slice) of each row. It names a slice in every bank's or slice store's table."""
    return list(zip(*(table.column(name).to_pylist() for name in ("subject", "frame", "slice")), strict=True))


def rows_of(index: pa.Table, wanted: pa.Table) -> npt.NDArray[np.int64]:
    """(n,) int64: for each row of `wanted`, the row of `index` that is the same slice (see `slice_keys`), or -1.

    Each of the two is a bank's or a slice store's table. `index` must not name a slice twice.
    """
    ours, theirs = _numbered(index, wanted)
    order = np.argsort(ours, kind="stable")  # the rows are mostly in order already
    at = np.minimum(np.searchsorted(ours, theirs, sorter=order), max(0, len(ours) - 1))
    rows = order[at] if len(ours) else np.full(len(theirs), -1)
    return np.where(ours[rows] == theirs, rows, -1) if len(ours) else rows


def _numbered(*tables: pa.Table) -> list[npt.NDArray[np.int64]]:
    """(rows,) int64 for each table: a number for each row.

    Two rows have the same number if, and only if, they are the same slice.
    """
    known: dict[str, int] = {}
    subjects = []
    for table in tables:
        codes, texts = text_codes(table["subject"])
        numbers = np.array([known.setdefault(text, len(known)) for text in texts], dtype=np.int64)
        subjects.append(numbers[codes] if texts else np.zeros(0, dtype=np.int64))
    whole = np.concatenate(subjects)
    for name in ("frame", "slice"):
        values, count = _counted_from_0(np.concatenate([table[name].to_numpy() for table in tables]).astype(np.int64))
        whole = whole * count + values
    return np.split(whole, np.cumsum([table.num_rows for table in tables])[:-1])


def _counted_from_0(values: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Replace values by numbers from 0 in the same order. Returns them and an upper end of them, exclusive."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if high - low < FEW:
        return values - low, high - low + 1
    different, ranks = np.unique(values, return_inverse=True)
    return ranks.astype(np.int64), len(different)


def validated_index(index: pa.Table) -> pa.Table:
    """The index with exactly our columns, in our order, each in one piece.

    The column `structures` is kept only if some mask is partly drawn. Raises ValueError if rows are not numbered 0, 1,
    2, …, if there is none, if a cell is empty or a slice occurs twice, and KeyError if a column is missing.
    """
    schema = with_repeated(_schema_of(index))
    if _STRUCTURES in schema.names:
        texts = index[_STRUCTURES]
        if not texts.null_count and not partly_drawn(different_texts(texts)):
            schema = with_repeated(BANK_INDEX_SCHEMA)
    table = pa.table([_held(index[field.name], field) for field in schema], schema=schema)
    if not table.num_rows or not np.array_equal(table["row"].to_numpy(), np.arange(table.num_rows)):
        raise ValueError("the index of a bank numbers its rows 0, 1, 2, …, and has at least one")
    if any(column.null_count for column in table.columns):
        raise ValueError("the index of a bank has no gaps")
    numbers = np.sort(_numbered(table)[0])
    if (numbers[1:] == numbers[:-1]).any():
        raise ValueError("the index of a bank names no slice twice")
    return table


def _schema_of(index: pa.Table) -> pa.Schema:
    """The schema that an index has in its file, with `structures` if the table has that column."""
    return BANK_INDEX_SCHEMA.append(STRUCTURES_FIELD) if _STRUCTURES in index.column_names else BANK_INDEX_SCHEMA


def _held(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """Convert a column to the type of `field`, in one piece."""
    if not pa.types.is_dictionary(field.type):
        return pa.chunked_array([column.cast(field.type).combine_chunks()], type=field.type)
    if not pa.types.is_dictionary(column.type):
        column = column.cast(field.type.value_type).dictionary_encode()
    return pa.chunked_array([column.unify_dictionaries().combine_chunks().cast(field.type)], type=field.type)


def with_structures(index: pa.Table) -> pa.Table:
    """The index with the column `structures`.

    If it had none, the column says that all structures are drawn in each labelled slice.
    """
    if _STRUCTURES in index.column_names:
        return index
    every = structures_text(ALL_STRUCTURES)
    texts = [every if labelled else "" for labelled in index["labelled"].to_pylist()]
    return index.append_column(STRUCTURES_FIELD.with_type(REPEATED), pa.array(texts).dictionary_encode())


def centred_on_canvas(index: pa.Table, canvas: tuple[int, int]) -> pa.Table:
    """Number the index's rows from 0 and centre its images on the canvas (H, W), as `bank_index` places them."""
    rows = {"row": np.arange(index.num_rows)}
    for at, (corner, extent) in enumerate((("top", "height"), ("left", "width"))):
        rows[corner] = (canvas[at] - index[extent].to_numpy()) // 2
    for name, values in rows.items():
        field = BANK_INDEX_SCHEMA.field(name)
        index = index.set_column(index.column_names.index(name), field, pa.array(values, type=field.type))
    return validated_index(index)


def append_missing_slices(index: pa.Table, wanted: pa.Table, canvas: tuple[int, int], bank: str) -> pa.Table:
    """Append to `index` the slices of `wanted` that it lacks. Returns `index` unchanged if none are missing.

    Images are centred on the canvas (H, W). `bank` is the bank's name for errors. Raises InputError if `wanted` lacks a
    slice of the index or says something else of it, or if a new slice is larger than the canvas.
    """
    remedy = "name another bank, or remove this one to extract it again"
    before = index
    index, wanted = with_structures(index), with_structures(wanted)
    shared = rows_of(wanted, index)
    lacking = int((shared < 0).sum())
    if lacking:
        raise InputError(bank, f"holds other slices than the run: {lacking} of them are not among its own", remedy)
    facts = pa.schema([field for field in _schema_of(wanted) if field.name not in _PLACE])
    if not wanted.select(facts.names).take(pa.array(shared)).cast(facts).equals(index.select(facts.names).cast(facts)):
        raise InputError(bank, "holds other slices than the run: some of the same name have changed", remedy)
    new = np.ones(wanted.num_rows, dtype=np.bool_)
    new[shared] = False
    if not new.any():
        return before
    added = wanted.take(pa.array(np.flatnonzero(new)))
    needed = tuple(int(pc.max(added[name]).as_py()) for name in ("height", "width"))
    if needed[0] > canvas[0] or needed[1] > canvas[1]:
        raise InputError(
            bank,
            f"its canvas is {canvas[0]} × {canvas[1]}, the new slices need {needed[0]} × {needed[1]}",
            "extract them to a bank of their own and join the two with `cardiomix bank merge`",
        )
    return centred_on_canvas(pa.concat_tables([index, added]), canvas)


def require_on_canvas(index: pa.Table, canvas: tuple[int, int], bank: str) -> None:
    """Raises InputError if an image's extent is empty or reaches beyond the canvas."""
    for corner, extent, length in zip(("top", "left"), ("height", "width"), canvas, strict=True):
        begin, size = (index[name].to_numpy() for name in (corner, extent))
        wrong = np.flatnonzero((begin < 0) | (size < 1) | (begin > length - size))
        if len(wrong):
            problem = f"the image of row {wrong[0]} is not on the canvas of {canvas[0]} × {canvas[1]}"
            raise InputError(f"{bank}, {INDEX}", problem, "restore it, or extract again")


def rows_where(index: pa.Table, wanted: dict[str, Any]) -> npt.NDArray[np.int64]:
    """The rows, (n,) int64, in which each column has the value given for it, or one of a list, tuple or set of values.

    Raises InputError for a column that the index does not have.
    """
    found = np.ones(index.num_rows, dtype=np.bool_)
    for name, value in wanted.items():
        if name not in index.column_names:
            raise InputError(f"where {name}", "an index has no such column", f"use {', '.join(index.column_names)}")
        values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        column = index[name].cast(pa.string()) if index[name].type == REPEATED else index[name]
        found &= pc.is_in(column, pa.array(values, type=column.type)).to_numpy()
    return np.flatnonzero(found)


def row_digests(index: pa.Table, parts: Iterable[range]) -> list[str]:
    """SHA-256, hex, of each range of rows, over each column in turn: its name, a zero byte, its values.

    Numbers are little endian, bools one byte, and a zero byte follows each text in UTF-8. In a range without a partly
    drawn mask, `structures` is left out. So a shard's digest stays the same if partly labelled slices are added
    elsewhere.
    """
    columns = [(name.encode() + b"\0", *_as_bytes(index[name])) for name in index.column_names]
    digests = []
    for part in parts:
        digest = hashlib.sha256()
        for name, values, texts in columns:
            if name == _STRUCTURES_NAME and not _says_anything(values[part.start : part.stop], texts):
                continue
            digest.update(name)
            for start in range(part.start, part.stop, AT_ONCE):
                piece = values[start : min(start + AT_ONCE, part.stop)]
                digest.update(piece.data if texts is None else b"".join([texts[code] for code in piece.tolist()]))
        digests.append(digest.hexdigest())
    return digests


def _says_anything(codes: npt.NDArray[Any], texts: list[bytes] | None) -> bool:
    """Whether nobody drew some structure in the mask of a labelled row."""
    assert texts is not None
    return partly_drawn(texts[code][:-1].decode() for code in np.unique(codes))


def _as_bytes(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], list[bytes] | None]:
    """A column's numbers, little endian, and None; for a text column the codes of its rows, and each text's bytes."""
    if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
        codes, texts = text_codes(column)
        return codes, [text.encode() + b"\0" for text in texts]
    values = column.to_numpy()
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")), None


def index_digest(index: pa.Table) -> str:
    """The digest (`row_digests`) of the whole index. It does not depend on how Parquet encodes the file."""
    return row_digests(index, [range(index.num_rows)])[0]


def write_index(bank: str, index: pa.Table) -> str:
    """Write the index, atomically: from now on the bank holds its rows. Returns its digest."""
    out, digest = io.BytesIO(), index_digest(index)
    # In the file, text columns have the plain type that the format names, so that every reader finds it. Parquet itself
    # stores them with dictionaries.
    plain = index.cast(_schema_of(index)).replace_schema_metadata({DIGEST: digest})
    pq.write_table(plain, out, compression="zstd")
    fs.write_bytes(fs.join(bank, INDEX), out.getvalue())
    return digest


def read_index(bank: str) -> tuple[pa.Table, str]:
    """Read the index and its digest.

    Raises InputError if it is missing or damaged, or if its digest is not the one that was written with it.
    """
    where, remedy = f"{fs.base_name(bank)}, {INDEX}", "restore it, or extract again"
    try:
        table = read_parquet(fs.read_bytes(fs.join(bank, INDEX)), repeated=True)
        index = validated_index(table)
        digest = index_digest(index)
    except FileNotFoundError as error:
        raise InputError(where, "is missing", remedy) from error
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(where, "is damaged", remedy) from error
    if digest.encode() != (table.schema.metadata or {}).get(DIGEST):
        raise InputError(where, "is not as it was written", remedy)
    return index, digest
