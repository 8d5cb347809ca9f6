"""A stage's pool of actors: which actor has which piece of work, and what happens to the pieces when an actor dies.

Ray is told to restart nothing. It would restart for ever, and it cannot tell the piece that kills its actors from the
pieces beside it. The policy is here, and it is the same for every stage:

- If an actor dies, its unfinished pieces are given out again. If it had one piece, that counts as a death of the piece;
  after `MOST_DEATHS` the piece has failed, and the error names it. If it had several pieces, each of those that it may
  have worked on runs alone next.
- If the whole node died, no piece is blamed.
- If `MOST_FAILED_STARTS` actors in a row die while they start, the stage ends with a one-line error. An exception in an
  actor's start is raised here: an InputError as it is, anything else as a StageError.
- Only an actor that has started is given work. While no actor has a place, the pool says so, and in the end gives up.

Every call reports by a callback, so that an event costs the same however many actors there are.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Generic

from actors.crew import AGAIN, Crew, Host, Job, KilledError, Piece, Worker, run_task
from actors.ray_internals import any_placed
from actors.waiting import PATIENCE, Patience, Wait
from storage.errors import FinalError, InputError, StageError, one_line
from storage.lease import fences

log = logging.getLogger(__name__)

MOST_DEATHS = 3  # a piece has failed when so many actors have died with only this piece to do
MOST_FAILED_STARTS = 5  # in a row
TICK_S = 2.0  # seconds between two rounds of asking actors how far they are
ASKED = 4  # actors asked in a round, in turn; with many actors, finished pieces alone show the progress well enough


class Pool(Generic[Piece]):
    """Up to `crew.size` actors, started when there is work for them. The end of the `with` block ends them."""

    def __init__(self, crew: Crew[Piece], patience: Patience = PATIENCE) -> None:
        import ray

        self.crew, self._say = crew, patience.say
        # DEFAULT: outside the placement group of the process that has the pool, such as a train worker
        options: dict[str, Any] = {"num_cpus": crew.cpus, "num_gpus": crew.gpus, "scheduling_strategy": "DEFAULT"}
        self._remote: Any
        if crew.method is None:
            self._remote = ray.remote(**options, max_retries=0)(run_task)
        else:
            options |= {"max_restarts": 0, "max_concurrency": crew.at_once + (crew.part is not None)}
            # processes are named after the class
            self._remote = ray.remote(**options)(type(crew.make.__name__, (Host,), {}))
        self.under_way = 0  # sum of the parts that actors have reported of unfinished pieces
        self._workers: dict[Worker[Piece], None] = {}
        self._starting: dict[Worker[Piece], None] = {}
        self._busy: dict[Worker[Piece], None] = {}
        self._ranks: list[dict[Worker[Piece], None]] = [{} for _ in range(crew.in_flight + 1)]
        self._waiting: deque[Job[Piece]] = deque()
        self._line: deque[Job[Piece]] = deque()  # jobs in the order in which `run` yields them
        self._open, self._in_order = 0, False
        self._events: SimpleQueue[tuple[Worker[Piece], str, Job[Piece] | None, Future[Any]]] = SimpleQueue()
        self._failed_starts = 0
        self._place = Wait(patience, crew.stage, crew.what, {"CPU": crew.cpus, "GPU": crew.gpus})
        self._room = Wait(patience, crew.stage, "room in this node's object store")
        self._asked = self._looked = time.monotonic()
        self._told_of_late = False

    def __enter__(self) -> Pool[Piece]:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for worker in self._workers:
            worker.gone = True
            if ray.is_initialized():
                worker.end()

    def start(self) -> None:
        """Start all actors and wait until they are ready, so that a measurement can leave this out. Raises as `run`."""
        self._place.over()
        while len(self._workers) < self.crew.size:
            self._hire_one()
        while self._starting:
            self._act(TICK_S)
            self._look_at_places()

    def run(
        self, pieces: Iterable[Piece], ahead: int | None = None, news: Callable[[], None] | None = None
    ) -> Iterator[tuple[Piece, Any]]:
        """Yield every piece with its answer, as the pieces get done. Use it to its end before the next run of the pool.

        With `ahead`, pieces are yielded in their order, and at most `ahead` of them are taken but not yet yielded.
        `news` is called now and then, after an event that may have changed `under_way`.
        Raises InputError if an actor finds bad input, in its start or in a call; FinalError if no node has had room for
        an actor for too long; StageError if actors cannot start; and what `crew.failed` raises for a piece.
        """
        coming = iter(pieces)
        self._in_order = ahead is not None
        self._place.over()
        while True:
            while self._act():
                pass
            self._look_at_places()
            for piece in islice(coming, None if ahead is None else ahead - self._open):
                self._pull(Job(piece))
            if not self._open:
                return
            self._hire()
            self._hand_out()
            if news is not None:
                self._ask_how_far()
            if not (self._line and self._line[0].made):
                if self._act(TICK_S) and news is not None:
                    news()
                continue
            job = self._line.popleft()
            # popped from a list, so that the pool holds no reference to an answer while its receiver works
            if answers := self._brought_here(job):
                self._open -= 1
                yield job.piece, answers.pop()
                self._place.over()  # the receiver's time does not count as waiting

    def _pull(self, job: Job[Piece]) -> None:
        self._open += 1
        self._waiting.append(job)
        if self._in_order:
            self._line.append(job)

    # ---- actors

    def _hire(self) -> None:
        """Start as many actors as there is work for."""
        idle = len(self._workers) - len(self._busy)
        for _ in range(min(self.crew.size - len(self._workers), len(self._waiting) - idle)):
            self._hire_one()

    def _hire_one(self) -> None:
        crew, name = self.crew, self.crew.make.__name__
        # Two return values: the second is small, comes to this process by itself, and says whether the first is there.
        if crew.method is None:
            task = self._remote.options(num_returns=2, name=name).remote
            worker = Worker[Piece](None, partial(task, fences(), crew.make, crew.arguments), time.monotonic())
            self._workers[worker] = None
            self._rank(worker)
            return
        actor = self._remote.remote()
        work = actor.work.options(num_returns=2, name=f"{name}.{crew.method}").remote
        worker = Worker[Piece](actor, work, time.monotonic())
        self._workers[worker] = self._starting[worker] = None
        start = actor.start.remote(fences(), crew.make, crew.arguments, crew.method, crew.part)
        self._watch(worker, "start", start)

    def _watch(self, worker: Worker[Piece], call: str, reference: Any, job: Job[Piece] | None = None) -> Future[Any]:
        """Queue an event when the call has answered. The referenced value is brought here, so it must be small."""
        events, future = self._events, reference.future()
        future.add_done_callback(lambda over: events.put((worker, call, job, over)))
        return future  # type: ignore[no-any-return]

    def _hand_out(self) -> None:
        """Give waiting jobs to the worker with the fewest jobs. No worker gets more than its share of the jobs left."""
        while self._waiting:
            worker = next((next(iter(rank)) for rank in self._ranks if rank), None)
            abreast = self.crew.abreast
            share = abreast * (1 + (len(self._waiting) - 1) // (abreast * self.crew.size))
            if worker is None or worker.rank >= min(self.crew.in_flight, share):
                return
            if worker.rank and self._waiting[0].suspect:
                return  # a suspect job waits for a worker that has no other
            job = self._waiting.popleft()
            worker.jobs[job] = self._busy[worker] = None
            self._rank(worker)
            job.answer, over = worker.work(job.piece)
            job.over = self._watch(worker, "work", over, job)

    def _rank(self, worker: Worker[Piece]) -> None:
        """List the worker under the number of its jobs. One that is gone, or has a suspect job, must get no other."""
        self._ranks[worker.rank].pop(worker, None)
        worker.rank = len(worker.jobs)
        if not worker.gone and not any(job.suspect for job in worker.jobs):
            self._ranks[worker.rank][worker] = None

    def _ask_how_far(self) -> None:
        now = time.monotonic()
        if now - self._asked < TICK_S:
            return
        self._asked = now
        for worker in list(islice(self._busy, ASKED)):
            self._busy[worker] = self._busy.pop(worker)  # to the end of the queue: the others are asked first
            if not worker.asked:
                worker.asked = True
                self._watch(worker, "part", worker.actor.part.remote())

    # ---- events

    def _act(self, timeout: float = 0.0) -> bool:
        """Wait up to `timeout` seconds for an event and act on it. Returns whether there was one."""
        try:
            worker, call, job, over = self._events.get(timeout > 0, timeout)
        except Empty:
            return False
        if not worker.gone:
            self._settle(worker, call, job, over)
        return True

    def _settle(self, worker: Worker[Piece], call: str, job: Job[Piece] | None, over: Future[Any]) -> None:
        from ray.exceptions import RayTaskError

        self._place.over()
        error = over.exception()
        if isinstance(error, RayTaskError):
            self._fail(worker, call, job, error)
        elif error is not None:
            self._lose(worker, error)
        elif call == "start":
            worker.node, self._failed_starts = over.result(), 0
            del self._starting[worker]
            self._rank(worker)
        elif call == "part":
            worker.asked, parts = False, over.result()
            for own in worker.jobs:
                self._set_part(own, parts.get(own.piece, 0))
        else:
            assert job is not None
            self._detach(worker, job)
            self._deliver(job)

    def _detach(self, worker: Worker[Piece], job: Job[Piece]) -> None:
        del worker.jobs[job]
        if not worker.jobs:
            del self._busy[worker]
        self._rank(worker)
        self._set_part(job, 0)

    def _deliver(self, job: Job[Piece]) -> None:
        job.made = True
        if not self._in_order:
            self._line.append(job)

    def _give_up(self, job: Job[Piece], error: StageError) -> None:
        import ray

        answer = self.crew.failed(job.piece, error)
        if answer is AGAIN:
            job.deaths = 0
            self._waiting.appendleft(job)
        else:
            job.answer = ray.put(answer)
            self._deliver(job)

    def _set_part(self, job: Job[Piece], part: int) -> None:
        self.under_way += part - job.part
        job.part = part

    def _fail(self, worker: Worker[Piece], call: str, job: Job[Piece] | None, error: Any) -> None:
        """A call has raised. The actor lives, and another try would fail in the same way, so the piece has failed."""
        cause = error.cause
        if isinstance(cause, InputError):
            raise cause from None
        if job is None:
            if isinstance(cause, StageError) and not isinstance(cause, FinalError):  # such as a store that is away
                raise StageError(f"{self.crew.stage}: {self.crew.what} cannot start: {cause}") from error
            raise self._cannot_start(one_line(cause)) from error
        name = self.crew.named(job.piece)
        log.debug("%s", name, exc_info=error)  # the trace names files with their folders
        self._detach(worker, job)
        self._give_up(job, StageError(f"{name}: {one_line(cause, trusted=False)}"))

    def _lose(self, worker: Worker[Piece], error: BaseException) -> None:
        """The actor is dead. Its unfinished jobs are given out again, before all others."""
        from ray.exceptions import ActorDiedError, OutOfMemoryError, WorkerCrashedError

        if isinstance(error, ActorDiedError) and error.actor_init_failed:
            raise self._cannot_start(one_line(error, last=True)) from error
        with_its_node = worker.went_with_its_node(error)
        for job in [job for job in worker.jobs if job.is_whole]:
            self._detach(worker, job)
            self._deliver(job)
        worker.end()
        left, failed_start = list(worker.jobs), worker in self._starting and not with_its_node
        worker.gone, worker.jobs = True, {}
        self._rank(worker)
        for listed in (self._workers, self._starting, self._busy):
            listed.pop(worker, None)
        if failed_start:
            self._count_failed_start()
        for job in left:
            self._set_part(job, 0)
        self._waiting.extendleft(reversed(left))
        if left and not with_its_node and isinstance(error, (ActorDiedError, OutOfMemoryError, WorkerCrashedError)):
            # One more than it works on at a time: an answer on its way here may have died with the actor.
            self._blame(left[: self.crew.at_once + 1], error)

    def _cannot_start(self, why: str) -> FinalError:
        return FinalError(f"{self.crew.stage}: {self.crew.what} cannot start: {why}")

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise StageError(
                f"{self.crew.stage}: {self._failed_starts} actors in a row died while they started, perhaps for want "
                f"of memory; {self.crew.remedy}"
            )

    def _blame(self, at: list[Job[Piece]], error: BaseException) -> None:
        """Note that an actor died that may have worked on the jobs `at`.

        If it had one job, the death counts against that job. If there were several, each of them must run alone next.
        """
        from ray.exceptions import OutOfMemoryError

        if len(at) > 1:
            for job in at:
                job.suspect = True
            return
        (job,) = at
        job.deaths += 1
        if job.deaths < MOST_DEATHS:
            return
        crew, times = self.crew, f"{MOST_DEATHS} times with nothing else to do"
        lack = f"ran out of memory {times}" if isinstance(error, OutOfMemoryError) else f"died {times}"
        why = f"{crew.named(job.piece)}: its process {lack}, perhaps for want of memory; {crew.remedy}"
        self._waiting.remove(job)
        self._give_up(job, KilledError(why))

    # ---- waiting

    def _look_at_places(self) -> None:
        """Raises FinalError if no actor has had a place for too long. If only some have none, says so once."""
        if self.crew.method is None:
            self._place.check(lambda: any_placed({job.answer: None for worker in self._busy for job in worker.jobs}))
            return
        if len(self._starting) == len(self._workers):
            self._place.check(lambda: any_placed({worker: worker.actor for worker in self._starting}))
            return
        self._place.over()
        now = time.monotonic()
        if self._told_of_late or now - self._looked < self._place.look_s:
            return
        self._looked = now
        late = [worker for worker in self._starting if now - worker.hired >= self._place.look_s]
        if not all(any_placed({worker: worker.actor}) for worker in late):
            self._told_of_late = True
            self._say(f"{self.crew.stage}: {self.crew.what} has found no room; the others make its share")

    def _brought_here(self, job: Job[Piece]) -> list[Any]:
        """[the job's answer], or [] if the answer was lost with its node; the job is then queued again.

        Raises FinalError if this node's object store has had no room for the answer for too long.
        """
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

        if self._in_order and self._line and self._line[0].made:  # fetch the next answer meanwhile
            ray.wait([self._line[0].answer], timeout=0, fetch_local=True)
        self._room.over()
        while True:
            try:
                return [ray.get(job.answer, timeout=self._room.look_s)]
            except GetTimeoutError:
                self._room.check(lambda: False)
            except (ObjectLostError, RayActorError):
                job.made = False
                self._waiting.appendleft(job)
                if self._in_order:
                    self._line.appendleft(job)
                return []
