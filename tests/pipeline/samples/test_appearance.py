from __future__ import annotations

import numpy as np
import pytest

from pipeline.samples.appearance import LOW, bigaug, fourier

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
