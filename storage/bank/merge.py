"""Joins several banks of one SDNet into a new bank, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from storage import fs
from storage.bank.arrays import row_shape
from storage.bank.bank import FactorBank, PackedBank
from storage.bank.index import centred_on_canvas, index_digest, with_structures
from storage.bank.spec import ROOT, STYLES
from storage.bank.styles import read_styles
from storage.errors import InputError
from storage.lock import bank_lock
from storage.parquet import different_texts

SAME = ("sdnet_fingerprint", "preprocess", "channels", "modality_size")


def merge(sources: Sequence[str], out: str, progress: Callable[[int, int], None] | None = None) -> FactorBank:
    """Join the complete banks at `sources`, in that order, into a bank at `out`. Imported styles are copied too.

    The canvas has the largest height and the largest width. Shards are as long as the first bank's. Images are centred
    on the new canvas. A merge that was interrupted continues where it stopped. `progress` is called with the number of
    shards done and the number of all shards.
    Raises InputError if the banks have different SDNets or preprocessing or share a subject, if one is not complete or
    damaged, or if `out` holds something else.
    """
    banks = [FactorBank.open(source) for source in sources]
    _require_joinable(banks)
    first = banks[0]
    canvas = (max(bank.spec.canvas[0] for bank in banks), max(bank.spec.canvas[1] for bank in banks))
    index = centred_on_canvas(pa.concat_tables([with_structures(bank.index) for bank in banks]), canvas)
    spec = first.spec.model_copy(update={"canvas": canvas})
    with bank_lock(out):
        if fs.exists(fs.join(out, ROOT)):  # `create` would extend a bank that is already there
            there = FactorBank.open(out, partial=True)
            if index_digest(there.index) != index_digest(index) or there.spec.canvas != canvas:
                raise InputError(fs.base_name(out), "holds other slices", "name a new folder for the bank")
        made = FactorBank.create(out, spec, index, *first.decoder())
        made.tidy()
        for bank in banks:
            for name in fs.list_names(fs.join(bank.uri, STYLES)):
                read_styles(bank, name)  # raises if it is damaged or of another network
                fs.write_bytes(fs.join(out, STYLES, name), fs.read_bytes(fs.join(bank.uri, STYLES, name)))
        todo = sorted(set(range(made.shards())) - made.committed())

        def join(shard: int) -> None:
            found = _rows_of_banks(banks, made, made.shard_rows(shard))
            made.write_shard(shard, found.anatomy, found.modality, found.mask)

        def tell(count: int) -> None:
            if progress is not None:
                progress(made.shards() - len(todo) + count, made.shards())

        if todo:
            made.unseal()
        tell(0)
        far = next((place for place in (out, *sources) if not fs.is_local(place)), out)
        fs.map_concurrently(far, join, todo, tell)
        made.seal()
    return made


def _require_joinable(banks: Sequence[FactorBank]) -> None:
    if len(banks) < 2:
        raise InputError("merge", "one bank alone", "name two or more banks, then the new one")
    ours = banks[0].spec.model_dump(mode="json") | {"decoder": banks[0].decoder_sha256}
    for bank in banks[1:]:
        name, theirs = fs.base_name(bank.uri), bank.spec.model_dump(mode="json") | {"decoder": bank.decoder_sha256}
        for key in (*SAME, "decoder"):
            if ours[key] != theirs[key]:
                problem = f"its {key} is {theirs[key]}, the first bank's is {ours[key]}"
                raise InputError(name, problem, "factors of two networks do not mix; extract again with one of them")
    counts = Counter(subject for bank in banks for subject in different_texts(bank.index["subject"]))
    shared = sorted(subject for subject, count in counts.items() if count > 1)
    if shared:
        more = f" and {len(shared) - 1} more subjects are" if len(shared) > 1 else " is"
        raise InputError("merge", f"{shared[0]}{more} in more than one of the banks", "merge banks of other subjects")


def _rows_of_banks(banks: Sequence[FactorBank], made: FactorBank, rows: range) -> PackedBank:
    """Read the new bank's rows from the old banks, each image centred on the new canvas."""
    out = PackedBank(
        np.zeros((len(rows), *made.spec.canvas), dtype=np.uint8),
        np.zeros((len(rows), *made.spec.canvas), dtype=np.uint8),
        np.empty((len(rows), *row_shape("modality", made.spec)), dtype=np.float32),
    )
    begin = 0
    for bank in banks:
        wanted = range(max(rows.start, begin), min(rows.stop, begin + len(bank)))
        if wanted:
            found = bank.read(np.arange(wanted.start, wanted.stop) - begin)
            own = np.arange(wanted.start - begin, wanted.stop - begin)
            for k, row in enumerate(own):
                at = wanted.start + k - rows.start
                source, target = (_extent(each, int(r)) for each, r in ((bank, row), (made, begin + row)))
                out.anatomy[at][target] = found.anatomy[k][source]
                out.mask[at][target] = found.mask[k][source]
                out.modality[at] = found.modality[k]
        begin += len(bank)
    return out


def _extent(bank: FactorBank, row: int) -> tuple[slice, slice]:
    top, left, height, width = (bank.index[name][row].as_py() for name in ("top", "left", "height", "width"))
    return slice(top, top + height), slice(left, left + width)
