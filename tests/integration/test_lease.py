"""Leases in a real S3 server (moto's, on loopback): lost owners, two at once, wrong clocks, stopped processes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import fsspec.config
import pytest
from typer.testing import CliRunner

from experiments.cli.main import app
from storage import conditional, fs, lease
from storage.errors import InputError, LeaseLostError, StageError
from storage.lock import LOCK, require_free, run_lock

LEASE_S = 4.0  # the least that the seconds in the store's answers allow
# Holds a run, on a host that has no process of ours, and does as it is told line by line.
HOLDER = f"""
import pickle, sys
from storage import fs, lease
from storage.errors import StageError
from storage.lock import run_lock
import fsspec.config
endpoint, run, elsewhere = sys.argv[1:]
fsspec.config.conf["s3"] = {{"endpoint_url": endpoint, "key": "me", "secret": "hidden"}}
lease.LEASE_S = {LEASE_S}
if elsewhere:
    lease._processes = lambda: elsewhere
try:
    with run_lock(run, print, lambda error: print(f"lost: {{error}}", flush=True)):
        print("held", flush=True)
        for line in sys.stdin:
            if line.startswith("write "):
                fs.write_text(fs.join(run, line.split()[1]), "by the first")
            elif line.startswith("fences"):
                print(pickle.dumps(lease.fences()).hex(), flush=True)
            else:
                break
            print("done", flush=True)
except StageError as error:
    print(f"failed: {{error}}", flush=True)
"""
# Works for an owner elsewhere: writes one file when it is told to.
WORKER = """
import pickle, sys
from storage import fs, lease
from storage.errors import StageError
import fsspec.config
endpoint, run, fences = sys.argv[1:]
fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "me", "secret": "hidden"}
print("ready", flush=True)
for line in sys.stdin:
    try:
        lease.under(pickle.loads(bytes.fromhex(fences)), fs.write_text, fs.join(run, line.strip()), "by a worker")
        print("done", flush=True)
    except StageError as error:
        print(f"failed: {error}", flush=True)
