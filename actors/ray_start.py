"""Start Ray on this machine, or join the cluster that RAY_ADDRESS names.

A local Ray listens on loopback only and has no dashboard. If Ray cannot start, or the cluster does not answer, the
error is one line that says what to do.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actors.ray_internals import machine_cpus, machine_gpus, noted_cluster
from actors.resources import Cluster, Node
from storage.errors import InputError, one_line
from storage.places import require_writable

HIDE_UNBOOKED = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest path that Ray makes
SOCKET_BYTES = 107  # the longest socket path that Linux accepts
SHARED = "/dev/shm"
ANSWER_S = 10.0  # seconds that a cluster may take to accept a connection, and again to answer
# Ray speaks gRPC, so HTTP/2: a server answers the preface and an empty frame of settings with its own (RFC 9113, 3.4)
HTTP2_SETTINGS = b"\x04"  # the fourth byte of a frame is its type
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + HTTP2_SETTINGS + bytes(5)


def local_cluster(cpus: int | None = None) -> Cluster:
    """The cluster that Ray would find on this machine, without starting Ray: one node.

    If `cpus` is given, it replaces the number of CPUs that Ray would find.
    """
    return Cluster((Node(float(cpus or machine_cpus()), float(machine_gpus())),))


def inside_cluster() -> bool:
    """Whether RAY_ADDRESS names a running cluster to join, as it does for the driver of a Ray job."""
    return "RAY_ADDRESS" in os.environ


def _require_answer(address: str) -> None:
    """Raises InputError if no Ray listens at host:port, or at what `auto` finds. Ray itself would try for minutes."""
    import socket

    try:
        host, separator, port = (noted_cluster() if address == "auto" else address).rpartition("://")[2].rpartition(":")
    except (ConnectionError, ValueError) as error:  # ValueError: the note of the last cluster is cut off
        raise _no_cluster(str(error).partition("\n")[0]) from error
    if not separator or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(HTTP2_PREFACE)
                if connection.recv(9, socket.MSG_WAITALL)[3:4] != HTTP2_SETTINGS:
                    raise _no_cluster("what listens there is no Ray")
    except OSError as error:
        raise _no_cluster(error.strerror or str(error)) from error


def _no_cluster(why: str) -> InputError:
    where = f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}"
    return InputError(
        where, f"no Ray cluster answers there ({why})", "start it, or unset RAY_ADDRESS to use this machine"
    )


def _not_started(why: str) -> InputError:
    logs = os.path.join(_temporary()[1], "ray/session_latest/logs")
    return InputError(
        "Ray",
        f"did not start on this machine ({why.partition('. ')[0]})",
        f"try again when the machine is less busy; Ray's logs are in {logs}",
    )


def _temporary() -> tuple[str, str]:
    """The folder under which Ray puts its files on this machine, after what names it."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "the folder for temporary files")
    return name, os.environ.get(name, "/tmp")


def require_places() -> None:
    """Raises InputError if a local Ray could not put its files, sockets or shared memory on this machine.

    Checks nothing if RAY_ADDRESS names a cluster to join.
    """
    if inside_cluster():
        return
    name, folder = _temporary()
    remedy = "set RAY_TMPDIR to a short path on a disk with room, such as /tmp"
    longest = os.path.join(os.path.abspath(folder), SOCKET.format(pid=os.getpid()))
    excess = len(os.fsencode(longest)) - SOCKET_BYTES
    if excess > 0:
        raise InputError(f"{name}={folder}", f"is {excess} bytes too long for Ray's sockets", remedy)
    require_writable(folder, f"{name}={folder}", remedy)
    remedy = "mount it as tmpfs, free some of it, or give the container more of it (docker run --shm-size)"
    if not os.path.isdir(SHARED):
        raise InputError(SHARED, "is not there, and Ray's object store needs it", remedy)
    require_writable(SHARED, SHARED, remedy)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the SIGTERM handler after `ray.init`.

    `ray.init` replaces it twice: with a Python handler, and below that with one in C++ that prints a stack trace.
    Outside the main thread nothing is restored, because Python cannot set handlers there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: the handler was not set by Python
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start_ray(cpus: int | None = None) -> Cluster:
    """Join the cluster that RAY_ADDRESS names, or start a local one; returns its living nodes.

    A local cluster listens on loopback, has no dashboard, and ignores every other Ray on this machine. `cpus` is its
    number of CPUs; None for as many as Ray finds.
    Raises InputError if the cluster does not answer within twice `ANSWER_S` seconds, if the local one does not start,
    and before anything is started if this machine has no place for Ray's files.
    """
    import logging

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # A task that books no GPU must see none. Otherwise two lanes on one unbooked card would fight over its memory.
    os.environ.setdefault(HIDE_UNBOOKED, "1")
    # Fractional CPUs mean more processes than cores, as planned. Without this setting Ray warns of each of them.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    if not inside_cluster():
        # Ray reads this when it is imported. Without it even a cluster of one node listens on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # No cluster takes this node away; Ray Train would start a process in each training to ask for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    require_places()
    import ray

    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if inside_cluster():
            _require_answer(os.environ["RAY_ADDRESS"])
            # the nodes do not inherit the environment of this process
            options["runtime_env"] = {"env_vars": {HIDE_UNBOOKED: os.environ[HIDE_UNBOOKED]}}
        else:
            options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus}
        try:
            with _signal_handlers_kept():
                ray.init(**options)
        except Exception as error:  # Ray raises bare exceptions if its processes die, or do not answer in time
            if not inside_cluster():
                raise _not_started(one_line(error)) from error
            if isinstance(error, ConnectionError):
                raise _no_cluster(str(error).splitlines()[0]) from error
            raise
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(Node(float(n.get("CPU", 0.0)), float(n.get("GPU", 0.0))) for n in alive))
