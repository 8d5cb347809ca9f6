from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage import fs
from storage.errors import InputError
from storage.lock import LOCK, run_lock

HOLDER = """
import sys
from storage.lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
TRY = """
import sys
from storage.errors import InputError
from storage.lock import run_lock
try:
    with run_lock(sys.argv[1]):
        print("held")
except InputError as error:
    print(error)
"""


@contextmanager
def holder(run: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def attempt(run: str) -> str:
    done = subprocess.run([sys.executable, "-c", TRY, run], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_a_second_process_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    with holder(str(tmp_path / "first")) as process:
        line = attempt(str(tmp_path / "first"))
        assert f"process {process.pid} on {socket.gethostname()}" in line
        assert line.startswith("first: ")
        assert "\n" not in line
        assert attempt(str(tmp_path / "second")) == "held"
        process.communicate("\n")
        assert attempt(str(tmp_path / "first")) == "held"


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with holder(str(tmp_path)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        assert attempt(str(tmp_path)) == "held"


def test_a_child_process_does_not_keep_its_parents_run(tmp_path: Path) -> None:
    with run_lock(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert attempt(str(tmp_path)) == "held"
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize("scheme", ["", "memory://lock"])
def test_the_run_is_free_and_clean_afterwards(tmp_path: Path, scheme: str) -> None:
    run = scheme + str(tmp_path / "run")
    with run_lock(run):
        assert fs.exists(fs.join(run, LOCK))
        with pytest.raises(InputError, match=f"process {os.getpid()}"), run_lock(run):
            pass
    assert not fs.exists(fs.join(run, LOCK))
    with pytest.raises(ZeroDivisionError), run_lock(run):
        raise ZeroDivisionError
    assert not fs.exists(fs.join(run, LOCK))


def test_in_a_store_without_conditional_writes_a_lock_stands_and_the_error_names_it(tmp_path: Path) -> None:
    run = f"memory://lock{tmp_path}"
    fs.write_text(fs.join(run, LOCK), json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))
    with pytest.raises(InputError, match=f"process 1 on elsewhere, .*remove {fs.join(run, LOCK)}"), run_lock(run):
        pass
    assert fs.exists(fs.join(run, LOCK))
