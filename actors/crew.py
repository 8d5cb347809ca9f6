"""What the actors of a stage are and what they have to do, for the pool that hires them; and what runs in their
processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from storage.errors import InputError, StageError
from storage.lease import Fence, under

Piece = TypeVar("Piece")

NODE_DIED = "its node has died"  # in Ray's words
AGAIN = object()  # a failed piece's answer: it is to be given out as if it had never been


class KilledError(StageError):
    """A piece of work that ended one actor after the other, with nothing else to do."""


def _with_advice(_: Any, error: StageError) -> Any:
    raise type(error)(f"{error}; the same command goes on where it stopped") from None


@dataclass(frozen=True)
class Crew(Generic[Piece]):
    """What a stage's actors are, and what it tells of them.

    Each of `size` actors is `make(*arguments)` in a process of its own; its `method` is given one piece a call.
    Without a method they are no actors but tasks, at most `size` at a time: each is `make(*arguments, piece)`, in a
    process that the next task finds warm.
    `what` is one of the actors in a line for people, `named` a piece, `remedy` what to do if they die.
    An actor works on `at_once` calls at the same time, in threads, and has up to `in_flight` of them given to it. It
    needs `abreast` of them to be busy, and gets no more than its share towards the end.
    `part`: a method that says how far the calls under way are, as {piece: amount}.
    `failed` is given a piece that has failed, and why; its answer stands for the piece's, unless that is `AGAIN`. By
    default it raises.
    """

    stage: str
    what: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    method: str | None
    size: int
    cpus: float
    gpus: float = 0.0
    at_once: int = 1
    in_flight: int = 1
    abreast: int = 1
    part: str | None = None
    named: Callable[[Piece], str] = str
    remedy: str = "use a machine with more memory"
    failed: Callable[[Piece, StageError], Any] = _with_advice


@dataclass(eq=False)
class Job(Generic[Piece]):
    """A piece and what is known of it. `suspect`: an actor died that was at this piece and at others. `answer` refers
    to the call's, which may be large and stays where it was made; `over` is set with it and holds nothing."""

    piece: Piece
    deaths: int = 0
    suspect: bool = False
    answer: Any = None
    over: Future[Any] | None = None
    made: bool = False
    part: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether its call has answered, whatever became of the actor afterwards."""
        return self.over is not None and self.over.done() and self.over.exception() is None


@dataclass(eq=False)
class Worker(Generic[Piece]):
    """An actor, or room for a task, and its jobs in the order in which it was given them. `work` calls it; `node` is
    None until it has started, `rank` the number of jobs by which the pool finds it."""

    actor: Any
    work: Callable[[Piece], list[Any]]
    hired: float
    node: str | None = None
    jobs: dict[Job[Piece], None] = field(default_factory=dict)
    rank: int = 0
    asked: bool = False
    gone: bool = False

    def end(self) -> None:
        """End the actor, or the tasks that are under way."""
        import ray

        if self.actor is not None:
            ray.kill(self.actor)
            return
        for job in self.jobs:
            ray.cancel(job.answer)

    def went_with_its_node(self, error: BaseException) -> bool:
        """Whether the actor died of this error because its whole node is gone."""
        import ray

        if NODE_DIED in str(error):
            return True
        return self.node is not None and self.node not in {str(n["NodeID"]) for n in ray.nodes() if n["Alive"]}


class Host:
    """An actor: the stage's object, in a process of its own. It is made by a call and not with the actor, since Ray
    tells nobody what an actor's own start raised."""

    def start(
        self,
        held: tuple[Fence, ...],
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        method: str,
        part: str | None,
    ) -> str:
        """Make the object, for the owner of these leases; returns the id of this actor's node."""
        import ray

        self._hosted, self._method, self._part = under(held, make, *arguments), method, part
        return str(ray.get_runtime_context().get_node_id())

    def work(self, piece: Any) -> tuple[Any, None]:
        """The piece's answer, and a word that it is there."""
        return getattr(self._hosted, self._method)(piece), None

    def part(self) -> dict[Any, int]:
        """How far the calls under way are."""
        assert self._part is not None
        return dict(getattr(self._hosted, self._part)())


def run_task(
    held: tuple[Fence, ...], make: Callable[..., Any], arguments: tuple[Any, ...], piece: Any
) -> tuple[Any, None]:
    """The piece's answer, and a word that it is there."""
    return under(held, make, *arguments, piece), None


def that_fit(wanted: int | None, cpus: float, gpus: float, what: str) -> int:
    """How many of the wanted actors the whole cluster can hold, None for all that it can. Raises InputError if it can
    hold none."""
    import ray

    resources = ray.cluster_resources()
    fit = wanted or sys.maxsize
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        there = float(resources.get(name, 0.0))
        if there < need:
            raise InputError("resources", f"{what} needs {need:g} {name}s, the cluster has {there:g}", "add nodes")
        if need:
            fit = min(fit, int(there / need + 1e-6))
    return max(1, fit)
