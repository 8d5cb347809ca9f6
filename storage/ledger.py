"""What is committed in a factor bank: `<bank>/ledger/shard-00000.json`, one file a shard, written after its data.

The ledger is the truth that a resume reads. An entry says from which weights and by which version a shard was made and
what its bytes are; no time and no host, so that the same inputs leave the same files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import uri

FOLDER = "ledger"
_NAME = re.compile(r"shard-(\d{5,})\.json")


@dataclass(frozen=True)
class Entry:
    """One committed shard.

    Rows `start` to `stop` (exclusive) of the bank; SHA-256 of each array's raw bytes (C order, little endian), by the
    array's name; the fingerprint of the SDNet that made them; the cardiomix that wrote them.
    """

    start: int
    stop: int
    sha256: Mapping[str, str]
    sdnet_fingerprint: str
    code_version: str


def array_sha256(values: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's raw bytes as an entry records them: C order, little endian; shape and type do not enter."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()


def entry_uri(bank: str, shard: int) -> str:
    """Where a shard's entry is."""
    return uri.join(bank, FOLDER, f"shard-{shard:05d}.json")


def commit(bank: str, shard: int, entry: Entry) -> None:
    """Write a shard's entry, atomically: from now on the shard counts."""
    uri.write_text(entry_uri(bank, shard), json.dumps(asdict(entry), indent=1, sort_keys=True) + "\n")


def retract(bank: str, shard: int) -> None:
    """Remove a shard's entry: from now on its data count as absent."""
    uri.remove(entry_uri(bank, shard))


def read_entry(bank: str, shard: int) -> Entry | None:
    """A shard's entry; None if there is none or it is damaged, for then nothing vouches for the data."""
    try:
        return _parsed(uri.read_text(entry_uri(bank, shard)))
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError):
        return None


def committed(bank: str) -> dict[int, Entry]:
    """Shard → entry of every shard that has a readable one."""
    found = {}
    for name in uri.list_names(uri.join(bank, FOLDER)):
        matched = _NAME.fullmatch(name)
        entry = read_entry(bank, int(matched[1])) if matched else None
        if matched and entry is not None:
            found[int(matched[1])] = entry
    return found


def _parsed(text: str) -> Entry:
    document: dict[str, Any] = json.loads(text)
    hashes = {str(name): str(value) for name, value in dict(document["sha256"]).items()}
    return Entry(
        start=int(document["start"]),
        stop=int(document["stop"]),
        sha256=hashes,
        sdnet_fingerprint=str(document["sdnet_fingerprint"]),
        code_version=str(document["code_version"]),
    )
