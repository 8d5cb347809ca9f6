"""The three arrays of a factor bank: their Zarr v3 metadata, and a shard's values to and from one file.

Put together here instead of by Zarr: one request a shard and array, no half-written file, the same errors for a folder
and an object store. `zarr.open_group` reads what comes out; tests/storage/bank/test_arrays.py holds it to that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from storage import fs
from storage.bank.spec import BankSpec
from storage.errors import InputError
from storage.sharded_array import LITTLE, ShardWriter, chunks

ARRAYS: Final = ("anatomy", "mask", "modality")
METADATA: Final = "zarr.json"
# Within 3 % of level 22 in a quarter of its time. No bit shuffle, which makes these maps half as large again or more:
# what the channels say of one pixel belongs together.
LEVEL: Final = 15

Values = npt.NDArray[Any]
EncodedRow = tuple[Values, bytes | None]  # a row's values; its chunk, None where it has none


def dtype(name: str) -> np.dtype[Any]:
    """The type of an array's values, little endian."""
    return np.dtype("<f4" if name == "modality" else "u1")


def row_shape(name: str, spec: BankSpec) -> tuple[int, ...]:
    """The shape of one slice's row."""
    return (spec.modality_size,) if name == "modality" else spec.canvas


def shard_uri(bank: str, name: str, shard: int) -> str:
    """The file of a shard: Zarr's key of the chunk (shard, 0, …)."""
    return fs.join(bank, name, "c", str(shard), *["0"] * (1 if name == "modality" else 2))


class ShardFile:
    """A shard's file of one array, and the SHA-256 of its values, put together row by row.

    A row is (H, W) uint8, or (modality_size,) float32; those that the last shard lacks are the fill value.
    """

    def __init__(self, name: str, spec: BankSpec) -> None:
        self._name, self._spec = name, spec
        self._sha256 = hashlib.sha256()
        self._maps = ShardWriter(Zstd(level=LEVEL).encode, spec.shard_slices)
        self._vectors: list[Values] = []

    def encoded(self, values: Values) -> EncodedRow:
        """A row of the array's shape and type, ready to be appended; on any thread."""
        values = np.ascontiguousarray(values, dtype=dtype(self._name))
        return values, None if self._name == "modality" else self._maps.encoded(values)

    def append(self, row: EncodedRow) -> None:
        """The next row. Raises IndexError if the shard is full."""
        values, chunk = row
        self._sha256.update(values.data)
        if self._name == "modality":
            self._vectors.append(values)
        else:
            self._maps.append_encoded(chunk)

    def values_sha256(self) -> str:
        """As the ledger records it, see `ledger.array_sha256`."""
        return self._sha256.hexdigest()

    def content(self) -> bytes:
        """The file's bytes. Raises ValueError for more vectors than a shard has room for."""
        if self._name != "modality":
            return self._maps.content()
        whole = np.full((self._spec.shard_slices, *row_shape(self._name, self._spec)), np.nan, dtype=dtype(self._name))
        whole[: len(self._vectors)] = self._vectors
        return bytes(Zstd(level=LEVEL).encode(whole))


def decoded_rows(name: str, stored: bytes, spec: BankSpec, rows: int, out: Values | None = None) -> Iterator[Values]:
    """A shard's first `rows` rows from its file, decoded one by one; into the rows of `out` if that is given.

    Raises ValueError or RuntimeError for damage that decoding detects. Does not verify the checksum; the ledger does.
    """
    codec, shape = Zstd(), row_shape(name, spec)
    targets = (np.empty(shape, dtype=dtype(name)) for _ in range(rows)) if out is None else out
    if name == "modality":
        whole = np.empty((spec.shard_slices, *shape), dtype=dtype(name))
        codec.decode(stored, whole)
        for target, vector in zip(targets, whole[:rows], strict=True):
            target[...] = vector
            yield target
        return
    for target, chunk in zip(targets, chunks(stored, spec.shard_slices)[:rows], strict=True):
        if chunk is None:
            target[...] = 0
        else:
            codec.decode(chunk, target)
        yield target


def write_metadata(bank: str, name: str, spec: BankSpec, rows: int) -> None:
    """Write an array's zarr.json for `rows` rows."""
    fs.write_text(fs.join(bank, name, METADATA), json.dumps(metadata(name, spec, rows), indent=2) + "\n")


def check_metadata(bank: str, name: str, spec: BankSpec, rows: int) -> None:
    """Raises InputError unless an array's zarr.json is what we write, for `rows` rows or for more.

    More are there when an extension was cut short before the index said so.
    """
    where = f"{fs.base_name(bank)}, {name}"
    remedy = "restore its zarr.json, or extract again"
    try:
        found = json.loads(fs.read_text(fs.join(bank, name, METADATA)))
        length = int(found["shape"][0])
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise InputError(where, "is missing or damaged", remedy) from error
    if length < rows or found != metadata(name, spec, length):
        raise InputError(where, "is not as the bank's attributes and index say", remedy)


def metadata(name: str, spec: BankSpec, rows: int) -> dict[str, Any]:
    """An array's zarr.json (Zarr v3 core specification; `sharding_indexed` is ZEP 2)."""
    row, flat = row_shape(name, spec), name == "modality"
    zstd = {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}
    sharding = {
        "chunk_shape": [1, *row],
        "codecs": [{"name": "bytes"}, zstd],
        "index_codecs": [LITTLE, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": [rows, *row],
        "data_type": "float32" if flat else "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [spec.shard_slices, *row]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if flat else 0,
        # Chunks of modality are not sharded: a shard of it is 2 KB.
        "codecs": [LITTLE, zstd] if flat else [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": ["row", "factor"] if flat else ["row", "y", "x"],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
