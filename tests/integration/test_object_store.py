"""Ingest from and into a real S3 server (moto's, on loopback): what comes out, and what a failing server does to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import fsspec
import fsspec.config
import numpy as np
import pytest

from pipeline.phantom import PhantomConfig, write_phantom
from storage import fs
from storage.errors import InputError, StageError
from storage.layouts import LayoutOptions, collect
from storage.lock import run_lock
from storage.nifti.file import NiftiFile
from storage.nifti.write import write_volume
from storage.slices.store import SliceStore
from storage.slices.writer import write_subject
from tests.integration.s3_faults import FAULTS, every_fourth

BUCKET = "s3://bucket"
SOURCES = (f"{BUCKET}/phantom", f"{BUCKET}/table")
PHANTOM = PhantomConfig(labelled_a=1, labelled_b=1, unlabelled_c=1, testing=0, frames=2, slices=(2, 3), field_scale=0.6)
# Several ingests in one Ray: each line on stdin is one, its data and last its run.
DRIVER = """
import json, sys
from actors.ingest import ingest
from actors.ray_start import start_ray
start_ray()
for line in sys.stdin:
    *data, run = json.loads(line)
    report = ingest(data, run)
    print(json.dumps([report.subjects, report.slices, len(report.skipped)]), flush=True)
"""
Ingest = Callable[..., list[int]]


def environment(endpoint: str) -> dict[str, str]:
    """What a user sets for an S3 of his own, and nothing of the one that runs the tests."""
    foreign = ("AWS_", "FSSPEC_", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | settings


def cardiomix(endpoint: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(endpoint), cwd=cwd)


@pytest.fixture(scope="module")
def ingest(s3_proxy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingest]:
    """`ingest(data…, run)` in a process of its own, whose Ray workers know the proxy: [subjects, slices, skipped]."""
    command = [sys.executable, "-c", DRIVER]
    driver = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(s3_proxy.url),
        cwd=tmp_path_factory.mktemp("driver"),
    )
    questions, answers = cast(TextIO, driver.stdin), cast(TextIO, driver.stdout)

    def run(*data_and_run: str) -> list[int]:
        print(json.dumps(data_and_run), file=questions, flush=True)
        counts: list[int] = json.loads(answers.readline())
        return counts

    yield run
    questions.close()
    driver.wait()


@pytest.fixture(scope="module")
def data(s3_proxy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A phantom of three subjects and a table of one, in folders; and the same in the bucket, `phantom` and `table`."""
    folder = tmp_path_factory.mktemp("data")
    write_phantom(folder / "phantom", PHANTOM)
    image = np.random.default_rng(0).integers(0, 900, (3, 2, 20, 24))
    write_volume(str(folder / "table" / "images" / "g.nii.gz"), image, (8.0, 1.4, 1.4), np.int16)
    (folder / "table" / "subjects.csv").write_text(
        "subject,image,mask,vendor,centre,ed,es\ng,images/g.nii.gz,,GE,c,0,1\n"
    )
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fs.write_bytes(fs.join(BUCKET, str(path.relative_to(folder))), path.read_bytes())
    return folder / "phantom", folder / "table"


