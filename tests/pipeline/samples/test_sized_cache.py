"""A cache bounded by bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.sized_cache import SizedCache

SIZES = {0: 3, 1: 5, 2: 1, 3: 40, 4: 10}


@given(st.lists(st.sampled_from(sorted(SIZES)), max_size=60), st.integers(0, 30))
def test_it_gives_what_is_made_holds_no_more_than_its_budget_and_keeps_what_was_used_last(
    asked: list[int], budget: int
) -> None:
    made: list[int] = []

    def make(key: int) -> bytes:
        made.append(key)
        return bytes([key]) * SIZES[key]

    cache = SizedCache(make, len, budget)
    for k, key in enumerate(asked):
        before = len(made)
        assert cache(key) == bytes([key]) * SIZES[key]
        assert cache.held <= budget
        recent: list[int] = []  # the distinct keys of earlier that fit alone, the last first
        for earlier in reversed(asked[:k]):
            if earlier not in recent and SIZES[earlier] <= budget:
                recent.append(earlier)
        at = recent.index(key) if key in recent else None
        if at is not None and sum(SIZES[other] for other in recent[: at + 1]) <= budget:
            assert len(made) == before
