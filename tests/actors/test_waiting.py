"""What Ray has no room for says so and is given up; slow work is not."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from actors.ray_internals import any_placed
from actors.waiting import Patience, Wait
from storage.errors import FinalError

MINUTES = 0.05


class Slow:
    def __init__(self) -> None:
        time.sleep(10)

    def call(self) -> int:
        return 1


def slow() -> int:
    time.sleep(10)
    return 1


def call_of(kind: str, cpus: float) -> dict[Any, Any]:
    """A slow call that books so many CPUs: its reference and its actor."""
    import ray

    if kind == "task":
        return {ray.remote(num_cpus=cpus)(slow).remote(): None}
    actor = ray.remote(num_cpus=cpus)(Slow).remote()
    return {actor.call.remote(): actor}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task", "actor"])
def test_work_without_a_place_says_so_and_is_given_up_by_name(no_room: None, kind: str) -> None:
    lines: list[str] = []
    wait = Wait(Patience(MINUTES, lines.append), "extract", "an extraction actor", {"CPU": 2, "GPU": 0})
    needs = "2 CPUs for an extraction actor; the cluster has 4 CPUs, 0 free"
    calls = call_of(kind, 2)
    with pytest.raises(FinalError, match=rf"^extract: waited \d seconds for {needs}; .*resources\.wait_minutes$"):
        wait.first(calls)
    assert lines and all(line.startswith("extract: waiting ") and line.endswith(needs) for line in lines)
    import ray

    for reference, actor in calls.items():
        ray.cancel(reference) if actor is None else ray.kill(actor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task", "actor"])
def test_slow_work_is_never_given_up(ray_local: None, kind: str) -> None:
    import ray

    lines: list[str] = []
    calls = call_of(kind, 0)
    until = time.monotonic() + 120
    while not any_placed(calls):  # a process takes its time to start
        assert time.monotonic() < until
        time.sleep(0.2)
    wait = Wait(Patience(MINUTES, lines.append), "extract", "an extraction actor")
    assert ray.get(wait.first(calls)) == 1


def test_minutes_are_counted_from_what_last_got_done_and_told_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr("actors.waiting.time", SimpleNamespace(monotonic=lambda: next(clock)))
    wait = Wait(Patience(30, lines.append), "train", "a place")
    for _ in range(200):
        wait.check(lambda: False)
    assert len(lines) == 16 and lines[2] == "train: waiting 3 minutes for a place"
    wait.over()
    for _ in range(1000):
        wait.check(lambda: True)
    with pytest.raises(FinalError, match="waited 30 minutes for a place"):
        for _ in range(1000):
            wait.check(lambda: False)
    assert len(lines) == 16 + 29