"""


class Process:
    """A process of ours that is told what to do line by line."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._in, self._out = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)
        self.pid = self._process.pid

    def say(self, line: str) -> None:
        print(line, file=self._in, flush=True)

    def hear(self) -> str:
        return self._out.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def s3(s3_proxy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The proxy, by which `s3://` goes in this process, and short leases."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_proxy.url, "key": "me", "secret": "hidden"})
    monkeypatch.setattr(lease, "LEASE_S", LEASE_S)
    s3_proxy.mend()
    yield s3_proxy
    s3_proxy.mend()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/leases/{request.node.name.replace('[', '-').replace(']', '')}"


@contextmanager
def holder(s3: Any, run: str, elsewhere: str = "another machine") -> Iterator[Process]:
    process = Process(HOLDER, s3.url, run, elsewhere)
    try:
        assert process.hear() == "held"
        yield process
    finally:
        process.end()


def test_a_look_refuses_a_living_owner_and_leaves_a_dead_ones_lock(s3: Any, run: str, tmp_path: Path) -> None:
    lock = fs.join(run, LOCK)
    with holder(s3, run) as process:
        command = ["ablate", "cpu", "--data", str(tmp_path), "--run", run, "--dry-run"]
        ended = CliRunner().invoke(app, command)
        assert str(ended.exception).startswith(f"{fs.base_name(run)}: is being worked on by process {process.pid} on ")
    before = conditional.look(lock)
    said: list[str] = []
    require_free(run, said.append)  # once the lease has run out
    after = conditional.look(lock)
    assert before is not None and after is not None and before.etag == after.etag
    assert len(said) == 1 and "waiting up to" in said[0]
    assert fs.list_names(run) == [LOCK]


def test_a_living_owner_is_not_succeeded_and_leaves_no_trace(s3: Any, run: str) -> None:
    told: list[str] = []
    with holder(s3, run) as process:
        with pytest.raises(InputError, match=f"process {process.pid} on "), run_lock(run, told.append):
            pass
        assert len(told) == 1 and f"process {process.pid} on " in told[0] and "waiting up to" in told[0]
        process.say("end")
        process.hear()
        with run_lock(run, told.append):
            fs.write_text(fs.join(run, "mine"), "")
    assert len(told) == 1
    assert fs.list_names(run) == ["mine"]


def test_a_lost_owner_is_succeeded_once_its_lease_has_run_out(s3: Any, run: str) -> None:
    told: list[str] = []
    with holder(s3, run) as process:
        process.send(signal.SIGKILL)
        with run_lock(run, told.append):
            fs.write_text(fs.join(run, "mine"), "")
    assert len(told) == 1
    removed = [method for method, path in s3.requests if method == "DELETE"]
    assert len(removed) == 1  # by the new owner, at its own end


def test_an_owner_that_is_gone_from_this_machine_is_succeeded_at_once(s3: Any, run: str) -> None:
    told: list[str] = []
    with holder(s3, run, elsewhere="") as process:
        process.end()
        with run_lock(run, told.append):
            pass
    assert told == []


@pytest.mark.parametrize("expired", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_several_that_come_at_once_one_succeeds(s3: Any, run: str, expired: bool) -> None:
    if expired:
        with holder(s3, run) as process:
            process.send(signal.SIGKILL)
        time.sleep(LEASE_S + 2)
    outcomes: list[str] = []
    begin, over = threading.Barrier(4), threading.Event()

    def come() -> None:
        begin.wait()
        try:
            with run_lock(run, lambda line: None):
                outcomes.append("held")
                over.wait()
        except InputError as error:
            outcomes.append(error.problem.partition(" by ")[0])
            if len(outcomes) == 4:
                over.set()

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["is being worked on"] * 3]


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_hours_off_neither_ends_nor_prolongs_a_lease(s3: Any, run: str, hours: int) -> None:
    s3.clock_s = hours * 3600
    with holder(s3, run) as process:
        with pytest.raises(InputError, match=f"process {process.pid} on "), run_lock(run):
            pass
        process.say("write first")
        assert process.hear() == "done"
        process.send(signal.SIGKILL)
        with run_lock(run):
            fs.write_text(fs.join(run, "second"), "")
    assert fs.list_names(run) == ["first", "second"]


@pytest.mark.slow
def test_a_process_that_was_stopped_past_its_lease_writes_nothing_when_it_wakes_up(s3: Any, run: str) -> None:
    with holder(s3, run) as process:
        process.say("write before")
        assert process.hear() == "done"
        process.send(signal.SIGSTOP)
        with run_lock(run):
            process.say("write after")
            process.send(signal.SIGCONT)
            lines = sorted([process.hear(), process.hear()])
            assert lines[0].startswith("failed: ") and lines[1].startswith("lost: ")
            assert all("taken it over" in line and f"process {lease.os.getpid()} on" in line for line in lines)
            assert process.hear() == ""
            fs.write_text(fs.join(run, "mine"), "")  # and this lease is untouched
    assert fs.list_names(run) == ["before", "mine"]


@pytest.mark.slow
def test_a_stopped_owners_workers_wait_and_go_on_or_stop_with_it(s3: Any, run: str) -> None:
    with holder(s3, run) as process:
        process.say("fences")
        worker = Process(WORKER, s3.url, run, process.hear())
        assert (process.hear(), worker.hear()) == ("done", "ready")
        worker.say("one")
        assert worker.hear() == "done"
        process.send(signal.SIGSTOP)
        time.sleep(LEASE_S)
        worker.say("two")
        time.sleep(1)
        assert fs.list_names(run) == [LOCK, "one"]  # it does not know who will own the run
        process.send(signal.SIGCONT)
        assert worker.hear() == "done"
        process.send(signal.SIGSTOP)
        with run_lock(run):
            worker.say("three")
            assert worker.hear().startswith("failed: ")
        worker.end()
    assert fs.list_names(run) == ["one", "two"]


@pytest.mark.slow
def test_an_owner_whose_store_was_away_for_longer_than_a_lease_goes_on(
    s3: Any, s3_impatient: dict[str, Any], run: str
) -> None:
    found: list[StageError] = []
    with run_lock(run, lost=found.append):
        s3.fault = lambda number, method: "503"
        time.sleep(LEASE_S + 2)
        s3.mend()
        fs.write_text(fs.join(run, "after"), "")
    assert found == []
    assert fs.list_names(run) == ["after"]


@pytest.mark.parametrize("so", ["ignores_conditions", "knows_no_conditions"])
def test_a_server_without_conditions_is_found_out_and_its_lock_stands(s3: Any, run: str, so: str) -> None:
    setattr(s3, so, True)
    with holder(s3, run) as process:
        process.say("write first")
        assert process.hear() == "done"
        process.send(signal.SIGKILL)
    refused = f"process {process.pid} .*no conditional writes.*remove {re.escape(run)}/.lock"
    with pytest.raises(InputError, match=refused), run_lock(run):
        pass
    fs.remove(fs.join(run, LOCK))
    with run_lock(run):
        pass
    # a store that refuses a conditional removal keeps the object, which says that it is released
    assert fs.list_names(run) == (["first"] if so == "ignores_conditions" else [".lock", "first"])
    with run_lock(run):
        pass


def test_what_is_written_names_its_owner_and_other_places_ask_nobody(s3: Any, run: str) -> None:
    def owner(name: str) -> Any:
        with fs.remote(fs.join(run, name)) as (store, path):
            bucket, key, _ = store.split_path(path)
            return store.call_s3("head_object", Bucket=bucket, Key=key)["Metadata"].get("owner")

    fs.write_text(fs.join(run, "before"), "")
    with run_lock(fs.join(run, "a")):
        (fence,) = lease.fences()
        fs.write_text(fs.join(run, "a", "file"), "")
        asked = len(s3.requests)
        fs.write_text(fs.join(run, "ab", "file"), "")
        assert [method for method, _ in s3.requests[asked:]] == ["PUT"]
        assert owner("a/file") == fence.token
    assert lease.fences() == ()
    assert owner("before") is None and owner("ab/file") is None


def test_a_lock_that_somebody_removed_is_lost(s3: Any, run: str) -> None:
    found: list[StageError] = []
    with pytest.raises(LeaseLostError, match="taken it over"), run_lock(run, lost=found.append):
        seen = conditional.look(fs.join(run, LOCK))
        assert seen is not None
        conditional.remove(fs.join(run, LOCK), seen.etag)
        while not lease.is_lost(run):
            time.sleep(0.05)
        fs.write_text(fs.join(run, "late"), "")
    assert len(found) == 1
    assert not fs.exists(run)
