"""The one pool of actors: order, errors of a start and of a call, and whose fault a death is. Real actors that die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.crew import AGAIN, Crew, KilledError, Worker
from actors.pool import MOST_DEATHS, MOST_FAILED_STARTS, Pool
from storage.errors import InputError, StageError
from storage.lease import Fence, fences, work_for
from tests.actors.tiny_runs import own_processes

pytestmark = pytest.mark.usefixtures("ray_local")

GUILTY = 4


class Squares:
    """Notes every call in a folder, and ends its process at the guilty piece as often as it is told to."""

    def __init__(self, notes: str = "", deaths: int = 0, seconds: float = 0.0) -> None:
        self.notes, self.deaths, self.seconds = notes, deaths, seconds

    def square(self, number: int) -> int:
        if number < 0:
            raise RuntimeError("/secret/place is full")
        if number == GUILTY and self.deaths:
            time.sleep(self.seconds)
            died = len(list(Path(self.notes).iterdir()))
            if died < self.deaths:
                (Path(self.notes) / str(died)).touch()
                os._exit(1)
        time.sleep(self.seconds)
        return number**2


class Unfit:
    """Cannot start, in one way or the other."""

    def __init__(self, error: Exception | None) -> None:
        if error is None:
            os._exit(1)
        raise error


class Slow:
    """Says that it has done five of whatever it is at."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def work(self, number: int) -> None:
        self.at[number] = 5
        time.sleep(8)
        del self.at[number]

    def how_far(self) -> dict[int, int]:
        return self.at


class Owned:
    """Says for whom its process works."""

    def held(self, _: int) -> tuple[Fence, ...]:
        return fences()


def held(_: int) -> tuple[Fence, ...]:
    return fences()


class Together:
    """A call ends when as many others are under way."""

    def __init__(self, calls: int) -> None:
        self.all_there = threading.Barrier(calls, timeout=60)

    def meet(self, number: int) -> int:
        self.all_there.wait()
        return number


def square(notes: str, deaths: int, number: int) -> int:
    return Squares(notes, deaths).square(number)


def crew(*arguments: Any, make: Any = Squares, **changes: Any) -> Crew[int]:
    values: dict[str, Any] = {"stage": "count", "what": "a counter", "method": "square", "size": 2, "cpus": 0.5}
    values |= {"named": lambda number: f"number {number}", "remedy": "count less"}
    return Crew(make=make, arguments=arguments, **values | changes)


@pytest.mark.parametrize(
    ("make", "method"),
    [pytest.param(Owned, "held", id="actors", marks=pytest.mark.slow), pytest.param(held, None, id="tasks")],
)
def test_actors_and_tasks_work_for_the_owner_of_the_leases_of_the_process_that_hires_them(
    make: Any, method: str | None
) -> None:
    for mine in ([Fence("memory://place", "memory://place/.lock", "a token")], []):
        work_for(mine)
        with Pool(crew(make=make, method=method)) as pool:
            assert [answer for _, answer in pool.run([1])] == [tuple(mine)]


def test_answers_come_in_order_and_only_so_many_pieces_are_taken_ahead() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(30):
            taken.append(number)
            yield number

    found = []
    with Pool(crew(in_flight=3)) as pool:
        for number, square in pool.run(pieces(), ahead=5):
            assert len(taken) - len(found) <= 5
            found.append((number, square))
        assert found == [(number, number**2) for number in range(30)]
        assert dict(pool.run(range(7))) == {number: number**2 for number in range(7)}  # as they get done


def test_an_actor_that_does_several_at_the_same_time_gets_so_many_to_the_end() -> None:
    several = {"at_once": 4, "in_flight": 6, "abreast": 4}
    with Pool(crew(4, make=Together, method="meet", size=1, **several)) as pool:
        assert sorted(piece for piece, _ in pool.run(range(12))) == list(range(12))


@pytest.mark.slow
def test_a_death_while_others_go_on_changes_neither_answers_nor_order(tmp_path: Path) -> None:
    with Pool(crew(str(tmp_path), 1, in_flight=3)) as pool:
        assert list(pool.run(range(12), ahead=6)) == [(number, number**2) for number in range(12)]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (InputError("bank.zarr", "is damaged", "copy it again"), InputError, "bank.zarr: is damaged; copy it again"),
        (RuntimeError("no card"), StageError, "count: a counter cannot start: no card"),
    ],
)
def test_what_a_start_raises_comes_back_and_is_no_death(error: Exception, kind: type[Exception], line: str) -> None:
    with Pool(crew(error, make=Unfit, size=1)) as pool, pytest.raises(kind) as raised:
        list(pool.run(range(3)))
    assert str(raised.value) == line


