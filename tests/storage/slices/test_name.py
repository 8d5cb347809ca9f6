"""The name of a run's slices is that of earlier versions, which took it from the index as one JSON text."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.scale import write_slices
from storage import fs
from storage.parquet import read_parquet
from storage.slices import name as naming
from storage.slices.name import NAME, checksum_of, name_of, stored_name
from storage.slices.store import TABLE, SliceStore
from storage.subjects import SLICE_SCHEMA

TEXTS = ("A", "é", 'quoted "x" \\ ', "", "line\nbreak", "心")
NUMBERS = (0.0, -0.0, 1.0, 1e22, 1e-7, 0.1, 1.25, 2**53 + 0.0, float("inf"), float("nan"), -3.5e-308)


def index(rows: int, **changes: Any) -> pa.Table:
    """Rows of every kind of value that a column may hold."""
    rng = np.random.default_rng(rows)
    columns: dict[str, Any] = {}
    for field in SLICE_SCHEMA:
        of = TEXTS if pa.types.is_string(field.type) else NUMBERS
        values: list[Any] = [of[k] for k in rng.integers(0, len(of), rows)]
        if pa.types.is_integer(field.type):
            values = rng.integers(-5, 2**31 - 1, rows).tolist()
        elif pa.types.is_boolean(field.type):
            values = (rng.random(rows) < 0.5).tolist()
        columns[field.name] = pa.array(values, type=field.type)
    return pa.table(columns | changes, schema=SLICE_SCHEMA)


def as_before(table: pa.Table) -> str:
    text = json.dumps(table.to_pylist(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def written(table: pa.Table, run: Path) -> str:
    out = io.BytesIO()
    pq.write_table(table, out)
    fs.write_bytes(fs.join(str(run), TABLE), out.getvalue())
    return str(run)


@pytest.mark.parametrize("rows", [0, 1, 2, 300])
def test_the_name_is_that_of_the_index_as_json(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = index(rows)
    assert name_of(table) == as_before(table)
    monkeypatch.setattr(naming, "AT_ONCE", 7)  # parts of which the last is not full
    assert name_of(table) == as_before(table)


def test_a_table_with_each_text_once_has_the_same_name(tmp_path: Path) -> None:
    table = index(100)
    out = io.BytesIO()
    with pq.ParquetWriter(out, SLICE_SCHEMA) as writer:  # row groups, and so dictionaries, of ten rows
        for start in range(0, 100, 10):
            writer.write_table(table.slice(start, 10))
    assert name_of(read_parquet(out.getvalue(), repeated=True)) == as_before(table)


def test_an_ingest_stores_the_name(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    write_slices(run, 2)
    content = fs.read_bytes(fs.join(run, TABLE))
    assert (
        stored_name(run, checksum_of(content)) == as_before(read_parquet(content)) == SliceStore.open(run).fingerprint
    )


def test_a_store_without_a_stored_name_or_with_that_of_another_index_works_it_out(tmp_path: Path) -> None:
    run = written(index(20), tmp_path / "run")
    assert SliceStore.open(run).fingerprint == as_before(index(20))
    content = fs.read_bytes(fs.join(run, TABLE))
    naming.store_name(run, "0123456789abcdef", checksum_of(content))
    assert SliceStore.open(run).fingerprint == "0123456789abcdef"  # it is not worked out again
    written(index(21), tmp_path / "run")
    assert SliceStore.open(run).fingerprint == as_before(index(21))
    for damaged in ("", "[]", "{}", '{"index_sha256": 1}'):
        fs.write_text(fs.join(run, NAME), damaged)
        assert stored_name(run, checksum_of(content)) is None
        assert SliceStore.open(run).fingerprint == as_before(index(21))
