"""Up to eight binary channels as one byte a pixel: channel c is bit c."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import InputError

MAX_CHANNELS = 8


def check_channels(channels: int) -> None:
    """Raises InputError unless a byte can hold this many channels (1 to 8)."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(
            "anatomy",
            f"{channels} channels, a factor bank holds 1 to {MAX_CHANNELS}",
            f"train an SDNet with anatomy_channels of at most {MAX_CHANNELS}",
        )


def pack(binary: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Pack (C, H, W) or (N, C, H, W) of bool, or of numbers that are 0 or 1, into uint8 (H, W) or (N, H, W).

    Raises InputError for more than eight channels, ValueError for another number of axes or other values.
    """
    if binary.ndim not in (3, 4):
        raise ValueError(f"anatomy has the shape {binary.shape}, (C, H, W) or (N, C, H, W) is expected")
    check_channels(binary.shape[-3])
    bits = binary.astype(np.uint8)
    if binary.dtype != np.bool_ and (bits.max(initial=0) > 1 or not np.array_equal(bits, binary)):
        raise ValueError("anatomy has values other than 0 and 1")
    planes = np.moveaxis(bits, -3, 0)  # (C, …, H, W)
    packed: npt.NDArray[np.uint8] = planes[0].copy()
    for channel in range(1, len(planes)):  # whole planes at a time are several times faster than packbits on this axis
        packed |= planes[channel] << np.uint8(channel)
    return packed


def unpack(packed: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """Unpack uint8 (H, W) or (N, H, W) into uint8 of 0 and 1, (channels, H, W) or (N, channels, H, W).

    Bits from `channels` on are ignored. Raises InputError for a number of channels that a byte cannot hold.
    """
    check_channels(channels)
    shifts = np.arange(channels, dtype=np.uint8)[:, None, None]
    bits: npt.NDArray[np.uint8] = (packed[..., None, :, :] >> shifts) & np.uint8(1)
    return bits
