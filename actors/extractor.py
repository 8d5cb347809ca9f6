"""The actor's side of extraction: the frozen SDNet, the slice store and the bank, opened once.

Ray runs up to `IN_FLIGHT` calls of an actor at a time, a thread each, and a shard is read, encoded and written under a
lock each. So while one shard is in the network, the next is read and the one before is compressed and written, the
network does not wait for disks, and at most `IN_FLIGHT` shards are in memory. Whatever goes wrong on any of these
threads is the answer of that shard's call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.preprocess import PreprocessConfig
from storage import uri
from storage.bank_index import slice_keys
from storage.errors import InputError
from storage.factor_bank import FactorBank, PackedBank
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    from pipeline.factors import Precision, View

IN_FLIGHT = 3  # shards of an actor: one is read, one encoded, one written


@dataclass(frozen=True)
class Work:
    """What actors extract, how and to where; `gpu`: on the GPU that the actor has booked."""

    run: str
    sdnet_dir: str
    bank: str
    preprocess: PreprocessConfig
    precision: Precision = "fp32"
    threads: int = 1
    gpu: bool = False


class Extractor:
    """One actor. `start` comes before all else."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._reading, self._encoding, self._writing = (threading.Lock() for _ in range(3))
        self._encoded = 0

    def start(self) -> str | InputError:
        """Open everything; returns the id of this actor's node. Bad input is an answer, not a crash, so that it reaches
        the driver as it is."""
        import ray
        import torch

        from pipeline.factors import FrozenSDNet, factors_name
        from pipeline.networks.files import load_sdnet, sdnet_fingerprint

        work = self._work
        torch.set_num_threads(work.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
        torch.backends.cudnn.benchmark = False  # which picks algorithms by their speed that day
        torch.backends.cudnn.deterministic = True
        try:
            self._store = SliceStore.open(work.run)
            self._bank = FactorBank.open(work.bank, partial=True)
            found = factors_name(sdnet_fingerprint(work.sdnet_dir), work.precision)
            wanted = self._bank.spec.sdnet_fingerprint
            if found != wanted:
                return InputError(
                    uri.base_name(work.sdnet_dir), f"is now {found}, not {wanted}", "extract to a new bank"
                )
            model = load_sdnet(work.sdnet_dir)
        except InputError as error:
            return error
        in_store = {key: i for i, key in enumerate(slice_keys(self._store.table))}
        self._slice_ids = [in_store[key] for key in slice_keys(self._bank.index)]
        self._network = FrozenSDNet(model, work.precision, "cuda" if work.gpu else "cpu")
        return str(ray.get_runtime_context().get_node_id())

    def extract(self, shard: int) -> InputError | None:
        """Read, encode, write and commit one shard."""
        try:
            with self._reading:
                views = self._read(shard)
            with self._encoding:
                found = self._encode(views)
            del views
            with self._writing:
                self._bank.write_shard(shard, found.anatomy, found.modality, found.mask)
        except InputError as error:
            return error
        return None

    def encoded(self) -> int:
        """Slices that have been through the network here, whatever became of them."""
        return self._encoded

    def _read(self, shard: int) -> list[View]:
        from pipeline.factors import view

        return [view(self._store, self._slice_ids[row], self._work.preprocess) for row in self._bank.shard_rows(shard)]

    def _encode(self, views: list[View]) -> PackedBank:
        from pipeline.factors import bank_rows

        def count() -> None:
            self._encoded += 1

        found = bank_rows(self._network, views, self._bank.spec.canvas, count)
        if not np.isfinite(found.modality).all():
            raise InputError(
                uri.base_name(self._work.sdnet_dir),
                "its modality is not finite",
                "pretrain again with a lower learning rate",
            )
        return found
