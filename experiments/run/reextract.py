"""Extract one shard of a bank again, to check that the network still gives the factors that the bank holds."""

from __future__ import annotations

import random

import numpy as np

from storage import fs
from storage.bank.anatomy_codec import unpack
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.errors import InputError
from storage.slices.store import SliceStore

# The arithmetic of another machine flips a few pixels, where two channels are nearly equally likely.
LEAST_SAME = 0.999  # share of the anatomy's bits
LARGEST_DIFFERENCE = {"fp32": 0.01, "bf16": 0.1}  # in standard deviations of the shard's vectors


def reextract(bank: FactorBank, run: str, sdnet: str, seed: int | None = None) -> tuple[str, list[str]]:
    """(a line on what was compared, the problems found). `seed` picks the shard; with None it is a random one.

    Raises InputError if `sdnet` is not the network that made the bank, or the run lacks slices of the shard.
    """
    from pipeline.factors.extract import FrozenSDNet, bank_rows, view
    from pipeline.factors.names import precision_of
    from pipeline.networks.description import sdnet_fingerprint
    from pipeline.networks.files import load_sdnet
    from pipeline.samples.preprocess import PreprocessConfig

    found = sdnet_fingerprint(sdnet)
    precision = precision_of(bank.spec.sdnet_fingerprint, found)
    if precision is None:
        problem = f"is {found}, the bank was made with {bank.spec.sdnet_fingerprint}"
        raise InputError(fs.base_name(sdnet), problem, "give the network that made the bank")
    shard, store = random.Random(seed).randrange(bank.shards()), SliceStore.open(run)
    rows = bank.shard_rows(shard)
    part = bank.index.slice(rows.start, len(rows))
    ids = rows_of(store.table, part)
    if (ids < 0).any():
        lacking = part["subject"][int(np.argmin(ids))].as_py()
        raise InputError(fs.base_name(run), f"lacks slices of {lacking}", "give the run that made the bank")
    preprocess = PreprocessConfig(**bank.spec.preprocess)
    views = [view(store, i, preprocess) for i in ids.tolist()]
    again = bank_rows(FrozenSDNet(load_sdnet(sdnet), precision), views, bank.spec.canvas)
    held, where = bank.read_shard(shard), f"{fs.base_name(bank.uri)}, shard {shard}"
    same = float((unpack(again.anatomy, bank.spec.channels) == unpack(held.anatomy, bank.spec.channels)).mean())
    spread = max(float(held.modality.std(axis=0).max()), 1e-6)
    difference = float(np.abs(again.modality - held.modality).max()) / spread
    problems = []
    if same < LEAST_SAME:
        problems.append(f"{where}: only {same:.2%} of its anatomy's bits are extracted again")
    if difference > LARGEST_DIFFERENCE[precision]:
        problems.append(
            f"{where}: its modality differs by up to {difference:.2g} of its spread from that extracted again"
        )
    if not np.array_equal(again.mask, held.mask):
        problems.append(f"{where}: its masks are not the run's")
    return f"shard {shard}: {same:.4%} of the bits the same, modality within {difference:.1g} of its spread", problems
