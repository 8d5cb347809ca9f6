"""One driver a run: the second is refused, with a line that says who holds it.

A local run is held by `flock` on a file in it, which the kernel gives up when the process ends, however it ends. (On a
network file system only where it serves locks.) In S3 a lock object holds a lease, see `storage.lease`. Other stores
have an object that stays behind a killed driver; the error says what to remove.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from storage import conditional, fs
from storage.errors import InputError, LeaseLostError
from storage.lease import lease, refused, refused_for_ever

log = logging.getLogger(__name__)

LOCK = ".lock"


def run_lock(
    run: str,
    say: Callable[[str], None] = log.warning,
    lost: Callable[[LeaseLostError], None] = lambda error: None,
) -> AbstractContextManager[None]:
    """Hold a run folder (made if it is absent) for the body, as `lock` does."""
    return lock(fs.join(run, LOCK), fs.base_name(run), say, lost)


def bank_lock(bank: str, say: Callable[[str], None] = log.warning) -> AbstractContextManager[None]:
    """Hold a factor bank for the body, which writes to it, as `lock` does."""
    bank = fs.absolute(bank)
    return lock(f"{bank}.lock", fs.base_name(bank), say)


def lock(
    path: str,
    name: str,
    say: Callable[[str], None] = log.warning,
    lost: Callable[[LeaseLostError], None] = lambda error: None,
) -> AbstractContextManager[None]:
    """Hold the lock file or object `path`, which is `<place>/.lock` or `<place>.lock`, for the body.

    `name` is what lines call the place. In S3 it may wait for another owner's lease to run out, and says so; `lost` is
    called by another thread if ours was taken over. Raises InputError if somebody else holds it, another `lock` of this
    process included.
    """
    if fs.is_local(path):
        return _local(fs.local_path(path), name)
    if conditional.supported(path):
        return lease(path, path.removesuffix(LOCK).rstrip("/"), name, say, lost)
    return _exclusive(path, name)


@contextmanager
def _local(path: Path, name: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, name)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InputError(
            str(path.parent), problem, "name a place that you may write to, on a disk with room"
        ) from error
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
            raise refused(name, owner) from error
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
def _exclusive(path: str, name: str) -> Iterator[None]:
    """Hold an object of a store without conditional writes: nobody takes it over, whatever has become of its owner."""
    mine = json.dumps(_owner()).encode()
    if fs.exists(path):
        raise refused_for_ever(name, path)
    with suppress(FileExistsError):  # where the store cannot do exclusive writes, the reading back decides
        fs.write_new(path, mine)
    if _content(path) != mine:  # somebody was as quick
        raise refused_for_ever(name, path)
    try:
        yield
    finally:
        if _content(path) == mine:
            fs.remove(path)


def _content(path: str) -> bytes:
    try:
        return fs.read_bytes(path)
    except FileNotFoundError:
        return b""


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "token": uuid.uuid4().hex}


def _parsed_holder(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):  # its holder has not written it yet
        return {}
