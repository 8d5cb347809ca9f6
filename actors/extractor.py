"""An extraction actor. It opens the frozen SDNet, the slice store and the bank once, and then makes whole shards.

Some threads read slices ahead, one thread at a time encodes them, and some threads compress the results. A CPU encodes
slices one by one; a GPU encodes the slices of a shard in batches. Ray runs up to `IN_FLIGHT` calls of an actor at the
same time: while one shard is in the network, the next one is read and the one before is written. So the network does
not wait for disks, and at most `IN_FLIGHT` shards are in memory. Each slice is compressed as soon as it is encoded: if
shards were compressed as a whole, actors that started together would all need their cores at the same moment. An error
on any of these threads is raised by the call that makes the shard.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.samples.preprocess import PreprocessConfig
from storage import fs
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.errors import InputError
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    from pipeline.factors.extract import Factors, NetworkView
    from pipeline.networks.config import Precision
    from storage.bank.arrays import EncodedRow
    from storage.bank.shard_builder import ShardDraft

IN_FLIGHT = 3  # shards of an actor: one is read, one encoded, one written
TOGETHER = 256  # most slices that are given to a GPU at once, which makes batches of slices with the same canvas


@dataclass(frozen=True)
class ExtractionSpec:
    """What actors extract, how, and to where.

    run, sdnet_dir, bank: folders of the run, the frozen network and the bank. precision: of the encoders (see
    `factors_name`). threads: torch threads of an actor; the bank's bits may depend on it. shard_slices: slices per
    shard; a bank with another number is refused. gpu: encode on the GPU that the actor has booked. helpers: threads
    that compress; a quarter as many read, because reading takes less time.
    """

    run: str
    sdnet_dir: str
    bank: str
    preprocess: PreprocessConfig
    precision: Precision = "fp32"
    threads: int = 1
    shard_slices: int = 64
    gpu: bool = False
    helpers: int = 1


class Extractor:
    """One actor. It opens the network, the slice store and the bank when it is made.

    Raises InputError if one of them is damaged, the SDNet is not the one that fills this bank, or the run lacks a slice
    of the bank.
    """

    def __init__(self, work: ExtractionSpec) -> None:
        import torch

        from pipeline.factors.extract import FrozenSDNet
        from pipeline.factors.names import factors_name
        from pipeline.networks.description import sdnet_fingerprint
        from pipeline.networks.files import load_sdnet

        self._work = work
        self._encoding = threading.Lock()
        threads = max(1, work.helpers // 4), work.helpers, 1
        self._readers, self._packers, self._appender = map(ThreadPoolExecutor, threads)
        self._encoded: dict[int, int] = {}
        torch.set_num_threads(work.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 must not become TF32
        torch.backends.cudnn.benchmark = False  # it would choose algorithms by their speed on that day
        torch.backends.cudnn.deterministic = True
        self._store = SliceStore.open(work.run)
        self._bank = FactorBank.open(work.bank, partial=True)
        found = factors_name(sdnet_fingerprint(work.sdnet_dir), work.precision)
        wanted = self._bank.spec.sdnet_fingerprint
        if found != wanted:
            raise InputError(fs.base_name(work.sdnet_dir), f"is now {found}, not {wanted}", "extract to a new bank")
        self._slice_ids = rows_of(self._store.table, self._bank.index).tolist()
        if -1 in self._slice_ids:
            raise InputError(fs.base_name(work.bank), "holds slices that the run has not", "extract to a new bank")
        self._network = FrozenSDNet(load_sdnet(work.sdnet_dir), work.precision, "cuda" if work.gpu else "cpu")

    def extract(self, shard: int) -> None:
        """Read, encode, write and commit one shard. Raises InputError if a modality is not finite.

        Does nothing if the shard is committed: another actor may have died after its commit, before it could report it.
        """
        if self._bank.is_committed(shard):
            return
        draft = self._bank.draft(shard)
        views = deque(self._readers.submit(self._view, row) for row in self._bank.shard_rows(shard))
        together = TOGETHER if self._work.gpu else 1
        packed: list[Future[None]] = []
        try:
            with self._encoding:
                while views:
                    some = [views.popleft().result() for _ in range(min(together, len(views)))]
                    packed += self._encode(some, draft)
                    self._encoded[shard] = len(packed)
            for done in packed:
                done.result()
            draft.commit()
        finally:
            self._encoded.pop(shard, None)
            for reading in views:
                reading.cancel()
            for packing in packed:
                packing.cancel()

    def encoded(self) -> dict[int, int]:
        """{shard: number of its slices that have been through the network}, for the shards under way."""
        return self._encoded.copy()

    def _view(self, row: int) -> NetworkView:
        from pipeline.factors.extract import view

        return view(self._store, self._slice_ids[row], self._work.preprocess)

    def _encode(self, views: Sequence[NetworkView], draft: ShardDraft) -> list[Future[None]]:
        """Encode slices. The futures end when the slices are compressed and in the draft, in their order."""
        factors = self._network.factors(views)
        if not all(np.isfinite(modality).all() for _, modality in factors):
            raise InputError(
                fs.base_name(self._work.sdnet_dir),
                "its modality is not finite",
                "pretrain again with a lower learning rate",
            )
        packed = []
        for found, seen in zip(factors, views, strict=True):
            compressed = self._packers.submit(self._compressed, found, seen, draft)
            packed.append(self._appender.submit(lambda row: draft.append_encoded(row.result()), compressed))
        return packed

    def _compressed(self, found: Factors, seen: NetworkView, draft: ShardDraft) -> dict[str, EncodedRow]:
        from pipeline.factors.extract import bank_row

        return draft.encoded(*bank_row(found, seen, self._bank.spec.canvas))
