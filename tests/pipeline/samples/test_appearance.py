from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.samples.appearance import LOW, bigaug, convolved, fourier, gin, histogram, mixstyle
from pipeline.samples.smooth import smooth_field

RNG = np.random.default_rng(0)
SMOOTH = (RNG.random((64, 80)).cumsum(axis=0).cumsum(axis=1) / 3000 - 0.5).clip(-0.9, 0.9).astype(np.float32)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_looks_change_within_the_range_and_by_the_seed_alone() -> None:
    images = [bigaug(SMOOTH, philox(k)) for k in range(40)]
    assert all(image.dtype == np.float32 and np.abs(image).max() <= 1 for image in images)
    assert sum(np.abs(image - SMOOTH).mean() > 0.01 for image in images) > 25
    np.testing.assert_array_equal(images[3], bigaug(SMOOTH, philox(3)))


def test_mixing_with_itself_changes_nothing() -> None:
    for seed in range(5):
        np.testing.assert_allclose(fourier(SMOOTH, SMOOTH, philox(seed)), SMOOTH, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 80), (50, 96), (65, 81)])
def test_the_other_image_gives_its_low_amplitudes_and_none_of_its_phase(size: tuple[int, int]) -> None:
    other = (0.5 * RNG.random(size) - 0.1).astype(np.float32)
    mixed, share = fourier(SMOOTH, other, philox(1)), philox(1).random()
    own, found = np.fft.fft2(SMOOTH), np.fft.fft2(mixed)
    mean = (1 - share) * abs(SMOOTH.mean()) + share * abs(other.mean())
    assert abs(mixed.mean()) == pytest.approx(mean, abs=1e-3)
    strong = np.abs(own) > 1.0
    assert np.abs(np.angle(found[strong] / own[strong])).max() < 0.05
    beyond = np.s_[20:40, 20:60]  # frequencies past the low ones
    assert 64 * LOW / 2 < 20
    np.testing.assert_allclose(found[beyond], own[beyond], atol=0.05)


NOISE = RNG.uniform(-0.2, 0.9, (50, 90)).round(2).astype(np.float32)  # with grey values that occur often


def test_an_image_takes_the_grey_values_of_the_other_and_keeps_its_own_order() -> None:
    matched = next(out for k in range(9) if (out := histogram(SMOOTH, NOISE, philox(k))) is not SMOOTH)
    assert matched.dtype == np.float32
    shares = np.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(np.quantile(matched, shares), np.quantile(NOISE, shares), atol=0.02)
    order = np.argsort(SMOOTH, axis=None)
    assert (np.diff(matched.ravel()[order]) >= 0).all()
    matched = next(out for k in range(9) if (out := histogram(NOISE, SMOOTH, philox(k))) is not NOISE)
    assert len(np.unique(matched)) == len(np.unique(NOISE)) < NOISE.size


def test_histograms_are_matched_as_by_scikit_image() -> None:
    exposure = pytest.importorskip("skimage.exposure", reason="pip install 'cardiomix[nnunet]' brings scikit-image")
    for image, look in ((SMOOTH, NOISE), (NOISE, SMOOTH)):
        matched = next(out for k in range(9) if (out := histogram(image, look, philox(k))) is not image)
        np.testing.assert_allclose(matched, exposure.match_histograms(image, look), atol=1e-6)


def test_mean_and_spread_move_towards_the_others_by_a_share() -> None:
    made = [mixstyle(SMOOTH / 2, NOISE / 2, philox(k)) for k in range(60)]
    means, stds = np.array([x.mean() for x in made]), np.array([x.std() for x in made])
    way_mean = (means - SMOOTH.mean() / 2) / (NOISE.mean() / 2 - SMOOTH.mean() / 2)
    way_std = (stds - SMOOTH.std() / 2) / (NOISE.std() / 2 - SMOOTH.std() / 2)
    np.testing.assert_allclose(way_mean, way_std, atol=0.05)
    assert (way_mean > -0.01).all() and (way_mean < 1.01).all()
    assert (way_mean < 0.01).sum() > 15 and (way_mean > 0.9).sum() > 5
    bright = mixstyle(SMOOTH, np.where(NOISE > 0.5, 1.0, -1.0).astype(np.float32), philox(2))
    assert bright.dtype == np.float32 and np.abs(bright).max() <= 1


@pytest.mark.parametrize("look", [histogram, mixstyle])
def test_a_look_borrowed_from_the_image_itself_changes_nothing(look: Any) -> None:
    for seed in range(6):
        np.testing.assert_allclose(look(SMOOTH, SMOOTH, philox(seed)), SMOOTH, atol=1e-5)
        np.testing.assert_array_equal(look(SMOOTH, NOISE, philox(seed)), look(SMOOTH, NOISE, philox(seed)))


def test_a_random_network_convolves_as_torch_does() -> None:
    for size in (1, 3):
        x, kernel = RNG.standard_normal((2, 20, 31)), RNG.standard_normal((3, 2, size, size))
        expected = torch.nn.functional.conv2d(torch.from_numpy(x)[None], torch.from_numpy(kernel), padding=size // 2)
        np.testing.assert_allclose(convolved(x, kernel), expected[0].numpy(), atol=1e-12)


def test_random_networks_change_the_image_within_its_range_and_by_the_seed_alone() -> None:
    made = [gin(SMOOTH, philox(k)) for k in range(30)]
    assert all(x.dtype == np.float32 and np.isfinite(x).all() and np.abs(x).max() <= 1 for x in made)
    assert sum(np.abs(x - SMOOTH).mean() > 0.05 for x in made) > 20
    np.testing.assert_array_equal(made[4], gin(SMOOTH, philox(4)))
    np.testing.assert_allclose(gin(SMOOTH, philox(4), strength=0.0), SMOOTH, atol=1e-4)
    flat = np.full((16, 16), -1.0, np.float32)
    assert np.isfinite(gin(flat, philox(0))).all()


def test_a_smooth_field_is_smooth_the_same_everywhere_and_random() -> None:
    fields = np.stack([smooth_field((60, 90), 20.0, philox(k)) for k in range(300)])
    spread = fields.std(0)
    assert spread.min() / spread.mean() > 0.8 and spread.max() / spread.mean() < 1.2
    assert np.abs(np.diff(fields, axis=1)).max() < 0.35 and abs(fields.mean()) < 0.1
