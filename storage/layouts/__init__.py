"""From a folder to subjects, one module a data set's layout; each knows its traps and its label order."""

from __future__ import annotations

from storage import uri
from storage.errors import InputError
from storage.layouts import acdc, mnms, table
from storage.layouts.options import LayoutOptions
from storage.subjects import Skipped, Subject

__all__ = ["LAYOUTS", "LayoutOptions", "detect", "read"]

# In the order of detection: a M&Ms folder also holds a CSV, and a table may lie beside anything.
LAYOUTS = {"mnms": mnms, "acdc": acdc, "table": table}
EXPECTED = (
    "give a folder in the layout of M&Ms (Training/Labeled/CODE/CODE_sa.nii.gz), of ACDC (patientNNN/Info.cfg) "
    "or with a subjects.csv"
)


def detect(folder: str) -> str:
    """Name of the layout of a folder (or of a table file): "mnms", "acdc" or "table". Raises InputError."""
    folder = _present(folder)
    for name, layout in LAYOUTS.items():
        if layout.matches(folder):
            return name
    raise InputError(uri.base_name(folder), "none of the known layouts", EXPECTED)


def read(
    folder: str, layout: str = "auto", options: LayoutOptions | None = None
) -> tuple[list[Subject], list[Skipped]]:
    """Subjects of a folder, sorted by name, and what cannot enter with reason and remedy.

    Only listings, metadata and headers are read. `split` may still be None: see `splits.assign`. Raises InputError for
    what concerns the whole folder: absent, of no known layout, or its table unreadable or without a needed column.
    """
    folder = _present(folder)
    chosen = detect(folder) if layout == "auto" else layout
    if chosen not in LAYOUTS:
        raise InputError(f"layout {layout}", "no such layout", f"choose one of auto, {', '.join(LAYOUTS)}")
    subjects, skipped = LAYOUTS[chosen].read(folder, options or LayoutOptions())
    if not subjects and not skipped:
        raise InputError(uri.base_name(folder), f"no subject in the layout {chosen}", EXPECTED)
    return sorted(subjects, key=lambda s: s.subject), sorted(skipped, key=lambda s: (s.subject, s.file))


def _present(folder: str) -> str:
    """The folder's absolute name: workers, which read the files, may stand elsewhere."""
    if not uri.exists(folder):
        raise InputError(uri.base_name(folder), "no such folder", "check the path")
    return uri.absolute(folder)
