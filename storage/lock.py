"""A lock, so that only one driver works on a run: a second driver gets an error that names the holder.

A local lock is `flock` on a file in the run (or beside a bank). The kernel releases it when the process ends, however
it ends. On a network file system this works only if the server supports locks. In S3 the lock is an object with a
lease, see `storage.lease`. In other stores the lock object stays if its driver is killed; the error then says what to
remove.
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
from storage.lease import lease, refused, refused_for_ever, wait_until_free

log = logging.getLogger(__name__)

LOCK = ".lock"


def run_lock(
    run: str,
    say: Callable[[str], None] = log.warning,
    lost: Callable[[LeaseLostError], None] = lambda error: None,
) -> AbstractContextManager[None]:
    """Hold the lock of a run for the body of a `with` statement; see `lock`. Makes a local folder if it is absent."""
    return lock(fs.join(run, LOCK), fs.base_name(run), say, lost)


def require_free(run: str, say: Callable[[str], None] = log.warning) -> None:
    """Raises InputError if `run_lock` would: if another driver holds the run. Only reads, and makes nothing.

    In S3 this waits as `run_lock` does. The lock of a local run is held for a moment if its last driver was killed.
    """
    path, name = fs.join(run, LOCK), fs.base_name(run)
    if fs.is_local(path):
        _require_unlocked(fs.local_path(path), name)
    elif conditional.supported(path):
        wait_until_free(path, name, say)
    elif fs.exists(path):
        raise refused_for_ever(name, path)


def bank_lock(bank: str, say: Callable[[str], None] = log.warning) -> AbstractContextManager[None]:
    """Hold the lock of a factor bank while the body writes to it; see `lock`."""
    bank = fs.absolute(bank)
    return lock(f"{bank}.lock", fs.base_name(bank), say)


def lock(
    path: str,
    name: str,
    say: Callable[[str], None] = log.warning,
    lost: Callable[[LeaseLostError], None] = lambda error: None,
) -> AbstractContextManager[None]:
    """Hold a lock for the body of a `with` statement.

    `path` is the lock file or object: `<place>/.lock` or `<place>.lock`. `name` is what messages call the place. In S3
    the call may wait until another owner's lease has run out, and then tells `say`. If another owner takes over our
    lease, a thread of the lease calls `lost`. Raises InputError if somebody else holds the lock, even another `lock` of
    this process, or if a local place cannot be written.
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
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        # The lock is still held here. A process that has opened this file already finds it gone, and tries again.
        path.unlink(missing_ok=True)
        os.close(handle)


def _require_unlocked(path: Path, name: str) -> None:
    try:
        handle = os.open(path, os.O_RDWR)  # as `_acquire` does, so that it fails where that would
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refused(name, _parsed_holder(os.pread(handle, 4096, 0))) from error
    except OSError as error:  # a file system without locks
        raise _unwritable(path.parent, error) from error
    finally:
        os.close(handle)


def _unwritable(folder: Path, error: OSError) -> InputError:
    problem = f"cannot be written ({error.strerror})"
    return InputError(str(folder), problem, "name a place that you may write to, on a disk with room")


def _acquire(path: Path, name: str) -> int:
    """Open and lock the file at `path`, write our owner record into it, and return its descriptor.

    Raises InputError if somebody else holds the lock.
    """
    while True:
        # The descriptor is not inheritable (Python's default): a child would keep the lock after we end.
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
        os.close(handle)  # the holder removed the file between our open and our flock: try again


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive(path: str, name: str) -> Iterator[None]:
    """Hold a lock object in a store without conditional writes. Nobody takes it over, even if its owner is dead."""
    mine = json.dumps(_owner()).encode()
    if fs.exists(path):
        raise refused_for_ever(name, path)
    with suppress(FileExistsError):  # if the store has no exclusive writes, reading it back decides
        fs.write_new(path, mine)
    if _content(path) != mine:  # another process wrote at the same time
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
    except (ValueError, TypeError):  # the holder has not written its record yet
        return {}
