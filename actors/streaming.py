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

from actors.ray_internals import any_placed
from actors.waiting import PATIENCE, Patience, Wait
from pipeline.samples.maker import MADE_AT, MADE_S, REJECTED, UPLOADED, SampleMaker
from pipeline.samples.stream_config import StreamConfig, open_bank, samples_of_worker, step_plan
from storage.bank.node_cache import BankView
from storage.errors import StageError, one_line
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    import torch

STEPS_PER_BLOCK = 8  # small blocks start a stream sooner, large ones cost less each; 8 steps of 8 rows measured well
BYTES_A_PIXEL = 5  # image and mask
NODE_DIED = "its node has died"  # in Ray's words
MOST_DEATHS = 3  # of makers at one block, but for those whose node is lost


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
    maker: type = SampleMaker,
    patience: Patience = PATIENCE,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `steps` for one train worker, in order, made by `actors` that live as long as the iteration.

    The same bytes for any number of actors; what a lost actor or node had made is made again. Of blocks that are made
    or being made there are never more than fit `stream_mb`, but two for each actor. Raises InputError if a step has no
    sample for this worker, or the bank is damaged; StageError if one sample ends one maker after the other, a maker
    cannot start, or no node has room for one.
    """
    store = SliceStore.open(config.run)
    bank = open_bank(config, store)
    if bank is not None:
        _ = BankView(bank).anatomy  # damage is found here, where it can be told
    rows = samples_of_worker(config, step_plan(config, store, bank), rank, world)
    blocks = deque(
        range(steps.start, steps.stop)[i : i + STEPS_PER_BLOCK] for i in range(0, len(steps), STEPS_PER_BLOCK)
    )
    block_bytes = STEPS_PER_BLOCK * rows * config.preprocess.size**2 * (BYTES_A_PIXEL + 4 * config.twins)
    most = max(2 * actors, int(stream_mb * 1e6 / block_bytes))
    with _Makers(config, rank, world, actors, cpus, maker, patience) as makers:
        while blocks or makers:
            while blocks and len(makers) < most:
                makers.ask(blocks.popleft())
            made = makers.next()
            yield from _cut(made, rows, device)
            del made


class _Block:
    """Steps that a maker was asked for, and how many makers ended while they were at it."""

    def __init__(self, steps: range) -> None:
        self.steps, self.deaths = steps, 0
        self.maker = -1
        self.reference: Any = None


class _Makers:
    """Actors that make blocks of steps, each its own in turn, given back in the order in which they were asked for.

    A maker that dies is replaced and what it had not made is asked for again. That is blamed on the block it was at,
    unless its whole node is gone. A block that has ended `MOST_DEATHS` makers is given up by name.
    """

    def __init__(
        self, config: StreamConfig, rank: int, world: int, count: int, cpus: float, maker: type, patience: Patience
    ) -> None:
        import ray

        # DEFAULT: outside the train worker's placement group
        options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": 0, "scheduling_strategy": "DEFAULT"}
        self._remote: Any = ray.remote(**options)(maker)
        self._arguments = (config, rank, world)
        self._makers: list[Any] = [self._remote.remote(*self._arguments) for _ in range(count)]
        self._under_way: deque[_Block] = deque()
        self._asked = 0
        self._say = patience.say
        self._place = Wait(patience, "samples", "a maker of samples", {"CPU": cpus})
        self._room = Wait(patience, "samples", "room in this node's object store")

    def __enter__(self) -> _Makers:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for maker in self._makers:
            ray.kill(maker)

    def __len__(self) -> int:
        return len(self._under_way)

    def ask(self, steps: range) -> None:
        """Have a block made by the maker whose turn it is."""
        block = _Block(steps)
        block.maker = self._asked % len(self._makers)
        self._asked += 1
        self._under_way.append(block)
        self._submit(block)

    def next(self) -> dict[str, Any]:
        """The block that was asked for first. Raises StageError if it ends one maker after the other."""
        import ray
        from ray.exceptions import (
            ActorDiedError,
            ActorUnavailableError,
            GetTimeoutError,
            ObjectLostError,
            OutOfMemoryError,
        )

        lost = (ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError)
        self._place.over()
        self._room.over()
        while True:
            if len(self._under_way) > 1:  # have the next one brought here meanwhile
                ray.wait([self._under_way[1].reference], timeout=0, fetch_local=True)
            first = self._under_way[0]
            try:
                made: dict[str, Any] = ray.get(first.reference, timeout=self._place.look_s)
            except GetTimeoutError:
                self._check_room(first)
                continue
            except lost as error:
                if isinstance(error, ActorDiedError) and error.actor_init_failed:
                    raise StageError(f"a maker of samples cannot start: {one_line(error, last=True)}") from error
                died = isinstance(error, (ActorDiedError, OutOfMemoryError))
                self._replace(first.maker, blamed=died and NODE_DIED not in str(error))
                continue
            self._under_way.popleft()
            return made

    def _check_room(self, block: _Block) -> None:
        """A block has not come for a while. Raises FinalError where no maker has had a place for too long, or the block
        has been made but finds no room here."""
        import ray

        if self._stood_in(block.maker):
            return
        self._place.check(lambda: any_placed({block.reference: self._makers[block.maker]}))
        self._room.check(lambda: not ray.wait([block.reference], timeout=0, fetch_local=False)[0])

    def _stood_in(self, waiting: int) -> bool:
        """Whether a maker that has no place was let go, and what it was asked for given to one that has."""
        import ray

        def placed(maker: Any) -> bool:
            return any_placed({maker: maker})

        pending = self._makers[waiting]
        if placed(pending) or not (working := [m for m in self._makers if m is not pending and placed(m)]):
            return False
        ray.kill(pending)
        self._makers[waiting] = working[waiting % len(working)]
        for block in self._under_way:
            if block.maker == waiting:
                self._submit(block)
        self._say("samples: a maker has found no room; the others make its share")
        return True

    def _submit(self, block: _Block) -> None:
        steps = np.array(block.steps, dtype=np.int64)
        block.reference = self._makers[block.maker].__call__.remote({"step": steps})

    def _replace(self, maker: int, blamed: bool) -> None:
        """A new actor in the place of a dead one, with what that had not made."""
        import ray

        left = [block for block in self._under_way if block.maker == maker and not _is_made(block.reference)]
        ray.kill(self._makers[maker])
        if left and blamed:
            left[0].deaths += 1
            if left[0].deaths >= MOST_DEATHS:
                self._try_alone(left[0])
        self._makers[maker] = self._remote.remote(*self._arguments)
        for block in left:
            self._submit(block)

    def _try_alone(self, block: _Block) -> None:
        """Make the block's samples one by one. Raises StageError with the slice whose sample ends its maker again; if
        none does, the deaths were not the block's."""
        import ray
        from ray.exceptions import ActorDiedError, OutOfMemoryError

        config, rank, world = self._arguments
        store = SliceStore.open(config.run)
        plan = step_plan(config, store, open_bank(config, store))
        alone = self._remote.remote(*self._arguments)
        try:
            for sample in (sample for step in block.steps for sample, _ in plan.samples(step, rank, world)):
                try:
                    ray.get(self._place.first({alone.make.remote(sample): alone}))
                except (ActorDiedError, OutOfMemoryError) as error:
                    who = [store.column(name)[sample.slice_id] for name in ("slice", "frame", "subject")]
                    where = "slice {} of frame {} of subject {}".format(*who)
                    remedy = "leave the subject out, or give the makers more memory"
                    raise StageError(f"{where} ended {MOST_DEATHS + 1} makers of samples; {remedy}") from error
        finally:
            ray.kill(alone)
        block.deaths = 0


def _is_made(reference: Any) -> bool:
    """Whether a block lies ready and whole."""
    import ray
    from ray.exceptions import RayError

    if not ray.wait([reference], timeout=0)[0]:
        return False
    try:
        ray.get(reference)
    except RayError:
        return False
    return True


def _cut(made: dict[str, Any], rows: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """A block's batches of `rows`, copied out of the object store."""
    import torch

    from pipeline.samples.canvas import upload

    where = {name: torch.device(device if name in UPLOADED else "cpu") for name in made}
    for i in range(0, len(made["image"]), rows):
        yield {name: upload(values[i : i + rows].copy(), where[name]) for name, values in made.items()}


class StreamStats:
    """What the stream of one train worker did, from the batches that it gave. `actors`: makers of these, which may be
    the worker's own thread."""

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
