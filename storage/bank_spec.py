"""What a factor bank is: its files' names, the schema of its index, and the attributes that identify it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from storage import ledger, uri
from storage.anatomy_codec import MAX_CHANNELS
from storage.errors import InputError

FORMAT: Final = "cardiomix-factor-bank"
VERSION: Final = 1
ROOT, INDEX, WEIGHTS, WEIGHTS_CONFIG = "zarr.json", "index.parquet", "decoder.safetensors", "decoder.json"
ARRAYS: Final = ("anatomy", "mask", "modality")
OURS: Final = frozenset({ROOT, INDEX, WEIGHTS, WEIGHTS_CONFIG, ledger.FOLDER, *ARRAYS})

# height, width, top, left: the image's true extent on the canvas, in working pixels; pixel_area_mm2: that of a working
# pixel; native_: the scanner's own grid.
_COLUMNS: Final = (
    (pa.int64(), "row slice_id"),
    (pa.string(), "subject vendor centre phase"),
    (pa.int32(), "frame slice"),
    (pa.bool_(), "labelled"),
    (pa.string(), "split"),
    (pa.float64(), "pixel_area_mm2"),
    (pa.int32(), "height width top left native_height native_width"),
    (pa.float64(), "native_row_mm native_col_mm"),
    (pa.string(), "terms"),
)
BANK_INDEX_SCHEMA: Final = pa.schema(
    [pa.field(name, kind, nullable=False) for kind, names in _COLUMNS for name in names.split()]
)


def code_version() -> str:
    """The installed cardiomix, as banks record it."""
    try:
        return version("cardiomix")
    except PackageNotFoundError:  # run from a bare checkout
        return "unknown"


class BankSpec(BaseModel):
    """What a bank is made of; all but `code_version` is its identity.

    channels: binary anatomy channels, 1 to 8; modality_size: floats a slice; canvas: (H, W) in working pixels;
    shard_slices: slices a shard; sdnet_fingerprint: the network that made it; preprocess: how images came to the
    network, as JSON; terms: of the source data.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later minor version may add attributes

    channels: int = Field(ge=1, le=MAX_CHANNELS)
    modality_size: int = Field(ge=1)
    canvas: tuple[int, int]
    shard_slices: int = Field(ge=1)
    sdnet_fingerprint: str = Field(min_length=1)
    preprocess: dict[str, Any]
    terms: tuple[str, ...]
    code_version: str = Field(default_factory=code_version)

    def identity(self) -> dict[str, Any]:
        """All but the code version, as JSON values."""
        return self.model_dump(mode="json", exclude={"code_version"})


def index_digest(index: pa.Table) -> str:
    """SHA-256 of an index's content, whatever the Parquet file's encoding: per column, its name and values as JSON."""
    parts = [as_json([name, index[name].to_pylist()]).encode() for name in index.column_names]
    return sha256(*parts)


def sha256(*parts: bytes) -> str:
    """SHA-256 over the parts one after another, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def as_json(value: object) -> str:
    """One text for equal values: keys sorted."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def in_schema(index: pa.Table) -> pa.Table:
    """The index with exactly our columns, in our order, in one piece. Raises ValueError if it is not an index."""
    table = index.select(BANK_INDEX_SCHEMA.names).cast(BANK_INDEX_SCHEMA).combine_chunks()
    if not table.num_rows or not np.array_equal(table["row"].to_numpy(), np.arange(table.num_rows)):
        raise ValueError("the index of a bank numbers its rows 0, 1, 2, …, and has at least one")
    return table


def read_attributes(bank: str) -> dict[str, Any]:
    """The group's attributes. Raises InputError if there are none of ours, or of a version that we do not know."""
    name = uri.base_name(bank)
    try:
        document = json.loads(uri.read_text(uri.join(bank, ROOT)))
        attributes = dict(document["attributes"])
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "run `cardiomix extract --run RUN`, or correct the path"
        raise InputError(name, "no factor bank here", remedy) from error
    except OSError as error:
        raise InputError(name, f"cannot be read ({type(error).__name__})", "check access to it") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(name, "its zarr.json is damaged", "restore it, or extract again") from error
    if attributes.get("format") != FORMAT:
        raise InputError(name, "is not a factor bank", "give the folder that `cardiomix extract` wrote")
    if attributes.get("version") != VERSION:
        raise InputError(
            name,
            f"its format version is {attributes.get('version')}, this cardiomix reads {VERSION}",
            "use the cardiomix that wrote it, or extract again",
        )
    if not all(isinstance(attributes.get(key), str) for key in ("index_sha256", "decoder_sha256")):
        raise InputError(name, "its attributes are damaged", "restore zarr.json, or extract again")
    return attributes


def read_index(bank: str, attributes: Mapping[str, Any]) -> pa.Table:
    """The index. Raises InputError if it is missing, damaged or of another length than the attributes say."""
    where = f"{uri.base_name(bank)}, {INDEX}"
    try:
        table = pq.read_table(pa.BufferReader(uri.read_bytes(uri.join(bank, INDEX))))
        index = in_schema(table)
    except FileNotFoundError as error:
        raise InputError(where, "is missing", "restore it, or extract again") from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(where, "is damaged", "restore it, or extract again") from error
    if index.num_rows != attributes.get("slices"):
        problem = f"has {index.num_rows} rows, the bank {attributes.get('slices')} slices"
        raise InputError(where, problem, "restore it, or extract again")
    return index
