"""How extraction and synthesis scale with actors.

On this machine's two cores: 1, 2 and 4 actors, of a thread each, fill a bank (width 16, cines of the phantom) and make
samples of the `cpu` preset. Then, to see the pool and the bank rather than the cores: 1 to 32 actors over four local
nodes, in which a call to the network takes 0.25 s of sleep, a slice a call, and everything else is real: slices are
read and prepared, shards of 64 written and committed. Every actor gets two shards; all have started before the clock.
Efficiency is the rate over that many times the rate of one. The JSON line's ratio is the efficiency at 32.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
CROWDS = (1, 2, 4, 8, 16, 32)
PHANTOM = PhantomConfig(labelled_a=16, labelled_b=0, unlabelled_c=0, testing=0, frames=26, slices=(10, 10))
WARM_UP, COUNTED = 64, 256


class Sleeping(Extractor):
    """An extractor whose network sleeps and then gives the slice's own threshold maps as its anatomy."""

    def __init__(self, work: ExtractionSpec) -> None:
        super().__init__(work)
        self._network = _Asleep(self._network.config)  # type: ignore[assignment]


class _Asleep:
    def __init__(self, config: Any) -> None:
        self.config = config

    def factors(self, seen: Any) -> Any:
        image = seen.canvas[seen.extent]
        time.sleep(CALL_S)
        levels = ((image + 1) * 4).clip(0, 7).astype(np.uint8)
        return np.left_shift(1, levels, dtype=np.uint8), np.zeros(self.config.modality_size, np.float32)


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


def _simulated(work: ExtractionSpec) -> dict[int, float]:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": CROWDS[-1] // NODES, "object_store_memory": 100 * 1024**2}
    nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False}, shutdown_at_exit=False)
    rates = {}
    try:
        for _ in range(NODES - 1):
            nodes.add_node(**node)
        ray.init(address=nodes.address, log_to_driver=False)
        bank = prepare_bank(replace(work, shard_slices=SHARD))
        for actors in CROWDS:
            with extractors(work, bank, ExtractionActors(actors), Sleeping) as pool:
                pool.start()
                rates[actors] = _rate(pool, bank, actors * SHARDS_EACH)
            print(
                f"{actors} actors over {NODES} nodes, {CALL_S} s a call: {rates[actors]:.2f} slices/s, efficiency "
                f"{rates[actors] / actors / rates[1]:.2f}",
                flush=True,
            )
    finally:
        ray.shutdown()
        nodes.shutdown()
    return rates


def run() -> dict[str, Any]:
    """Efficiency of 32 simulated extractors."""
    with tempfile.TemporaryDirectory(prefix="cardiomix-actors-") as place:
        root = Path(place)
        write_phantom(root / "drawn", PHANTOM)
        run, sdnet = slice_store(root / "drawn", root / "run", LayoutOptions(frames="all")), str(root / "sdnet")
        torch.manual_seed(0)
        save_model(sdnet, SDNet(SETTINGS.sdnet), SETTINGS.sdnet, SETTINGS.preprocess.model_dump(), ["phantom"])
        print(f"{len(SliceStore.open(run))} slices in shards of {SHARD}", flush=True)
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
        _on_two_cores(ExtractionSpec(run, sdnet, bank, SETTINGS.preprocess), stream)
        rates = _simulated(ExtractionSpec(run, sdnet, str(root / "simulated.zarr"), SETTINGS.preprocess))
    most = CROWDS[-1]
    return {
        "ratio": round(rates[most] / most / rates[1], 2),
        "ours": round(rates[most], 1),
        "reference": round(most * rates[1], 1),
        "unit": f"slices/s, {most} actors and {most} times one",
    }
