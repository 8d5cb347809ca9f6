"""This node's folder for copies of data that are remote or compressed: its place, its size limit and its locks.

The folder is the argument, else CARDIOMIX_CACHE, else `cardiomix-<user id>` in the system's folder for temporary files.
It should be on this node's own disk or in its memory (/dev/shm). Each copy is a folder in it. The name of a copy ends
in the id of the machine's boot, because copies are not synced to disk: after a power cut their files may be full of
zeros. If all copies together exceed CARDIOMIX_CACHE_GB (32), or if the disk is short, the copies that were opened
longest ago are removed. Copies of earlier boots are always removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from storage import fs
from storage.errors import InputError

FOLDER, LIMIT, DEFAULT_LIMIT_GB = "CARDIOMIX_CACHE", "CARDIOMIX_CACHE_GB", 32.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


def node_folder(folder: str | None = None) -> Path:
    """The node's folder, made for this user alone if it is absent. Raises InputError if it cannot be used."""
    chosen = folder or os.environ.get(FOLDER)
    path = fs.local_path(chosen) if chosen else Path(tempfile.gettempdir()) / f"cardiomix-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not chosen and path.stat().st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
    except OSError as error:
        raise InputError(path.name, f"cannot hold a bank's cache ({error.strerror or error})", elsewhere()) from error
    return path


def make_room(root: Path, key: str, size: int) -> None:
    """Remove other copies as the module's docstring says, so that the copy `key` may grow by `size` bytes.

    Raises InputError if the disk still has too little room.
    """
    limit = float(os.environ.get(LIMIT, DEFAULT_LIMIT_GB)) * 1e9
    for left in root.glob(".*.gone"):  # by a process that was killed while it removed a copy
        shutil.rmtree(left, ignore_errors=True)
    others = sorted((p for p in root.iterdir() if p.is_dir() and p.name != key), key=_opened)
    own = _bytes_in(root / key)
    sizes = {place: _bytes_in(place) for place in others}
    for place in others:
        earlier = not place.name.endswith(boot())
        if earlier or sum(sizes.values()) + own + size > limit or shutil.disk_usage(root).free < size:
            with locked(root / f"{place.name}.lock", wait=False) as ours:
                if ours:
                    gone = root / f".{uuid.uuid4().hex}.gone"
                    with suppress(OSError):  # another process has removed it, or it is another user's
                        place.rename(gone)  # at once, so that nobody opens half a copy
                    shutil.rmtree(gone, ignore_errors=True)
                    sizes.pop(place)
    free = shutil.disk_usage(root).free
    if free < size:
        problem = f"has {free / 1e9:.2f} GB free, the bank's cache needs {size / 1e9:.2f} GB"
        raise InputError(root.name, problem, elsewhere())


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file for the body of a `with` statement. The file stays afterwards.

    Yields False if `wait` is false and somebody else holds it, else True.
    """
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def boot() -> str:
    """The first 8 characters of the boot's id, which is new at each start of the machine; `0` if there is none."""
    return BOOT.read_text()[:8] if BOOT.exists() else "0"


def elsewhere() -> str:
    """The remedy in error messages of a folder that cannot be used."""
    return f"name a folder on this node's disk in {FOLDER}"


def _opened(place: Path) -> float:
    """When a copy was last opened, in seconds since the epoch; 0 if another process has just removed it."""
    try:
        return place.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_in(place: Path) -> int:
    """The size in bytes of all files below a folder. Files that disappear meanwhile do not count."""
    total = 0
    for folder, _, files in os.walk(place):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total
