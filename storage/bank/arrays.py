"""The three arrays of a factor bank: their Zarr v3 metadata, and a shard's values to and from its file.

Shards are encoded here instead of by Zarr. So each shard of an array is one request, no file is half written, and a
folder and an object store raise the same errors. `zarr.open_group` reads the result; tests/storage/bank/test_arrays.py
checks this.
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
# The size is within 3 % of that at level 22, in a quarter of the time. A bit shuffle would make files larger by half or
# more, because it separates the channels of a pixel, which depend on each other.
LEVEL: Final = 15

Values = npt.NDArray[Any]
EncodedRow = tuple[Values, bytes | None]  # a row's values, and its chunk: None for zeros and for modality


def dtype(name: str) -> np.dtype[Any]:
    """The type of an array's values: float32, little endian, for modality, uint8 for anatomy and mask."""
    return np.dtype("<f4" if name == "modality" else "u1")


def row_shape(name: str, spec: BankSpec) -> tuple[int, ...]:
    """The shape of one slice's row: (modality_size,) for modality, the canvas (H, W) for anatomy and mask."""
    return (spec.modality_size,) if name == "modality" else spec.canvas


def shard_uri(bank: str, name: str, shard: int) -> str:
    """The path or URI of a shard's file, which Zarr knows as the chunk (shard, 0, …)."""
    return fs.join(bank, name, "c", str(shard), *["0"] * (1 if name == "modality" else 2))


class ShardFile:
    """Builds a shard's file of one array, row by row, and the SHA-256 of its values.

    A row is (H, W) uint8, or (modality_size,) float32. If the last shard has fewer rows, the rest of its file is the
    fill value.
    """

    def __init__(self, name: str, spec: BankSpec) -> None:
        self._name, self._spec = name, spec
        self._sha256 = hashlib.sha256()
        self._maps = ShardWriter(Zstd(level=LEVEL).encode, spec.shard_slices)
        self._vectors: list[Values] = []

    def encoded(self, values: Values) -> EncodedRow:
        """Encode a row, which must have the array's shape and type, for `append`. Any thread may call this."""
        values = np.ascontiguousarray(values, dtype=dtype(self._name))
        return values, None if self._name == "modality" else self._maps.encoded(values)

    def append(self, row: EncodedRow) -> None:
        """Append the next row. Raises IndexError if a shard of anatomy or mask is full.

        If a shard of modality has too many rows, `content` raises instead.
        """
        values, chunk = row
        self._sha256.update(values.data)
        if self._name == "modality":
            self._vectors.append(values)
        else:
            self._maps.append_encoded(chunk)

    def values_sha256(self) -> str:
        """SHA-256, in hex, of the values of all rows, as `ledger.array_sha256` computes it."""
        return self._sha256.hexdigest()

    def content(self) -> bytes:
        """The bytes of the file. Raises ValueError for more rows of modality than a shard has room for."""
        if self._name != "modality":
            return self._maps.content()
        whole = np.full((self._spec.shard_slices, *row_shape(self._name, self._spec)), np.nan, dtype=dtype(self._name))
        whole[: len(self._vectors)] = self._vectors
        return bytes(Zstd(level=LEVEL).encode(whole))


def decoded_rows(name: str, stored: bytes, spec: BankSpec, rows: int, out: Values | None = None) -> Iterator[Values]:
    """Decode the first `rows` rows of a shard's file one by one, into the rows of `out` if that is given.

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

    It says more rows if an extension was interrupted before the index was replaced.
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
    """The content of an array's zarr.json (Zarr v3 core specification; `sharding_indexed` is ZEP 2)."""
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
