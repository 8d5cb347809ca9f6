"""Volumes, ejection fraction, mass and agreement against counting voxels and against closed forms; what a perfect
network loses on the way through its grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from medpy.metric import binary
from torch import nn

from pipeline.inference.predictor import network_input, predict_volume
from pipeline.samples.preprocess import PreprocessConfig, centre_crop, even, working_scales, working_shape
from pipeline.samples.rescale import resampling_matrix, resized_labels
from pipeline.scores.metrics import score_volume
from pipeline.scores.tables import case_rows
from pipeline.scores.volumes import agreement, cardiac_function, share_outside, subject_measures, volumes_ml
from storage.slices.intensities import statistics
from storage.subjects import STRUCTURES

ACDC_LABELS = np.array([0, 3, 2, 1], dtype=np.uint8)  # RV 1, LV 3 there
Labels = npt.NDArray[np.uint8]
Spacing = tuple[float, float, float]


def _rows(subject: str, phase: str, predicted: Labels, reference: Labels, spacing: Spacing, **whose: Any) -> list[Any]:
    known = {"arm": "fs_sdnet", "seed": 0, "subject": subject, "vendor": "A", "centre": "1", "phase": phase} | whose
    outside = dict.fromkeys(("LV", "MYO", "RV"), 0.0)
    return case_rows(score_volume(predicted, reference, spacing), outside, known)


def _box(lv: int, myo: int, rv: int) -> Labels:
    """So many voxels of each structure."""
    mask = np.zeros((10, 10, 10), dtype=np.uint8)
    mask.ravel()[: lv + myo + rv] = np.repeat((1, 2, 3), (lv, myo, rv))
    return mask


def test_volumes_ef_and_mass_are_those_of_the_voxels() -> None:
    spacing = (10.0, 1.25, 0.8)  # a voxel is 0.01 ml
    cases = _rows("a", "ED", _box(200, 100, 300), _box(220, 120, 280), spacing)
    cases += _rows("a", "ES", _box(80, 110, 150), _box(110, 130, 140), spacing)
    found = {row["measure"]: (row["reference"], row["predicted"], row["unit"]) for row in cardiac_function(cases)}
    assert {measure: pytest.approx(values[:2]) for measure, values in found.items()} == {
        "LV EDV": (2.2, 2.0),
        "LV ESV": (1.1, 0.8),
        "LV EF": (50.0, 60.0),
        "RV EDV": (2.8, 3.0),
        "RV ESV": (1.4, 1.5),
        "RV EF": (50.0, 50.0),
        "LV mass": (1.2 * 1.05, 1.0 * 1.05),
    }
    assert [values[2] for values in found.values()] == ["ml", "ml", "%", "ml", "ml", "%", "g"]


@pytest.mark.parametrize("subject", ["patient004", "patient022"])
def test_volumes_and_ef_of_real_masks_are_those_of_counted_voxels(real_acdc: Path, subject: str) -> None:
    masks, cases, counted = sorted((real_acdc / subject).glob("*_gt.nii.gz")), [], []
    for phase, path in zip(("ED", "ES"), masks, strict=True):
        image = nib.load(path)
        raw = np.asarray(image.dataobj)
        x, y, z = (float(mm) for mm in image.header.get_zooms())
        counted.append({label: np.count_nonzero(raw == label) * x * y * z / 1000 for label in (1, 2, 3)})
        ours = ACDC_LABELS[raw.transpose(2, 1, 0)]
        cases += _rows(subject, phase, ours, ours, (z, y, x))
    ed, es = counted
    found = {row["measure"]: row["reference"] for row in cardiac_function(cases)}
    assert found == pytest.approx({
        "LV EDV": ed[3], "LV ESV": es[3], "LV EF": 100 * (1 - es[3] / ed[3]), "LV mass": 1.05 * ed[2],
        "RV EDV": ed[1], "RV ESV": es[1], "RV EF": 100 * (1 - es[1] / ed[1]),
    })  # fmt: skip
    assert 5 < found["LV EF"] < 90 and 30 < found["LV EDV"] < 500


def test_a_missed_ventricle_counts_as_no_volume_and_leaves_ef_undefined() -> None:
    mm = (10.0, 1.0, 1.0)
    cases = _rows("a", "ED", _box(0, 10, 10), _box(20, 10, 10), mm) + _rows("a", "ES", _box(5, 1, 5), _box(9, 1, 5), mm)
    rows = {row["measure"]: row for row in cardiac_function(cases)}
    assert rows["LV EDV"]["predicted"] == 0
    assert np.isnan(rows["LV EF"]["predicted"]) and rows["LV EF"]["reference"] == pytest.approx(55.0)
    (ef,) = [row for row in agreement(rows.values()) if row["measure"] == "LV EF"]
    assert (ef["n"], ef["undefined"]) == (0, 1)


def test_a_single_phase_gives_what_it_can() -> None:
    cases = _rows("a", "ED", _box(2, 1, 1), _box(2, 1, 1), (10.0, 1.0, 1.0))
    assert [row["measure"] for row in cardiac_function(cases)] == ["LV EDV", "RV EDV", "LV mass"]


def _measured(values: dict[str, tuple[float, float]], seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"arm": "x", "seed": seed, "subject": subject, "vendor": "A", "centre": "1", "measure": "LV EF", "unit": "%"}
        | {"reference": reference, "predicted": predicted}
        for subject, (reference, predicted) in values.items()
    ]


def test_bias_and_limits_of_agreement_are_bland_and_altmans() -> None:
    (row,) = agreement(_measured({"a": (50, 52), "b": (60, 58), "c": (40, 46), "d": (55, 57)}))
    deltas = np.array([2.0, -2.0, 6.0, 2.0])
    assert (row["n"], row["bias"], row["undefined"]) == (4, pytest.approx(2.0), 0)
    sd = np.sqrt(((deltas - 2) ** 2).sum() / 3)
    assert (row["low"], row["high"]) == pytest.approx((2 - 1.96 * sd, 2 + 1.96 * sd))
    (one,) = agreement(_measured({"a": (50, 52)}))
    assert one["bias"] == 2 and np.isnan(one["low"])


def test_seeds_of_a_subject_are_averaged_before_subjects_are_compared() -> None:
    rows = _measured({"a": (50, 52), "b": (60, 60)}) + _measured({"a": (50, 56), "b": (60, 60)}, seed=1)
    assert [row["predicted"] for row in subject_measures(rows)] == [54, 60]
    assert agreement(rows)[0]["n"] == 2


class Oracle(nn.Module):
    """A network that knows the answer: the class shares of the reference on its own grid."""

    def __init__(self, labels_NHW: Labels) -> None:
        super().__init__()
        shares = nn.functional.one_hot(torch.from_numpy(labels_NHW).long(), 4).permute(0, 3, 1, 2).float()
        self.logits = nn.Parameter(shares.clamp(1e-6).log())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) == len(self.logits)
        return self.logits


def _there_and_back(mask: Labels, spacing: Spacing, config: PreprocessConfig) -> Labels:
    """A reference mask as training sees it, through the real prediction code back to its own grid."""
    height, width = even(mask.shape[1]), even(mask.shape[2])
    scales = working_scales(spacing[1], spacing[2], config)
    shape = working_shape(mask.shape[1], mask.shape[2], spacing[1], spacing[2], config)
    rows, cols = (resampling_matrix(n, m, s) for n, m, s in zip((height, width), shape, scales, strict=True))
    seen = np.stack([centre_crop(resized_labels(m[:height, :width], rows, cols), config.size, 0) for m in mask])
    image = mask.astype(np.float32)
    assert network_input(image, statistics(image), spacing, config).shape == seen.shape
    return predict_volume(Oracle(seen), image, statistics(image), spacing, config)  # type: ignore[arg-type]


def _dice(found: Labels, mask: Labels) -> dict[str, float]:
    return {name: float(binary.dc(found == label, mask == label)) for name, label in STRUCTURES.items()}


@pytest.mark.slow
def test_what_a_perfect_network_loses_on_its_grid_on_every_real_heart(real_acdc: Path) -> None:
    native, small = PreprocessConfig(size=224, field=224), PreprocessConfig(size=128, field=224)
    kept: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for mask, spacing, name in _real_masks(real_acdc):
        assert not any(share_outside(mask, spacing, native).values()), name
        assert min(_dice(_there_and_back(mask, spacing, native), mask).values()) >= 0.999, name
        for structure, dice in _dice(_there_and_back(mask, spacing, small), mask).items():
            kept[structure].append(dice)
    assert len(kept["MYO"]) == 60
    assert np.mean(kept["MYO"]) >= 0.94 and np.mean(kept["LV"]) >= 0.97 and np.mean(kept["RV"]) >= 0.96
    assert min(map(min, kept.values())) >= 0.90


def test_real_hearts_that_a_narrow_field_cuts_off_lose_what_is_said_to_be_outside(real_acdc: Path) -> None:
    narrow, cut = PreprocessConfig(size=96, field=96), 0
    for mask, spacing, name in list(_real_masks(real_acdc))[::6]:
        outside, found = share_outside(mask, spacing, narrow), _dice(_there_and_back(mask, spacing, narrow), mask)
        for structure, lost in outside.items():
            assert found[structure] == pytest.approx(2 * (1 - lost) / (2 - lost), abs=1e-6), f"{name} {structure}"
            cut += lost > 0
    assert cut > 0


def _real_masks(folder: Path) -> Iterator[tuple[Labels, Spacing, str]]:
    for path in sorted(folder.glob("*/*_gt.nii.gz")):
        image = nib.load(path)
        x, y, z = (float(mm) for mm in image.header.get_zooms())
        yield ACDC_LABELS[np.asarray(image.dataobj).transpose(2, 1, 0)], (z, y, x), path.name


@pytest.mark.parametrize("size", [224, 128])
def test_a_heart_outside_the_field_is_told(size: int) -> None:
    config, spacing = PreprocessConfig(size=size, field=224), (8.0, 1.5, 1.5)
    mask = np.zeros((2, 400, 300), dtype=np.uint8)
    mask[:, 180:220, 140:160] = 1  # in the middle
    mask[:, 300:324, 140:160] = 2  # half beyond row 312, where the field of 224 rows ends
    mask[:, 0:10, 0:10] = 3  # all of it beyond
    found = share_outside(mask, spacing, config)
    assert found["LV"] == 0 and found["RV"] == 1
    assert found["MYO"] == pytest.approx(0.5, abs=0.05)
    assert set(share_outside(np.zeros_like(mask), spacing, config).values()) == {0.0}


def test_volumes_of_a_box_with_anisotropic_voxels() -> None:
    mask = np.zeros((5, 20, 20), dtype=np.uint8)
    mask[1:4, 2:12, 3:7] = 3
    assert volumes_ml(mask, (9.0, 1.4, 0.7)) == pytest.approx({"LV": 0, "MYO": 0, "RV": 120 * 9 * 1.4 * 0.7 / 1000})
