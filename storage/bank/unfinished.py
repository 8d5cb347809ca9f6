"""The names in a bank's folder, and the removal of what an interrupted creation left there."""

from __future__ import annotations

from storage import fs
from storage.bank import ledger
from storage.bank.arrays import ARRAYS
from storage.bank.spec import INDEX, ROOT, STYLES, WEIGHTS, WEIGHTS_CONFIG
from storage.errors import InputError

KNOWN_FILES = frozenset({ROOT, INDEX, WEIGHTS, WEIGHTS_CONFIG, STYLES, ledger.FOLDER, ledger.MANIFEST, *ARRAYS})


def clear_unfinished(bank: str) -> None:
    """Remove what an interrupted creation left. Raises InputError if there is anything else, which stays."""
    if not fs.exists(bank):
        return
    if not fs.is_folder(bank) or not all(_is_of_bank(bank, name) for name in fs.list_names(bank)):
        raise InputError(fs.base_name(bank), "is there and is not a factor bank", "name a new folder for the bank")
    fs.remove(bank)


def _is_of_bank(bank: str, name: str) -> bool:
    """Whether a name in a bank's folder, and what lies below it, is what a bank writes there."""
    if name not in ARRAYS:
        return name in KNOWN_FILES
    inside = fs.join(bank, name)
    return fs.is_folder(inside) and set(fs.list_names(inside)) <= {ROOT, "c"}
