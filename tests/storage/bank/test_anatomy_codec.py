from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.bank.anatomy_codec import pack, unpack
from storage.errors import InputError

binary_NCHW = hnp.arrays(
    np.bool_, st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(1, 19), st.integers(1, 19))
)


@given(binary_NCHW, st.sampled_from([np.bool_, np.uint8, np.int64, np.float32, np.float64]))
def test_what_is_packed_comes_back(binary: npt.NDArray[np.bool_], dtype: type[Any]) -> None:
    packed = pack(binary.astype(dtype))
    assert packed.dtype == np.uint8
    assert packed.shape == (binary.shape[0], *binary.shape[2:])
    assert np.array_equal(unpack(packed, binary.shape[1]), binary)


@given(binary_NCHW.filter(len))
def test_one_slice_packs_as_it_does_among_others(binary: npt.NDArray[np.bool_]) -> None:
    assert np.array_equal(pack(binary[0]), pack(binary)[0])
    assert np.array_equal(unpack(pack(binary[0]), binary.shape[1]), binary[0])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))))
def test_every_byte_is_a_pixel_of_eight_channels(packed: npt.NDArray[np.uint8]) -> None:
    assert np.array_equal(pack(unpack(packed, 8)), packed)


@pytest.mark.parametrize("channel", range(8))
def test_channel_c_is_bit_c(channel: int) -> None:
    binary = np.zeros((8, 1, 1), dtype=np.float32)
    binary[channel] = 1
    assert pack(binary).tolist() == [[1 << channel]]


def test_a_view_in_another_memory_order_packs_the_same() -> None:
    binary = np.random.default_rng(0).random((2, 5, 6, 8)) > 0.5  # (N, H, W, C)
    view = np.moveaxis(binary, -1, 1)
    assert np.array_equal(pack(view), pack(np.ascontiguousarray(view)))


@pytest.mark.parametrize("channels", [0, 9, 64])
def test_a_number_of_channels_that_a_byte_cannot_hold_is_refused(channels: int) -> None:
    with pytest.raises(InputError, match=f"^anatomy: {channels} channels"):
        pack(np.zeros((channels, 4, 4), dtype=np.bool_))
    with pytest.raises(InputError, match=f"^anatomy: {channels} channels"):
        unpack(np.zeros((4, 4), dtype=np.uint8), channels)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 256.0, 1e-7])
def test_values_other_than_0_and_1_are_not_rounded_away(value: float) -> None:
    soft = np.zeros((2, 3, 3))
    soft[1, 2, 0] = value
    with pytest.raises(ValueError, match="other than 0 and 1"):
        pack(soft)
