"""The index of a factor bank: which slice each row is. Its file is the one truth about how many slices a bank holds."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import fs
from storage.bank.spec import INDEX, sha256
from storage.errors import InputError
from storage.parquet import read_parquet
from storage.subjects import ALL_STRUCTURES, STRUCTURES_FIELD, partly_drawn, structures_text

DIGEST: Final = b"cardiomix_sha256"  # key of the file's metadata

# height, width, top, left: the image's true extent on the canvas, in working pixels; pixel_area_mm2: that of a working
# pixel; native_: the scanner's own grid.
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
_PLACE: Final = frozenset({"row", "top", "left"})  # where a slice is in a bank; the rest says what it is
_STRUCTURES: Final = STRUCTURES_FIELD.name  # a last column, only in an index in which some mask lacks one

Key = tuple[str, int, int]


def slice_keys(table: pa.Table) -> list[Key]:
    """(subject, frame, slice) of each row of a bank's or a slice store's table: names a slice in any run and bank."""
    return list(zip(*(table.column(name).to_pylist() for name in ("subject", "frame", "slice")), strict=True))


def validated_index(index: pa.Table) -> pa.Table:
    """The index with exactly our columns, in our order, in one piece; `structures` only if it says anything.

    Raises ValueError if it is not an index.
    """
    texts = index[_STRUCTURES].to_pylist() if _STRUCTURES in index.column_names else []
    schema = BANK_INDEX_SCHEMA.append(STRUCTURES_FIELD) if partly_drawn(texts) else BANK_INDEX_SCHEMA
    table = index.select(schema.names).cast(schema).combine_chunks()
    if not table.num_rows or not np.array_equal(table["row"].to_numpy(), np.arange(table.num_rows)):
        raise ValueError("the index of a bank numbers its rows 0, 1, 2, …, and has at least one")
    if any(column.null_count for column in table.columns):
        raise ValueError("the index of a bank has no gaps")
    if len(set(slice_keys(table))) != table.num_rows:
        raise ValueError("the index of a bank names no slice twice")
    return table


def with_structures(index: pa.Table) -> pa.Table:
    """The index with the column `structures`, which says of a labelled slice that all are drawn if there was none."""
    if _STRUCTURES in index.column_names:
        return index
    every = structures_text(ALL_STRUCTURES)
    texts = [every if labelled else "" for labelled in index["labelled"].to_pylist()]
    return index.append_column(STRUCTURES_FIELD, pa.array(texts, type=STRUCTURES_FIELD.type))


def centred_on_canvas(index: pa.Table, canvas: tuple[int, int]) -> pa.Table:
    """The index with its rows numbered anew and its images centred on the canvas, as `bank_index` places them."""
    rows = {"row": np.arange(index.num_rows)}
    for at, (corner, extent) in enumerate((("top", "height"), ("left", "width"))):
        rows[corner] = (canvas[at] - index[extent].to_numpy()) // 2
    for name, values in rows.items():
        field = BANK_INDEX_SCHEMA.field(name)
        index = index.set_column(index.column_names.index(name), field, pa.array(values, type=field.type))
    return validated_index(index)


def append_missing_slices(index: pa.Table, wanted: pa.Table, canvas: tuple[int, int], bank: str) -> pa.Table:
    """The bank's index with those slices of `wanted` after its own that it has not; itself if there are none.

    Raises InputError if `wanted` lacks a slice of the index, says something else of one, or has one that is too large.
    """
    remedy = "name another bank, or remove this one to extract it again"
    before = index
    index, wanted = with_structures(index), with_structures(wanted)
    at = {key: row for row, key in enumerate(slice_keys(wanted))}
    shared = [at.pop(key, None) for key in slice_keys(index)]
    lacking = shared.count(None)
    if lacking:
        raise InputError(bank, f"holds other slices than the run: {lacking} of them are not among its own", remedy)
    facts = [name for name in wanted.column_names if name not in _PLACE]
    if not wanted.select(facts).take(pa.array(shared, type=pa.int64())).equals(index.select(facts)):
        raise InputError(bank, "holds other slices than the run: some of the same name have changed", remedy)
    if not at:
        return before
    added = wanted.take(pa.array(list(at.values()), type=pa.int64()))
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
    """Rows in which every named column has the value, or one of the values in a list, tuple or set.

    Raises InputError for a column that an index does not have.
    """
    found = np.ones(index.num_rows, dtype=np.bool_)
    for name, value in wanted.items():
        if name not in index.column_names:
            raise InputError(f"where {name}", "an index has no such column", f"use {', '.join(index.column_names)}")
        values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        found &= pc.is_in(index[name], pa.array(values, type=index[name].type)).to_numpy()
    return np.flatnonzero(found)


def row_digests(index: pa.Table, parts: Iterable[range]) -> list[str]:
    """SHA-256, hex, of each range of rows: column by column, its name and a zero byte, then its values.

    Numbers little endian, bools as one byte, each text in UTF-8 with a zero byte after it. `structures` does not count
    in a range where it says nothing, so that a shard stays the same when others that are partly labelled are added.
    """
    columns = []
    for name in index.column_names:
        text = pa.types.is_string(index[name].type)
        columns.append((name, index[name].to_pylist() if text else index[name].to_numpy()))

    def content(name: str, values: Any) -> bytes:
        if not isinstance(values, list):
            body = bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
        elif name == _STRUCTURES and not partly_drawn(values):
            return b""
        else:
            body = b"".join(text.encode() + b"\0" for text in values)
        return name.encode() + b"\0" + body

    return [sha256(*(content(name, values[part.start : part.stop]) for name, values in columns)) for part in parts]


def index_digest(index: pa.Table) -> str:
    """`row_digests` of the whole index; it does not depend on the Parquet file's encoding."""
    return row_digests(index, [range(index.num_rows)])[0]


def write_index(bank: str, index: pa.Table) -> None:
    """Write the index, atomically: from now on the bank holds its rows."""
    out = io.BytesIO()
    pq.write_table(index.replace_schema_metadata({DIGEST: index_digest(index)}), out, compression="zstd")
    fs.write_bytes(fs.join(bank, INDEX), out.getvalue())


def read_index(bank: str) -> pa.Table:
    """The index. Raises InputError if it is missing, damaged or not as it was written."""
    where, remedy = f"{fs.base_name(bank)}, {INDEX}", "restore it, or extract again"
    try:
        table = read_parquet(fs.read_bytes(fs.join(bank, INDEX)))
        index = validated_index(table)
        digest = index_digest(index)
    except FileNotFoundError as error:
        raise InputError(where, "is missing", remedy) from error
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(where, "is damaged", remedy) from error
    if digest.encode() != (table.schema.metadata or {}).get(DIGEST):
        raise InputError(where, "is not as it was written", remedy)
    return index.replace_schema_metadata(None)
