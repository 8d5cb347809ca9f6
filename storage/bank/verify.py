"""Finds everything that can be wrong with a bank, and describes each fault in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.bank import ledger
from storage.bank.arrays import ARRAYS, METADATA
from storage.bank.bank import FactorBank
from storage.bank.spec import STYLES
from storage.bank.styles import read_styles
from storage.bank.unfinished import KNOWN_FILES
from storage.errors import InputError

CLASSES = 4  # background, LV, MYO, RV


def verify(bank: FactorBank, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Check the decoder, all shards, the manifest, imported styles, and that no other file is in the folder.

    Returns one line for each fault. The list is empty if the bank is complete and every byte is as the ledger says.
    `progress` is called with the number of shards checked and the number of all shards. Raises InputError if the bank
    cannot be opened.
    """
    return list(_problems(FactorBank.open(bank.uri, partial=True), progress))


def _problems(bank: FactorBank, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    yield from _problem_of(bank.decoder)
    entries, shards = ledger.committed(bank.uri), bank.shards()
    tell = None if progress is None else lambda count: progress(count, shards)

    def check(shard: int) -> list[str]:
        return list(_of_shard(bank, shard, entries.get(shard)))

    for problems in fs.map_concurrently(bank.uri, check, range(shards), tell, computes=True):
        yield from problems
    manifest = ledger.read_manifest(bank.uri)
    if manifest is not None and set(entries) >= set(range(shards)) and manifest != bank.ledger_as_manifest():
        yield f"{ledger.MANIFEST} is not what the ledger says; remove it"
    for name in fs.list_names(fs.join(bank.uri, STYLES)):
        yield from _problem_of(lambda name=name: read_styles(bank, name))  # type: ignore[misc]
    yield from _strays(bank, entries)


def _of_shard(bank: FactorBank, shard: int, entry: ledger.Entry | None) -> Iterator[str]:
    """Compare a shard's data with its ledger entry, and with what a bank may hold."""
    try:
        found = bank.read_shard(shard)
    except InputError as error:
        yield str(error)
        return
    rows, where = bank.shard_rows(shard), f"{fs.base_name(bank.uri)}, shard {shard}"
    for name in ARRAYS:
        if entry is None or ledger.array_sha256(getattr(found, name)) != entry.sha256.get(name):
            yield f"{where}: its {name} decodes to other values than the ledger says"
    labelled = bank.index["labelled"].to_numpy()[rows.start : rows.stop]
    if (found.anatomy >> np.uint8(bank.spec.channels - 1) > 1).any():
        yield f"{where}: its anatomy has bits beyond the {bank.spec.channels} channels"
    if found.anatomy[_around(bank, rows)].any() or found.mask[_around(bank, rows)].any():
        yield f"{where}: there is anatomy or mask around its images"
    if (found.mask >= CLASSES).any() or found.mask[~labelled].any():
        yield f"{where}: its mask has values that are none, or is of slices that are not labelled"
    if not np.isfinite(found.modality).all():
        yield f"{where}: its modality is not finite"


def _around(bank: FactorBank, rows: range) -> npt.NDArray[np.bool_]:
    """(n, H, W) bool: the pixels of the canvas that are outside the image."""
    part = bank.index.slice(rows.start, len(rows))
    beyond = []
    for corner, extent, length in zip(("top", "left"), ("height", "width"), bank.spec.canvas, strict=True):
        begin = part[corner].to_numpy()[:, None]
        at = np.arange(length)[None]
        beyond.append((at < begin) | (at >= begin + part[extent].to_numpy()[:, None]))  # (n, H) or (n, W)
    found: npt.NDArray[np.bool_] = beyond[0][:, :, None] | beyond[1][:, None, :]
    return found


def _strays(bank: FactorBank, entries: Iterable[int]) -> Iterator[str]:
    for name in sorted(set(fs.list_names(bank.uri)) - KNOWN_FILES):
        yield f"{name} does not belong in a bank; move it elsewhere"
    for shard in sorted(k for k in entries if k >= bank.shards()):
        yield f"ledger: shard {shard} is beyond the bank's {bank.shards()}"
    shards = {str(k) for k in range(bank.shards())}
    for array in ARRAYS:
        for name in sorted(set(fs.list_names(fs.join(bank.uri, array))) - {METADATA, "c"}):
            yield f"{array}/{name} does not belong in a bank; move it elsewhere"
        for name in sorted(set(fs.list_names(fs.join(bank.uri, array, "c"))) - shards):
            yield f"{array}/c/{name} is beyond the bank's {bank.shards()} shards; remove it"


def _problem_of(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except InputError as error:
        yield str(error)
