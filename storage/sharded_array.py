"""Reads and writes Zarr v3 shards of one chunk a row (Zarr v3 core specification; `sharding_indexed`, ZEP 2).

In writing and reading, Zarr itself spends several times as long on its own bookkeeping as the compression takes. The
files have the same bytes as Zarr's, except that an array of zeros has a shard here. Of whole arrays, only those that
`write_array` wrote can be read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from numcodecs.blosc import Blosc

from storage import fs

ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that is not stored: it has only the fill value
CRC = 4  # bytes
# Blosc's threads write a chunk's blocks in the order in which they finish. The bytes would vary, and it is no faster.
blosc.use_threads = False
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
METADATA = "zarr.json"
FILES_OF_THREE = (METADATA, "c/0/0/0")  # the files of an array with three dimensions
BLOSC_HEADER = struct.Struct("<4xI4xI")  # two sizes in bytes: decoded, and encoded with the header


def write_array(path: str, data: npt.NDArray[Any], level: int, dimension_names: tuple[str, ...]) -> None:
    """Write an array (rows, …) of integers at `path`; a row of zeros takes no space.

    Chunks are Blosc zstd of `level` with bitshuffle; the fill value is 0. The metadata are written last: without them
    there is no array.
    """
    described = _metadata(data.shape, data.dtype, level, dimension_names)
    fs.write_bytes(fs.join(path, _shard_name(data.shape)), shard(data, level))
    fs.write_text(fs.join(path, METADATA), json.dumps(described, indent=2))


@dataclass(frozen=True, eq=False)
class ShardedArray:
    """An array that `write_array` wrote, open for reading. It knows the place of each row's chunk in the shard.

    No file is held open. Any number of threads may read at once.
    """

    path: str
    shape: tuple[int, ...]  # (rows, …)
    dtype: np.dtype[Any]
    index: npt.NDArray[np.uint64]  # (rows, 2), offset and length of each row's chunk

    @classmethod
    def open(cls, path: str) -> ShardedArray:
        """Read metadata and index. Raises ValueError if one is missing or damaged, OSError if it is unreadable."""
        shape, dtype = _described(_part(path, METADATA, 0))
        index = _index(_part(path, _shard_name(shape), -16 * shape[0] - CRC), shape[0])
        return cls(path, shape, dtype, index)

    def rows(self, wanted: Sequence[int]) -> npt.NDArray[Any]:
        """Read the given rows, (len(wanted), …), with one request for all bytes from the first to the last of them.

        Raises ValueError if the shard is missing or decoding detects damage, OSError if it is unreadable.
        """
        values = np.zeros((len(wanted), *self.shape[1:]), self.dtype)
        places = self.index[np.asarray(wanted, dtype=np.int64)].tolist()
        found = [(out, at, at + size) for out, (at, size) in zip(values, places, strict=True) if at != int(ABSENT)]
        if found:
            first = min(begin for _, begin, _ in found)
            stored = memoryview(_part(self.path, _shard_name(self.shape), first, max(end for _, _, end in found)))
            for out, begin, end in found:
                _decode(stored[begin - first : end - first], end - begin, out)
        return values


def shard(data: npt.NDArray[Any], level: int) -> bytes:
    """The bytes of the shard of an array (rows, …): Blosc zstd of `level` with bitshuffle."""
    joined = ShardWriter(Blosc(cname="zstd", clevel=level, shuffle=Blosc.BITSHUFFLE).encode, len(data))
    for values in data:
        joined.append(values)
    return joined.content()


class ShardWriter:
    """Builds a shard row by row: the chunks, then offset and length of each, then a CRC-32C of these numbers.

    `slots` is the number of rows that the shard has room for. Rows of zeros and unused slots have no chunk.
    """

    def __init__(self, encode: Callable[[npt.NDArray[Any]], Any], slots: int) -> None:
        self._encode = encode
        self._index = np.full((slots, 2), ABSENT, dtype="<u8")
        self._chunks: list[bytes] = []
        self._rows = self._end = 0

    def encoded(self, values: npt.NDArray[Any]) -> bytes | None:
        """Encode a row as a chunk; None for a row of zeros. Any thread may call this."""
        if not values.any():
            return None
        return bytes(self._encode(values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)))

    def append(self, values: npt.NDArray[Any]) -> None:
        """Encode and append the next row; only its chunk is kept. Raises IndexError if the shard is full."""
        self.append_encoded(self.encoded(values))

    def append_encoded(self, chunk: bytes | None) -> None:
        """Append the next row by its chunk, None for zeros. Raises IndexError if the shard is full."""
        if self._rows == len(self._index):
            raise IndexError(f"a shard of {self._rows} rows is full")
        if chunk is not None:
            self._index[self._rows] = self._end, len(chunk)
            self._chunks.append(chunk)
            self._end += len(chunk)
        self._rows += 1

    def content(self) -> bytes:
        """The bytes of the shard's file."""
        listed = self._index.tobytes()
        return b"".join([*self._chunks, listed, google_crc32c.value(listed).to_bytes(CRC, "little")])


