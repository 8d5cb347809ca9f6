"""How extraction and synthesis scale with actors.

On this machine's two cores: 1, 2 and 4 actors, of a thread each, fill a bank (width 16, cines of the phantom) and make
samples of the `cpu` preset. Then, to see the pool and the bank rather than the cores: 1 to 32 actors over four local
nodes, in which a call to the network takes 0.25 s of sleep, a slice a call, and everything else is real: slices are
read and prepared, shards written and committed. Every actor gets two shards; all have started before the clock.
Efficiency is the rate over that many times the rate of one. The JSON line's ratio is the efficiency of the most.

`CARDIOMIX_BENCH_CROWDS=64,32x8` measures these crowds alone: 64 actors in as many processes, and 256 in 32 processes of
eight. There a call sleeps longer, so that all of them together ask for 100 slices a second, which two cores can read
and write; shards are smaller, so that the phantom has enough for all.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from actors.extraction import ExtractionActors, extractors, fill, prepare_bank
from actors.extractor import ExtractionSpec, Extractor
from actors.pool import Pool
from actors.streaming import batches
from benchmarks import cluster
from benchmarks.extract import slice_store
from experiments.config import cpu
from pipeline.networks.files import save_model
from pipeline.networks.sdnet import SDNet
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples.stream_config import StreamConfig
from storage.bank import ledger
from storage.bank.bank import FactorBank
from storage.layouts import LayoutOptions
from storage.slices.store import SliceStore

SETTINGS = cpu()
CALL_S, SHARD, SHARDS_EACH, NODES = 0.25, 64, 2, 4
MOST_A_SECOND, SLICES = 100, 4096  # of all actors; that the phantom has at least
PHANTOM = PhantomConfig(labelled_a=16, labelled_b=0, unlabelled_c=0, testing=0, frames=26, slices=(10, 10))
WARM_UP, COUNTED = 64, 256


@dataclass(frozen=True)
class Crowd:
    """Simulated extractors: `logical` of them in each process."""

    processes: int
    logical: int = 1

    @property
    def actors(self) -> int:
        return self.processes * self.logical

    @property
    def call_s(self) -> float:
        """Seconds that one slice takes in the network."""
        return CALL_S if self.actors <= CROWDS[-1].actors else self.actors / MOST_A_SECOND

    @property
    def shard(self) -> int:
        """Slices in a shard."""
        return min(SHARD, SLICES // (SHARDS_EACH * self.actors))


CROWDS = tuple(Crowd(n) for n in (1, 2, 4, 8, 16, 32))


def asked_for() -> tuple[Crowd, ...] | None:
    """The crowds of `CARDIOMIX_BENCH_CROWDS`, if that is set."""
    text = os.environ.get("CARDIOMIX_BENCH_CROWDS")
    return tuple(Crowd(*map(int, one.split("x"))) for one in text.split(",")) if text else None


def sleeping(call_s: float, logical: int) -> type[Extractor]:
    """An extractor whose network sleeps and then gives the slice's own threshold maps as its anatomy; `logical` slices
    at a time, as that many extractors would."""

    class Sleeping(Extractor):
        def __init__(self, work: ExtractionSpec) -> None:
            super().__init__(work)
            self._encoding = threading.Semaphore(logical)  # type: ignore[assignment]
            self._network = _Asleep(self._network.config, call_s)  # type: ignore[assignment]

    return Sleeping


class _Asleep:
    def __init__(self, config: Any, call_s: float) -> None:
        self.config, self.call_s = config, call_s

    def factors(self, views: Sequence[Any]) -> list[Any]:
        return [self._one(seen.canvas[seen.extent]) for seen in views]

    def _one(self, image: Any) -> Any:
        time.sleep(self.call_s)
        levels = ((image + 1) * 4).clip(0, 7).astype(np.uint8)
        return np.left_shift(1, levels, dtype=np.uint8), np.zeros(self.config.modality_size, np.float32)


def _megabytes() -> list[float]:
    """PSS of each process of the crowd that runs."""
    pss = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "Sleeping" in " ".join(process.cmdline()):
                pss.append(process.memory_full_info().pss / 1e6)
        except psutil.Error:  # it has ended
            continue
    return pss


def _rate(pool: Pool[int], bank: FactorBank, shards: int) -> float:
    """Slices a second to committed shards, by a pool that has started."""
    for shard in range(bank.shards()):
        if bank.is_committed(shard):
            ledger.retract(bank.uri, shard)
    began = time.perf_counter()
    fill(pool, bank, range(shards), lambda _: None)
    return sum(len(bank.shard_rows(shard)) for shard in range(shards)) / (time.perf_counter() - began)


def _on_two_cores(work: ExtractionSpec, stream: StreamConfig) -> None:
    with cluster.local(8):
        bank = prepare_bank(replace(work, shard_slices=SHARD))
        found, made = {}, {}
        for actors in (1, 2, 4):
            with extractors(work, bank, ExtractionActors(actors)) as pool:
                pool.start()
                _rate(pool, bank, actors)  # warm-up
                found[actors] = _rate(pool, bank, 8)
        for shard in sorted(set(range(bank.shards())) - bank.committed()):
            with extractors(work, bank, ExtractionActors(2)) as pool:
                fill(pool, bank, [shard], lambda _: None)
        for actors in (1, 2, 4):
            source = batches(stream, range(WARM_UP + COUNTED), actors=actors, cpus=1.0)
            for _ in range(WARM_UP):
                next(source)
            began = time.perf_counter()
            count = sum(1 for _ in source)
            made[actors] = count * stream.samples_per_step / (time.perf_counter() - began)
    for name, rates in (("extraction", found), ("samples", made)):
        text = ", ".join(f"{n} actors {rate:.1f}" for n, rate in rates.items())
        print(f"{name} a second on two cores: {text}; two against one {rates[2] / rates[1]:.2f}", flush=True)


def _simulated(work: ExtractionSpec, crowds: Sequence[Crowd]) -> tuple[float, float]:
    """Slices a second of the last crowd, and of one actor whose calls and shards are like that crowd's."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # so many start at once
    most = max(crowd.processes for crowd in crowds)
    node = {"num_cpus": -(-most // NODES), "object_store_memory": 100 * 1024**2}
    nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False}, shutdown_at_exit=False)
    rates: dict[tuple[Crowd, float, int], float] = {}

    def rate(crowd: Crowd, like: Crowd) -> float:
        key = crowd, like.call_s, like.shard
        if key not in rates:
            own = replace(work, bank=f"{work.bank}-{like.shard}", shard_slices=like.shard)
            bank = prepare_bank(own)
            actors, make = ExtractionActors(crowd.processes), sleeping(like.call_s, crowd.logical)
            with extractors(own, bank, actors, make, abreast=crowd.logical) as pool:
                pool.start()
                rates[key] = _rate(pool, bank, crowd.actors * SHARDS_EACH)
                print(f"{crowd.processes} processes of {np.mean(_megabytes()):.0f} MB (PSS) on average", flush=True)
        return rates[key]

    try:
        for _ in range(NODES - 1):
            nodes.add_node(**node)
        ray.init(address=nodes.address, log_to_driver=False)
        for crowd in crowds:
            one, all_of_them = rate(Crowd(1), crowd), rate(crowd, crowd)
            print(
                f"{crowd.actors} actors in {crowd.processes} processes over {NODES} nodes, {crowd.call_s} s a call, "
                f"shards of {crowd.shard}: {all_of_them:.2f} slices/s, "
                f"efficiency {all_of_them / crowd.actors / one:.2f}",
                flush=True,
            )
    finally:
        ray.shutdown()
        nodes.shutdown()
    return all_of_them, one


