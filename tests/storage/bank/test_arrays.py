"""A bank's arrays: the bytes are those that Zarr itself writes, and Zarr reads them back, whatever their size."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.codecs import ZstdCodec

from storage import fs
from storage.bank.anatomy_codec import pack, unpack
from storage.bank.arrays import LEVEL, ShardFile, decoded_rows, metadata, shard_uri, write_metadata
from storage.bank.ledger import array_sha256
from storage.bank.spec import BankSpec
from tests.storage.banks import spec

# (slices, channels, H, W): odd sizes, edge tiles and shards that are not full
anatomies_NCHW = hnp.arrays(
    np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 21), st.integers(1, 21))
)


def encoded(name: str, values: npt.NDArray[Any], of: BankSpec) -> bytes:
    file = ShardFile(name, of)
    for row in values:
        file.append(file.encoded(row))
    assert file.values_sha256() == array_sha256(values)
    return file.content()


def by_zarr(path: Path, name: str, values: npt.NDArray[Any], slots: int) -> None:
    row, flat = values.shape[1:], name == "modality"
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(slots if flat else 1, *row),
        shards=None if flat else (slots, *row),
        compressors=ZstdCodec(level=LEVEL),
        fill_value=float("nan") if flat else 0,
        zarr_format=3,
        dimension_names=("row", "factor") if flat else ("row", "y", "x"),
    )
    array[:] = values


@settings(max_examples=40)
@given(anatomies_NCHW, st.integers(0, 3))
def test_anatomies_of_any_size_come_back_through_a_shard(binary: npt.NDArray[np.bool_], spare: int) -> None:
    of = spec(canvas=binary.shape[2:], shard_slices=len(binary) + spare, channels=binary.shape[1])
    stored = encoded("anatomy", pack(binary), of)
    found = np.stack(list(decoded_rows("anatomy", stored, of, len(binary))))
    assert np.array_equal(unpack(found, of.channels), binary)
    out = np.full_like(found, 7)
    assert all(row.base is out for row in decoded_rows("anatomy", stored, of, len(binary), out))
    assert np.array_equal(out, found)


@settings(max_examples=15)
@given(anatomies_NCHW, st.integers(0, 3), st.integers(1, 9))
def test_the_bytes_are_zarr_s_own(binary: npt.NDArray[np.bool_], spare: int, size: int) -> None:
    of = spec(canvas=binary.shape[2:], shard_slices=len(binary) + spare, modality_size=size)
    maps = pack(binary)
    vectors = np.random.default_rng(size).standard_normal((len(maps), size)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for name, values in (("anatomy", maps), ("modality", vectors)):
            by_zarr(Path(folder) / "zarr" / name, name, values, of.shard_slices)
            theirs = Path(shard_uri(f"{folder}/zarr", name, 0))
            if theirs.exists():  # Zarr writes none of nothing but zeros
                assert theirs.read_bytes() == encoded(name, values, of)
            found = json.loads((Path(folder) / "zarr" / name / "zarr.json").read_text())
            assert found == metadata(name, of, len(values))
            fs.write_bytes(shard_uri(f"{folder}/ours", name, 0), encoded(name, values, of))
            write_metadata(f"{folder}/ours", name, of, len(values))
            assert np.array_equal(np.asarray(zarr.open_array(f"{folder}/ours/{name}", mode="r")), values)


@pytest.mark.parametrize("name", ["anatomy", "modality"])
def test_a_file_of_something_else_is_an_error(name: str) -> None:
    for content in (b"", b"x", b"x" * 1000, bytes(1000)):
        with pytest.raises((ValueError, RuntimeError)):
            list(decoded_rows(name, content, spec(), 4))
