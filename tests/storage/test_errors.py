"""Any exception as one line for a person."""

from __future__ import annotations

import errno

import pytest

from storage.errors import InputError, StageError, one_line


class Remote(Exception):
    """As Ray has them: a traceback for a text, and the exception that it is about."""

    def __init__(self, cause: Exception | None) -> None:
        super().__init__("Traceback:\n  File x\nValueError: the end")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "options", "line"),
    [
        (ValueError("one\ntwo"), {}, "one"),
        (ValueError("one\ntwo\n"), {"last": True}, "two"),
        (ValueError(), {}, "ValueError"),
        (ValueError("/home/mrs-smith"), {"trusted": False}, "ValueError"),
        (StageError("our own words"), {"trusted": False}, "our own words"),
        (Remote(InputError("a.nii", "is cut off", "copy it")), {"trusted": False}, "a.nii: is cut off; copy it"),
        (Remote(None), {"last": True}, "ValueError: the end"),
        (OSError(errno.ENOSPC, "No space left on device", "/home/mrs-smith"), {}, "No space left on device"),
        (ValueError("(background)\nthe words"), {"skip": "(back"}, "the words"),
    ],
)
def test_one_line(error: Exception, options: dict[str, object], line: str) -> None:
    assert one_line(error, **options) == line  # type: ignore[arg-type]