def test_what_a_call_raises_names_the_piece_and_no_folder() -> None:
    with Pool(crew(size=1)) as pool, pytest.raises(StageError) as raised:
        list(pool.run([1, 2, -1]))
    assert str(raised.value) == "number -1: RuntimeError; the same command goes on where it stopped"


def test_tasks_are_told_of_as_actors_are() -> None:
    with Pool(crew("", 0, make=square, method=None)) as pool:
        assert dict(pool.run(range(9))) == {number: number**2 for number in range(9)}
        with pytest.raises(StageError, match="number -1: RuntimeError"):
            list(pool.run([1, -1]))


def test_a_node_that_is_not_there_any_more_is_lost() -> None:
    import ray

    ended, told = RuntimeError("ended"), RuntimeError("its node has died")
    here = ray.get_runtime_context().get_node_id()
    on_it, starting, gone = (Worker[int](None, list, 0.0, node) for node in (here, None, "0" * 56))
    assert not on_it.went_with_its_node(ended) and not starting.went_with_its_node(ended)
    assert gone.went_with_its_node(ended) and on_it.went_with_its_node(told)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["actors", "tasks"])
def test_three_deaths_alone_give_a_piece_up_by_name(tmp_path: Path, kind: str) -> None:
    line = "number 4: its process died 3 times with nothing else to do, perhaps for .*; count less; the same"
    notes = str(tmp_path)
    # The actor ends at once, and may take the answer before along: that piece must not be blamed.
    dying = crew(notes, 99, in_flight=3) if kind == "actors" else crew(notes, 99, make=square, method=None)
    with Pool(dying) as pool, pytest.raises(KilledError, match=line):
        list(pool.run(range(9)))
    # A death beside others counts for nobody. There is a second one if two answers were on their way.
    beside_others = 2 if kind == "actors" else 0
    assert MOST_DEATHS <= len(list(tmp_path.iterdir())) <= MOST_DEATHS + beside_others


@pytest.mark.slow
def test_pieces_beside_a_guilty_one_survive(tmp_path: Path) -> None:
    given_up: list[tuple[int, str]] = []

    def failed(number: int, error: StageError) -> int:
        given_up.append((number, str(error)))
        return -1

    # three calls at a time: the first death is nobody's, since others were under way
    crowd = crew(str(tmp_path), 99, 0.5, size=1, at_once=3, in_flight=3, failed=failed)
    with Pool(crowd) as pool:
        found = dict(pool.run(range(9)))
    assert found == {number: -1 if number == GUILTY else number**2 for number in range(9)}
    assert [number for number, _ in given_up] == [GUILTY]
    assert len(list(tmp_path.iterdir())) == MOST_DEATHS + 1


@pytest.mark.slow
def test_a_piece_may_be_tried_again_after_all(tmp_path: Path) -> None:
    errors: list[StageError] = []

    def failed(_: int, error: StageError) -> Any:
        errors.append(error)
        return AGAIN

    with Pool(crew(str(tmp_path), 2 * MOST_DEATHS, failed=failed)) as pool:
        assert list(pool.run(range(6), ahead=4)) == [(number, number**2) for number in range(6)]
    assert len(errors) == 2 and all(isinstance(error, KilledError) for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [None, 6])
def test_actors_killed_at_random_change_nothing(ahead: int | None) -> None:
    killed, found = 0, []
    with Pool(crew("", 0, 0.1, at_once=2, in_flight=3)) as pool:
        for number, square in pool.run(range(40), ahead=ahead):
            found.append((number, square))
            if number % 12 == 5:
                for pid in own_processes("ray::Squares")[: 1 + number % 2]:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
    assert killed >= 3
    assert sorted(found) == [(number, number**2) for number in range(40)]
    assert ahead is None or found == sorted(found)


@pytest.mark.slow
def test_actors_that_die_while_they_start_end_the_stage() -> None:
    line = f"count: {MOST_FAILED_STARTS} actors in a row died while they started, perhaps for .*; count less"
    with Pool(crew(None, make=Unfit, size=1)) as pool, pytest.raises(StageError, match=f"^{line}$"):
        list(pool.run(range(3)))


@pytest.mark.slow
def test_how_far_calls_are_is_told_while_they_last() -> None:
    seen: list[int] = []
    with Pool(crew(make=Slow, method="work", part="how_far", size=1, at_once=2, in_flight=2)) as pool:
        list(pool.run(range(4), news=lambda: seen.append(pool.under_way)))
        assert pool.under_way == 0
    assert max(seen) == 10  # two calls, five of each
