"""One driver a run: the second is refused, with a line that says who holds it.

A local run is held by `flock` on a file in it, which the kernel gives up when the process ends, however it ends. (On a
network file system only where it serves locks.) An object store has no such thing: there a lock object names its owner
and stays behind a killed driver. It is taken over if that process ran on this host and is gone; else the error says
what to remove.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage import fs
from storage.errors import InputError

LOCK = ".lock"


@contextmanager
def run_lock(run: str) -> Iterator[None]:
    """Hold a run folder (made if it is absent) for the body. Raises InputError if another driver holds it."""
    with lock(fs.join(run, LOCK), fs.base_name(run)):
        yield


@contextmanager
def lock(path: str, name: str) -> Iterator[None]:
    """Hold the lock file or object `path` for the body; `name` is what the error calls the thing it protects.

    Raises InputError if somebody else holds it, another `lock` of this process included.
    """
    held = _local(fs.local_path(path), name) if fs.is_local(path) else _remote(path, name)
    with held:
        yield


@contextmanager
def _local(path: Path, name: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(path, name)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever waits for the file finds that it is another
        os.close(handle)


def _acquire(path: Path, name: str) -> int:
    """An exclusively locked descriptor of the file that `path` names, our owner record in it."""
    while True:
        # Not inheritable (Python's default): a child would keep the lock beyond our end.
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_owner()).encode(), 0)
                return handle
        except BlockingIOError as error:
            owner = _parsed_holder(os.pread(handle, 4096, 0))
            os.close(handle)
            raise _refused(name, owner, "wait until it ends, or end it") from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has let go and removed it between our two calls


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _remote(path: str, name: str) -> Iterator[None]:
    mine = _owner()
    owner = _read_holder(path)
    if owner is not None and not _gone(owner):
        raise _refused(name, owner, f"wait until it ends; if it was killed, remove {path}")
    if owner is not None:
        fs.remove(path)
    with suppress(FileExistsError):  # where the store cannot do exclusive writes, the reading back decides
        fs.write_new(path, json.dumps(mine).encode())
    found = _read_holder(path)
    if found != mine:  # somebody was as quick, and the store does not do exclusive writes
        raise _refused(name, found or {}, f"wait until it ends; if it was killed, remove {path}")
    try:
        yield
    finally:
        if _read_holder(path) == mine:
            fs.remove(path)


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "token": uuid.uuid4().hex}


def _read_holder(path: str) -> dict[str, Any] | None:
    try:
        return _parsed_holder(fs.read_bytes(path))
    except FileNotFoundError:
        return None


def _parsed_holder(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):  # its holder has not written it yet
        return {}


def _gone(owner: dict[str, Any]) -> bool:
    """Whether an owner certainly lives no more: only its own host can tell."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def _refused(name: str, owner: dict[str, Any], remedy: str) -> InputError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return InputError(name, f"is being worked on by {who}", remedy)
