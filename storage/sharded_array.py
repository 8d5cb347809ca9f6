"""Zarr v3 shards, one chunk a row, written and read in one go.

Shard and metadata are put together here (Zarr v3 core specification; its `sharding_indexed` codec, ZEP 2): Zarr's own
writer spends several times as long on them as the compression takes. What comes out is the same bytes (but an array of
nothing but zeros has a shard here).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from numcodecs.blosc import Blosc

from storage import uri

ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that holds the fill value alone
CRC = 4  # bytes
# Blosc's threads put a chunk's blocks down in the order in which they finish: other bytes each time, and no faster.
blosc.use_threads = False
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def write_array(path: str, data: npt.NDArray[Any], level: int, dimension_names: tuple[str, ...]) -> None:
    """Write (rows, …) integers at `path`; a row of zeros takes no space.

    Blosc zstd of `level` with bitshuffle, fill value 0. The metadata come last: without them there is no array.
    """
    uri.write_bytes(uri.join(path, "c", *["0"] * data.ndim), shard(data, level))
    uri.write_text(uri.join(path, "zarr.json"), json.dumps(_metadata(data, level, dimension_names), indent=2))


def shard(data: npt.NDArray[Any], level: int) -> bytes:
    """The shard of (rows, …): Blosc zstd of `level` with bitshuffle."""
    return joined(data, Blosc(cname="zstd", clevel=level, shuffle=Blosc.BITSHUFFLE).encode, len(data))


def joined(data: npt.NDArray[Any], encode: Callable[[npt.NDArray[Any]], Any], slots: int) -> bytes:
    """The chunks of (rows, …), one after the other, then offset and length of each and a CRC-32C of these.

    slots: the rows that a shard has room for; those without data, and rows of zeros, have no chunk.
    """
    little = data.astype(data.dtype.newbyteorder("<"), order="C", copy=False)
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    chunks: list[bytes] = []
    at = 0
    for row, values in enumerate(little):
        if not values.any():
            continue
        chunks.append(bytes(encode(values)))
        index[row] = at, len(chunks[-1])
        at += len(chunks[-1])
    listed = index.tobytes()
    return b"".join([*chunks, listed, google_crc32c.value(listed).to_bytes(CRC, "little")])


def chunks(stored: bytes, slots: int) -> list[memoryview | None]:
    """The chunk of each slot of a shard, None where there is none. Raises ValueError if the shard is damaged."""
    size = 16 * slots
    end = len(stored) - size - CRC
    if end < 0:
        raise ValueError("shorter than its index")
    listed = stored[end : end + size]
    if google_crc32c.value(listed) != int.from_bytes(stored[-CRC:], "little"):
        raise ValueError("its index is damaged")
    found: list[memoryview | None] = []
    for offset, length in np.frombuffer(listed, dtype="<u8").reshape(slots, 2).tolist():
        absent = offset == length == int(ABSENT)
        if not absent and offset + length > end:
            raise ValueError("its index points beyond it")
        found.append(None if absent else memoryview(stored)[offset : offset + length])
    return found


def _metadata(data: npt.NDArray[Any], level: int, dimension_names: tuple[str, ...]) -> dict[str, Any]:
    size = data.dtype.itemsize
    blosc = {"typesize": size, "cname": "zstd", "clevel": level, "shuffle": "bitshuffle", "blocksize": 0}
    sharding = {
        "chunk_shape": [1, *data.shape[1:]],
        "codecs": [LITTLE if size > 1 else {"name": "bytes"}, {"name": "blosc", "configuration": blosc}],
        "index_codecs": [LITTLE, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(data.shape),
        "data_type": data.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(data.shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": list(dimension_names),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
