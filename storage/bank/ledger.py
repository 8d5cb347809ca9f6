"""The ledger says which shards of a factor bank are complete: one file a shard, written after the shard's data.

The files are `<bank>/ledger/shard-00000.json` and so on. A run that resumes trusts them alone. An entry says which
weights and which version made the shard, and has checksums of its bytes. It has no time and no host, so that the same
inputs leave the same files.

If a bank is complete, `<bank>/manifest.json` holds all entries, so that a reader asks for one file instead of one a
shard. The manifest is removed as soon as a shard is written again. A bank without a manifest can be read too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import fs

FOLDER, MANIFEST = "ledger", "manifest.json"
_NAME = re.compile(r"shard-(\d{5}|[1-9]\d{5,8})\.json")


@dataclass(frozen=True)
class Entry:
    """One committed shard: the bank's rows `start` to `stop` (exclusive).

    `sha256` has, for each array, the SHA-256 of its raw values (C order, little endian); `files_sha256` has that of its
    file. `index_sha256` is the `row_digests` of these rows of the index. `sdnet_fingerprint` names the SDNet that made
    the shard, `code_version` the cardiomix that wrote it.
    """

    start: int
    stop: int
    sha256: Mapping[str, str]
    files_sha256: Mapping[str, str]
    index_sha256: str
    sdnet_fingerprint: str
    code_version: str


@dataclass(frozen=True)
class Manifest:
    """The ledger of a complete bank in one file.

    `bank` says which bank it belongs to: spec, index and decoder. `fingerprint` is `FactorBank.content_fingerprint`.
    `entries` maps shards to their entries.
    """

    bank: Mapping[str, Any]
    fingerprint: str
    entries: Mapping[int, Entry]


def array_sha256(values: npt.NDArray[Any]) -> str:
    """SHA-256, in hex, of an array's raw values in C order, little endian, as an entry records it.

    Shape and type do not count.
    """
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()


def entry_uri(bank: str, shard: int) -> str:
    """The path or URI of a shard's entry."""
    return fs.join(bank, FOLDER, f"shard-{shard:05d}.json")


def commit(bank: str, shard: int, entry: Entry) -> None:
    """Write a shard's entry, atomically: from now on the shard counts."""
    fs.write_text(entry_uri(bank, shard), document(entry))


def document(entry: Entry) -> str:
    """The text of an entry's file."""
    return json.dumps(asdict(entry), indent=1, sort_keys=True) + "\n"


def retract(bank: str, shard: int) -> None:
    """Remove a shard's entry, and the manifest: from now on its data count as absent."""
    remove_manifest(bank)
    fs.remove(entry_uri(bank, shard))


def remove_manifest(bank: str) -> None:
    """Remove the manifest: from now on the entries alone say which shards count."""
    fs.remove(fs.join(bank, MANIFEST))


def write_manifest(bank: str, manifest: Manifest) -> None:
    """Write the manifest, atomically, unless the file has this content already."""
    text, place = json.dumps(asdict(manifest), sort_keys=True) + "\n", fs.join(bank, MANIFEST)
    with suppress(FileNotFoundError, ValueError):
        if fs.read_text(place) == text:
            return
    fs.write_text(place, text)


def read_manifest(bank: str) -> Manifest | None:
    """Read the manifest. None if it is absent or damaged, since the ledger says the same."""
    try:
        document = json.loads(fs.read_text(fs.join(bank, MANIFEST)))
        entries = {int(shard): _entry(entry) for shard, entry in document["entries"].items()}
        return Manifest(dict(document["bank"]), str(document["fingerprint"]), entries)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def read_entry(bank: str, shard: int) -> Entry | None:
    """Read a shard's entry. None if it is absent or damaged, since nothing vouches for the shard's data then."""
    try:
        return _entry(json.loads(fs.read_text(entry_uri(bank, shard))))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def committed(bank: str) -> dict[int, Entry]:
    """Shard → entry of every shard that has a readable one."""
    shards = sorted(listed(bank))
    entries = fs.map_concurrently(bank, lambda shard: read_entry(bank, shard), shards)
    return {shard: entry for shard, entry in zip(shards, entries, strict=True) if entry is not None}


def listed(bank: str) -> set[int]:
    """Shards that have an entry, readable or not."""
    names = fs.list_names(fs.join(bank, FOLDER))
    return {int(matched[1]) for matched in map(_NAME.fullmatch, names) if matched}


def _entry(document: dict[str, Any]) -> Entry:
    return Entry(
        start=int(document["start"]),
        stop=int(document["stop"]),
        sha256=_hashes(document["sha256"]),
        files_sha256=_hashes(document["files_sha256"]),
        index_sha256=str(document["index_sha256"]),
        sdnet_fingerprint=str(document["sdnet_fingerprint"]),
        code_version=str(document["code_version"]),
    )


def _hashes(document: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in dict(document).items()}
