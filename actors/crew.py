"""The actors of a stage: their description for the pool that starts them, and the code in their processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from storage.errors import InputError, StageError
from storage.lease import Fence, under

Piece = TypeVar("Piece")

NODE_DIED = "its node has died"  # part of Ray's message for this
AGAIN = object()  # what `Crew.failed` returns so that the piece is tried again, as if it had never failed


class KilledError(StageError):
    """A piece of work has failed: several actors died one after the other, each with only this piece to do."""


def _with_advice(_: Any, error: StageError) -> Any:
    raise type(error)(f"{error}; the same command goes on where it stopped") from None


@dataclass(frozen=True)
class Crew(Generic[Piece]):
    """What a stage's actors are, and what its messages call them.

    Each of `size` actors is `make(*arguments)` in a process of its own. Each call of its `method` gets one piece.
    If `method` is None, tasks run instead of actors, at most `size` at a time: each calls `make(*arguments, piece)`, in
    a process that the next task uses again.
    In messages, `what` is one of the actors, `named` names a piece, and `remedy` says what to do if actors die.
    An actor works on `at_once` calls at the same time, in threads, and holds up to `in_flight` calls. It needs
    `abreast` calls to be busy; towards the end it gets no more than its share.
    `part` names the actor's method that says how far its calls are, as {piece: amount}.
    `failed` is given a piece that has failed, and the error. What it returns becomes the piece's answer; if it returns
    `AGAIN`, the piece is tried again. By default it raises.
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
    """A piece of work and its state.

    deaths: how many actors died while this was their only piece. suspect: an actor died that may have worked on this
    piece, and had others. answer: reference to the call's answer, which may be large and stays where it was made.
    over: future of the call's second value, which is empty and arrives together with the answer. made: the answer is
    there. part: how much of the piece its actor has reported as done.
    """

    piece: Piece
    deaths: int = 0
    suspect: bool = False
    answer: Any = None
    over: Future[Any] | None = None
    made: bool = False
    part: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether the call has answered. The actor may have died since."""
        return self.over is not None and self.over.done() and self.over.exception() is None


@dataclass(eq=False)
class Worker(Generic[Piece]):
    """An actor, or a place for one task, with its jobs in the order in which it was given them.

    actor: None for a task. work: calls the actor or task. hired: when it was asked for, by `time.monotonic`. node: id
    of its node, None until it has started. rank: the number of jobs under which the pool lists it. asked: it has not
    yet answered how far it is. gone: it is dead or was ended.
    """

    actor: Any
    work: Callable[[Piece], list[Any]]
    hired: float
    node: str | None = None
    jobs: dict[Job[Piece], None] = field(default_factory=dict)
    rank: int = 0
    asked: bool = False
    gone: bool = False

    def end(self) -> None:
        """Kill the actor, or cancel the task."""
        import ray

        if self.actor is not None:
            ray.kill(self.actor)
            return
        for job in self.jobs:
            ray.cancel(job.answer)

    def went_with_its_node(self, error: BaseException) -> bool:
        """Whether the actor died with this error because its whole node is gone."""
        import ray

        if NODE_DIED in str(error):
            return True
        return self.node is not None and self.node not in {str(n["NodeID"]) for n in ray.nodes() if n["Alive"]}


class Host:
    """The Ray actor that holds the stage's object, in a process of its own.

    `start` makes the object, not `__init__`: Ray does not report what an actor's constructor raised.
    """

    def start(
        self,
        held: tuple[Fence, ...],
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        method: str,
        part: str | None,
    ) -> str:
        """Make the object. This process then works for the owner of the leases `held`. Returns the id of its node."""
        import ray

        self._hosted, self._method, self._part = under(held, make, *arguments), method, part
        return str(ray.get_runtime_context().get_node_id())

    def work(self, piece: Any) -> tuple[Any, None]:
        """(the piece's answer, None). The second value only says that the answer is there."""
        return getattr(self._hosted, self._method)(piece), None

    def part(self) -> dict[Any, int]:
        """How far each call under way is, as {piece: amount}."""
        assert self._part is not None
        return dict(getattr(self._hosted, self._part)())


def run_task(
    held: tuple[Fence, ...], make: Callable[..., Any], arguments: tuple[Any, ...], piece: Any
) -> tuple[Any, None]:
    """(the piece's answer, None), from a task that works for the owner of the leases `held`; see `Host.work`."""
    return under(held, make, *arguments, piece), None


def that_fit(wanted: int | None, cpus: float, gpus: float, what: str) -> int:
    """How many actors of `cpus` and `gpus` each the whole cluster can hold, at most `wanted` if that is given.

    Raises InputError if it cannot hold one.
    """
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