def run() -> dict[str, Any]:
    """Efficiency of the last crowd of simulated extractors, 32 of them if nothing else is asked for."""
    asked = asked_for()
    with tempfile.TemporaryDirectory(prefix="cardiomix-actors-") as place:
        root = Path(place)
        write_phantom(root / "drawn", PHANTOM)
        run, sdnet = slice_store(root / "drawn", root / "run", LayoutOptions(frames="all")), str(root / "sdnet")
        torch.manual_seed(0)
        save_model(sdnet, SDNet(SETTINGS.sdnet), SETTINGS.sdnet, SETTINGS.preprocess.model_dump(), ["phantom"])
        print(f"{len(SliceStore.open(run))} slices", flush=True)
        bank = str(root / "bank.zarr")
        stream = StreamConfig(
            run=run,
            bank=bank,
            preprocess=SETTINGS.preprocess,
            plan=SETTINGS.plan,
            seed=0,
            semi_supervised=False,
            ra=True,
            fa=True,
            batch_size=16,
        )
        if asked is None:
            _on_two_cores(ExtractionSpec(run, sdnet, bank, SETTINGS.preprocess), stream)
        crowds = asked or CROWDS
        ours, one = _simulated(ExtractionSpec(run, sdnet, str(root / "simulated.zarr"), SETTINGS.preprocess), crowds)
    most = crowds[-1].actors
    return {
        "ratio": round(ours / most / one, 2),
        "ours": round(ours, 1),
        "reference": round(most * one, 1),
        "unit": f"slices/s, {most} actors and {most} times one",
    }
