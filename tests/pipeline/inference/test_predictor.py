from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.config import InferenceConfig
from pipeline.inference.predictor import Predictor, keep_largest, load_predictor, network_input
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.rescale import resampling_matrix, resized
from storage.errors import InputError
from storage.slices.intensities import statistics
from tests.tiny_networks import PREPROCESS, tiny_unet, volume_zhw, write_unet

SPACING = (8.0, 1.4, 1.2)


class Oracle(torch.nn.Module):
    """Sees labels as grey values and tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        labels = ((image[:, 0] + 1) * 1.5).round().long()
        return torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float() * 20


def heart(height: int = 200, width: int = 170, at: tuple[int, int] = (90, 92)) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    r = np.hypot((y - at[0]) * SPACING[1], (x - at[1]) * SPACING[2])
    mask = np.where(r < 24, 1, np.where(r < 36, 2, 0)).astype(np.uint8)
    mask[(r >= 36) & (r < 60) & (x < at[1] - 12)] = 3
    return mask[None].repeat(2, 0)


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float(2 * np.sum(a & b) / (a.sum() + b.sum()))


@pytest.mark.parametrize("area", [None, 1.0, 2.4])
def test_whatever_pixel_area_the_network_sees_its_answer_comes_back_to_its_place(area: float | None) -> None:
    mask = heart()
    seen = mask.astype(np.float32)
    preprocess = PreprocessConfig(size=224, normalisation="minmax")
    predictor = Predictor([Oracle()], preprocess, InferenceConfig(pixel_area=area))
    (found,) = predictor.masks([(seen, statistics(seen))], SPACING)
    assert found.mask.shape == mask.shape and found.cut == ()
    for label in (1, 2, 3):
        assert dice(found.mask == label, mask == label) > 0.95


def test_a_chosen_pixel_area_is_what_the_network_sees() -> None:
    volume = volume_zhw(0, (3, 96, 90)).astype(np.float32)
    stats, config = statistics(volume), PREPROCESS
    own = network_input(volume, stats, SPACING, config)
    np.testing.assert_array_equal(network_input(volume, stats, SPACING, config, SPACING[1] * SPACING[2]), own)
    # the same picture with pixels of half the length, seen as if they were of the full one
    twice = volume.repeat(2, axis=1).repeat(2, axis=2)
    fine = (SPACING[0], SPACING[1] / 2, SPACING[2] / 2)
    seen = network_input(twice, stats, fine, config, SPACING[1] * SPACING[2])
    np.testing.assert_allclose(seen[:, 2:-2, 2:-2], own[:, 2:-2, 2:-2], atol=0.05)


def test_structures_at_the_edge_of_the_field_of_view_are_told() -> None:
    config = PreprocessConfig(size=64, field=64, normalisation="minmax")  # rows 68 to 131 of 200
    predictor = Predictor([Oracle()], config)
    for first, expected in ((90, ()), (60, ("MYO",))):
        seen = np.zeros((2, 200, 170), np.float32)
        seen[:, first : first + 20, 70:90] = 2
        seen[:, 0, 0] = 3
        (found,) = predictor.masks([(seen, statistics(seen))], (8.0, 1.0, 1.0))
        assert found.cut == expected
    seen = np.zeros((2, 64, 64), np.float32)  # the heart ends where the image does: nothing lies beyond
    seen[:, :20, 20:40] = 3
    (found,) = predictor.masks([(seen, statistics(seen))], (8.0, 1.0, 1.0))
    assert found.cut == () and (found.mask == seen).all()


def test_resampling_only_what_is_not_background_gives_the_same_labels_as_resampling_all() -> None:
    volume = volume_zhw(1).astype(np.float32)
    predictor = Predictor([tiny_unet(3)], PREPROCESS, InferenceConfig(keep_largest=False))
    (found,) = predictor.masks([(volume, statistics(volume))], SPACING)
    shares = predictor.shares(network_input(volume, statistics(volume), SPACING, PREPROCESS))
    scale_y, scale_x = (PREPROCESS.factor * mm / np.sqrt(1.4 * 1.2) for mm in (1.4, 1.2))
    rows, cols = resampling_matrix(32, 60, 1 / scale_y), resampling_matrix(32, 50, 1 / scale_x)
    wanted = np.stack([resized(share, rows, cols).argmax(0) for share in shares])
    np.testing.assert_array_equal(found.mask[:, :60], wanted)
    assert not found.mask[:, 60:].any() and set(np.unique(wanted)) == {0, 1, 2, 3}


def test_an_ensemble_is_the_mean_of_its_networks_shares() -> None:
    inputs = network_input(volume_zhw(2).astype(np.float32), statistics(volume_zhw(2)), SPACING, PREPROCESS)
    alone = [Predictor([tiny_unet(seed)], PREPROCESS).shares(inputs) for seed in (3, 4)]
    both = Predictor([tiny_unet(3), tiny_unet(4)], PREPROCESS).shares(inputs)
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(both.sum(1), 1.0, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


@pytest.mark.parametrize(("mirrors", "axes"), [("rows", [(), (1,)]), ("both", [(), (1,), (2,), (1, 2)])])
def test_flips_average_over_the_mirror_images_turned_back(mirrors: str, axes: list[tuple[int, ...]]) -> None:
    inputs = network_input(volume_zhw(2).astype(np.float32), statistics(volume_zhw(2)), SPACING, PREPROCESS)
    plain = Predictor([tiny_unet(3)], PREPROCESS)
    turned = [np.flip(plain.shares(np.flip(inputs, a).copy()), [x + 1 for x in a]) for a in axes]
    found = Predictor([tiny_unet(3)], PREPROCESS, mirrors=mirrors).shares(inputs)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, np.mean(turned, axis=0), atol=1e-5)


def test_frames_that_share_a_batch_are_segmented_as_each_alone() -> None:
    volumes = [volume_zhw(seed, (7, 61, 50)).astype(np.float32) for seed in range(6)]
    frames = [(volume, statistics(volume)) for volume in volumes]
    predictor = Predictor([tiny_unet(3)], PREPROCESS)
    together = [found.mask for found in predictor.masks(frames, SPACING)]
    alone = [found.mask for frame in frames for found in predictor.masks([frame], SPACING)]
    assert len(together) == 6
    assert np.mean(np.stack(together) != np.stack(alone)) < 1e-3  # other batch sizes round otherwise


@given(st.integers(0, 10_000))
def test_the_largest_part_is_the_one_that_medpy_keeps(seed: int) -> None:
    from medpy.filter.binary import largest_connected_component

    mask = np.random.default_rng(seed).choice(4, (4, 9, 9), p=(0.7, 0.1, 0.1, 0.1)).astype(np.uint8)
    found = keep_largest(mask)
    for label in (1, 2, 3):  # of parts of one size either may stay
        theirs = largest_connected_component(mask == label, np.ones((3, 3, 3)))
        assert (found == label).sum() == theirs.sum()
        assert (mask[found == label] == label).all()
    assert (found[mask == 0] == 0).all()


def test_networks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first = write_unet(tmp_path / "first", 3, training={"flips": "both"})
    other = write_unet(tmp_path / "other", 4, PreprocessConfig(size=32, field=64))
    with pytest.raises(InputError, match="another preprocessing"):
        load_predictor([first, other])
    plain = write_unet(tmp_path / "plain", 4)
    with pytest.raises(InputError, match="other flips"):
        load_predictor([first, plain], InferenceConfig(flips=True))
    with pytest.raises(InputError, match="mirrored heart"):
        load_predictor([plain], InferenceConfig(flips=True))
    assert len(load_predictor([first], InferenceConfig(flips=True)).mirrors) == 4
    assert len(load_predictor([first, plain]).mirrors) == 1
