"""The sample stream: warm actors turn one long plan into batches, in order (FA, then RA).

The actors are called directly. Ray Data over the same plan gave the same batches, but its executor lives in the train
worker and takes a whole core of it while it holds production back (Ray 2.60), which made a step 2.4 times as long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.samples.maker import MADE_AT, MADE_S, REJECTED, SampleMaker
from pipeline.samples.stream_config import StreamConfig, open_bank, step_plan
from storage.bank.node_cache import BankView
from storage.errors import InputError
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    import torch

STEPS_PER_BLOCK = 8  # small blocks start a stream sooner, large ones cost less each; 8 steps of 8 rows measured well
BYTES_A_PIXEL = 5  # image and mask


def batches(
    config: StreamConfig,
    steps: range,
    *,
    rank: int = 0,
    world: int = 1,
    actors: int = 1,
    cpus: float = 0.25,
    device: str = "cpu",
    stream_mb: int = 256,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `steps` for one train worker, in order, made by `actors` that live as long as the iteration.

    The same bytes for any number of actors; what a lost actor or node had made is made again. Of blocks that are made
    or being made there are never more than fit `stream_mb`, but two for each actor. Raises InputError if a step has no
    sample for this worker, or the bank is damaged.
    """
    import ray

    store = SliceStore.open(config.run)
    bank = open_bank(config, store)
    if bank is not None:
        BankView(bank)  # damage is found here, where it can be told
    rows = step_plan(config, store, bank).rows(rank, world)
    if rows == 0:
        raise InputError(
            "resources.train_workers",
            f"a step has {config.batch_size} labelled samples, none of them for worker {rank + 1} of {world}",
            "lower resources.train_workers or raise train.batch_size",
        )
    # DEFAULT: outside the train worker's placement group
    options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": -1}
    remote: Any = ray.remote(**options, scheduling_strategy="DEFAULT")(SampleMaker)
    makers = [remote.remote(config, rank, world) for _ in range(actors)]
    blocks = deque(
        range(steps.start, steps.stop)[i : i + STEPS_PER_BLOCK] for i in range(0, len(steps), STEPS_PER_BLOCK)
    )
    block_bytes = STEPS_PER_BLOCK * rows * config.preprocess.size**2 * (BYTES_A_PIXEL + 4 * config.twins)
    most = max(2 * actors, int(stream_mb * 1e6 / block_bytes))
    under_way: deque[Any] = deque()
    asked = 0
    try:
        while blocks or under_way:
            while blocks and len(under_way) < most:
                block = np.array(blocks.popleft(), dtype=np.int64)
                under_way.append(makers[asked % actors].__call__.remote({"step": block}))
                asked += 1
            if len(under_way) > 1:  # have the next one brought here meanwhile
                ray.wait([under_way[1]], timeout=0, fetch_local=True)
            made = ray.get(under_way.popleft())
            yield from _cut(made, rows, device)
            del made
    finally:
        for maker in makers:
            ray.kill(maker)


def _cut(made: dict[str, Any], rows: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """A block's batches of `rows`, copied out of the object store."""
    import torch

    for i in range(0, len(made["image"]), rows):
        batch = {name: torch.from_numpy(values[i : i + rows].copy()) for name, values in made.items()}
        if device != "cpu":
            batch = {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}
        yield batch


class StreamStats:
    """What the stream of one train worker did, from the batches that it gave."""

    def __init__(self, actors: int) -> None:
        self._actors, self._began = actors, time.perf_counter()
        self._batches = 0
        self._waited = self._making = self._lay_ready = self._rejected = 0.0

    def add(self, batch: dict[str, torch.Tensor], waited: float) -> None:
        """Count a batch for which the trainer has just waited so many seconds."""
        self._waited += waited
        self._making += float(batch[MADE_S].sum())
        self._batches += 1
        self._rejected += float(batch[REJECTED].mean())
        self._lay_ready += max(0.0, time.time() - float(batch[MADE_AT].mean()))

    def numbers(self) -> dict[str, float]:
        """Since the start: `train_seconds`; `data_wait_fraction`, the trainer's share of waiting; `actor_utilisation`,
        what making these batches took of the actors' time (batches made beforehand count too, so that after a short
        epoch it may pass 1); `queue_depth`, how many batches lay ready on average (Little's law: the sum of how long
        each did, over the time); `fa_rejected`, the share of samples that the guard of realism turned down."""
        took = time.perf_counter() - self._began
        return {
            "train_seconds": took,
            "data_wait_fraction": self._waited / took,
            "actor_utilisation": self._making / took / self._actors,
            "queue_depth": self._lay_ready / took,
            "fa_rejected": self._rejected / max(1, self._batches),
        }
