"""Ingest on a real local Ray: any mix of data sets in, one slice store out, the same whoever did the work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from actors.ingest import IngestReport, VendorCount, ingest
from storage.errors import InputError
from storage.layouts import LayoutOptions, same_images
from storage.lock import run_lock
from storage.slices.store import SliceStore

Write = Callable[..., Path]
Study = Callable[..., Any]
Build = Callable[[dict[str, tuple[str, str]]], Path]

pytestmark = pytest.mark.usefixtures("ray_local")

PEOPLE = {f"A{n}": ("Training/Labeled", "A") for n in range(9)} | {
    "C0": ("Training/Unlabeled", "C"),
    "D0": ("Testing", "D"),
}


@pytest.fixture
def table_folder(tmp_path: Path, write_nifti: Write, study: Study) -> Path:
    """A table of one unlabelled subject, g, of another vendor."""
    image, _ = study(99)
    write_nifti(tmp_path / "table" / "g.nii.gz", image)
    (tmp_path / "table" / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es\ng,g.nii.gz,,GE,c,0,1\n")
    return tmp_path / "table"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_subject_of_every_folder_comes_in(mnms_folder: Build, table_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    data = [str(mnms_folder(PEOPLE)), str(table_folder)]
    report = ingest(data, str(tmp_path / "run"), progress=lambda *call: calls.append(call))
    assert report == IngestReport(
        12,
        72,
        {"A": VendorCount(9, 54, 54), "C": VendorCount(1, 6, 0), "D": VendorCount(1, 6, 6), "GE": VendorCount(1, 6, 0)},
        [],
    )
    assert calls == [("ingest", n, 12) for n in range(1, 13)]
    store = SliceStore.open(str(tmp_path / "run"))
    assert sorted(set(store.column("subject"))) == sorted([*PEOPLE, "g"])
    assert store.column("slice_id").tolist() == list(range(72))
    assert {v.vendor for v in store.volumes("validation")} == {"A"}
    assert {v.subject for v in store.volumes("test")} == {"D0"}
    assert store.layouts == LayoutOptions()


def test_the_store_is_the_same_bytes_for_any_number_of_workers(
    mnms_folder: Build, table_folder: Path, tmp_path: Path
) -> None:
    data = [str(mnms_folder(PEOPLE)), str(table_folder)]
    ingest(data, str(tmp_path / "one"), num_cpus=4)
    ingest(data[::-1], str(tmp_path / "four"), num_cpus=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_a_second_ingest_reads_only_what_is_missing(mnms_folder: Build, tmp_path: Path) -> None:
    folder, run = str(mnms_folder(PEOPLE)), tmp_path / "run"
    ingest([folder], str(run))
    whole = contents(run)
    (run / "slices.parquet").unlink()  # as if killed: two subjects unfinished, one of them not begun
    (run / "slices.zarr" / "A3" / "frames.json").unlink()
    shutil.rmtree(run / "slices.zarr" / "A5")
    finished = {p: p.stat().st_mtime_ns for p in run.rglob("slices.zarr/*/*/c/**/*") if "A3" not in str(p)}
    ingest([folder], str(run))
    assert contents(run) == whole
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())


def test_a_broken_subject_is_skipped_with_its_reason_and_the_rest_goes_on(mnms_folder: Build, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    image = folder / "OpenDataset" / "Training" / "Labeled" / "A4" / "A4_sa.nii.gz"
    image.write_bytes(image.read_bytes()[:500])
    report = ingest([str(folder)], str(tmp_path / "run"))
    assert report.subjects == 10
    assert [(s.subject, s.file) for s in report.skipped] == [("A4", "A4_sa.nii.gz")]
    assert (tmp_path / "run" / "skipped.csv").read_text() == (
        "subject,file,reason,remedy\nA4,A4_sa.nii.gz,is damaged or cut off: it cannot be read to the end,"
        "copy the file again\n"
    )
    with pytest.raises(InputError, match=r"^A4, A4_sa\.nii\.gz: is damaged or cut off.*; copy the file again$"):
        ingest([str(folder)], str(tmp_path / "strict"), strict=True)
    assert not (tmp_path / "strict" / "slices.parquet").exists()


def test_a_phase_beyond_the_last_frame_is_skipped(mnms_folder: Build, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    (table,) = folder.glob("*.csv")
    table.write_text(table.read_text().replace(",A4,some,A,1,0,2,", ",A4,some,A,1,0,4,"))
    report = ingest([str(folder)], str(tmp_path / "run"))
    assert [(s.subject, s.reason) for s in report.skipped] == [("A4", "has no frame 4: its frames are 0 to 3")]


def test_of_two_subjects_with_one_name_the_first_folders_stays(
    mnms_folder: Build, table_folder: Path, tmp_path: Path
) -> None:
    table = table_folder / "subjects.csv"
    table.write_text(table.read_text().replace("\ng,", "\nA1,"))
    folder = str(mnms_folder(PEOPLE))
    report = ingest([folder, str(table_folder)], str(tmp_path / "run"))
    assert [(s.subject, s.file, s.reason) for s in report.skipped] == [
        ("A1", "table", "a subject of that name came in from mnms")
    ]
    assert "GE" not in report.by_vendor


def test_the_same_image_under_two_names_enters_once(mnms_folder: Build, table_folder: Path, tmp_path: Path) -> None:
    folder = mnms_folder(PEOPLE)
    shutil.copy(folder / "OpenDataset" / "Testing" / "D0" / "D0_sa.nii.gz", table_folder / "g.nii.gz")
    report = ingest([str(folder), str(table_folder)], str(tmp_path / "run"))
    assert [(s.subject, s.reason) for s in report.skipped] == [("g", "has an image that is also subject D0's")]
    assert report.subjects == 11
    assert same_images({"b": ["1", "2"], "a": ["2"], "c": ["3", "3"]})[0].subject == "b"


def test_nothing_that_can_enter_is_an_error_with_the_first_reason(table_folder: Path, tmp_path: Path) -> None:
    (table_folder / "g.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"g, g\.nii\.gz: is not a NIfTI file \(no subject came in\)"):
        ingest([str(table_folder)], str(tmp_path / "run"))
    with pytest.raises(InputError, match="no such folder"):
        ingest([str(table_folder), str(tmp_path / "absent")], str(tmp_path / "run"))


def test_a_task_that_no_machine_can_run_fails_at_once(table_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a subject needs 64 CPUs, the cluster has 4"):
        ingest([str(table_folder)], str(tmp_path / "run"), num_cpus=64)


def test_every_trap_of_the_release_comes_in_right(mnms_folder: Build, tmp_path: Path) -> None:
    folder = mnms_folder(
        {
            "A1": ("Training/Labeled", "A"),
            "A2": ("Training/Labeled", "A"),
            "B1": ("Validation", "B"),
            "C1": ("Training/Unlabeled", "C"),
            "D1": ("Testing", "D"),
        }
    )
    data = folder / "OpenDataset"
    small, large = (192, 200, 6, 4), (512, 480, 6, 4)
    # Floats up to 300 on a large matrix, the header's cosines skewed; integers up to 7,000 on a small one.
    rescanned(data / "Training" / "Labeled" / "A1", large, 0.8, 300.0, np.float32, skewed=True)
    rescanned(data / "Training" / "Labeled" / "A2", small, 1.64, 7000.0, np.int16)
    rescanned(data / "Testing" / "D1", small, 0.79, 7000.0, np.uint16)
    (data / "Testing" / "B1").mkdir()  # a mask in another split's folder
    shutil.move(data / "Validation" / "B1" / "B1_sa_gt.nii.gz", data / "Testing" / "B1")
    assert (data / "Training" / "Unlabeled" / "C1" / "C1_sa_gt.nii.gz").exists()  # and ED = ES = 0 in the table

    report = ingest([str(folder)], str(tmp_path / "run"))
    assert report.skipped == [] and report.subjects == 5
    store = SliceStore.open(str(tmp_path / "run"))
    volumes = {(v.subject, v.frame): v for v in store.volumes()}
    assert {key: (v.phase, v.labelled, v.split) for key, v in volumes.items()} == {
        ("A1", 0): ("ED", True, "validation"),
        ("A1", 2): ("ES", True, "validation"),
        ("A2", 0): ("ED", True, "train"),
        ("A2", 2): ("ES", True, "train"),
        ("B1", 0): ("ED", True, "excluded"),
        ("B1", 2): ("ES", True, "excluded"),
        ("C1", 0): ("-", False, "train"),
        ("C1", 2): ("-", False, "train"),
        ("D1", 0): ("ED", True, "test"),
        ("D1", 2): ("ES", True, "test"),
    }
    for name, side, most, step in (("A1", 0.8, 300.0, 300 / 65535), ("A2", 1.64, 7000.0, 0), ("D1", 0.79, 7000.0, 0)):
        (path,) = data.rglob(f"{name}_sa.nii.gz")
        volume = volumes[name, 2]
        image, mask = store.volume(volume.rows)
        assert volume.spacing == pytest.approx((8.0, side, side))
        assert np.abs(image - np.asarray(nib.load(path).dataobj)[..., 2].T).max() <= step
        assert most * 0.9 < image.max() <= most * (1 + 1e-6)
        assert np.array_equal(mask, np.asarray(nib.load(str(path).replace("_sa.", "_sa_gt.")).dataobj)[..., 2].T)
    assert not any(store.mask(i).any() for v in volumes.values() if v.subject == "C1" for i in v.rows)


def rescanned(
    folder: Path, shape: tuple[int, int, int, int], side: float, most: float, dtype: Any, skewed: bool = False
) -> None:
    """Another image and mask in a subject's folder: matrix and frames, pixel side in mm, largest value, type."""
    image = np.random.default_rng(sum(folder.name.encode())).random(shape) * most
    mask = np.zeros(shape, np.uint8)
    x, y = shape[0] // 2, shape[1] // 2
    for frame in (0, 2):
        mask[x - 20 : x + 20, y - 20 : y + 20, :, frame] = 2
        mask[x - 12 : x + 12, y - 12 : y + 12, :, frame] = 1
        mask[x - 40 : x - 20, y - 15 : y + 15, :, frame] = 3
    affine = np.diag([side, side, 8.0, 1.0])
    for ending, data in (("", image.astype(dtype)), ("_gt", mask)):
        written = nib.Nifti1Image(data, affine)
        if skewed:
            written.header["srow_x"] = [side, 0.1 * side, 0, 5]  # the x and y axes are not at right angles
        nib.save(written, folder / f"{folder.name}_sa{ending}.nii.gz")


