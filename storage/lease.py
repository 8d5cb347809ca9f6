"""A lease on a place in an object store: one owner at a time, and the store alone is the judge.

The lock object names the owner, its token, and how many seconds a lease lasts after its last write. The owner writes it
anew five times in that span. Each write names the ETag of the one before, so of two who write at once one succeeds, and
nobody removes what another wrote. The age of a lease is the difference between two times of the store's clock; no
host's clock enters.

Each process that writes below the place asks the lock object first: the owner, and the processes that work for it and
are given a `Fence`. Where the lock object names another owner, they raise LeaseLostError. Where the lease has run out,
they wait until the owner has renewed it or another has taken it over. So a process that was stopped for longer than a
lease finds out before its next write.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from storage import conditional, fs
from storage.errors import InputError, LeaseLostError, StageError

log = logging.getLogger(__name__)

A = TypeVar("A")

LEASE_S = 90.0
RENEWALS = 5  # in that time
ASKS = 30  # at most, in that time, of each process that writes
SECOND = 1.0  # to which the store's times are rounded
POLL_S = 1.0
NO_ETAG = '"00000000000000000000000000000000"'  # of no object


@dataclass(frozen=True)
class Fence:
    """What a process that works for an owner must know: the place, its lock object, the owner's token."""

    place: str
    lock: str
    token: str


_fences: dict[str, Fence] = {}
_trusted: dict[Fence, float] = {}  # until when a fence need not be asked for again
_lost: set[str] = set()


def fences() -> tuple[Fence, ...]:
    """The leases that this process holds or works for."""
    return tuple(_fences.values())


def under(held: Iterable[Fence], work: Callable[..., A], *arguments: Any) -> A:
    """`work(*arguments)` in a process of its own, see `work_for`."""
    work_for(held)
    return work(*arguments)


def work_for(held: Iterable[Fence]) -> None:
    """From now on this process works for the owner of these leases, and for no other."""
    wanted = {fence.place: fence for fence in held}
    for place, fence in list(_fences.items()):
        if wanted.get(place) != fence:
            _leave(place)
    for place, fence in wanted.items():
        if place not in _fences:
            _enter(fence)


def is_lost(place: str) -> bool:
    """Whether this process held or worked for a lease on the place, and found that another has taken it over."""
    return place in _lost


@contextmanager
def lease(
    lock: str,
    place: str,
    name: str,
    say: Callable[[str], None] = log.warning,
    lost: Callable[[LeaseLostError], None] = lambda error: None,
) -> Iterator[None]:
    """Hold the lease that the object `lock` stands for; writes at or below `place` ask for it.

    Waits where another owner may have died, until its lease has run out, and says so once. `name` is what lines call
    the place. `lost` is called, by a thread of the lease, once another has taken it over.
    Raises InputError if its owner is alive, or if the store does not keep conditions and somebody else holds the place.
    """
    held = _Lease(lock, name, say)
    fence = Fence(place, lock, held.token)
    _lost.discard(place)
    _enter(fence)
    over = threading.Event()
    beat = threading.Thread(target=_keep, args=(held, fence, over, lost), name=f"lease of {name}", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        _leave(place)
        if not is_lost(place):
            with suppress(StageError, InputError, OSError):  # it runs out by itself
                held.release()


def _keep(held: _Lease, fence: Fence, over: threading.Event, lost: Callable[[LeaseLostError], None]) -> None:
    """Renew the lease until it is over or lost."""
    while not over.wait(held.lasts_s / RENEWALS):
        try:
            held.renew()
        except LeaseLostError as error:
            _lost.add(fence.place)
            lost(error)
            return
        except (StageError, InputError, OSError) as error:  # the store is away, for whoever would take it over too
            log.debug("%s", error)


class _Lease:
    """The lock object while we own it. Made by waiting for it."""

    def __init__(self, lock: str, name: str, say: Callable[[str], None]) -> None:
        self._lock, self._name, self.lasts_s = lock, name, LEASE_S
        self.token = uuid.uuid4().hex
        self._document: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "processes": _processes(),
            "token": self.token,
            "lease_s": LEASE_S,
            "renewed": 0,
        }
        self._etag = self._take(say)
        if not self._conditions_are_kept():
            self._document |= {"lease_s": None}
            self.renew()

    def renew(self) -> None:
        """Write the object anew. Raises LeaseLostError if another has, StageError if the store fails."""
        self._document["renewed"] += 1
        etag = self._write(self._etag)
        if etag is None:
            seen = conditional.look(self._lock)
            holder = _document(seen)
            if seen is None or holder.get("token") != self.token:
                raise _lost_to(self._name, holder)
            etag = seen.etag  # it is ours: the answer to our write was lost, or another write was refused with it
        self._etag = etag

    def release(self) -> None:
        """Give the place up: first so that all see it, then without a trace."""
        self._document |= {"released": True}
        etag = self._write(self._etag)
        if etag is not None:
            conditional.remove(self._lock, etag)

    def _take(self, say: Callable[[str], None]) -> str:
        """Write the object once nobody else holds the place; returns its ETag."""
        first: str | None = None  # the ETag that we wait to see replaced
        while True:
            seen = conditional.look(self._lock)
            holder = _document(seen)
            if holder.get("token") == self.token:  # the answer to our own write was lost
                assert seen is not None
                return seen.etag
            if seen is None or _is_free(holder, seen.age_s):
                etag = self._write(None if seen is None else seen.etag)
                if etag is not None:
                    return etag
                continue
            if not holder.get("lease_s"):
                raise refused_for_ever(self._name, self._lock)
            if first is None:
                first = seen.etag
                left = max(0.0, holder["lease_s"] - seen.age_s)
                say(f"{self._name}: held by {who(holder)}; waiting up to {left:.0f} s to see whether that still runs")
            elif seen.etag != first:
                raise refused(self._name, holder)
            time.sleep(min(POLL_S, self.lasts_s / RENEWALS))

    def _write(self, match: str | None) -> str | None:
        return conditional.write(self._lock, json.dumps(self._document), match)

    def _conditions_are_kept(self) -> bool:
        """Whether the store refuses what it must: some servers take the headers and ignore them."""
        note = json.dumps(self._document)
        written = (conditional.write(self._lock, note, match) for match in (None, NO_ETAG))
        return all(etag is None for etag in written)


