"""Checks whether a place can be written, before work is done for it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from glob import has_magic
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
        _require_accepted(folder, what, is_file=False)
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


def require_writable_file(file: str, what: str) -> None:
    """Like `require_writable` for the folder of a file. Also raises InputError if the file is a folder."""
    if not fs.is_local(file):
        _require_accepted(file, what, is_file=True)
        return
    if fs.local_path(file).is_dir():
        raise InputError(what, "is a folder", "name a file")
    require_writable(str(fs.local_path(file).absolute().parent), what)


def _require_accepted(place: str, what: str, *, is_file: bool) -> None:
    """Write an object into a remote folder, or beside a remote file, and remove it. Errors name `what`."""
    what, place = fs.redacted(what), place.rstrip("/")
    folder = place[: -len(fs.base_name(place))] if is_file else place + "/"
    probe = f"{folder}.{uuid.uuid4().hex}.tmp"
    try:
        if has_magic(place):
            raise InputError(what, "has one of * ? [ in its name", "name it without")
        if is_file and fs.is_folder(place):
            raise InputError(what, "is a folder", "name a file")
        try:
            fs.write_bytes(probe, bytes(PROBE))
        except BaseException:
            with suppress(InputError, StageError):  # it may be there: the answer alone may have been lost
                fs.remove(probe)
            raise
        fs.remove(probe)
    except OSError as error:  # such as a bucket that is not there, which each store says in its own way
        problem = f"cannot be written ({error.strerror or type(error).__name__})"
        raise InputError(what, problem, "name a place that is there and that you may write to") from error
    except InputError as error:
        raise InputError(what, error.problem, error.remedy) from error
    except StageError as error:
        told = str(error).removeprefix(fs.redacted(probe)).removeprefix(fs.redacted(place))
        raise StageError(f"{what}{told}") from error
