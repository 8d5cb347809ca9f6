"""The terms of use of a data set. Banks and weights that are made from the data carry the same line."""

from __future__ import annotations

from storage import fs
from storage.errors import InputError

TERMS_FILE = "TERMS.txt"


def terms_of(folder: str, usual: str) -> str:
    """The first line with text in the folder's TERMS.txt, or the layout's usual terms if there is none.

    Raises InputError if the file is not UTF-8 text.
    """
    path = fs.join(folder, TERMS_FILE)
    if not fs.exists(path):
        return usual
    try:
        lines = [line.strip() for line in fs.read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(TERMS_FILE, "cannot be read as UTF-8 text", "save it again as UTF-8") from error
    return next((line for line in lines if line), usual)
