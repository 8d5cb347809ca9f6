"""A pool of extractors: who has which shards, and what becomes of a shard whose actor dies.

Ray is told to restart nothing: it would do so for ever, and cannot tell the shard that kills its actors from those
beside it. A lost shard is given out again here, alone from then on, so that the next death is its own; after
`MOST_DEATHS` extraction ends with its name. A death with the whole node counts against nobody.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.extractor import IN_FLIGHT, ExtractionSpec, Extractor
from actors.ray_internals import any_placed
from actors.waiting import PATIENCE, Patience, Wait
from storage import fs
from storage.bank.bank import FactorBank
from storage.errors import InputError, StageError, one_line

TICK_S = 2.0  # between two looks at how far the actors are
MOST_DEATHS = 4  # with one shard; of the first another shard may be guilty
MOST_FAILED_STARTS = 5  # one after the other


@dataclass(eq=False)
class _Worker:
    """An actor and its shards; `node` is None until it has started. `ahead`: slices that its network has done of shards
    that are not committed, as far as it has told."""

    actor: Any
    node: str | None = None
    shards: set[int] = field(default_factory=set)
    ahead: int = 0
    committed: int = 0
    asked: bool = False


class ExtractorPool:
    """Up to `size` extractors that each book `num_cpus` and `num_gpus`. A context: at its end they are gone.

    Raises InputError if the cluster cannot hold even one.
    """

    def __init__(
        self,
        work: ExtractionSpec,
        size: int,
        num_cpus: float,
        num_gpus: float,
        actor: type[Extractor] = Extractor,
        patience: Patience = PATIENCE,
    ) -> None:
        self.size, self._actor = _that_fit(size, num_cpus, num_gpus), actor
        self._work, self._num_cpus, self._num_gpus = work, num_cpus, num_gpus
        self._workers: list[_Worker] = []
        self._calls: dict[Any, tuple[_Worker, str, int]] = {}  # reference → its actor, method and shard
        self._waiting: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._failed_starts = 0
        self._wait = Wait(patience, "extract", "an extraction actor", {"CPU": num_cpus, "GPU": num_gpus})

    def __enter__(self) -> ExtractorPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._dismiss(worker)

    def start(self) -> None:
        """Wait until all actors have started, for whoever measures what comes then."""
        self._hire(self.size)
        while any(worker.node is None for worker in self._workers):
            self._settle_one()

    def run(self, bank: FactorBank, shards: Sequence[int], told: Callable[[int], None]) -> None:
        """Extract these shards of the bank that `work` names; `told` hears every few seconds how many slices are done.

        Raises InputError for what an actor finds wrong with the input; FinalError if no node has room for an actor;
        StageError, naming the shard, if its actors die again and again or if it fails otherwise.
        """
        self._bank, self._waiting, self._left, self._slices = bank, deque(shards), len(shards), 0
        asked = time.monotonic()
        self._wait.over()
        while self._left:
            busy = sum(bool(worker.shards) for worker in self._workers)
            self._hire(min(self.size, busy + len(self._waiting)))
            for worker in self._workers:
                self._hand_out(worker)
            if time.monotonic() - asked > TICK_S:
                self._ask()
                asked = time.monotonic()
            self._settle_one()
            told(self._slices + sum(max(0, worker.ahead) for worker in self._workers))

    def _hire(self, size: int) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": self._num_cpus, "num_gpus": self._num_gpus, "max_restarts": 0}
        options["max_concurrency"] = IN_FLIGHT + 1  # one to ask how far it is
        remote: Any = ray.remote(**options)(self._actor)
        while len(self._workers) < size:
            worker = _Worker(remote.remote(self._work))
            self._workers.append(worker)
            self._call(worker, "start")

    def _hand_out(self, worker: _Worker) -> None:
        """As many shards as the actor can use, but towards the end only its share of those that are left."""
        while worker.node is not None and self._waiting:
            most = min(IN_FLIGHT, 1 + (len(self._waiting) - 1) // self.size)
            if len(worker.shards) >= most:
                return
            if worker.shards and any(self._deaths[shard] for shard in (self._waiting[0], *worker.shards)):
                return  # a suspect runs alone
            shard = self._waiting.popleft()
            worker.shards.add(shard)
            self._call(worker, "extract", shard)

    def _ask(self) -> None:
        for worker in self._workers:
            if worker.node is not None and not worker.asked:
                worker.asked = True
                self._call(worker, "encoded")

    def _call(self, worker: _Worker, method: str, shard: int = -1) -> None:
        arguments = [shard] if method == "extract" else []
        self._calls[getattr(worker.actor, method).remote(*arguments)] = worker, method, shard

    def _settle_one(self) -> None:
        """Wait for one answer, a moment at most, and act on it."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=TICK_S)
        if any(worker.node is not None for worker in self._workers):
            self._wait.over()
        else:
            self._wait.check(lambda: any_placed({call: worker.actor for call, (worker, *_) in self._calls.items()}))
        for reference in ready:
            worker, method, shard = self._calls.pop(reference)
            try:
                answer = ray.get(reference)
            except RayTaskError as error:
                where = self._named(shard) if method == "extract" else "extraction"
                raise StageError(
                    f"{where}: {one_line(error.cause, trusted=False)}; the same command goes on where it stopped"
                ) from None
            except RayError:
                self._lose(worker)
                continue
            if isinstance(answer, InputError):
                raise answer
            self._accept(worker, method, shard, answer)

    def _accept(self, worker: _Worker, method: str, shard: int, answer: Any) -> None:
        if method == "start":
            worker.node, self._failed_starts = answer, 0
        elif method == "encoded":
            worker.asked, worker.ahead = False, answer - worker.committed
        else:
            slices = len(self._bank.shard_rows(shard))
            worker.shards.remove(shard)
            worker.committed += slices
            worker.ahead -= slices
            self._commit(shard)

    def _commit(self, shard: int) -> None:
        self._left -= 1
        self._slices += len(self._bank.shard_rows(shard))

    def _lose(self, worker: _Worker) -> None:
        """The actor is dead. What it had is given out again."""
        with_its_node = worker.node is not None and worker.node not in _nodes()
        self._dismiss(worker)
        if worker.node is None:
            self._failed_starts += 1
            if self._failed_starts >= MOST_FAILED_STARTS:
                raise StageError(
                    f"extraction: {self._failed_starts} actors in a row died while they started, perhaps for want of "
                    "memory; lower resources.extract_actors, or use a machine with more memory"
                )
        for shard in sorted(worker.shards, reverse=True):
            if self._bank.is_committed(shard):
                self._commit(shard)
                continue
            self._waiting.appendleft(shard)
            self._deaths[shard] += not with_its_node
            if self._deaths[shard] >= MOST_DEATHS:
                raise StageError(
                    f"{self._named(shard)}: its actor died {self._deaths[shard]} times, at last with nothing else "
                    "to do, perhaps for want of memory; lower bank_shard or resources.extract_actors, or use a machine "
                    "with more memory. The other shards are kept"
                )

    def _dismiss(self, worker: _Worker) -> None:
        import ray

        self._workers.remove(worker)
        self._calls = {reference: call for reference, call in self._calls.items() if call[0] is not worker}
        ray.kill(worker.actor)

    def _named(self, shard: int) -> str:
        """The shard and its slices, from first to last."""
        rows = self._bank.shard_rows(shard)
        first, last = (
            "{subject} frame {frame} slice {slice}".format(**self._bank.index.slice(row, 1).to_pylist()[0])
            for row in (rows.start, rows.stop - 1)
        )
        return f"{fs.base_name(self._bank.uri)}, shard {shard} ({len(rows)} slices, {first} to {last})"


def _nodes() -> set[str]:
    import ray

    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def _that_fit(wanted: int, num_cpus: float, num_gpus: float) -> int:
    """How many of the wanted actors the whole cluster can hold. Raises InputError if it is none."""
    import ray

    resources = ray.cluster_resources()
    fit = wanted
    for name, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        there = float(resources.get(name, 0.0))
        if there < need:
            raise InputError(
                "resources", f"extraction needs {need:g} {name}s an actor, the cluster has {there:g}", "add nodes"
            )
        if need:
            fit = min(fit, int(there / need + 1e-6))
    return max(1, fit)
