"""The actor's side of extraction: the frozen SDNet, the slice store and the bank, opened once.

Slices go through three stages: some threads read them ahead, one encodes them, some compress what has come out. On a
CPU slices are encoded one by one; a GPU gets those of a shard together, in batches. Ray runs up to `IN_FLIGHT` calls of
an actor at a time, so that the next shard is read and the one before is written while one is in the network, the
network does not wait for disks, and at most `IN_FLIGHT` shards are in memory. A shard is compressed slice by slice and
not when it is whole, or actors that started together would all want their cores at once in the end. Whatever goes wrong
on any of these threads is the answer of that shard's call.
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
TOGETHER = 256  # slices at most that a GPU gets at once, in batches of those of one canvas


@dataclass(frozen=True)
class ExtractionSpec:
    """What actors extract, how and to where.

    sdnet_dir, the frozen network's folder; precision, of the encoders (see `factors_name`); threads, torch's, which the
    bits may depend on; shard_slices, of a bank that is not there yet; gpu: on the GPU that the actor has booked;
    helpers: threads that compress, and a quarter as many that read, which takes less.
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
    """One actor; opens everything when it is made. Raises InputError for files that are not what they should be."""

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
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
        torch.backends.cudnn.benchmark = False  # which picks algorithms by their speed that day
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
        """Read, encode, write and commit one shard, unless another actor has, which died before it could say so."""
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
        """Of each shard that is under way, the slices that have been through the network."""
        return self._encoded.copy()

    def _view(self, row: int) -> NetworkView:
        from pipeline.factors.extract import view

        return view(self._store, self._slice_ids[row], self._work.preprocess)

    def _encode(self, views: Sequence[NetworkView], draft: ShardDraft) -> list[Future[None]]:
        """Encode slices; what is returned compresses them and adds them to the draft, in their order."""
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
