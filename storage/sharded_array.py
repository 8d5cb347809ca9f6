"""A Zarr v3 array in one shard, one chunk a row, written in one go.

Shard and metadata are put together here (Zarr v3 core specification; its `sharding_indexed` codec, ZEP 2): Zarr's own
writer spends several times as long on them as the compression takes. What comes out is the same bytes (but an array of
nothing but zeros has a shard here).
"""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from numcodecs.blosc import Blosc

from storage import uri

ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that holds the fill value alone
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
    """The chunks of (rows, …), one after the other, then offset and length of each and a CRC-32C of these."""
    codec = Blosc(cname="zstd", clevel=level, shuffle=Blosc.BITSHUFFLE)
    little = data.astype(data.dtype.newbyteorder("<"), order="C", copy=False)
    index = np.full((len(data), 2), ABSENT, dtype="<u8")
    chunks: list[bytes] = []
    at = 0
    for row, values in enumerate(little):
        if not values.any():
            continue
        chunks.append(bytes(codec.encode(values)))
        index[row] = at, len(chunks[-1])
        at += len(chunks[-1])
    listed = index.tobytes()
    return b"".join([*chunks, listed, google_crc32c.value(listed).to_bytes(4, "little")])


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
