from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rescale import linear_scale, resample_crop, resampling_matrix, resized, resized_labels


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (60, 45), (40, 80), (50, 50)])
def test_resampling_equals_torch_antialiased_interpolation(n_in: int, n_out: int) -> None:
    image = np.random.default_rng(0).normal(size=(n_in, n_in)).astype(np.float32)
    matrix = resampling_matrix(n_in, n_out, n_out / n_in)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None, None], size=(n_out, n_out), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(resized(image, matrix, matrix), expected[0, 0].numpy(), atol=1e-5)


@given(st.integers(5, 80), st.integers(5, 80), st.floats(0.3, 3.0))
def test_rows_of_a_resampling_matrix_sum_to_one_inside_and_zero_outside(n_in: int, n_out: int, scale: float) -> None:
    sums = resampling_matrix(n_in, n_out, scale).sum(1)
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0))


@given(st.floats(0.5, 2.0))
def test_the_centre_stays_the_centre(scale: float) -> None:
    y, x = np.mgrid[:81, :81] - 40.0
    image = np.exp(-(y**2 + x**2) / 100).astype(np.float32)
    out, _ = resample_crop(image, np.zeros((81, 81), np.uint8), scale, 65, 0.0)
    grid = np.arange(65) - 32.0
    total = out.sum()
    assert abs((out.sum(1) * grid).sum() / total) < 1e-3
    assert abs((out.sum(0) * grid).sum() / total) < 1e-3


@given(st.floats(0.6, 1.6), st.floats(20, 32))
def test_a_disc_covers_an_area_that_scales_by_the_area_ratio(scale: float, radius: float) -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    disc = (y**2 + x**2 <= radius**2).astype(np.uint8)
    image, mask = resample_crop(disc.astype(np.float32), disc, scale, 128, 0.0)
    # whole pixels cannot follow a circle closer than about 0.6 / radius; shares of pixels can
    assert mask.sum() == pytest.approx(np.pi * (radius * scale) ** 2, rel=0.06)
    assert image.sum() == pytest.approx(disc.sum() * scale**2, rel=0.01)


def test_image_and_mask_lie_on_the_same_grid() -> None:
    mask = np.zeros((90, 70), np.uint8)
    mask[30:61, 20:44] = 2
    image, labels = resample_crop((mask == 2).astype(np.float32), mask, 1.37, 96, 0.0)
    assert np.mean((image > 0.5) == (labels == 2)) > 0.99


def test_what_lies_beyond_the_image_is_the_fill_value_and_background() -> None:
    image, mask = resample_crop(np.ones((40, 40), np.float32), np.ones((40, 40), np.uint8), 0.5, 64, -0.7)
    assert image[0, 0] == np.float32(-0.7)
    assert mask[0, 0] == 0
    assert mask.sum() == 20 * 20


def test_the_linear_scale_is_the_root_of_the_area_ratio() -> None:
    assert linear_scale(2.0, 0.5) == pytest.approx(2.0)
    assert linear_scale(2.0, 0.5, "length") == pytest.approx(4.0)


def test_labels_resampled_down_and_up_again_keep_their_shape() -> None:
    y, x = np.mgrid[:112, :112] - 55.5
    r = np.hypot(y, x)
    mask = np.where(r < 15, 1, np.where(r < 24, 2, 0)).astype(np.uint8)
    down, up = resampling_matrix(112, 64, 64 / 112), resampling_matrix(64, 112, 112 / 64)
    back = resized_labels(resized_labels(mask, down, down), up, up)
    for label in (1, 2):
        dice = 2 * np.sum((back == label) & (mask == label)) / (np.sum(back == label) + np.sum(mask == label))
        assert dice > 0.93
