"""The sample stream: warm Ray Data actors turn one long plan into batches, in order (FA, then RA)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from actors.sample_maker import MADE_AT, MADE_S, REJECTED, SampleMaker
from actors.stream_config import StreamConfig, open_bank, step_plan
from storage.errors import InputError
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    import torch

STEPS_PER_BLOCK = 8  # small blocks start a stream sooner, large ones cost less each; 8 steps of 8 rows measured well


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
    """Batches of `steps` for one train worker, in order: one Ray Data execution over the whole range.

    The same bytes for any number of actors; a lost actor's block is made again. Ray starts no block while the samples
    that wait take `stream_mb` MB or more of the object store; at least one block is always under way. Raises InputError
    if a step has no sample for this worker.
    """
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    store = SliceStore.open(config.run)
    bank = open_bank(config, store)
    if bank is not None:
        bank.view()  # damage is found here: of an actor that cannot start, Ray would start another for ever
    rows = step_plan(config, store, bank).rows(rank, world)
    if rows == 0:
        raise InputError(
            "resources.train_workers",
            f"a step has {config.batch_size} labelled samples, none of them for worker {rank + 1} of {world}",
            "lower resources.train_workers or raise train.batch_size",
        )
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=stream_mb * 1e6)
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    numbers = np.arange(steps.start, steps.stop, dtype=np.int64)
    blocks = [pa.table({"step": numbers[i : i + STEPS_PER_BLOCK]}) for i in range(0, len(numbers), STEPS_PER_BLOCK)]
    made = ray.data.from_arrow(blocks).map_batches(
        SampleMaker,
        fn_constructor_kwargs={"config": config, "rank": rank, "world": world},
        batch_size=None,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=cpus,
    )
    yield from made.iter_torch_batches(batch_size=rows, prefetch_batches=2, device=device)


class Flow:
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
