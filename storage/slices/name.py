"""The name of a run's slices: a SHA-256 over the index as JSON text, and the file in which the name is stored.

The text is what `json.dumps(table.to_pylist(), sort_keys=True)` gives, because the names of finished runs come from it.
To save time and memory, it is built column by column, for a part of the rows at a time.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage import fs
from storage.parquet import text_codes

NAME: Final = "slices.json"
AT_ONCE: Final = 2**16  # rows that are turned into JSON at a time: 45 MB of text


def name_of(table: pa.Table) -> str:
    """Compute the name of an index: 16 hex digits. Its columns hold text, numbers or bools, and no nulls."""
    digest = hashlib.sha256(b"[")
    for start in range(0, table.num_rows, AT_ONCE):
        text = _objects(table.slice(start, AT_ONCE))
        digest.update(memoryview(text)[0 if start else 2 :])
    digest.update(b"]")
    return digest.hexdigest()[:16]


def checksum_of(content: bytes) -> str:
    """SHA-256, in hex, of an index file. `slices.json` records it to say which index its name belongs to."""
    return hashlib.sha256(content).hexdigest()


def stored_name(run: str, checksum: str) -> str | None:
    """Read the stored name of the index with this checksum. None if it is absent, damaged or of another index."""
    try:
        document = json.loads(fs.read_text(fs.join(run, NAME)))
        return str(document["fingerprint"]) if document["index_sha256"] == checksum else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def store_name(run: str, name: str, checksum: str) -> None:
    """Store the name of an index, atomically."""
    fs.write_text(fs.join(run, NAME), json.dumps({"fingerprint": name, "index_sha256": checksum}, indent=1) + "\n")


def _objects(part: pa.Table) -> pa.Buffer:
    """The rows as JSON text, one `, {…}` after another."""
    pieces: list[Any] = []
    for number, name in enumerate(sorted(part.column_names)):
        pieces += [f"{', ' if number else ', {'}{json.dumps(name)}: ", _values(part[name])]
    rows = pc.binary_join_element_wise(*pieces, "}", "").combine_chunks()
    _, offsets, text = rows.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[rows.offset : rows.offset + len(rows) + 1]
    return text.slice(int(ends[0]), int(ends[-1] - ends[0]))


def _values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each value of a column as JSON text."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    different: list[Any]
    codes: npt.NDArray[np.integer[Any]]
    if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
        codes, different = text_codes(column)
    elif pa.types.is_boolean(column.type):
        codes, different = column.to_numpy().astype(np.int64), [False, True]
    else:
        bits, codes = np.unique(column.to_numpy().view(np.int64), return_inverse=True)  # keeps -0.0 apart from 0.0
        different = bits.view(np.float64).tolist()
    return pa.chunked_array([pa.array(map(json.dumps, different), type=pa.string()).take(pa.array(codes))])
