"""The names of a factor bank's files, and the attributes that identify a bank."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage import fs
from storage.bank.anatomy_codec import MAX_CHANNELS
from storage.errors import InputError

FORMAT: Final = "cardiomix-factor-bank"
VERSION: Final = 1
ROOT, INDEX, STYLES = "zarr.json", "index.parquet", "styles"
UNKNOWN: Final = "unknown"
WEIGHTS, WEIGHTS_CONFIG = "decoder.safetensors", "decoder.json"


@cache
def code_version() -> str:
    """The version of the installed cardiomix, as banks record it; `unknown` if it is not installed.

    It is read once a process, so that all files have the same version even if the installation changes during a run.
    """
    try:
        return version("cardiomix")
    except PackageNotFoundError:
        return UNKNOWN


class BankSpec(BaseModel):
    """What a bank is made of. All fields but `code_version` and `terms` are its identity.

    channels: binary anatomy channels, 1 to 8; modality_size: floats a slice; canvas: (H, W) in working pixels;
    shard_slices: slices a shard; sdnet_fingerprint: the network that made it; preprocess: how images came to the
    network, as JSON; terms: of the source data, which an opened bank takes from its index.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later minor version may add attributes

    channels: int = Field(ge=1, le=MAX_CHANNELS)
    modality_size: int = Field(ge=1, le=65536)
    canvas: tuple[int, int]
    shard_slices: int = Field(ge=1, le=65536)
    sdnet_fingerprint: str = Field(min_length=1)
    preprocess: dict[str, Any]
    terms: tuple[str, ...] = ()
    code_version: str = Field(default_factory=code_version)

    def identity(self) -> dict[str, Any]:
        """The attributes that two banks must share to be the same bank, as JSON values."""
        return self.model_dump(mode="json", exclude={"code_version", "terms"})


def root_document(spec: BankSpec, decoder_sha256: str) -> str:
    """The text of the group's zarr.json. It is written once: what grows with a bank is in the index alone."""
    attributes = {"format": FORMAT, "version": VERSION, **spec.model_dump(mode="json", exclude={"terms"})}
    attributes["decoder_sha256"] = decoder_sha256
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2) + "\n"


def read_root(bank: str) -> tuple[BankSpec, str]:
    """Read the spec, without terms, and the decoder's checksum.

    Raises InputError if there is no bank, or one that is unreadable, damaged or of an unknown version.
    """
    name, damaged = fs.base_name(bank), ("its zarr.json is damaged", "restore it, or extract again")
    try:
        attributes = dict(json.loads(fs.read_text(fs.join(bank, ROOT)))["attributes"])
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "run `cardiomix extract --run RUN`, or correct the path"
        raise InputError(name, "no factor bank here", remedy) from error
    except OSError as error:
        raise InputError(name, f"cannot be read ({type(error).__name__})", "check access to it") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(name, *damaged) from error
    if attributes.get("format") != FORMAT:
        raise InputError(name, "is not a factor bank", "give the folder that `cardiomix extract` wrote")
    if attributes.get("version") != VERSION:
        raise InputError(
            name,
            f"its format version is {attributes.get('version')}, this cardiomix reads {VERSION}",
            "use the cardiomix that wrote it, or extract again",
        )
    try:
        spec = BankSpec(**{key: value for key, value in attributes.items() if key != "terms"})
    except (ValidationError, TypeError) as error:
        raise InputError(name, *damaged) from error
    decoder = attributes.get("decoder_sha256")
    if not isinstance(decoder, str) or min(spec.canvas) < 1:
        raise InputError(name, *damaged)
    return spec, decoder


def require_same_network(ours: BankSpec, theirs: BankSpec, name: str) -> None:
    """Raises InputError, naming what differs, unless a bank with the spec `ours` may hold slices made with `theirs`.

    `name` is the bank's name. The canvas may differ: `append` checks whether a slice fits on ours.
    """
    elsewhere = "name another bank, or remove this one to extract it again"
    one, other = ours.identity(), theirs.identity()
    if one["sdnet_fingerprint"] != other["sdnet_fingerprint"]:
        problem = f"was made with SDNet {one['sdnet_fingerprint']}, not {other['sdnet_fingerprint']}"
        raise InputError(name, problem, elsewhere)
    for key in sorted(one.keys() - {"canvas"}):
        if one[key] != other[key]:
            raise InputError(name, f"its {key} is {one[key]}, not {other[key]}", elsewhere)


def sha256(*parts: bytes | memoryview) -> str:
    """SHA-256 over the parts one after another, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def as_json(value: object) -> str:
    """JSON text with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