@pytest.fixture(scope="module")
def local_run(data: tuple[Path, Path], ingest: Ingest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in a folder, made from folders."""
    run = str(tmp_path_factory.mktemp("runs") / "run")
    assert ingest(*map(str, data), run) == [4, 22, 0]
    return run


@pytest.fixture(scope="module")
def s3_run(data: tuple[Path, Path], ingest: Ingest) -> str:
    """A run in the bucket, made from the bucket."""
    assert ingest(*SOURCES, f"{BUCKET}/run") == [4, 22, 0]
    return f"{BUCKET}/run"


def arrays(run: str) -> dict[str, bytes]:
    """Every file of a run's arrays, but for those that say of which files the arrays were made."""
    store = fsspec.filesystem("file" if fs.is_local(run) else "s3", use_listings_cache=False)
    root = fs.join(run, "slices.zarr").removeprefix("s3://")
    names = (name.removeprefix(f"{root}/") for name in store.find(root))
    return {name: store.cat_file(f"{root}/{name}") for name in names if name.count("/") != 1}


def objects(run: str) -> dict[str, tuple[str, str]]:
    """ETag and time of every object of a run's arrays."""
    store = fsspec.filesystem("s3", use_listings_cache=False)
    found = store.find(fs.join(run, "slices.zarr"), detail=True)
    return {name: (facts["ETag"], str(facts["LastModified"])) for name, facts in found.items()}


def assert_same(run: str, expected: str) -> None:
    assert arrays(run) == arrays(expected)
    for name in ("slices.parquet", "skipped.csv", "splits.csv"):
        assert fs.read_bytes(fs.join(run, name)) == fs.read_bytes(fs.join(expected, name))


def test_ingest_within_a_bucket_gives_the_bytes_of_ingest_within_folders(s3_run: str, local_run: str) -> None:
    assert len(arrays(s3_run)) == 4 * 4 + 1
    assert_same(s3_run, local_run)
    assert fs.list_names(s3_run) == fs.list_names(local_run)  # and no lock


@pytest.mark.slow
def test_ingest_by_the_command_line_leaves_nothing_on_the_machine(
    data: tuple[Path, Path], local_run: str, s3_proxy: Any, tmp_path: Path
) -> None:
    run = f"{BUCKET}/by_command"
    done = cardiomix(s3_proxy.url, tmp_path, "ingest", *SOURCES, "--run", run)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert_same(run, local_run)
    assert fs.list_names(run) == sorted([*fs.list_names(local_run), "config.yaml"])  # and no lock


def test_a_slice_store_in_a_bucket_gives_the_images_and_masks_of_one_in_a_folder(s3_run: str, local_run: str) -> None:
    there, here = SliceStore.open(s3_run), SliceStore.open(local_run)
    assert len(there) == len(here) == 22
    assert {"A", "B", "C", "GE"} == set(there.column("vendor"))
    for i in range(len(here)):
        assert np.array_equal(there.image(i), here.image(i))
        assert np.array_equal(there.mask(i), here.mask(i))
    assert any(here.mask(i).any() for i in range(len(here)))


def test_a_second_ingest_reads_no_image_and_writes_no_array(s3_run: str, ingest: Ingest, s3_proxy: Any) -> None:
    before = objects(s3_run)
    s3_proxy.mend()
    assert ingest(*SOURCES, s3_run) == [4, 22, 0]
    assert objects(s3_run) == before
    # A header is read, of images whose table does not say which frames they have.
    opened = {path for method, path in s3_proxy.requests if method == "GET" and path.endswith(".nii.gz")}
    assert len(opened) == 2 and not any("/Labeled/" in path for path in opened)
    written = [path for method, path in s3_proxy.requests if method == "PUT"]
    assert sorted(map(fs.base_name, written)) == ["skipped.csv", "slices.parquet", "splits.csv"]


@pytest.mark.slow
def test_a_server_that_fails_every_fourth_request_loses_nothing(
    local_run: str, data: tuple[Path, Path], ingest: Ingest, s3_proxy: Any
) -> None:
    failed: list[str] = []
    s3_proxy.fault = every_fourth(failed)
    try:
        assert ingest(*SOURCES, f"{BUCKET}/shaky") == [4, 22, 0]
    finally:
        s3_proxy.mend()
    assert set(failed) == set(FAULTS)
    assert_same(f"{BUCKET}/shaky", local_run)


def test_an_image_whose_server_goes_away_is_not_called_damaged(
    data: tuple[Path, Path], s3_proxy: Any, s3_impatient: dict[str, Any]
) -> None:
    with NiftiFile(f"{BUCKET}/table/images/g.nii.gz") as file:
        assert file.frame(1).shape == (2, 20, 24)
    noise = np.random.default_rng(0).integers(-30000, 30000, (40, 200, 200), dtype=np.int16)  # more than one block
    write_volume(f"{BUCKET}/large.nii.gz", noise, (8.0, 1.4, 1.4), np.int16)
    with NiftiFile(f"{BUCKET}/large.nii.gz") as file:
        s3_proxy.fault = lambda number, method: "503"
        with pytest.raises(StageError, match=r"large\.nii\.gz: the object store failed"):
            file.frame(None)


@pytest.mark.slow
def test_whenever_the_server_goes_away_no_subject_is_skipped(
    data: tuple[Path, Path], s3_proxy: Any, s3_impatient: dict[str, Any]
) -> None:
    def ingest_subjects(run: str) -> int:
        subjects, skipped = collect([SOURCES[1]], LayoutOptions())
        assert skipped == []
        for subject in subjects:
            write_subject(run, subject)
        return len(subjects)

    s3_proxy.mend()
    assert ingest_subjects(f"{BUCKET}/unhurried") == 1
    needed = len(s3_proxy.requests)
    assert needed > 20
    for answered in range(needed):
        s3_proxy.mend()
        s3_proxy.fault = lambda number, method, last=answered: "503" if len(s3_proxy.requests) > last else None
        with pytest.raises(StageError):
            ingest_subjects(f"{BUCKET}/after{answered}")


def test_a_lock_is_held_though_the_answer_to_taking_it_was_lost(s3_proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_proxy.url, "key": "me", "secret": "hidden"})
    monkeypatch.setattr("storage.lease.LEASE_S", 4.0)  # a second owner sees within a fifth of it that the first lives
    lost = iter(["no answer"])
    s3_proxy.fault = lambda number, method: next(lost, None) if method == "PUT" else None
    with run_lock(f"{BUCKET}/locked"):
        assert next(lost, None) is None
        with pytest.raises(InputError, match=f"process {os.getpid()}"), run_lock(f"{BUCKET}/locked"):
            pass
    assert not fs.exists(f"{BUCKET}/locked/.lock")
    s3_proxy.mend()


def test_absent_data_are_named(s3_endpoint: str) -> None:
    with pytest.raises(InputError, match=r"^absent: no such folder"):
        collect([f"{BUCKET}/absent"], LayoutOptions())
    fs.write_text(f"{BUCKET}/gap/subjects.csv", "subject,image,mask,vendor,centre,ed,es\ng,g.nii.gz,,GE,c,0,1\n")
    subjects, skipped = collect([f"{BUCKET}/gap"], LayoutOptions())
    assert (subjects, [(s.subject, s.file, s.reason) for s in skipped]) == ([], [("g", "g.nii.gz", "no such file")])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("ingest", SOURCES[0], "--run", "s3://absent/run"), 2, "error: s3://absent/run/config.yaml: there is no such"),
        (("status", "--run", f"{BUCKET}/absent"), 2, "no such run configuration"),
        (("ingest", SOURCES[0], "--run", f"{BUCKET}/run"), 1, "failed: s3://bucket/run/config.yaml: the object store"),
    ],
    ids=["absent bucket", "absent run", "dead endpoint"],
)
def test_what_is_absent_or_dead_is_one_line_on_the_command_line(
    arguments: tuple[str, ...], status: int, message: str, s3_endpoint: str, tmp_path: Path
) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        done = cardiomix(dead if status == 1 else s3_endpoint, tmp_path, *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
