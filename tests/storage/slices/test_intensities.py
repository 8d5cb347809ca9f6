"""Intensities in int16 and their statistics, against numpy on the volume as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.slices.intensities import INT16_STEPS, Statistics, quantise, statistics

Array = npt.NDArray[Any]

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)


def by_numpy(volume: Array) -> Statistics:
    values = volume.astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    return Statistics(*map(float, (values.mean(), values.std(), values.min(), values.max(), low, high)))


def assert_as_numpy(volume: Array) -> None:
    found, expected = statistics(volume), by_numpy(volume)
    size = max(abs(expected.minimum), abs(expected.maximum))
    for name in vars(expected):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-9 * size), name


def assert_kept(volume: Array) -> None:
    """Within half a step of the range, which is nothing for whole numbers that are no further apart than int16's."""
    kept = quantise(volume)
    assert kept.stored.dtype == np.int16 and kept.stored.shape == volume.shape
    values = volume.astype(np.float64)
    error = np.abs(kept.stored * kept.scale + kept.offset - values).max()
    if np.array_equal(values, np.rint(values)) and np.ptp(values) <= INT16_STEPS:
        assert kept.scale == 1.0 and error == 0.0
    else:
        assert error <= np.ptp(values) / INT16_STEPS * 0.5 + 1e-12 * np.abs(values).max()


def integers(dtype: str) -> st.SearchStrategy[Array]:
    """Volumes over the whole type, and of a scanner's few thousand levels."""
    top = min(int(np.iinfo(dtype).max), 4095)
    whole = hnp.arrays(dtype, SHAPES)
    return st.one_of(whole, hnp.arrays(dtype, SHAPES, elements=st.integers(0, top))).filter(
        lambda v: v.min() != v.max()
    )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_any_type_have_numpys_statistics_and_are_kept(dtype: str) -> None:
    @given(integers(dtype))
    def check(volume: Array) -> None:
        assert_as_numpy(volume)
        assert_kept(volume)

    check()


@given(hnp.arrays("float32", SHAPES, elements=st.floats(-1e6, 1e6, width=32)))
def test_floats_have_numpys_statistics_and_are_kept_within_half_a_step(volume: Array) -> None:
    assume(volume.min() != volume.max())
    assert_as_numpy(volume)
    assert_kept(volume)


@given(st.data(), st.sampled_from(("int16", "uint16", "int32")), st.integers(-(2**23), 2**23))
def test_equal_values_give_equal_results_whatever_their_type(data: st.DataObject, dtype: str, base: int) -> None:
    levels = data.draw(hnp.arrays("int32", SHAPES, elements=st.integers(0, 70_000)))
    info = np.iinfo(dtype)
    volume = np.clip(levels.astype(np.int64) + base, info.min, info.max).astype(dtype)
    assume(volume.min() != volume.max())
    as_float = volume.astype(np.float32)
    assert statistics(as_float) == statistics(volume)
    ours, theirs = quantise(volume), quantise(as_float)
    assert (ours.scale, ours.offset) == (theirs.scale, theirs.offset)
    assert np.array_equal(ours.stored, theirs.stored)


def test_a_whole_study_has_numpys_statistics() -> None:
    rng = np.random.default_rng(0)
    scan = rng.gamma(2.0, 150.0, (10, 256, 216))
    for volume in (scan.astype(np.int16), scan.astype(np.uint16) + 40_000, scan.astype(np.float32), -scan):
        assert_as_numpy(volume)
        assert_kept(volume)
