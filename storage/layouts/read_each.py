"""One subject after another; one that cannot enter is listed and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from storage import uri
from storage.errors import InputError
from storage.subjects import Skipped, Subject

A = TypeVar("A")


def read_each(
    folder: str, subject: Callable[[A], Subject], named: Sequence[tuple[str, A]]
) -> tuple[list[Subject], list[Skipped]]:
    """`subject` of each (name, item): those that it makes, and those that it raises an InputError for."""

    def attempt(item: tuple[str, A]) -> Subject | Skipped:
        try:
            return subject(item[1])
        except InputError as error:
            return Skipped(item[0], error.where, error.problem, error.remedy)

    found = uri.each(folder, attempt, named)
    return [f for f in found if isinstance(f, Subject)], [f for f in found if isinstance(f, Skipped)]
