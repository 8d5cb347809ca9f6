"""What of a volume is image: constants around it, however many and of whatever value, change no bit."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.slices.foreground import foreground_box, foreground_statistics
from storage.slices.intensities import statistics

Array = npt.NDArray[Any]

SPACING = (8.0, 1.4, 1.4)
WIDTHS = st.tuples(*[st.integers(0, 9)] * 4)
CONSTANTS = st.sampled_from((0, -1024, 255, 32767)) | st.integers(-2000, 4000)


def scan(seed: int, shape: tuple[int, int, int] = (4, 40, 36), dtype: Any = np.int16) -> Array:
    """Noise with a bright disc; no row or column is constant."""
    rng = np.random.default_rng(seed)
    _, height, width = shape
    y, x = np.mgrid[:height, :width]
    heart = 300 * (np.hypot(y - height / 2, x - width / 2) < height / 4)
    return (rng.gamma(2.0, 40.0, shape) + heart).astype(dtype)


def padded(volume: Array, widths: tuple[int, int, int, int], slices: tuple[int, int], value: float) -> Array:
    top, bottom, left, right = widths
    return np.pad(volume, (slices, (top, bottom), (left, right)), constant_values=value)


@given(st.integers(0, 5), WIDTHS, st.tuples(st.integers(0, 3), st.integers(0, 3)), CONSTANTS, st.booleans())
def test_constant_padding_of_any_value_and_blank_slices_change_no_bit(
    seed: int, widths: tuple[int, int, int, int], slices: tuple[int, int], value: int, floats: bool
) -> None:
    volume = scan(seed, dtype=np.float32 if floats else np.int16)
    assert foreground_statistics(padded(volume, widths, slices, value), SPACING) == foreground_statistics(
        volume, SPACING
    )


@given(st.integers(0, 5), st.lists(st.tuples(WIDTHS, CONSTANTS), min_size=1, max_size=3))
def test_padding_around_padding_is_found_too(seed: int, rings: list[tuple[tuple[int, int, int, int], int]]) -> None:
    image = scan(seed)[0]
    out = image
    for widths, value in rings:
        out = padded(out[None], widths, (0, 0), value)[0]
    box = foreground_box(out)
    assert box is not None
    np.testing.assert_array_equal(out[box], image)


@given(st.data())
def test_each_slice_may_have_padding_of_its_own(data: st.DataObject) -> None:
    volume = scan(data.draw(st.integers(0, 5)))
    whole = padded(volume, (6, 6, 6, 6), (0, 0), 0)
    outside = np.ones(whole.shape[1:], bool)
    outside[6:-6, 6:-6] = False
    for image in whole:
        image[outside] = data.draw(CONSTANTS)
    whole = np.insert(whole, 2, data.draw(CONSTANTS), axis=0)  # a blank slice between others
    assert foreground_statistics(whole, SPACING) == foreground_statistics(volume, SPACING)


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 51), st.integers(0, 47))
def test_a_hot_pixel_in_the_image_or_its_padding_moves_nothing_by_more_than_a_hundredth(
    seed: int, z: int, y: int, x: int
) -> None:
    whole = padded(scan(seed), (6, 6, 6, 6), (0, 0), 0)
    usual = foreground_statistics(whole, SPACING)
    whole[z, y, x] = 32767
    found = foreground_statistics(whole, SPACING)
    assert astuple(found) == pytest.approx(astuple(usual), abs=0.01 * usual.std, rel=0.01)
    assert statistics(whole).std > 1.5 * statistics(padded(scan(seed), (6, 6, 6, 6), (0, 0), 0)).std


@given(st.integers(0, 5), st.sampled_from((-1024, -1, 0)))
def test_the_value_of_a_background_of_any_shape_does_not_matter(seed: int, value: int) -> None:
    volume = scan(seed) + 1
    y, x = np.mgrid[:40, :36]
    volume[:, np.hypot(y - 19.5, x - 17.5) > 17] = value
    other = np.where(volume == value, -3000, volume)
    assert foreground_statistics(volume, SPACING) == foreground_statistics(other, SPACING)


@given(st.integers(0, 5), st.integers(4, 20))
def test_dark_air_that_a_scanner_replaced_by_one_value_moves_mean_and_spread_little(seed: int, columns: int) -> None:
    lung = np.abs(np.arange(36) - 18) < columns / 2  # at an edge it would be padding
    air = np.where(lung, scan(seed) % 12, scan(seed) + 12)
    as_it_is, masked = (foreground_statistics(volume, SPACING) for volume in (air, np.where(lung, -1024, air)))
    assert abs(masked.mean - as_it_is.mean) < 12
    assert masked.std == pytest.approx(as_it_is.std, rel=0.1)


def test_only_the_central_160_mm_count() -> None:
    volume = scan(0, (3, 200, 180))
    cut = volume[:, 40:160, 30:150]  # 168 mm
    other = volume.copy()
    other[:, :40] += 1000
    assert foreground_statistics(volume, SPACING) == foreground_statistics(cut, SPACING)
    assert foreground_statistics(volume, SPACING) == foreground_statistics(other, SPACING)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 1), (1, 2, 2), (3, 9, 9)])
def test_an_image_that_cannot_be_told_from_padding_has_statistics_all_the_same(shape: tuple[int, ...]) -> None:
    volume = np.zeros(shape, np.int16)
    volume[..., -1, :] = 7
    volume[0, 0, 0] = 3
    assert np.isfinite(astuple(foreground_statistics(volume, SPACING))).all()
    assert foreground_box(np.repeat(np.arange(9)[:, None], 9, axis=1)) is None
