"""Reading Parquet files that are in memory, and tables in which the same few texts stand in many rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

REPEATED = pa.dictionary(pa.int32(), pa.string())  # each different text once, and which of them a row has


def read_parquet(content: bytes, columns: Sequence[str] | None = None, repeated: bool = False) -> pa.Table:
    """The table in a file's bytes, or some of its columns; with `repeated`, text columns are of the type `REPEATED`
    and every column is in one piece. Raises pa.ArrowException if they are damaged.

    In this thread alone: our tables are small, and Arrow's threads, if they are just starting when a process ends,
    abort it. `pq.read_table` starts one even with `use_threads=False`: 6 of 20 commands that ended right after it.
    """
    chosen = None if columns is None else list(columns)
    if not repeated:
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=chosen, use_threads=False)
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
    # Files hold such columns by dictionaries of their own, so that no text is made twice on the way.
    table = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts).read(columns=chosen, use_threads=False)
    return table.unify_dictionaries().combine_chunks()


def with_repeated(schema: pa.Schema) -> pa.Schema:
    """The schema with `REPEATED` for text, as `read_parquet(…, repeated=True)` gives it."""
    fields = [field.with_type(REPEATED) if pa.types.is_string(field.type) else field for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def text_codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], list[str]]:
    """A text column as (n,) codes and the text of each code; a text that no row has may be among them."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no rows
        return np.zeros(0, dtype=np.int32), []
    return whole.indices.to_numpy(), whole.dictionary.to_pylist()


def text_array(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    """A text column as (n,) text."""
    codes, texts = text_codes(column)
    return np.array(texts, dtype=np.str_)[codes] if texts else np.zeros(len(codes), dtype=np.str_)


def different_texts(column: pa.ChunkedArray) -> list[str]:
    """The different texts of a column's rows, sorted."""
    codes, texts = text_codes(column)
    return sorted(texts[code] for code in np.flatnonzero(np.bincount(codes, minlength=len(texts))))
