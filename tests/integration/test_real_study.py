"""A real study, of a GE scanner and without masks, through both doors: the slice store and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.inference.find_studies import find_studies
from pipeline.inference.predictor import load_predictor
from pipeline.inference.study import attempt
from pipeline.samples.preprocess import PreprocessConfig, stored_statistics, working_slice
from storage.layouts import LayoutOptions, read, splits
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject
from tests.tiny_networks import write_unet

STUDY = Path(__file__).parents[1] / "data" / "sunnybrook" / "SC-HF-I-5_sa.nii.gz"


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.int16]:
    """(x, y, slice, frame)."""
    loaded: Any = nib.load(STUDY)
    return np.asarray(loaded.dataobj)


def ingested(folder: Path, pixels: npt.NDArray[np.int16]) -> SliceStore:
    folder.mkdir()
    loaded: Any = nib.load(STUDY)
    nib.save(nib.Nifti1Image(pixels, loaded.affine, loaded.header), folder / "sa.nii.gz")
    header = "subject,image,mask,vendor,centre,ed,es,split,spacing,labels"
    (folder / "subjects.csv").write_text(f"{header}\nSC-HF-I-5,sa.nii.gz,,GE,Sunnybrook,0,1,,,\n", encoding="utf-8")
    options = LayoutOptions()
    subjects, skipped = read(str(folder), "table", options)
    assert not skipped
    run = folder / "run"
    entered = splits.assign(subjects, options)
    finalise(str(run), {s.subject: write_subject(str(run), s) for s in entered}, [], entered, options)
    return SliceStore.open(str(run))


def test_its_pixels_and_millimetres_come_in_as_they_are(tmp_path: Path, pixels: npt.NDArray[np.int16]) -> None:
    store = ingested(tmp_path / "in", pixels)
    assert len(store) == 12 and set(store.column("vendor")) == {"GE"} and not store.column("labelled").any()
    assert list(store.column("phase")) == ["ED"] * 6 + ["ES"] * 6
    for row in range(12):
        np.testing.assert_array_equal(store.image(row), pixels[:, :, row % 6, row // 6].T)
    assert store.column("pixel_area_mm2") == pytest.approx(1.3672**2, rel=1e-4)


def test_zeros_around_it_do_not_move_the_heart_that_the_network_sees(
    tmp_path: Path, pixels: npt.NDArray[np.int16]
) -> None:
    config = PreprocessConfig(size=96, field=96, normalisation="foreground")
    wide = np.pad(pixels, ((40, 40), (40, 40), (0, 0), (0, 0)))
    stores = [ingested(tmp_path / name, values) for name, values in (("as it is", pixels), ("padded", wide))]
    assert stored_statistics(stores[0], 0, config) == stored_statistics(stores[1], 0, config)
    for row in range(12):
        narrow, padded = (working_slice(store, row, config).image for store in stores)
        np.testing.assert_array_equal(padded[40:-40, 40:-40], narrow)


def test_its_prediction_lies_on_its_own_grid(tmp_path: Path, pixels: npt.NDArray[np.int16]) -> None:
    predictor = load_predictor([write_unet(tmp_path / "model", preprocess=PreprocessConfig(size=64, field=144))])
    studies, _ = find_studies([str(STUDY)], str(tmp_path / "out"))
    (outcome,) = (attempt(predictor, study, ["tiny"]) for study in studies)
    assert outcome.report is not None
    mask: Any = nib.load(tmp_path / "out" / "SC-HF-I-5_sa_pred.nii.gz")
    values, source = np.asarray(mask.dataobj), nib.load(STUDY)
    assert values.shape == pixels.shape and set(np.unique(values)) <= {0, 1, 2, 3} and values.any()
    np.testing.assert_array_equal(mask.affine, source.affine)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(mask.header.get_zooms(), source.header.get_zooms())  # type: ignore[attr-defined]
    lv = (values == 1).sum((0, 1, 2)) * 1.3672**2 * 8 / 1000
    assert [frame["ml"]["LV"] for frame in outcome.report["frames"]] == pytest.approx(lv, rel=1e-3)
    with Image.open(tmp_path / "out" / "SC-HF-I-5_sa_pred.png") as picture:
        assert picture.width > 6 * 100
