"""What a stage does while the cluster has no room for its work: it says so once a minute, and in the end gives up.

A stage waits while Ray has found no node for any of its calls. Calls that have a node may take as long as they like.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.ray_internals import any_placed
from storage.errors import FinalError

log = logging.getLogger(__name__)

MINUTES = 30.0  # until a stage gives up
LOOK_S = 60.0  # seconds between two looks at whether there is a place


@dataclass(frozen=True)
class Patience:
    """How many minutes to wait for room, and the function that is given a line while a stage waits."""

    minutes: float = MINUTES
    say: Callable[[str], None] = log.warning

    @property
    def look_s(self) -> float:
        """Seconds between two looks at whether there is a place: at most a third of the patience."""
        return min(LOOK_S, self.minutes * 20)


PATIENCE = Patience()


class Wait:
    """A stage's wait for `what`, such as "its train workers". Each of these books `need`, such as {"CPU": 2}."""

    def __init__(self, patience: Patience, stage: str, what: str, need: Mapping[str, float] | None = None) -> None:
        self._patience, self._stage, self._what = patience, stage, what
        self._need = {name: amount for name, amount in (need or {}).items() if amount}
        self.look_s = patience.look_s
        self.over()

    def over(self) -> None:
        """Start counting again from now, because something has happened."""
        self._since = self._looked = time.monotonic()

    def first(self, calls: Mapping[Any, Any]) -> Any:
        """The first of these references to be ready. `calls` maps each reference to its actor, None for a task.

        Raises FinalError as `check` does.
        """
        import ray

        self.over()
        while True:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=self.look_s)
            if ready:
                return ready[0]
            self.check(lambda: any_placed(calls))

    def check(self, placed: Callable[[], bool]) -> None:
        """Call this repeatedly while nothing gets done. Once a minute it asks `placed` whether anything has a node.

        Raises FinalError if nothing has had a node for `Patience.minutes`.
        """
        now = time.monotonic()
        if now - self._looked < self.look_s:
            return
        self._looked = now
        if placed():
            self._since = now
            return
        waited = now - self._since
        if waited < self._patience.minutes * 60:
            self._patience.say(f"{self._stage}: waiting {_duration(waited)} for {self._wanted()}")
            return
        raise FinalError(
            f"{self._stage}: waited {_duration(waited)} for {self._wanted()}; end what else uses it, add nodes, or "
            "raise resources.wait_minutes"
        )

    def _wanted(self) -> str:
        import ray

        if not self._need:
            return self._what
        there, free = ray.cluster_resources(), ray.available_resources()
        booked = " and ".join(f"{amount:g} {_plural(name, amount)}" for name, amount in self._need.items())
        has = " and ".join(
            f"{there.get(name, 0):g} {_plural(name, there.get(name, 0))}, {free.get(name, 0):g} free"
            for name in self._need
        )
        return f"{booked} for {self._what}; the cluster has {has}"


def _plural(name: str, amount: float) -> str:
    return name if amount == 1 else f"{name}s"


def _duration(seconds: float) -> str:
    amount, unit = (seconds, "second") if seconds < 59.5 else (seconds / 60, "minute")
    return f"{amount:.0f} {_plural(unit, round(amount))}"
