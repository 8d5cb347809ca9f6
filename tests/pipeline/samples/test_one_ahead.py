"""Batches one ahead: their order, what they raise, and when they are fetched and closed."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
import torch

from pipeline.samples import one_ahead
from pipeline.samples.one_ahead import Batch, OneAhead


class Made:
    """Batches with their number as image; which were asked for, in which thread, and whether the source was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.asked, self.closed = threading.Semaphore(0), False
        self.threads: set[str] = set()

    def batches(self) -> Generator[Batch]:
        try:
            for number in range(self.count):
                self.threads.add(threading.current_thread().name)
                self.asked.release()
                if number == self.fails_at:
                    raise ValueError(f"batch {number} cannot be made")
                yield {"image": torch.full((2, 1, 4, 4), float(number)), "slice_id": torch.tensor([number, number])}
        finally:
            self.closed = True


def test_batches_come_in_order_from_a_thread_of_their_own() -> None:
    made = Made(5)
    with OneAhead(made.batches(), "cpu") as stream:
        found = [int(batch["image"][0, 0, 0, 0]) for batch in stream]
    assert found == list(range(5)) and made.closed
    assert all(name.startswith("batches") for name in made.threads)


def test_the_first_is_fetched_before_it_is_asked_for_and_then_one_ahead() -> None:
    made = Made(5)
    with OneAhead(made.batches(), "cpu") as stream:
        assert made.asked.acquire(timeout=30)
        next(stream)
        assert made.asked.acquire(timeout=30)
        assert not made.asked.acquire(timeout=0.2)  # not two ahead
    assert made.closed


def test_what_the_source_raises_is_raised_where_its_batch_would_be() -> None:
    made = Made(5, fails_at=2)
    with OneAhead(made.batches(), "cpu") as stream:
        assert [int(next(stream)["slice_id"][0]) for _ in range(2)] == [0, 1]
        with pytest.raises(ValueError, match="batch 2 cannot be made"):
            next(stream)


def test_a_trainer_that_fails_closes_the_source() -> None:
    made = Made(5)
    with pytest.raises(RuntimeError, match="not finite"), OneAhead(made.batches(), "cpu") as stream:
        next(stream)
        raise RuntimeError("the loss is not finite")
    assert made.closed


def test_a_trainer_s_error_does_not_wait_for_a_source_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_ahead, "STUCK_S", 0.1)
    go_on = threading.Event()

    def stuck() -> Generator[Batch]:
        go_on.wait(60)
        yield {}

    try:
        with pytest.raises(RuntimeError, match="not finite"), OneAhead(stuck(), "cpu"):
            raise RuntimeError("the loss is not finite")
        assert not go_on.is_set()
    finally:
        go_on.set()
