from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.rescale import linear_scale, resample_crop, resampling_matrix, resized, resized_labels


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (60, 45), (40, 80), (50, 50)])
def test_resampling_equals_torch_antialiased_interpolation(n_in: int, n_out: int) -> None:
    image = np.random.default_rng(0).normal(size=(n_in, n_in)).astype(np.float32)
    matrix = resampling_matrix(n_in, n_out, n_out / n_in)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None, None], size=(n_out, n_out), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(resized(image, matrix, matrix), expected[0, 0].numpy(), atol=1e-5)
    sampled, _ = resample_crop(image, np.zeros((n_in, n_in), np.uint8), n_out / n_in, n_out, 0.0)
    np.testing.assert_allclose(sampled, expected[0, 0].numpy(), atol=1e-5)


@given(st.integers(5, 90), st.integers(5, 90), st.floats(0.2, 4.0))
def test_a_crop_equals_the_resampling_matrices_inside_the_image(height: int, width: int, scale: float) -> None:
    image = np.random.default_rng(height).normal(size=(height, width)).astype(np.float32)
    out, inside = resample_crop(image, np.ones((height, width), np.uint8), scale, 64, 9.0)
    expected = resized(image, resampling_matrix(height, 64, scale), resampling_matrix(width, 64, scale))
    np.testing.assert_allclose(out, np.where(inside, expected, 9.0), atol=1e-5)


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


@given(st.floats(0.4, 2.5), st.integers(20, 90), st.integers(20, 90))
def test_what_is_symmetric_stays_symmetric(scale: float, height: int, width: int) -> None:
    image = np.random.default_rng(width).normal(size=(height, width)).astype(np.float32)
    image = image + image[::-1] + image[:, ::-1] + image[::-1, ::-1]
    out, _ = resample_crop(image, np.zeros((height, width), np.uint8), scale, 64, 9.0)
    np.testing.assert_allclose(out, out[::-1], atol=1e-4)
    np.testing.assert_allclose(out, out[:, ::-1], atol=1e-4)


@given(st.one_of(st.floats(0.2, 3.0), st.sampled_from([0.25, 0.5, 1.0, 1.05, 2.0])), st.integers(10, 45), st.booleans())
def test_a_symmetric_mask_stays_symmetric_even_where_centres_fall_on_edges(scale: float, half: int, odd: bool) -> None:
    quarter = np.random.default_rng(half).integers(0, 4, (half + odd, half + odd)).astype(np.uint8)
    top = np.concatenate([quarter, quarter[:, ::-1][:, odd:]], axis=1)
    mask = np.concatenate([top, top[::-1][odd:]])
    size = 64 + odd
    _, out = resample_crop(mask.astype(np.float32), mask, scale, size, 0.0)
    np.testing.assert_array_equal(out, out[::-1])
    np.testing.assert_array_equal(out, out[:, ::-1])


@given(st.floats(0.6, 1.5), st.floats(-12, 12), st.floats(-12, 12))
def test_a_blob_lands_where_the_scale_puts_it(scale: float, dy: float, dx: float) -> None:
    # a wide one: antialiasing moves detail to and fro by a few hundredths of a pixel, which averages out
    y, x = np.mgrid[:160, :168]
    image = np.exp(-((y - 79.5 - dy) ** 2 + (x - 83.5 - dx) ** 2) / 200).astype(np.float32)
    out, _ = resample_crop(image, np.zeros(image.shape, np.uint8), scale, 192, 0.0)
    grid, total = np.arange(192) - 95.5, out.sum(dtype=np.float64)
    assert abs((out.sum(1) * grid).sum() / total - scale * dy) < 0.01
    assert abs((out.sum(0) * grid).sum() / total - scale * dx) < 0.01


@given(st.booleans(), st.booleans(), st.floats(0.5, 2.0))
def test_a_flip_is_exact_and_takes_image_and_mask_alike(rows: bool, columns: bool, scale: float) -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.normal(size=(70, 51)).astype(np.float32), rng.integers(0, 4, (70, 51)).astype(np.uint8)
    plain = resample_crop(image, mask, scale, 64, -1.0)
    turned = np.s_[:: -1 if rows else 1, :: -1 if columns else 1]
    for found, before in zip(resample_crop(image, mask, scale, 64, -1.0, (rows, columns)), plain, strict=True):
        np.testing.assert_array_equal(found, before[turned])


def test_a_pair_gives_the_same_bytes_on_any_number_of_threads_after_any_other_and_from_read_only_memory() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.normal(size=(96, 80)).astype(np.float32), rng.integers(0, 4, (96, 80)).astype(np.uint8)
    first = resample_crop(image, mask, 0.83, 64, -1.0)
    resample_crop(image[:50], mask[:50], 1.9, 96, 0.0)
    image.setflags(write=False)
    mask.setflags(write=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = resample_crop(image, mask, 0.83, 64, -1.0)
    finally:
        torch.set_num_threads(threads)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in again]


@given(st.floats(0.6, 1.6), st.floats(20, 32))
def test_a_disc_covers_an_area_that_scales_by_the_area_ratio(scale: float, radius: float) -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    disc = (y**2 + x**2 <= radius**2).astype(np.uint8)
    image, mask = resample_crop(disc.astype(np.float32), disc, scale, 128, 0.0)
    # whole pixels cannot follow a circle closer than about 0.6 / radius; shares of pixels can
    assert mask.sum() == pytest.approx(np.pi * (radius * scale) ** 2, rel=0.06)
    assert image.sum() == pytest.approx(disc.sum() * scale**2, rel=0.01)


def test_mask_areas_scale_by_the_area_ratio_without_bias() -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    ratios = []
    for target in np.linspace(0.954, 2.692, 60):
        rng = np.random.default_rng(int(target * 1e6))
        centre, radius = rng.uniform(-6, 6, 2), rng.uniform(20, 30)
        disc = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)
        scale = linear_scale(1.6, target)
        ratios.append(resample_crop(disc.astype(np.float32), disc, scale, 128, 0.0)[1].sum() / disc.sum() * target)
    assert np.mean(ratios) == pytest.approx(1.6, rel=2e-3)
    assert np.std(ratios) < 0.02


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