@pytest.mark.slow
def test_an_ingest_goes_on_after_a_kill_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    count, run, data = 150, tmp_path / "run", tmp_path / "data"
    write_table(data, count)
    with ingest_in_a_process(data, run) as driver:
        while len(done := list(run.glob("slices.zarr/*/frames.json"))) < 3:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.001)
        kill(driver.pid)
    finished = {p.parent for p in run.glob("slices.zarr/*/frames.json")}
    assert len(done) <= len(finished) < count and not (run / "slices.parquet").exists()
    times = {p: p.stat().st_mtime_ns for folder in finished for p in folder.rglob("*")}

    with run_lock(str(run)):
        report = ingest([str(data)], str(run))
    assert report.subjects == count and report.skipped == []
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    ingest([str(data)], str(tmp_path / "undisturbed"))
    (run / "config.yaml").unlink()  # the command line's, not the store's
    assert contents(run) == contents(tmp_path / "undisturbed")


def write_table(folder: Path, count: int) -> None:
    """Unlabelled volumes, all different."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = ["subject,image,mask,vendor,centre,ed,es"]
    for number in range(count):
        volume = rng.integers(0, 900, (128, 128, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.diag([1.5, 1.5, 8, 1])), folder / f"{number:03d}.nii")
        lines.append(f"{number:03d},{number:03d}.nii,,X,c,,")
    (folder / "subjects.csv").write_text("\n".join(lines) + "\n")


@contextmanager
def ingest_in_a_process(data: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line with a Ray of its own; killed with it at the end, whatever happens."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "experiments", "ingest", str(data), "--run", str(run)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    with driver:
        try:
            yield driver
        finally:
            kill(driver.pid)


def kill(pid: int) -> None:
    """SIGKILL for a process and all that came from it; they are gone when it returns."""
    family = [pid, *descendants(pid)]
    for process in family:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(map(lives, family)):
        time.sleep(0.005)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, tasks.read_text().split())
    return children + [found for child in children for found in descendants(child)]


def inside(region: Any, around: Any) -> float:
    """Share of the region's pixels whose four neighbours all lie in the region or in `around`."""
    both = np.pad(region | around, 1)
    held = both[:-2, 1:-1] & both[2:, 1:-1] & both[1:-1, :-2] & both[1:-1, 2:]
    return float(held[region].mean())


