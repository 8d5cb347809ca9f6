"""One subject after another; one that cannot enter is listed and the rest goes on."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

from storage import fs
from storage.errors import InputError
from storage.subjects import Skipped, Subject

A = TypeVar("A")

ILLEGIBLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, undecodable byte of a file's name, line breaks


def read_each(
    folder: str, subject: Callable[[A], Subject], named: Sequence[tuple[str, A]]
) -> tuple[list[Subject], list[Skipped]]:
    """`subject` of each (name, item): those that it makes, and those that it raises an InputError for."""

    def attempt(item: tuple[str, A]) -> Subject | Skipped:
        name = item[0]
        if not legible(name):  # it would break up the lines that it stands in
            shown = repr(name)[1:-1]
            return Skipped(shown, shown, "its name has a line break, control or undecodable character", "rename it")
        try:
            return subject(item[1])
        except InputError as error:
            return Skipped(name, error.where, error.problem, error.remedy)

    found = fs.map_concurrently(folder, attempt, named)
    return [f for f in found if isinstance(f, Subject)], [f for f in found if isinstance(f, Skipped)]


def legible(text: str) -> bool:
    """Whether `text` stays one line and can be written as UTF-8."""
    return not any(unicodedata.category(character) in ILLEGIBLE for character in text)
