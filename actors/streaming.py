"""The sample stream: actors make the samples of one long plan (FA, then RA), and their batches arrive in order.

The actors are called directly (docs/decisions/0008). Ray Data gave the same batches. But its executor runs in the train
worker, and takes a whole core there while it holds production back (Ray 2.60); a step then took 2.4 times as long.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.crew import AGAIN, Crew, KilledError
from actors.pool import MOST_DEATHS, Pool
from actors.waiting import PATIENCE, Patience
from pipeline.samples.maker import MADE_AT, MADE_S, REJECTED, SampleMaker
from pipeline.samples.plan import Sample
from pipeline.samples.stream_config import StreamConfig, open_bank, step_plan
from storage.bank.node_cache import BankView
from storage.errors import FinalError, StageError
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    import torch

# Large blocks cost less per step. 8 steps of 8 samples measured well.
STEPS_PER_BLOCK = 8
BYTES_A_PIXEL = 5  # float32 image and uint8 mask

Block = dict[str, Any]  # {"step": (k,) int64}: the steps that a maker makes in one call


def batches(
    config: StreamConfig,
    steps: range,
    *,
    rank: int = 0,
    world: int = 1,
    actors: int = 1,
    cpus: float = 0.25,
    gpus: float = 0.0,
    stream_mb: int = 256,
    maker: type = SampleMaker,
    patience: Patience = PATIENCE,
) -> Generator[dict[str, torch.Tensor]]:
    """Yield the batches of `steps` for train worker `rank` of `world`, in order. The actors live as long as the
    iteration.

    A batch has what `SampleMaker.__call__` makes, as tensors on the CPU. An actor that books a share `gpus` of a GPU
    draws on it.
    The bytes are the same for any number of actors; samples that are lost with an actor or node are made again. At most
    `stream_mb` MB of blocks are made or being made, but always at least two steps per actor.
    Raises InputError if the workers cannot share a step evenly, or the bank is damaged; FinalError if one sample kills
    one maker after the other, makers cannot start, or no node has room for one; StageError if they die as they start.
    """
    store = SliceStore.open(config.run)
    bank = open_bank(config, store)
    if bank is not None:
        _ = BankView(bank).anatomy  # a damaged bank raises here, before any actor starts
    plan = step_plan(config, store, bank)
    rows = plan.rows(rank, world)
    step_bytes = rows * config.preprocess.size**2 * (BYTES_A_PIXEL + 4 * config.twins)
    room = int(stream_mb * 1e6 / step_bytes)  # steps
    in_block = min(STEPS_PER_BLOCK, max(1, room // (2 * actors)))
    most = max(2 * actors, room // in_block)
    crew = _crew(config, rank, world, actors, cpus, gpus, maker)
    tried: set[int] = set()

    def failed(block: Block, error: StageError) -> Any:
        first = int(block["step"][0])
        if not isinstance(error, KilledError):
            raise error
        if first in tried:  # its samples killed nobody one by one, but do so together
            raise FinalError(str(error)) from error
        tried.add(first)
        samples = [sample for step in block["step"] for sample, _ in plan.samples(int(step), rank, world)]
        _try_one_by_one(crew, samples, store, patience)
        return AGAIN  # no sample kills a maker when it is made alone

    crew = replace(crew, in_flight=most, failed=failed)
    with Pool(crew, patience) as makers:
        for _, made in makers.run(_blocks(steps, in_block), ahead=most):
            yield from _cut(made, rows)
            del made


def _blocks(steps: range, in_block: int) -> Iterator[Block]:
    """The steps in order, `in_block` in a block. The first blocks hold 1, 2, 4, ..., so that a stream starts soon."""
    size = 1
    while steps:
        yield {"step": np.array(steps[:size], dtype=np.int64)}
        steps, size = steps[size:], min(in_block, 2 * size)


def _crew(
    config: StreamConfig, rank: int, world: int, actors: int, cpus: float, gpus: float, maker: type
) -> Crew[Block]:
    return Crew(
        stage="samples",
        what="a maker of samples",
        make=maker,
        arguments=(config, rank, world, 1, "cuda" if gpus else "cpu"),
        method="__call__",
        size=actors,
        cpus=cpus,
        gpus=gpus,
        named=lambda block: f"samples of steps {block['step'][0]} to {block['step'][-1]}",
        remedy="give the makers more memory",
    )


def _try_one_by_one(makers: Crew[Block], samples: Sequence[Sample], store: SliceStore, patience: Patience) -> None:
    """Make these samples one by one in a maker of their own. Raises FinalError, with the slice, if a sample kills its
    makers again."""

    def failed(sample: Sample, error: StageError) -> None:
        if not isinstance(error, KilledError):
            raise error
        who = [store.column(name)[sample.slice_id] for name in ("slice", "frame", "subject")]
        where = "slice {} of frame {} of subject {}".format(*who)
        raise FinalError(
            f"{where} ended {MOST_DEATHS} makers of samples; leave the subject out, or {makers.remedy}"
        ) from error

    crew = Crew(
        makers.stage, makers.what, makers.make, makers.arguments, "make", 1, makers.cpus, makers.gpus, failed=failed
    )
    with Pool(crew, patience) as alone:
        for _ in alone.run(samples):
            pass


def _cut(made: dict[str, Any], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """The block's batches of `rows` samples each, copied out of the object store."""
    import torch

    for i in range(0, len(made["image"]), rows):
        yield {name: torch.from_numpy(values[i : i + rows].copy()) for name, values in made.items()}


class StreamStats:
    """Measures the stream of one train worker by its batches. `actors` is the number of makers: 1 if the worker makes
    its samples in a thread of its own."""

    def __init__(self, actors: int) -> None:
        self._actors, self._began = actors, time.perf_counter()
        self._batches = 0
        self._waited = self._making = self._lay_ready = self._rejected = 0.0

    def add(self, batch: dict[str, torch.Tensor], waited: float) -> None:
        """Count a batch, for which the trainer has just waited `waited` seconds."""
        self._waited += waited
        self._making += float(batch[MADE_S].sum())
        self._batches += 1
        self._rejected += float(batch[REJECTED].mean())
        self._lay_ready += max(0.0, time.time() - float(batch[MADE_AT].mean()))

    def numbers(self) -> dict[str, float]:
        """What was measured since the start:

        - `train_seconds`: seconds since the start.
        - `data_wait_fraction`: the share of this time in which the trainer waited for a batch, 0 to 1.
        - `actor_utilisation`: the share of the actors' time that it took to make these batches. It may exceed 1 after a
          short epoch, because batches made before the start count too.
        - `queue_depth`: how many batches lay ready on average (Little's law: the sum of the times for which each lay
          ready, divided by the time since the start).
        - `fa_rejected`: images that the realism guard rejected, per sample.
        """
        took = time.perf_counter() - self._began
        return {
            "train_seconds": took,
            "data_wait_fraction": self._waited / took,
            "actor_utilisation": self._making / took / self._actors,
            "queue_depth": self._lay_ready / took,
            "fa_rejected": self._rejected / max(1, self._batches),
        }