def _enter(fence: Fence) -> None:
    _fences[fence.place] = fence
    fs.guard(fence.place, lambda: _require(fence))


def _leave(place: str) -> None:
    fs.guard(place, None)
    fence = _fences.pop(place, None)
    if fence is not None:
        _trusted.pop(fence, None)


def _require(fence: Fence) -> str:
    """The owner's token, if it may still write; see the module's text. Raises LeaseLostError."""
    while _now() >= _trusted.get(fence, 0.0):
        asked = _now()
        seen = conditional.look(fence.lock)
        holder = _document(seen)
        if seen is None or holder.get("token") != fence.token:
            _lost.add(fence.place)
            raise _lost_to(fs.base_name(fence.place), holder)
        lasts_s = holder["lease_s"] or LEASE_S
        trust_s = lasts_s / ASKS
        if holder["lease_s"] is None or seen.age_s <= lasts_s - trust_s - 2 * SECOND:
            _trusted[fence] = asked + trust_s
            break
        time.sleep(min(POLL_S, lasts_s / RENEWALS))
    return fence.token


def _now() -> float:
    """Seconds that go on while this machine sleeps and this process is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _document(seen: conditional.Seen | None) -> dict[str, Any]:
    try:
        return dict(json.loads(seen.note)) if seen is not None else {}
    except (ValueError, TypeError):  # of another version, or not ours
        return {}


def _is_free(holder: dict[str, Any], age_s: float) -> bool:
    lasts_s = holder.get("lease_s")
    if holder.get("released") or (lasts_s is not None and age_s >= lasts_s + SECOND):
        return True
    return lasts_s is not None and _is_gone(holder)


def _processes() -> str:
    """Names the set of processes to which a pid belongs: the machine since it was started, and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # known to nobody


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether an owner certainly runs no more, since its pid is one of ours and nobody has it."""
    pid = holder.get("pid")
    if holder.get("processes") != _processes() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def who(holder: dict[str, Any]) -> str:
    """An owner in a line for people."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def refused(name: str, holder: dict[str, Any]) -> InputError:
    """The error of whoever finds a place held by a living owner."""
    return InputError(name, f"is being worked on by {who(holder)}", "wait until it ends, or end it")


def refused_for_ever(name: str, lock: str) -> InputError:
    """The error of whoever finds a place held in a store that cannot tell whether its owner lives."""
    try:
        holder = dict(json.loads(fs.read_bytes(lock)))
    except (FileNotFoundError, ValueError, TypeError):
        holder = {}
    problem = f"is held by {who(holder)}, and its store has no conditional writes, so that nobody can take it over"
    return InputError(name, problem, f"wait until it ends; if it was killed, remove {lock}")


def _lost_to(name: str, holder: dict[str, Any]) -> LeaseLostError:
    taker = who(holder) if holder else "another process, which has ended"
    return LeaseLostError(f"{name}: its lease ran out and {taker} has taken it over; this one ends")