def chunks(stored: bytes, slots: int) -> list[memoryview | None]:
    """The chunk of each slot of a shard, None where there is none. Raises ValueError if the shard is damaged."""
    index = _index(stored, slots)
    end = len(stored) - index.nbytes - CRC
    found: list[memoryview | None] = []
    for offset, length in index.tolist():
        absent = offset == length == int(ABSENT)
        if not absent and offset + length > end:
            raise ValueError("its shard's index points beyond it")
        found.append(None if absent else memoryview(stored)[offset : offset + length])
    return found


def _index(stored: bytes, slots: int) -> npt.NDArray[np.uint64]:
    """(slots, 2) uint64: offset and length of each slot's chunk, from a shard's end. Raises ValueError if damaged."""
    end = len(stored) - 16 * slots - CRC
    if end < 0:
        raise ValueError("its shard is shorter than its index")
    listed = stored[end:-CRC]
    if google_crc32c.value(listed) != int.from_bytes(stored[-CRC:], "little"):
        raise ValueError("its shard's index is damaged")
    return np.frombuffer(listed, dtype="<u8").reshape(slots, 2)


def _decode(chunk: memoryview, size: int, out: npt.NDArray[Any]) -> None:
    """Decode a chunk into `out`. Raises ValueError if it is damaged or does not have `size` bytes.

    Blosc trusts the sizes in a chunk's header, so they are checked first.
    """
    if len(chunk) != size:
        raise ValueError("its shard is cut off")
    if size < BLOSC_HEADER.size or BLOSC_HEADER.unpack_from(chunk) != (out.nbytes, size):
        raise ValueError("a chunk of its shard is damaged")
    try:
        blosc.decompress(chunk, out)
    except RuntimeError as error:
        raise ValueError("a chunk of its shard is damaged") from error


def _part(array: str, name: str, start: int, end: int | None = None) -> bytes:
    try:
        return fs.read_range(fs.join(array, name), start, end)
    except FileNotFoundError as error:
        raise ValueError(f"its {name} is missing") from error


def _shard_name(shape: Sequence[int]) -> str:
    return "/".join(["c", *["0"] * len(shape)])


def _described(metadata: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array's values.

    Raises ValueError unless the metadata are exactly what we write for such an array.
    """
    try:
        found = json.loads(metadata)
        shape, dtype = tuple(map(int, found["shape"])), np.dtype(found["data_type"])
        level = found["codecs"][0]["configuration"]["codecs"][1]["configuration"]["clevel"]
        ours = min(shape) >= 0 and found == _metadata(shape, dtype, level, found["dimension_names"])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"its {METADATA} is damaged") from error
    if not ours:
        raise ValueError(f"its {METADATA} is not as cardiomix writes it")
    return shape, dtype.newbyteorder("<")


def _metadata(
    shape: tuple[int, ...], dtype: np.dtype[Any], level: int, dimension_names: Sequence[str]
) -> dict[str, Any]:
    size = dtype.itemsize
    blosc = {"typesize": size, "cname": "zstd", "clevel": level, "shuffle": "bitshuffle", "blocksize": 0}
    sharding = {
        "chunk_shape": [1, *shape[1:]],
        "codecs": [LITTLE if size > 1 else {"name": "bytes"}, {"name": "blosc", "configuration": blosc}],
        "index_codecs": [LITTLE, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": list(dimension_names),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
