"""A lease on a place in an object store: there is one owner at a time, and the store alone decides who it is.

The lock object names the owner, its token, and how many seconds a lease lasts after its last write. The owner writes
the object anew five times in that span. Each write names the ETag of the one before. So if two write at once, one
succeeds, and nobody removes what another wrote. The age of a lease is the difference between two times of the store's
clock; no host's clock is used.

Each process that writes below the place reads the lock object first: the owner, and the processes that work for it and
are given a `Fence`. If the lock object names another owner, they raise LeaseLostError. If the lease has run out, they
wait until the owner has renewed it or another has taken it over. So a process that was stopped for longer than a lease
finds out before its next write.
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
RENEWALS = 5  # times that the owner renews a lease in LEASE_S
ASKS = 30  # most times that a process which writes reads the lock object in LEASE_S
SECOND = 1.0  # the store's times are rounded to it
POLL_S = 1.0
NO_ETAG = '"00000000000000000000000000000000"'  # no object has this ETag


@dataclass(frozen=True)
class Fence:
    """What a process that works for an owner must know: the place, the URI of its lock object, the owner's token."""

    place: str
    lock: str
    token: str


_fences: dict[str, Fence] = {}
_trusted: dict[Fence, float] = {}  # until when (see `_now`) a fence's lock object need not be read again
_lost: set[str] = set()


def fences() -> tuple[Fence, ...]:
    """The leases that this process holds or works for."""
    return tuple(_fences.values())


def under(held: Iterable[Fence], work: Callable[..., A], *arguments: Any) -> A:
    """Call `work(*arguments)` in a process of its own, for the owner of the leases `held`; see `work_for`."""
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
    """Hold the lease of the lock object `lock` for the body of a `with` statement.

    Writes at or below `place` check the lease meanwhile. If another owner may have died, this waits until that owner's
    lease has run out, and tells `say` once. `name` is what messages call the place. If another owner takes our lease
    over, a thread of the lease calls `lost`.
    Raises InputError if the other owner is alive, or if the store ignores conditions and somebody else holds the place.
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
        if not is_lost(place):  # otherwise the guard stays: a thread may still want to write
            _leave(place)
            with suppress(StageError, InputError, OSError):  # the lease runs out by itself
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
        except Exception as error:  # whatever it is, the lease must be tried again: nobody else may reach the store
            log.debug("%s", error)


class _Lease:
    """The lock object while we own it. The constructor waits until it owns the object."""

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
        self._plain = False  # the store has told that it has no conditions, before we held the place
        self._etag = self._take(say)
        if self._plain or not self._conditions_are_kept():
            self._document |= {"lease_s": None}
            self.renew()

    def renew(self) -> None:
        """Write the object anew. Raises LeaseLostError if another owner wrote it, StageError if the store fails."""
        self._document["renewed"] += 1
        etag = self._write(self._etag)
        if etag is None:
            seen = conditional.look(self._lock)
            holder = _document(seen)
            if seen is None or holder.get("token") != self.token:
                raise _lost_to(self._name, holder)
            etag = seen.etag  # it is ours: the answer to our write was lost, or our write was refused with another's
        self._etag = etag

    def release(self) -> None:
        """Give the place up: write that it is released, so that all see it, then remove the object."""
        self._document |= {"released": True}
        etag = self._write(self._etag)
        if etag is not None:
            conditional.remove(self._lock, etag)

    def _take(self, say: Callable[[str], None]) -> str:
        """Write the object once nobody else holds the place; returns its ETag.

        Raises InputError if the holder is alive, or if its store cannot tell.
        """
        for seen in _when_free(self._lock, self._name, say, self.token):
            if seen is not None and _document(seen).get("token") == self.token:  # the answer to our own write was lost
                return seen.etag
            try:
                etag = self._write(None if seen is None else seen.etag)
            except conditional.NoConditionsError:
                self._plain = True
                continue
            if etag is not None:
                return etag
        raise AssertionError("the place becomes free, or an error says why not")

    def _write(self, match: str | None) -> str | None:
        if self._plain:
            return conditional.write_in_any_case(self._lock, json.dumps(self._document))
        return conditional.write(self._lock, json.dumps(self._document), match)

    def _conditions_are_kept(self) -> bool:
        """Whether the store refuses a write whose condition is not met: some servers ignore the conditions."""
        note = json.dumps(self._document)
        written = (conditional.write(self._lock, note, match) for match in (None, NO_ETAG))
        return all(etag is None for etag in written)


def wait_until_free(lock: str, name: str, say: Callable[[str], None]) -> None:
    """Return once nobody holds the place of the lock object; as `lease`, but without taking it. Only reads."""
    next(_when_free(lock, name, say, ""))


def _when_free(lock: str, name: str, say: Callable[[str], None], token: str) -> Iterator[conditional.Seen | None]:
    """Yield what the lock object is whenever nobody else than `token` holds the place. Never ends.

    Raises InputError if the holder is alive, or if its store cannot tell.
    """
    first: str | None = None  # the ETag that we wait to see replaced
    while True:
        seen = conditional.look(lock)
        holder = _document(seen)
        if seen is None or holder.get("token") == token or _is_free(holder, seen.age_s):
            yield seen
            continue
        if not holder.get("lease_s"):
            raise refused_for_ever(name, lock)
        if first is None:
            first = seen.etag
            left = max(0.0, holder["lease_s"] - seen.age_s)
            say(f"{name}: held by {who(holder)}; waiting up to {left:.0f} s to see whether that still runs")
        elif seen.etag != first:
            raise refused(name, holder)
        time.sleep(min(POLL_S, holder["lease_s"] / RENEWALS))


def _enter(fence: Fence) -> None:
    _fences[fence.place] = fence
    fs.guard(fence.place, lambda: _require(fence))


def _leave(place: str) -> None:
    fs.guard(place, None)
    fence = _fences.pop(place, None)
    if fence is not None:
        _trusted.pop(fence, None)


def _require(fence: Fence) -> str:
    """The owner's token, if this process may still write; the module's docstring says when.

    If the lease has run out, this waits. Raises LeaseLostError if another owner has taken it over.
    """
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
    """Seconds of a clock that also runs while this machine sleeps or this process is stopped."""
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
    """A name for the set of processes in which a pid is unique: the machine's boot and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # equal to no other name


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether an owner has certainly ended: its pid is one of our set of processes, and no process has it."""
    pid = holder.get("pid")
    if holder.get("processes") != _processes() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process, and alive
        return False
    return False


def who(holder: dict[str, Any]) -> str:
    """An owner as text for people: its process and its host."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def refused(name: str, holder: dict[str, Any]) -> InputError:
    """The error for a place that a living owner holds."""
    return InputError(name, f"is being worked on by {who(holder)}", "wait until it ends, or end it")


def refused_for_ever(name: str, lock: str) -> InputError:
    """The error for a place that is held in a store that cannot tell whether the owner lives."""
    try:
        holder = dict(json.loads(fs.read_bytes(lock)))
    except (FileNotFoundError, ValueError, TypeError):
        holder = {}
    why = (
        "its store has no conditional writes"
        if "lease_s" in holder or not holder
        else "another version of cardiomix holds it"
    )
    problem = f"is held by {who(holder)}, and {why}, so that nobody can take it over"
    return InputError(name, problem, f"wait until it ends; if it was killed, remove {lock}")


def _lost_to(name: str, holder: dict[str, Any]) -> LeaseLostError:
    taker = who(holder) if holder else "another process, which has ended"
    return LeaseLostError(f"{name}: its lease ran out and {taker} has taken it over; this one ends")
