"""What is committed in a factor bank: `<bank>/ledger/shard-00000.json`, one file a shard, written after its data.

The ledger is the truth that a resume reads. An entry says from which weights and by which version a shard was made and
what its bytes are; no time and no host, so that the same inputs leave the same files.

Of a complete bank, `<bank>/manifest.json` holds all entries, so that a reader asks for one file instead of one a shard.
It goes as soon as a shard is written again. Banks made before there were manifests are read without.
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
    """One committed shard.

    Rows `start` to `stop` (exclusive) of the bank; by array, SHA-256 of its raw bytes (C order, little endian) and of
    its file; `row_digests` of the index's rows; the fingerprint of the SDNet that made them; the cardiomix that wrote
    them.
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
    """A complete bank's ledger in one: `bank` says what the entries are of (as in `FactorBank.content_fingerprint`),
    `fingerprint` is that name, `entries` are by shard."""

    bank: Mapping[str, Any]
    fingerprint: str
    entries: Mapping[int, Entry]


def array_sha256(values: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's raw bytes as an entry records them: C order, little endian; shape and type do not enter."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()


def entry_uri(bank: str, shard: int) -> str:
    """Where a shard's entry is."""
    return fs.join(bank, FOLDER, f"shard-{shard:05d}.json")


def commit(bank: str, shard: int, entry: Entry) -> None:
    """Write a shard's entry, atomically: from now on the shard counts."""
    fs.write_text(entry_uri(bank, shard), document(entry))


def document(entry: Entry) -> str:
    """An entry's file."""
    return json.dumps(asdict(entry), indent=1, sort_keys=True) + "\n"


def retract(bank: str, shard: int) -> None:
    """Remove a shard's entry, and the manifest: from now on its data count as absent."""
    remove_manifest(bank)
    fs.remove(entry_uri(bank, shard))


def remove_manifest(bank: str) -> None:
    """From now on the entries alone say what counts."""
    fs.remove(fs.join(bank, MANIFEST))


def write_manifest(bank: str, manifest: Manifest) -> None:
    """Write the manifest, atomically, unless it is there as it should be."""
    text, place = json.dumps(asdict(manifest), sort_keys=True) + "\n", fs.join(bank, MANIFEST)
    with suppress(FileNotFoundError, ValueError):
        if fs.read_text(place) == text:
            return
    fs.write_text(place, text)


def read_manifest(bank: str) -> Manifest | None:
    """The manifest; None if there is none or it is damaged, for the ledger says the same."""
    try:
        document = json.loads(fs.read_text(fs.join(bank, MANIFEST)))
        entries = {int(shard): _entry(entry) for shard, entry in document["entries"].items()}
        return Manifest(dict(document["bank"]), str(document["fingerprint"]), entries)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def read_entry(bank: str, shard: int) -> Entry | None:
    """A shard's entry; None if there is none or it is damaged, for then nothing vouches for the data."""
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
