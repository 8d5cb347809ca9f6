"""Reads one subject after another. A subject that cannot be read is listed, and the others are read all the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

from storage import fs
from storage.errors import InputError
from storage.subjects import Skipped, Subject

A = TypeVar("A")

ILLEGIBLE_NAME = "its name has a line break, control or undecodable character"
ILLEGIBLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, undecodable byte of a file's name, line break


def read_each(
    folder: str, subject: Callable[[A], Subject], named: Sequence[tuple[str, A]]
) -> tuple[list[Subject], list[Skipped]]:
    """Call `subject` with the item of each (name, item).

    Returns the subjects, and an entry for each item that raised InputError or whose name is not legible.
    """

    def attempt(item: tuple[str, A]) -> Subject | Skipped:
        name = item[0]
        if not legible(name):  # such a name would break the lines of logs and tables
            return Skipped(shown(name), shown(name), ILLEGIBLE_NAME, "rename it")
        try:
            return subject(item[1])
        except InputError as error:
            return Skipped(name, error.where, error.problem, error.remedy)

    found = fs.map_concurrently(folder, attempt, named)
    return [f for f in found if isinstance(f, Subject)], [f for f in found if isinstance(f, Skipped)]


def legible(text: str) -> bool:
    """Whether `text` stays one line and can be written as UTF-8."""
    return not any(unicodedata.category(character) in ILLEGIBLE for character in text)


def shown(name: str) -> str:
    """The name as it is, or with escapes in place of what is not legible."""
    return name if legible(name) else repr(name)[1:-1]
