"""Places that cannot be written: one line, before any work is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.experiments.cli.test_main import cardiomix

ABSENT = "/proc/nope"  # nobody can make it, root neither


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ingest", ".", "--run", f"{ABSENT}/run"), f"--run {ABSENT}/run, in /proc: cannot be written (No such file"),
        (("ingest", ".", "--run", "file"), "file: cannot be written (Not a directory)"),
        (("ablate", "cpu", "--data", ".", "--run", "file/run"), "file: cannot be written (Not a directory)"),
        (
            ("ablate", "cpu", "--data", ".", "--run", ABSENT, "--dry-run"),
            f"--run {ABSENT}, in /proc: cannot be written",
        ),
        (("ablate", "cpu", "--data", ".", "--run", ABSENT), f"--run {ABSENT}, in /proc: cannot be written"),
        (("predict", "model", "image", "--out", "file"), "--out file: cannot be written (Not a directory)"),
        (("predict", "model", "image", "--out", ABSENT), f"--out {ABSENT}, in /proc: cannot be written"),
        (("export-model", "model", "--onnx", f"{ABSENT}/x.onnx"), f"--onnx {ABSENT}/x.onnx, in /proc: cannot be"),
        (("inspect", ".", "--out", "file/page.html"), "--out file/page.html"),
        (("inspect", ".", "--out", "."), "--out .: is a folder; name a file"),
        (("phantom", ABSENT), f"{ABSENT}, in /proc: cannot be written"),
        (("export", ABSENT, "--run", "r"), f"{ABSENT}, in /proc: cannot be written"),
        (("compare", "r", "--csv", f"{ABSENT}/t.csv"), f"--csv {ABSENT}/t.csv, in /proc: cannot be written"),
        (("preview", "--run", "r", "--out", f"{ABSENT}/p.png"), f"--out {ABSENT}/p.png, in /proc: cannot be written"),
        (("bank", "merge", "a", "b", f"{ABSENT}/c"), f"{ABSENT}/c, in /proc: cannot be written"),
        (("bank", "export-styles", "a", f"{ABSENT}/s"), f"{ABSENT}/s, in /proc: cannot be written"),
        (
            ("transfer", "cpu", "--data", ".", "--vendors", "A", "--arms", "unet_ra", "--out", ABSENT),
            f"--out {ABSENT}, in /proc: cannot be written",
        ),
    ],
)
def test_a_place_for_results_that_cannot_be_written_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = cardiomix(capsys, *arguments)
    assert done.status == 2, done.err
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("TMPDIR", "/tmp/" + "long" * 20, "bytes too long for Ray's sockets; set RAY_TMPDIR to a short path"),
        ("RAY_TMPDIR", "/tmp/" + "long" * 20, "bytes too long for Ray's sockets; set RAY_TMPDIR to a short path"),
        ("TMPDIR", ABSENT, "in /proc: cannot be written (No such file or directory); set RAY_TMPDIR"),
        ("RAY_TMPDIR", ABSENT, "in /proc: cannot be written (No such file or directory); set RAY_TMPDIR"),
        ("SHARED", ABSENT, f"{ABSENT}: is not there, and Ray's object store needs it; mount it"),
    ],
)
def test_a_place_for_ray_that_is_no_use_is_one_line_before_the_run_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    folder: str,
    says: str,
) -> None:
    for other in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    if name == "SHARED":
        monkeypatch.setattr("actors.ray_start.SHARED", folder)
    else:
        monkeypatch.setenv(name, folder)
    done = cardiomix(capsys, "ablate", "demo", "--run", str(tmp_path / "run"))
    assert done.status == 2, done.err
    assert says in done.err
    assert name == "SHARED" or done.err.startswith(f"error: {name}={folder}")
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


FULL = "mount -t tmpfs -o size=64k tmpfs {0} && { head -c 100000 /dev/zero > {0}/fill 2>/dev/null; true; }"
READ_ONLY = "mount -t tmpfs -o ro tmpfs {0}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mount", "problem"), [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")]
)
@pytest.mark.parametrize("place", ["run", "out", "TMPDIR", "RAY_TMPDIR", "shm"])
def test_a_full_or_read_only_disk_is_one_line(tmp_path: Path, mount: str, problem: str, place: str) -> None:
    disk = Path("/dev/shm") if place == "shm" else Path(tempfile.mkdtemp(dir="/tmp"))  # short enough for sockets
    words = {
        "run": f"ingest {tmp_path} --run {disk}/run",
        "out": f"predict model image --out {disk}/out",
    }.get(place, f"ablate demo --run {tmp_path}/run")
    script = mount.replace("{0}", str(disk)) + f' && exec "{sys.executable}" -m experiments {words}'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("this user may not mount")
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")}
    if place in ("TMPDIR", "RAY_TMPDIR"):
        environment[place] = str(disk)
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if place != "shm":
        disk.rmdir()
    assert done.returncode == 2, done.stderr
    assert f"{disk}" in done.stderr and f"cannot be written ({problem})" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_full_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "experiments", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "failed: output: No space left on device; mend that, then give the same command again\n"
