"""Region looks: what they change, and what they leave."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pipeline.samples.regions import EDGE, GAIN, PLANES, SHIFT, grey_regions, label_regions, region_looks

IMAGE = np.random.default_rng(0).uniform(-0.6, 0.6, (24, 30)).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
def test_each_region_gets_a_gain_and_a_shift_with_smooth_edges(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, IMAGE.shape, dtype=np.uint8)
    normal = np.random.default_rng(seed).standard_normal((2, PLANES))
    planes = [gaussian_filter((bits >> c & 1).astype(float), EDGE, mode="nearest") for c in range(PLANES)]
    gain, shift = (sum(n * plane for n, plane in zip(of, planes, strict=True)) for of in normal)
    expected = (IMAGE * np.exp(GAIN * gain) + SHIFT * shift).clip(-1, 1)
    np.testing.assert_allclose(region_looks(IMAGE, bits, np.random.default_rng(seed)), expected, atol=1e-4)


def test_where_there_is_no_region_the_image_stays() -> None:
    bits = np.zeros(IMAGE.shape, np.uint8)
    bits[:, 20:] = 4
    out = region_looks(IMAGE, bits, np.random.default_rng(1))
    np.testing.assert_array_equal(out[:, :15], IMAGE[:, :15])  # farther from the edge than the smoothing reaches
    assert np.abs(out[:, 22:] - IMAGE[:, 22:]).min() > 0


def test_labels_and_quantiles_of_grey_are_regions_that_do_not_overlap() -> None:
    mask = np.arange(720, dtype=np.uint8).reshape(24, 30) % 4
    np.testing.assert_array_equal(label_regions(mask), 2**mask)
    regions = grey_regions(IMAGE)
    values, counts = np.unique(regions, return_counts=True)
    assert values.tolist() == [2**k for k in range(PLANES)] and counts.max() - counts.min() <= 1
    brightest = [IMAGE[regions == value].max() for value in values]
    assert brightest == sorted(brightest)


def test_a_flat_image_is_one_region() -> None:
    assert len(np.unique(grey_regions(np.zeros((8, 8), np.float32)))) == 1
