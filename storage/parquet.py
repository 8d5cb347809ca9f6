"""Reads Parquet files from memory, and handles columns in which the same few texts stand in many rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

REPEATED = pa.dictionary(pa.int32(), pa.string())  # holds each different text once, and for each row its number


def read_parquet(content: bytes, columns: Sequence[str] | None = None, repeated: bool = False) -> pa.Table:
    """Read the table in a file's bytes, or some of its columns. Raises pa.ArrowException if the bytes are damaged.

    With `repeated`, text columns have the type `REPEATED`, and every column is in one piece. The table is read in this
    thread alone: our tables are small, and if Arrow's threads are just starting when a process ends, they abort it.
    `pq.read_table` starts such a thread even with `use_threads=False`: 6 of 20 commands that ended right after it were
    aborted.
    """
    chosen = None if columns is None else list(columns)
    if not repeated:
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=chosen, use_threads=False)
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
    # Files store such columns with dictionaries of their own. Read as such, no text is made twice.
    table = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts).read(columns=chosen, use_threads=False)
    return table.unify_dictionaries().combine_chunks()


def with_repeated(schema: pa.Schema) -> pa.Schema:
    """The schema with `REPEATED` for text, as `read_parquet(…, repeated=True)` gives it."""
    fields = [field.with_type(REPEATED) if pa.types.is_string(field.type) else field for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def text_codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], list[str]]:
    """A text column as (n,) int32 codes and the list of texts that they number.

    Some texts may belong to no row.
    """
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # a column without rows
        return np.zeros(0, dtype=np.int32), []
    return whole.indices.to_numpy(), whole.dictionary.to_pylist()


def text_array(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    """A text column as an array (n,) of numpy str."""
    codes, texts = text_codes(column)
    return np.array(texts, dtype=np.str_)[codes] if texts else np.zeros(len(codes), dtype=np.str_)


def different_texts(column: pa.ChunkedArray) -> list[str]:
    """The different texts of a column's rows, sorted."""
    codes, texts = text_codes(column)
    return sorted(texts[code] for code in np.flatnonzero(np.bincount(codes, minlength=len(texts))))
