"""Reading Parquet files that are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a file's bytes, or some of its columns. Raises pa.ArrowException if they are damaged.

    In this thread alone: our tables are small, and Arrow's threads, if they are just starting when a process ends,
    abort it (3 of 40 short commands on a busy machine).
    """
    chosen = None if columns is None else list(columns)
    return pq.read_table(pa.BufferReader(content), columns=chosen, use_threads=False, pre_buffer=False)
