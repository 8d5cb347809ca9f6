"""Faults that the S3 proxy of tests/conftest.py makes."""

from __future__ import annotations

from collections.abc import Callable

FAULTS = ("503", "no answer", "half an answer")


def every_fourth(failed: list[str]) -> Callable[[int, str], str | None]:
    """Every fourth request fails, each time by the next of `FAULTS`, and is noted."""

    def fault(number: int, method: str) -> str | None:
        if number % 4:
            return None
        failed.append(FAULTS[number // 4 % len(FAULTS)])
        return failed[-1]

    return fault
