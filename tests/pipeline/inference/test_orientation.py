"""However a study is stored, its mask is the one of the study as scanners display it, on the study's own grid."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import find_studies
from pipeline.inference.predictor import Predictor, load_predictor
from pipeline.inference.study import Outcome, attempt
from tests.tiny_networks import volume_zhw, write_unet

Array = npt.NDArray[np.int16]

# A real study of GE, by its DICOM files.
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array(
    [
        [0.7122 * 1.25, -0.3077 * 1.4, -0.6310 * 8, 16.7],
        [0.7011 * 1.25, 0.2678 * 1.4, 0.6610 * 8, -247.2],
        [-0.0344 * 1.25, -0.9130 * 1.4, 0.4060 * 8, 81.9],
        [0, 0, 0, 1],
    ]
)
IN_PLANE = [((a, sa), (1 - a, sb), (2, 1)) for a, sa, sb in product((0, 1), (1, -1), (1, -1))]
WAYS = [*IN_PLANE, ((2, 1), (1, -1), (0, 1)), ((1, -1), (2, -1), (0, 1))]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load_predictor([write_unet(tmp_path_factory.mktemp("model"))])


def predicted(predictor: Predictor, image: nib.Nifti1Image, folder: Path, orientation: str = "header") -> Outcome:
    folder.mkdir(exist_ok=True)
    nib.save(image, folder / "c.nii.gz")
    config = InferenceConfig(orientation=orientation)
    (study,), _ = find_studies([str(folder / "c.nii.gz")], str(folder / "out"))
    return attempt(Predictor(predictor.networks, predictor.preprocess, config), study, ["name"])


def mask_in(folder: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(nib.load(folder / "out" / "c_pred.nii.gz").dataobj)


@pytest.fixture(scope="module")
def base(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A study of two frames as scanners display it, and its mask."""
    frames = [volume_zhw(seed) for seed in (0, 1)]
    image = nib.Nifti1Image(np.stack(frames).transpose(3, 2, 1, 0), AFFINE)
    folder = tmp_path_factory.mktemp("base")
    outcome = predicted(predictor, image, folder)
    assert outcome.report is not None
    (told,) = outcome.report["orientation"]
    assert (told["turn"], told["known"]) == ("x y z", True)
    return image, nib.load(folder / "out" / "c_pred.nii.gz")


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_the_mask_of_a_study_that_is_stored_otherwise_is_the_same_mask_voxel_for_voxel(
    tmp_path: Path, predictor: Predictor, base: tuple[nib.Nifti1Image, nib.Nifti1Image], way: int
) -> None:
    image, mask = (each.as_reoriented(np.array(WAYS[way], float)) for each in base)
    outcome = predicted(predictor, image, tmp_path)
    assert outcome.report is not None, outcome.failure
    np.testing.assert_array_equal(mask_in(tmp_path), np.asarray(mask.dataobj))
    np.testing.assert_array_equal(
        nib.load(tmp_path / "out" / "c_pred.nii.gz").affine, nib.load(tmp_path / "c.nii.gz").affine
    )
    assert not any("orientation" in warning for warning in outcome.report["warnings"])


def test_what_is_said_of_an_array_overrides_its_header(
    tmp_path: Path, predictor: Predictor, base: tuple[nib.Nifti1Image, nib.Nifti1Image]
) -> None:
    image, mask = base
    flipped = nib.Nifti1Image(np.asarray(image.dataobj)[:, ::-1], np.diag([1.25, 1.4, 8.0, 1.0]))  # says nothing
    stored = predicted(predictor, flipped, tmp_path / "stored")
    assert stored.report is not None and not stored.report["orientation"][0]["known"]
    wanted = np.asarray(mask.dataobj)[:, ::-1]
    assert not np.array_equal(mask_in(tmp_path / "stored"), wanted)
    said = predicted(predictor, flipped, tmp_path / "said", "x -y z")
    assert said.report is not None and said.report["inference"]["orientation"] == "x -y z"
    np.testing.assert_array_equal(mask_in(tmp_path / "said"), wanted)


def test_time_on_the_third_axis_is_refused_in_one_line_and_segmented_when_told_so(
    tmp_path: Path, predictor: Predictor
) -> None:
    slices = volume_zhw(5, (4, 61, 50)).astype(np.int16)
    cine = np.stack([slices + t * volume_zhw(9, (4, 61, 50)) // 400 for t in range(3)])  # (t, z, y, x)
    usual = nib.Nifti1Image(cine.transpose(3, 2, 1, 0), AFFINE)
    wrong = nib.Nifti1Image(cine.transpose(3, 2, 0, 1), AFFINE)
    assert predicted(predictor, usual, tmp_path / "usual").report is not None
    refused = predicted(predictor, wrong, tmp_path / "refused")
    assert refused.failure.startswith("c.nii.gz: its third axis looks like time") and "\n" not in refused.failure
    assert not (tmp_path / "refused" / "out").exists()
    assert predicted(predictor, wrong, tmp_path / "told", "x y t z").report is not None
    np.testing.assert_array_equal(mask_in(tmp_path / "told"), mask_in(tmp_path / "usual").transpose(0, 1, 3, 2))
