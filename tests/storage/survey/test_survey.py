"""What a survey measures, by hand; what it flags, one fault at a time; and that sound data raise no flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from storage.errors import InputError
from storage.layouts import LayoutOptions
from storage.subjects import LV, MYO, RV
from storage.survey.flags import flags
from storage.survey.survey import PICTURE_PIXELS, SubjectFacts, survey

Build = Callable[[dict[str, tuple[str, str]]], Path]

RA_RANGE = (0.954, 2.692)
UPRIGHT = np.array([[-0.71, 0.31, 0.63], [-0.70, -0.27, -0.66], [-0.03, -0.91, 0.41]])  # a short axis as displayed


@dataclass(frozen=True)
class Scan:
    """A made-up heart: rings of bright blood in dark muscle. Radii in mm at ED and ES."""

    name: str
    zooms: tuple[float, float, float] = (1.4, 1.4, 8.0)
    slices: int = 8
    blood: tuple[float, float] = (24.0, 18.0)
    wall: float = 8.0
    scale: float = 1.0
    labels: tuple[int, ...] = (LV, MYO, RV)
    shift: int = 0  # of the mask along its rows, in voxels
    directions: npt.NDArray[np.float64] | None = None
    split: str = "train"
    clipped: bool = False

    def write(self, folder: Path) -> str:
        """Write image and mask; returns the table's row."""
        image, mask = (np.stack(frames, axis=-1) for frames in zip(*map(self._frame, (0, 1)), strict=True))
        affine = np.diag([*self.zooms, 1.0])
        if self.directions is not None:
            affine[:3, :3] = self.directions / np.linalg.norm(self.directions, axis=0) * self.zooms
        for data, end in ((image, ""), (mask, "_gt")):
            nib.save(nib.Nifti1Image(data, affine), folder / f"{self.name}{end}.nii.gz")
        return f"{self.name},{self.name}.nii.gz,{self.name}_gt.nii.gz,X,here,0,1,{self.split}"

    def _frame(self, phase: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
        rng = np.random.default_rng([*self.name.encode(), phase])
        x, y = np.meshgrid((np.arange(128) - 64) * self.zooms[0], (np.arange(96) - 48) * self.zooms[1], indexing="ij")
        far = np.hypot(x, y)
        shape = (*far.shape, self.slices)
        plane = np.where((np.hypot(x + 44, y) < 22) & (far >= self.blood[phase] + self.wall), RV, 0)
        plane = np.where(far < self.blood[phase] + self.wall, MYO, plane)
        plane = np.where(far < self.blood[phase], LV, plane)
        signal = np.array([60.0, 400.0, 120.0, 380.0])[plane] + 200 * (far > 55)
        if self.clipped:
            signal = 500 * ((plane == LV) | (far > 40))
        image = signal[:, :, None] + rng.normal(0, 8, shape)
        kept = np.where(np.isin(plane, self.labels), plane, 0)
        mask = np.broadcast_to(np.roll(kept, self.shift, axis=0)[:, :, None], shape)
        return np.rint(np.clip(image, 0, None) * self.scale).astype(np.int16), mask.astype(np.uint8)


def write(folder: Path, scans: list[Scan]) -> Path:
    folder.mkdir()
    rows = [scan.write(folder) for scan in scans]
    (folder / "subjects.csv").write_text("subject,image,mask,vendor,centre,ed,es,split\n" + "\n".join(rows) + "\n")
    return folder


SOUND = [Scan(f"s{n}") for n in range(9)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SubjectFacts]:
    """Nine subjects without a fault."""
    folder = write(tmp_path_factory.mktemp("sound") / "data", SOUND)
    return {s.subject: s for s in survey([str(folder)]).subjects}


def found_beside(sound: dict[str, SubjectFacts], folder: Path, scan: Scan) -> dict[str, str]:
    """What is flagged of a subject among the sound ones, which stay without a flag: finding → number."""
    (odd,) = survey([str(write(folder / "odd", [scan]))]).subjects
    found = flags([*sound.values(), odd], RA_RANGE)
    assert {f.subject for f in found} <= {odd.subject}
    assert all(f.check.why and (f.vendor, f.centre) == ("X", "here") for f in found)
    return {f"{f.check.about} {f.check.finding}": f"{f.number} {f.unit}".strip() for f in found}


def test_facts_are_those_counted_by_hand(mnms_folder: Build, study: Callable[..., Any]) -> None:
    found = survey([str(mnms_folder({"A1": ("Training/Labeled", "A"), "C1": ("Training/Unlabeled", "C")}))])
    labelled, unlabelled = found.subjects
    image, mask = study(0)
    assert (labelled.subject, labelled.vendor, labelled.centre, labelled.split) == ("A1", "A", "1", "train")
    assert (labelled.height, labelled.width) == (20, 24)  # the fixture's x is 24
    assert labelled.spacing_mm == (8.0, 1.5, 1.5) and labelled.pixel_area_mm2 == 2.25
    assert [(v.phase, v.frame, v.slices) for v in labelled.volumes] == [("ED", 0, 3), ("ES", 2, 3)]
    facts = labelled.mask("ES")
    assert facts is not None and not facts.at_border
    voxel_ml = 1.5 * 1.5 * 8 / 1000
    assert (facts.lv_ml, facts.myo_ml, facts.rv_ml) == pytest.approx(
        [3 * n * voxel_ml for n in (36, 100 - 36, 32)]  # of a slice, as the fixture draws them
    )
    blood, muscle = (image[..., 2][mask[..., 2] == label].mean() for label in (LV, MYO))
    assert facts.blood_to_muscle == pytest.approx(blood / muscle)
    for volume in labelled.volumes:
        low, high = np.percentile(image[..., volume.frame], (0.5, 99.5))
        assert volume.p995 == pytest.approx(high)
        assert volume.contrast == pytest.approx(image[..., volume.frame].std() / (high - low))
    assert unlabelled.mask("ED") is None and not unlabelled.labelled
    assert [v.phase for v in unlabelled.volumes] == ["-", "-"]
    assert found.skipped == ()


def test_nothing_of_a_volume_stays_but_a_small_picture(sound: dict[str, SubjectFacts]) -> None:
    def arrays(value: Any) -> list[npt.NDArray[Any]]:
        if isinstance(value, np.ndarray):
            return [value]
        inner = vars(value).values() if hasattr(value, "__dataclass_fields__") else value
        return [a for v in inner for a in arrays(v)] if isinstance(value, tuple) or inner is not value else []

    kept = arrays(sound["s0"])
    assert [(a.shape, a.dtype) for a in kept] == [((PICTURE_PIXELS, PICTURE_PIXELS), np.dtype(np.uint8))] * 2


def test_a_picture_shows_millimetres_whatever_the_pixel_size(tmp_path: Path) -> None:
    scans = [Scan("fine", (1.0, 1.0, 8.0)), Scan("coarse", (2.0, 1.5, 8.0))]
    coarse, fine = survey([str(write(tmp_path / "data", scans))]).subjects
    for facts in (fine, coarse):
        radius_mm = np.sqrt((facts.picture.mask == LV).sum() / np.pi) * 1.5
        assert radius_mm == pytest.approx(24, abs=1.0)
        lv, rv = (np.argwhere(facts.picture.mask == label).mean(axis=0) for label in (LV, RV))
        assert (lv - rv)[1] * 1.5 == pytest.approx(48, abs=4)  # columns run as stored
        assert (
            facts.picture.image[facts.picture.mask == LV].mean() > facts.picture.image[facts.picture.mask == MYO].mean()
        )
    outside = np.abs(np.arange(PICTURE_PIXELS) - 63.5) * 1.5 > 51
    assert not fine.picture.image[outside].any()  # beyond its 96 rows of 1 mm


def test_sound_subjects_raise_no_flag(sound: dict[str, SubjectFacts]) -> None:
    assert flags(list(sound.values()), RA_RANGE) == []
    assert flags([], RA_RANGE) == []


FAULTS = {
    "header": (Scan("odd", (2.2, 2.2, 8.0), blood=(24, 18)), {"pixel area outside 0.3–4 mm²": "4.84 mm²"}),
    "beyond RA": (Scan("odd", (1.8, 1.8, 8.0)), {"pixel area outside 0.954–2.692 mm²": "3.24 mm²"}),
    "never seen": (
        Scan("odd", (1.2, 1.2, 8.0), split="test"),
        {"pixel area outside 1.96 mm² (labelled training)": "1.44 mm²"},
    ),
    "unlike": (Scan("odd", (1.1, 1.1, 8.0)), {"pixel area unlike its group’s 1.96": "1.21 mm²"}),
    "oblong": (Scan("odd", (1.4, 1.3, 8.0)), {"pixels not square": "8 %"}),
    "thick": (Scan("odd", (1.4, 1.4, 16.0), blood=(20, 16)), {"slice distance outside 4–15 mm": "16 mm"}),
    "thicker": (Scan("odd", (1.4, 1.4, 13.0)), {"slice distance unlike its group’s 8": "13 mm"}),
    "few": (Scan("odd", slices=5), {"slices outside 6–20": "5"}),
    "many": (Scan("odd", slices=14), {"slices unlike its group’s 8": "14"}),
    "bright": (Scan("odd", scale=10.0), {"intensity p99.5 unlike its group’s 583": "5831"}),
    "clipped": (Scan("odd", clipped=True), {"contrast unlike its group’s 0.207": "0.34"}),
    "swapped": (Scan("odd", blood=(20, 24)), {"LV smaller at ED than at ES": "80 < 117 ml"}),
    "small": (Scan("odd", blood=(11, 8)), {"LV at ED outside 30–500 ml": "24 ml"}),
    "stout": (
        Scan("odd", wall=30.0, labels=(LV, MYO)),
        {"MYO at ED outside 20–450 ml": "469 ml", "mask without a structure": "RV at ED, RV at ES"},
    ),
    "no RV": (Scan("odd", labels=(LV, MYO)), {"mask without a structure": "RV at ED, RV at ES"}),
    "cut off": (Scan("odd", shift=-36), {"mask touches the image’s border": "at ED, ES"}),
    "beside": (Scan("odd", shift=20), {"mask where blood is no brighter than muscle": "0.81 times"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_flagged_with_its_number_and_nothing_else_is(
    sound: dict[str, SubjectFacts], tmp_path: Path, fault: str
) -> None:
    scan, expected = FAULTS[fault]
    assert found_beside(sound, tmp_path, scan) == expected


def test_subjects_that_are_turned_unlike_most_are_flagged_and_those_in_doubt_too(
    sound: dict[str, SubjectFacts], tmp_path: Path
) -> None:
    names = {"down1": UPRIGHT, "down2": UPRIGHT, "up": UPRIGHT * [1, -1, 1]}
    scans = [Scan(name, directions=directions) for name, directions in names.items()]
    facts = survey([str(write(tmp_path / "data", scans))]).subjects
    assert [s.orientation.turn.words for s in facts] == ["x y z", "x y z", "x -y z"]
    assert not any(s.orientation.known for s in sound.values())  # a diagonal without an origin: nobody knows
    (flag,) = flags([*sound.values(), *facts], RA_RANGE)
    assert (flag.subject, flag.check.about, flag.number) == ("up", "orientation", "x -y z")
    assert flags([*sound.values(), facts[2]], RA_RANGE) == []
    doubtful = replace(facts[0], orientation=replace(facts[0].orientation, doubt="halfway"))
    assert [f.check.why for f in flags([doubtful, facts[1]], RA_RANGE)] == ["halfway"]


def test_a_group_of_few_or_of_many_kinds_has_no_outliers(sound: dict[str, SubjectFacts]) -> None:
    few = list(sound.values())[:6]
    bright = replace(few[0], volumes=tuple(replace(v, p995=9 * v.p995) for v in few[0].volumes))
    assert flags([bright, *few[1:]], RA_RANGE) == []
    spread = [
        replace(s, volumes=tuple(replace(v, p995=10.0 * 2**i) for v in s.volumes)) for i, s in enumerate(sound.values())
    ]
    assert flags(spread, RA_RANGE) == []


def test_a_centre_of_few_is_held_against_its_vendor(sound: dict[str, SubjectFacts]) -> None:
    alone = replace(sound["s0"], centre="elsewhere", spacing_mm=(13.0, 1.4, 1.4))
    (flag,) = flags([alone, *list(sound.values())[1:]], RA_RANGE)
    assert (flag.subject, flag.centre, flag.check.about) == ("s0", "elsewhere", "slice distance")


def test_a_clean_phantom_raises_no_flag_but_what_it_is_made_for(tmp_path: Path) -> None:
    from pipeline.phantom import PhantomConfig, write_phantom

    config = PhantomConfig(labelled_a=1, labelled_b=1, unlabelled_c=1, testing=1, frames=2, seed=3)
    write_phantom(tmp_path / "phantom", config)
    found = survey([str(tmp_path / "phantom")])
    assert found.skipped == () and len(found.subjects) == 7
    assert {(f.vendor, f.check.about) for f in flags(found.subjects, RA_RANGE)} - {("D", "pixel area")} == set()


def test_options_reach_the_layouts_and_progress_is_told(mnms_folder: Build) -> None:
    folder = str(mnms_folder({"A1": ("Training/Labeled", "A"), "A2": ("Training/Labeled", "A")}))
    calls: list[tuple[int, int]] = []
    found = survey([folder], LayoutOptions(frames="all"), progress=lambda *call: calls.append(call))
    assert [len(s.volumes) for s in found.subjects] == [4, 4]
    assert calls == [(1, 2), (2, 2)]
    with pytest.raises(InputError, match="no such folder"):
        survey([folder, folder + "x"])
    with pytest.raises(InputError, match="no such layout"):
        survey([folder], layout="bids")


def test_real_acdc_lacks_patient001_for_its_info_file_and_has_few_flags(real_acdc: Path) -> None:
    found = survey([str(real_acdc)])
    assert [(s.subject, s.file, s.remedy) for s in found.skipped] == [
        ("patient001", "Info.cfg", "copy it from the data set")
    ]
    assert len(found.subjects) == 29 and all(s.labelled for s in found.subjects)
    for subject in found.subjects:
        ed, es = subject.mask("ED"), subject.mask("ES")
        assert ed is not None and es is not None and ed.lv_ml > es.lv_ml
    found_flags = flags(found.subjects, RA_RANGE)
    assert {f.check.about for f in found_flags} == {"pixel area", "intensity p99.5"}
    assert {f.subject for f in found_flags if f.check.about == "pixel area"} == {
        "patient006", "patient007", "patient020", "patient021",
    }  # fmt: skip