def test_real_data_come_in_with_the_ventricles_in_their_places(
    real_acdc: Path, real_sunnybrook: Path, tmp_path: Path
) -> None:
    report = ingest([str(real_acdc), str(real_sunnybrook)], str(tmp_path / "run"), LayoutOptions())
    assert [s.subject for s in report.skipped] == ["patient001"]
    assert {v: c.subjects for v, c in report.by_vendor.items()} == {"GE": 4, "Siemens": 29}
    store = SliceStore.open(str(tmp_path / "run"))
    assert store.column("labelled").tolist() == (store.column("vendor") == "Siemens").tolist()
    for volume in (v for v in store.volumes() if v.labelled):
        image, mask = store.volume(volume.rows)
        whole = [z for z in range(len(mask)) if len(np.unique(mask[z])) == 4]
        middle = whole[len(whole) // 2]  # the slice amid those that show all three
        lv, myo, rv = (mask[middle] == label for label in (1, 2, 3))
        assert inside(lv, myo) > 0.95, volume  # the left ventricle lies inside its wall, the right one does not
        assert inside(rv, myo) < 0.95, volume
        # Right side up: the patient's right is on the left, and blood is brighter than muscle.
        assert np.nonzero(rv)[1].mean() < np.nonzero(lv)[1].mean(), volume
        assert image[middle][lv].mean() > image[middle][myo].mean(), volume
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "slices.zarr",
        "slices.parquet",
        "slices.json",
        "skipped.csv",
        "splits.csv",
    }


@pytest.mark.slow
def test_subjects_that_no_node_has_room_for_are_given_up(
    no_room: None, tmp_path: Path, mnms_folder: Callable[..., Path]
) -> None:
    import ray

    folder = mnms_folder({"A0A0A0": ("Training/Labeled", "A")})
    command = [sys.executable, "-m", "experiments", "ingest", str(folder), "--run", str(tmp_path / "run")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [*command, "--set", "resources.wait_minutes=0.1"], env=environment, capture_output=True, text=True, timeout=300
    )
    needs = "1 CPU for a subject; the cluster has 4 CPUs, 0 free"
    assert re.search(rf"^ingest: waiting \d seconds for {needs}$", done.stderr, re.MULTILINE), done.stderr
    assert re.search(rf"^failed: ingest: waited \d seconds for {needs}; .*wait_minutes$", done.stderr, re.MULTILINE)
    assert done.returncode == 1
