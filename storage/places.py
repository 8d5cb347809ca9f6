"""Checks whether a place can be written, before work is done for it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from storage import fs
from storage.errors import InputError, StageError

PROBE = 2**12  # bytes


def in_a_jobs_folder() -> bool:
    """Whether the working directory is the one that Ray made for a job, and removes when the job has ended."""
    return "runtime_resources" in Path.cwd().parts


def require_writable(
    folder: str, what: str, remedy: str = "name a place that you may write to, on a disk with room"
) -> None:
    """Raises InputError unless files can be written in a folder, StageError if a remote one refuses or fails.

    If a local folder is absent, the nearest folder above it that exists is tried. `what` names the folder in the error.
    Nothing is left behind: a file is written and removed.
    """
    if not fs.is_local(folder):
        _require_accepted(fs.join(folder, f".{uuid.uuid4().hex}.tmp"), what)
        return
    place = fs.local_path(folder).absolute()
    there = next(f for f in (place, *place.parents) if os.path.lexists(f))
    probe = there / f".{uuid.uuid4().hex}.tmp"
    try:
        if place != there:
            probe.mkdir()
            probe.rmdir()
        with probe.open("xb") as out:
            out.write(bytes(PROBE))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        named = f"{what}, in {there}" if there != place else what
        raise InputError(named, f"cannot be written ({error.strerror})", remedy) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _require_accepted(probe: str, what: str) -> None:
    """Write a remote file and remove it. Errors name `what` instead."""
    try:
        fs.write_bytes(probe, bytes(PROBE))
        fs.remove(probe)
    except InputError as error:
        raise InputError(what, error.problem, error.remedy) from error
    except StageError as error:
        raise StageError(str(error).replace(fs.redacted(probe), what)) from error


def require_writable_file(file: str, what: str) -> None:
    """Like `require_writable` for the folder of a file. Also raises InputError if the file is a folder."""
    if fs.is_folder(file):
        raise InputError(what, "is a folder", "name a file")
    if fs.is_local(file):
        require_writable(str(fs.local_path(file).absolute().parent), what)
    else:
        _require_accepted(f"{file}.{uuid.uuid4().hex}.tmp", what)
