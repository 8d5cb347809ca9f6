"""A study's files become one report; what is wrong with one of them is one line or a warning."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.inference import study
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import find_studies
from pipeline.inference.plausible import header_warnings, padding_warnings, volume_warnings
from pipeline.inference.predictor import Predictor, load_predictor
from pipeline.inference.study import Outcome, attempt
from pipeline.inference.volumes_table import TABLE, write_table
from pipeline.samples.preprocess import PreprocessConfig
from storage.nifti.file import read_header
from tests.dicom_files import LONG_AXIS, PERSON, Place, Writer, everything_below
from tests.tiny_networks import volume_zhw, write_unet

Write = Callable[..., Path]
ZOOMS = (1.25, 1.4, 8.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load_predictor([write_unet(tmp_path_factory.mktemp("model"), trust={"LV": -3.1, "MYO": -3.7, "RV": -2.7})])


def volume_xyz(seed: int) -> npt.NDArray[np.int16]:
    return volume_zhw(seed).transpose(2, 1, 0)


def cine_xyzt(frames: int = 3) -> npt.NDArray[np.int16]:
    return np.stack([volume_xyz(seed) for seed in range(frames)], axis=3)


def outcomes(predictor: Predictor, place: Path, out: Path) -> dict[str, Outcome]:
    """What becomes of every study in a folder, by its name."""
    studies, _ = find_studies([str(place)], str(out))
    return {study.name: attempt(predictor, study, ["name"]) for study in studies}


def test_cines_named_like_frames_are_studies_of_their_own(
    tmp_path: Path, write_nifti: Write, predictor: Predictor
) -> None:
    """F14: two cines with other pixels became one study, with an EF across them."""
    write_nifti(tmp_path / "in" / "p2_frame01.nii.gz", cine_xyzt(), ZOOMS)
    write_nifti(tmp_path / "in" / "p2_frame10.nii.gz", cine_xyzt(2), (1.25, 2.8, 8.0))
    for frame in (2, 3):
        write_nifti(tmp_path / "in" / f"p2_frame{frame:02d}.nii.gz", volume_xyz(frame), ZOOMS)
    found = outcomes(predictor, tmp_path / "in", tmp_path / "out")
    frames = {name: [f["image"] for f in (o.report or {})["frames"]] for name, o in found.items()}
    assert frames == {
        "p2_frame01": ["p2_frame01.nii.gz"] * 3,
        "p2_frame10": ["p2_frame10.nii.gz"] * 2,
        "p2": ["p2_frame02.nii.gz", "p2_frame03.nii.gz"],
    }


@pytest.mark.parametrize(
    ("zooms", "rows", "line"),
    [
        (
            (1.25, 2.8, 8.0),
            61,
            "has voxels of 1.25 × 2.8 × 8 mm, but p_frame01.nii.gz of the same study 1.25 × 1.4 × 8 mm",
        ),
        (ZOOMS, 60, "is 50 × 60 × 5 voxels, but p_frame01.nii.gz of the same study 50 × 61 × 5"),
    ],
)
def test_frame_files_of_different_grids_are_refused_in_one_line(
    tmp_path: Path, write_nifti: Write, predictor: Predictor, zooms: tuple[float, ...], rows: int, line: str
) -> None:
    write_nifti(tmp_path / "in" / "p_frame01.nii.gz", volume_xyz(0), ZOOMS)
    write_nifti(tmp_path / "in" / "p_frame12.nii.gz", volume_xyz(1)[:, :rows], zooms)
    outcome = outcomes(predictor, tmp_path / "in", tmp_path / "out")["p"]
    assert outcome.report is None and not (tmp_path / "out").exists()
    remedy = "predict each in a command of its own, or rename the file that belongs to another study"
    assert outcome.failure == f"p_frame12.nii.gz: {line}; {remedy}"


@pytest.mark.parametrize("spoilt", [0.0, np.nan], ids=["blank", "nan"])
def test_a_cine_with_a_frame_that_cannot_be_used_is_measured_without_it(
    tmp_path: Path, write_nifti: Write, predictor: Predictor, spoilt: float
) -> None:
    """F15: one blank frame lost the whole cine, and the line did not say which frame it was."""
    cine = cine_xyzt().astype(np.float32)
    write_nifti(tmp_path / "whole" / "c.nii.gz", cine[..., [0, 2]], ZOOMS)
    cine[..., 1] = spoilt
    write_nifti(tmp_path / "in" / "c.nii.gz", cine, ZOOMS)
    report = outcomes(predictor, tmp_path / "in", tmp_path / "out")["c"].report
    whole = outcomes(predictor, tmp_path / "whole", tmp_path / "out")["c"].report
    assert report is not None and whole is not None
    volumes = [frame["ml"] for frame in report["frames"]]
    assert volumes[1] is None and [volumes[0], volumes[2]] == [frame["ml"] for frame in whole["frames"]]
    assert report["lv"] == whole["lv"] and report["ed"] in (0, 2)
    what = (
        "the image is constant: every voxel is 0" if spoilt == 0 else f"{cine[..., 1].size} voxels are NaN or infinite"
    )
    assert report["warnings"][0] == f"c.nii.gz: {what} in frame 1 (from 0): not segmented"
    assert not any("frame 1" in warning for warning in report["warnings"][1:])


def test_a_cine_without_any_frame_to_use_fails_and_the_line_names_a_frame(
    tmp_path: Path, write_nifti: Write, predictor: Predictor
) -> None:
    write_nifti(tmp_path / "in" / "c.nii.gz", np.zeros((9, 8, 3, 2), np.int16), ZOOMS)
    write_nifti(tmp_path / "in" / "v.nii.gz", np.full((9, 8, 3), 7, np.int16), ZOOMS)
    found = outcomes(predictor, tmp_path / "in", tmp_path / "out")
    constant = "the image is constant: every voxel is"
    assert found["c"].failure == f"c.nii.gz: {constant} 0 in frame 0 (from 0); export the image again"
    assert found["v"].failure == f"v.nii.gz: {constant} 7; export the image again"


def test_every_frame_has_its_expected_dice_and_a_doubtful_study_is_told(
    tmp_path: Path, write_nifti: Write, predictor: Predictor
) -> None:
    write_nifti(tmp_path / "in" / "c.nii.gz", cine_xyzt(), ZOOMS)  # its transform has no origin: as stored
    report = outcomes(predictor, tmp_path / "in", tmp_path / "out")["c"].report
    assert report is not None
    dice = [frame["expected_dice"] for frame in report["frames"]]
    assert all(set(one) == {"LV", "MYO", "RV"} and 0 <= min(one.values()) <= max(one.values()) <= 1 for one in dice)
    assert report["expected_dice"] == {"ED": dice[report["ed"]], "ES": dice[report["es"]]}
    # an untrained network is sure of nothing
    doubts = [line for line in report["warnings"] if line.startswith("doubtful mask of ")]
    assert [line.split()[3] for line in doubts] == ["ED", "ES"]
    (row,) = rows_of(tmp_path / "out", report)
    means = [sum(one.values()) / 3 for one in report["expected_dice"].values()]
    assert float(row["expected Dice"]) == pytest.approx(min(means), abs=5e-4)


def rows_of(out: Path, report: dict[str, Any]) -> list[dict[str, str]]:
    write_table(str(out))
    with (out / TABLE).open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.DictReader(file) if row["study"] == report["study"]]


def test_a_fault_that_nobody_foresaw_ends_its_study_alone(
    tmp_path: Path, write_nifti: Write, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", volume_xyz(0), ZOOMS)
    picture = study._picture

    def fails(frames: Any, report: dict[str, Any], *others: Any) -> bytes:
        if report["study"] == "bad":
            raise IndexError("/home/mrs-smith is out of range")
        return picture(frames, report, *others)

    monkeypatch.setattr(study, "_picture", fails)
    found = outcomes(predictor, tmp_path / "in", tmp_path / "out")
    assert found["bad"].failure.startswith("bad: IndexError, a fault of cardiomix; report it")
    assert "smith" not in found["bad"].failure and found["good"].report is not None
    assert not list((tmp_path / "out").glob("bad*"))


def write_header(
    path: Path, data: npt.NDArray[np.int16], pixdim: Sequence[float], affine: npt.ArrayLike | None
) -> Path:
    """A file whose voxel size and transform may contradict each other; without an `affine` it has no transform."""
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else np.asarray(affine))
    image.header.set_qform(None, 0)
    if affine is None:
        image.header.set_sform(None, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    block = image.to_bytes()
    header = nib.Nifti1Header(block[:348], check=False)
    header["pixdim"][1:4] = pixdim
    path.write_bytes(header.binaryblock + block[348:])
    return path


@pytest.mark.parametrize(("rows", "share"), [(20, None), (80, "57")])
def test_padding_is_told_to_networks_that_are_normalised_by_the_whole_volume(
    tmp_path: Path, write_nifti: Write, predictor: Predictor, rows: int, share: str | None
) -> None:
    """F1: zeros around a heart changed its volume from 84 to 183 ml, without a word."""
    padded = np.pad(volume_xyz(0) + 1, ((0, 0), (0, rows), (0, 0)))
    write_nifti(tmp_path / "in" / "c.nii.gz", padded, ZOOMS)
    report = outcomes(predictor, tmp_path / "in", tmp_path / "out")["c"].report
    assert report is not None
    told = [warning for warning in report["warnings"] if "one value" in warning]
    assert [line.partition(" of its voxels")[0] for line in told] == ([] if share is None else [f"c.nii.gz: {share} %"])
    robust = PreprocessConfig(size=32, field=48, normalisation="foreground")
    assert padding_warnings("c.nii.gz", padded.T, robust) == []


def test_frames_of_one_slice_that_are_stored_as_slices_are_told(tmp_path: Path, write_nifti: Write) -> None:
    path = write_nifti(tmp_path / "c.nii.gz", np.repeat(volume_xyz(0)[..., :1], 24, axis=2), (1.25, 1.4, 9.68))
    (line,) = header_warnings(read_header(str(path)))
    assert line.startswith("c.nii.gz: its 24 slices span 232 mm, more than a heart; if they are frames of one slice")


TRUE = np.diag([-1.25, -1.4, 8.0, 1.0])
FOLLOW = "volumes follow from it; if it is wrong, use --spacing"
HEADERS: dict[str, tuple[tuple[float, ...], npt.ArrayLike | None, list[str]]] = {
    "right": (ZOOMS, TRUE, []),
    "no transform": (ZOOMS, None, []),
    "ACDC's transform without a scale": (ZOOMS, np.diag([-1, -1, 1, 1.0]), []),
    "sheared transform": (ZOOMS, TRUE + np.array([[0, 0, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), []),
    "voxel size lost, transform right": (
        (1, 1, 1),
        TRUE,
        [
            "c.nii: its header contradicts itself: pixdim gives voxels of 1 × 1 × 1 mm, the transform 1.25 × 1.4 × 8 mm"
            "; volumes follow pixdim; if that is wrong, use --spacing",
            f"c.nii: the distance of slices is 1 mm, outside 4 to 15; {FOLLOW}",
        ],
    ),
    "both lost": ((1, 1, 1), np.eye(4), [f"c.nii: the distance of slices is 1 mm, outside 4 to 15; {FOLLOW}"]),
    "in centimetres": (
        (0.125, 0.14, 0.8),
        None,
        [
            f"c.nii: the distance of slices is 0.8 mm, outside 4 to 15; {FOLLOW}",
            f"c.nii: the area of a pixel is 0.0175 mm², outside 0.3 to 4; {FOLLOW}",
        ],
    ),
}


@pytest.mark.parametrize(("pixdim", "affine", "lines"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_contradicts_itself_or_cannot_be_true_is_told(
    tmp_path: Path, pixdim: tuple[float, ...], affine: npt.ArrayLike | None, lines: list[str]
) -> None:
    """F5: LV EDV 4 ml from a header that had lost its voxel size, without a warning."""
    assert header_warnings(read_header(str(write_header(tmp_path / "c.nii", volume_xyz(0), pixdim, affine)))) == lines


def report_of(
    edv: float, esv: float, rv_edv: float = 114.0, rv_esv: float = 55.0, mass_g: float = 90.0
) -> dict[str, Any]:
    sides = {
        side: {"edv_ml": ed, "esv_ml": es, "ef_percent": 100 * (ed - es) / ed if ed else None}
        for side, ed, es in (("lv", edv, esv), ("rv", rv_edv, rv_esv))
    }
    return {**sides, "lv_mass_g": mass_g, "frames": []}


WRONG = "a wrong voxel size or a wrong mask"
IMPOSSIBLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a heart": (report_of(84.0, 31.0), []),
    "a failing heart": (report_of(310.0, 265.0, 190.0, 160.0, 260.0), []),
    "EDV of 4 ml": (report_of(4.0, 1.5), [f"LV at ED is 4 ml, outside 30 to 500 ml: {WRONG}"]),
    "RV of 2 l": (report_of(84.0, 31.0, 2000.0, 900.0), [f"RV at ED is 2000 ml, outside 30 to 500 ml: {WRONG}"]),
    "EF of -103 %": (
        report_of(183.0, 60.0, 23.0, 46.7),
        [
            "RV is larger at ES (47 ml) than at ED (23 ml): its EF is not to be used",
            f"RV at ED is 23 ml, outside 30 to 500 ml: {WRONG}",
        ],
    ),
    "EF of 98 %": (
        report_of(84.0, 2.0),
        ["LV EF is 98 %, outside 10 to 85 %: frames that are not ED and ES, or a wrong mask"],
    ),
    "F6: upside down, EF of 5.6 %": (
        report_of(113.0, 106.7),
        ["LV EF is 6 %, outside 10 to 85 %: frames that are not ED and ES, or a wrong mask"],
    ),
    "mass": (report_of(84.0, 31.0, mass_g=3.0), [f"LV mass is 3 g, outside 21 to 472.5 g: {WRONG}"]),
    "no RV, which has a warning of its own": (report_of(84.0, 31.0, 0.0, 0.0), []),
    "one frame, F6's sum over time": (
        {"lv": None, "frames": [{"ml": None}, {"ml": {"LV": 1261.0}}]},
        [f"LV is 1261 ml, outside 30 to 500 ml: {WRONG}"],
    ),
    "one frame, at ES": ({"lv": None, "frames": [{"ml": {"LV": 12.0}}]}, []),
}


@pytest.mark.parametrize(("report", "lines"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_volumes_that_no_heart_has_are_told(report: dict[str, Any], lines: list[str]) -> None:
    assert volume_warnings(report) == lines


def test_a_stated_spacing_stands_in_for_a_broken_header_in_predict(tmp_path: Path, write_nifti: Write) -> None:
    model = write_unet(tmp_path / "model")
    write_nifti(tmp_path / "right" / "c.nii", cine_xyzt(2), ZOOMS)
    write_header(tmp_path / "broken" / "c.nii", cine_xyzt(2), (0, 0, 0), TRUE)
    plain, stated = (load_predictor([model], InferenceConfig(spacing=mm)) for mm in (None, (8.0, 1.4, 1.25)))
    wanted = outcomes(plain, tmp_path / "right", tmp_path / "out")["c"].report
    refused = outcomes(plain, tmp_path / "broken", tmp_path / "out")["c"].failure
    assert refused.startswith("c.nii: voxel size is 0 × 0 × 0 mm; fix the header, or give") and "--spacing" in refused
    report = outcomes(stated, tmp_path / "broken", tmp_path / "out")["c"].report
    assert report is not None and wanted is not None
    assert report["lv"] == wanted["lv"] and report["frames"] == wanted["frames"]
    assert report["inference"]["spacing"] == [8.0, 1.4, 1.25] and "spacing" not in wanted["inference"]
    assert not any("header" in warning or "slices" in warning for warning in report["warnings"])
    write_header(tmp_path / "lost" / "c.nii", cine_xyzt(2), (1, 1, 1), TRUE)
    lost = outcomes(plain, tmp_path / "lost", tmp_path / "out")["c"].report
    assert lost is not None and any("contradicts itself" in warning for warning in lost["warnings"])


def test_a_dicom_study_gives_the_masks_and_volumes_of_its_nifti_file(
    tmp_path: Path, write_nifti: Write, predictor: Predictor
) -> None:
    cine = cine_xyzt(5)
    write_nifti(tmp_path / "in" / "nifti.nii.gz", cine, ZOOMS)
    writer = Writer(tmp_path / "in" / "dicom")
    writer.cine(cine.transpose(3, 2, 1, 0), Place(pixel=(1.4, 1.25)), number=3)
    writer.cine(cine.transpose(3, 2, 1, 0), Place(LONG_AXIS), number=4)
    found = outcomes(predictor, tmp_path / "in", tmp_path / "out")
    assert {name: o.failure for name, o in found.items()} == {"nifti": "", "in": ""}
    nifti, dicom = (found[name].report or {} for name in ("nifti", "in"))
    for ours, theirs in zip(dicom["frames"], nifti["frames"], strict=True):
        assert ours["ml"] == pytest.approx(theirs["ml"], rel=1e-3)
    assert (dicom["ed"], dicom["es"]) == (nifti["ed"], nifti["es"])
    assert dicom["left_out"] == ["series 4: 25 images, cines along the long axis or oblique to it"]
    assert "left_out" not in nifti
    masks = [tmp_path / "out" / name for name in ("in_pred.nii.gz", "nifti_pred.nii.gz")]
    ours, theirs = (np.asanyarray(nib.load(mask).dataobj) for mask in masks)
    np.testing.assert_array_equal(ours, theirs)
    written = everything_below(tmp_path / "out") + repr(found).encode()
    assert not [tag for tag, value in PERSON.items() if value.encode() in written]


def test_a_dicom_study_without_a_short_axis_cine_fails_in_one_line(tmp_path: Path, predictor: Predictor) -> None:
    Writer(tmp_path / "in" / "p1").cine(cine_xyzt(5).transpose(3, 2, 1, 0), Place(LONG_AXIS))
    outcome = outcomes(predictor, tmp_path / "in" / "p1", tmp_path / "out")["p1"]
    assert outcome.report is None and outcome.failure.startswith("p1: has no short-axis cine (series 5: 25 images")
    assert not (tmp_path / "out").exists()
