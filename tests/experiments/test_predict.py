from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from pipeline.inference.find_studies import find_studies
from pipeline.inference.study import guess_phases
from storage.errors import InputError
from tests.tiny_networks import volume_zhw, write_cine, write_unet

Done = subprocess.CompletedProcess[str]


def cardiomix(*arguments: str | Path, cwd: Path) -> Done:
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd)


def write_frame(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume_zhw(seed).transpose(2, 1, 0), np.diag([1.2, 1.4, 8.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies as they come: a cine, ACDC's frames with their masks, and a file that breaks off."""
    place = tmp_path_factory.mktemp("studies") / "in"
    write_cine(place / "cine.nii.gz", 0)
    for frame in (1, 12):
        write_frame(place / "sub" / f"p1_frame{frame:02d}.nii.gz", frame)
    shutil.copy(place / "sub" / "p1_frame01.nii.gz", place / "sub" / "p1_frame01_gt.nii.gz")
    whole = gzip.decompress((place / "cine.nii.gz").read_bytes())
    (place / "sub" / "broken.nii").write_bytes(whole[:-1000])
    return place


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm of two seeds."""
    place = tmp_path_factory.mktemp("arm")
    for k in (0, 1):
        write_unet(place / f"seed{k}", 3 + k)
    return place


@pytest.fixture(scope="module")
def done(folder: Path, arm: Path) -> tuple[Done, Path]:
    """The folder predicted by the arm's two seeds."""
    out = folder.parent / "out"
    return cardiomix("predict", arm, folder, "--out", out, cwd=folder.parent), out


def test_a_bad_study_fails_alone_in_one_line(done: tuple[Done, Path], folder: Path) -> None:
    result, out = done
    assert result.returncode == 1, result.stderr
    assert "failed broken.nii: " in result.stderr and "Traceback" not in result.stderr
    assert "p1_frame01_gt.nii.gz" in result.stderr  # left out, and told
    assert result.stdout.splitlines()[-1] == f"2 of 3 studies in {out}"
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    wanted = ["cine_pred.json", "cine_pred.nii.gz", "cine_pred.png", "sub/p1_frame01_pred.nii.gz"]
    assert found == [*wanted, "sub/p1_frame12_pred.nii.gz", "sub/p1_pred.json", "sub/p1_pred.png", "volumes.csv"]
    table = (out / "volumes.csv").read_text(encoding="utf-8-sig").splitlines()
    assert [line.split(",")[0] for line in table] == ["study", "cine", "sub/broken", "sub/p1"]


def test_a_full_output_costs_no_mask_and_ends_in_one_line(tmp_path: Path, arm: Path) -> None:
    for seed in (1, 2):
        write_frame(tmp_path / "in" / f"s{seed}.nii.gz", seed)
    command = [sys.executable, "-m", "experiments", "predict", str(arm / "seed0"), "in", "--out", "out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "No space left" in line] == [
        "failed: output: No space left on device; mend that, then give the same command again"
    ]
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"s1_pred.nii.gz", "s2_pred.nii.gz"}
    table = (tmp_path / "out" / "volumes.csv").read_text(encoding="utf-8-sig").splitlines()
    assert [line.split(",")[0] for line in table] == ["study", "s1", "s2"]


def test_a_mask_lies_on_its_image_s_very_grid(done: tuple[Done, Path], folder: Path) -> None:
    ours, theirs = nib.load(done[1] / "cine_pred.nii.gz"), nib.load(folder / "cine.nii.gz")
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.header.get_zooms() == theirs.header.get_zooms()
    for field in ("sform_code", "qform_code", "quatern_b", "qoffset_x", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(ours.header[field], theirs.header[field])
    assert ours.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(ours.dataobj))) == {0, 1, 2, 3}


def test_volumes_are_voxels_counted_on_the_mask(done: tuple[Done, Path]) -> None:
    report = json.loads((done[1] / "cine_pred.json").read_text())
    mask = np.asarray(nib.load(done[1] / "cine_pred.nii.gz").dataobj)
    ml = 1.25 * 1.4 * 8.0 / 1000
    lv, myo, rv = ([(mask[..., t] == label).sum() * ml for t in range(3)] for label in (1, 2, 3))
    for t, frame in enumerate(report["frames"]):
        assert (frame["image"], frame["frame"]) == ("cine.nii.gz", t)
        assert frame["ml"] == pytest.approx({"LV": lv[t], "MYO": myo[t], "RV": rv[t]}, abs=1e-3)
    ed, es = int(np.argmax(lv)), int(np.argmin(lv))
    assert (report["ed"], report["es"]) == (ed, es) and ed != es
    assert report["lv"]["ef_percent"] == pytest.approx(100 * (lv[ed] - lv[es]) / lv[ed], abs=0.01)
    assert report["rv"]["sv_ml"] == pytest.approx(rv[ed] - rv[es], abs=2e-3)
    assert report["lv_mass_g"] == pytest.approx(1.05 * myo[ed], abs=2e-3)
    assert len(report["models"]) == 2


def test_frames_in_files_of_their_own_are_one_study(done: tuple[Done, Path]) -> None:
    report = json.loads((done[1] / "sub" / "p1_pred.json").read_text())
    assert report["images"] == ["p1_frame01.nii.gz", "p1_frame12.nii.gz"]
    assert {report["ed"], report["es"]} == {0, 1} and report["lv"]["ef_percent"] > 0
    with Image.open(done[1] / "sub" / "p1_pred.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert {(213, 94, 0), (86, 180, 233), (240, 228, 66)} <= colours


def test_again_with_other_options_replaces_what_is_there(done: tuple[Done, Path], folder: Path, arm: Path) -> None:
    out = folder.parent / "again"
    shutil.copytree(done[1], out)
    options = ("--model", arm / "seed0", "--pixel-area", "2.0", "--keep-all", "--bf16")
    again = cardiomix("predict", arm / "seed1", folder / "cine.nii.gz", "--out", out, *options, cwd=folder)
    assert again.returncode == 0, again.stderr
    report = json.loads((out / "cine_pred.json").read_text())
    asked = {"pixel_area": 2.0, "flips": False, "keep_largest": False, "precision": "bf16"}
    assert report["inference"] == asked and len(report["models"]) == 2
    assert (out / "cine_pred.nii.gz").read_bytes() != (done[1] / "cine_pred.nii.gz").read_bytes()
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cine.nii.gz", "--flips"), "does not know a mirrored heart"),
        (("cine.nii.gz", "absent.nii.gz"), "no such file"),
        (("cine.nii.gz", "--pixel-area", "0"), "no area"),
        (("cine.nii.gz", "--spacing", "8 1.4"), "--spacing: spacing is '8 1.4'; write slice, row and column in mm"),
        (("cine.nii.gz", "--spacing", "8 0 0"), "--spacing: the spacing given for it is 8 × 0 × 0 mm; give slice"),
        (("cine.nii.gz", "--model", "absent"), "no trained network here"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    folder: Path, arm: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = cardiomix("predict", arm, *arguments, "--out", tmp_path / "out", cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_images_that_would_give_one_file_are_refused(tmp_path: Path) -> None:
    for name in ("a/x.nii.gz", "b/x.nii.gz", "c/x_pred.nii.gz", "d/x.nii", "d/x.nii.gz", "e/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    place, out = str(tmp_path), str(tmp_path / "c")
    with pytest.raises(InputError, match="two images"):
        find_studies([f"{place}/a/x.nii.gz", f"{place}/b/x.nii.gz"], out)
    with pytest.raises(InputError, match="two images"):
        find_studies([f"{place}/d"], out)
    with pytest.raises(InputError, match="overwritten"):
        find_studies([f"{place}/a/x.nii.gz", f"{place}/c/x_pred.nii.gz"], out)
    with pytest.raises(InputError, match="no image"):
        find_studies([f"{place}/e"], out)
    with pytest.raises(InputError, match="not named"):
        find_studies([f"{place}/e/notes.txt"], out)
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    studies, left_out = find_studies([f"{place}/a", f"{place}/c"], str(tmp_path / "out"))
    assert [study.name for study in studies] == ["x"] and left_out.masks == ("x_pred.nii.gz",)


@pytest.mark.parametrize(
    ("lv_ml", "phases"),
    [([], None), ([90.0], None), ([90.0, 0.0], None), ([80.0, 120.0, 0.0, 45.0, 120.0], (1, 3))],
)
def test_ed_and_es_are_the_largest_and_smallest_lv_that_was_found(
    lv_ml: list[float], phases: tuple[int, int] | None
) -> None:
    assert guess_phases(lv_ml) == phases
