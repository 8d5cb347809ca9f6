"""A heart that lies off-centre is looked at again; one that does not is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.centre import around, heart_shift, is_better
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import find_studies
from pipeline.inference.predictor import Predictor, Segmented, network_input
from pipeline.inference.study import attempt
from pipeline.samples.preprocess import PreprocessConfig
from storage.slices.intensities import statistics
from tests.tiny_networks import volume_zhw

SAME = PreprocessConfig(size=48, field=48)


class Bright(nn.Module):
    """Takes what is bright for the left ventricle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, 4, S, S)."""
        lv = (image[:, 0] > 0.5).float() * self.weight
        return torch.stack([0.5 + 0 * lv, lv, 0 * lv, 0 * lv], 1) * 9


def disc(row: int, column: int, radius: float = 10) -> npt.NDArray[np.bool_]:
    """Around a place in 120 × 121 pixels."""
    y, x = np.ogrid[:120, :121]
    return np.asarray((y - row) ** 2 + (x - column) ** 2 <= radius**2)


def segmented(tmp_path: Path, heart: npt.NDArray[np.bool_], config: InferenceConfig) -> tuple[Any, npt.NDArray[Any]]:
    noise = np.random.default_rng(0).integers(0, 9, (3, *heart.shape))
    data = (noise + 900 * heart).astype(np.int16)
    nib.save(nib.Nifti1Image(data.transpose(2, 1, 0), np.diag([1.4, 1.4, 8, 1])), tmp_path / "a.nii.gz")
    (study,), _ = find_studies([str(tmp_path / "a.nii.gz")], str(tmp_path / "out"))
    report = attempt(Predictor([Bright()], SAME, config), study, ["bright"]).report
    assert report is not None
    return report, np.asarray(nib.load(tmp_path / "out" / "a_pred.nii.gz").dataobj).T


@pytest.mark.parametrize("place", [(60, 78), (44, 60), (80, 42)])
def test_a_heart_that_the_field_of_view_cuts_is_found_whole_at_the_second_look(
    tmp_path: Path, place: tuple[int, int]
) -> None:
    heart = disc(*place)
    report, mask = segmented(tmp_path, heart, InferenceConfig())
    np.testing.assert_array_equal(mask, np.broadcast_to(heart, mask.shape))
    shift = report["recentred"]["a.nii.gz"]
    assert abs(shift["rows"] - (place[0] - 59.5)) < 6 and abs(shift["columns"] - (place[1] - 60)) < 6
    assert not any("edge" in warning for warning in report["warnings"])
    once, cut = segmented(tmp_path, heart, InferenceConfig(recentre=False))
    assert "recentred" not in once and cut.sum() < mask.sum() and any("edge" in w for w in once["warnings"])


def test_a_heart_near_the_centre_is_looked_at_once(tmp_path: Path) -> None:
    heart = disc(60, 64)
    report, mask = segmented(tmp_path, heart, InferenceConfig())
    assert "recentred" not in report
    np.testing.assert_array_equal(mask, np.broadcast_to(heart, mask.shape))


def test_a_shifted_field_of_view_is_the_middle_one_of_a_shifted_image() -> None:
    volume = volume_zhw(3, (2, 80, 90)).astype(np.float32)
    stats = statistics(volume)
    for config in (SAME, PreprocessConfig(size=32, field=48)):
        for rows, columns in ((0, 0), (5, -8), (-11, 3)):
            moved = np.roll(volume, (-rows, -columns), (1, 2))
            found = network_input(volume, stats, (8, 1.4, 1.4), config, shift=(rows, columns))
            np.testing.assert_allclose(found, network_input(moved, stats, (8, 1.4, 1.4), config), atol=1e-5)


def found_at(row: int, column: int, cut: tuple[str, ...] = (), radius: float = 6) -> Segmented:
    return Segmented(disc(row, column, radius)[None].astype(np.uint8), cut, {})


def test_where_the_heart_is_follows_from_all_frames() -> None:
    field = PreprocessConfig(size=96, field=96)  # off-centre from 12 pixels on, or 3.8 if it is cut
    nothing = Segmented(np.zeros((1, 120, 121), np.uint8), ("LV",), {})
    assert heart_shift([nothing], field) is None
    assert heart_shift([found_at(70, 60)], field) is None
    assert heart_shift([found_at(70, 60, ("LV",))], field) == (10, 0)
    assert heart_shift([found_at(80, 40), nothing], field) == (20, -20)
    assert heart_shift([found_at(80, 60), found_at(60, 60)], field) is None  # on the average near the centre
    assert is_better([found_at(60, 60)], [found_at(80, 60)]) and not is_better([nothing], [found_at(80, 60)])


def test_statistics_of_the_centre_are_taken_around_the_heart_and_others_of_everything() -> None:
    volume = np.arange(2 * 9 * 8).reshape(2, 9, 8)
    foreground = PreprocessConfig(normalisation="foreground")
    np.testing.assert_array_equal(around(volume, (2, -1), foreground), volume[:, 4:, :6])
    assert around(volume, (2, -1), PreprocessConfig()) is volume
