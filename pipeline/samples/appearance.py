"""Augmentations of an image's looks that came after the paper, on the same stream: what FA is compared with.

`bigaug`: the intensity half of the stacked transformations of Zhang et al. 2020 (BigAug): gamma, contrast, brightness,
noise, and the bias field that MR adds to it. `fourier`: the low frequencies' amplitudes mixed with another image's
(Yang and Soatto 2020, FDA; Xu et al. 2021, as a mixture). Both leave the geometry, and so the mask, alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Appearance = Literal["none", "bigaug", "fourier"]

LOW = 0.1  # share of the spectrum's width, to each side of its centre, whose amplitudes are mixed


def bigaug(image_HW: Image, rng: np.random.Generator) -> Image:
    """An image in [-1, 1] as another scanner might give it, in [-1, 1]; each change with probability one half."""
    x = (image_HW.astype(np.float64) + 1.0) / 2.0
    gamma, contrast, brightness, noise, field = rng.random(5) < 0.5
    strength = rng.uniform(-1.0, 1.0, 4)
    polynomial, speckle = rng.uniform(-1.0, 1.0, 5), rng.standard_normal(x.shape)
    if field:
        x = x * _bias(x.shape, 0.4 * polynomial)
    if gamma:
        x = x.clip(0.0, None) ** float(np.exp(0.7 * strength[0]))
    if contrast:
        x = (x - x.mean()) * float(np.exp(0.5 * strength[1])) + x.mean()
    if brightness:
        x = x + 0.1 * strength[2]
    if noise:
        x = x + 0.05 * abs(strength[3]) * speckle
    out: Image = (2.0 * x - 1.0).clip(-1.0, 1.0).astype(np.float32)
    return out


def _bias(shape: tuple[int, ...], weights_5: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A smooth positive field around 1: exp of a polynomial of degree two."""
    y, x = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in shape), indexing="ij")
    field: npt.NDArray[np.float64] = np.exp(np.tensordot(weights_5, np.stack([y, x, x * y, x * x, y * y]), 1))
    return field


def fourier(image_HW: Image, look_HW: Image, rng: np.random.Generator) -> Image:
    """The image's phase with low-frequency amplitudes on the way to those of `look_HW`; both in [-1, 1], so is it.

    The look may have another size: its spectrum is cut or padded to the image's, frequency by frequency.
    """
    own, other = np.fft.fftshift(np.fft.fft2(image_HW)), np.fft.fftshift(np.fft.fft2(look_HW))
    own, other = own / image_HW.size, other / look_HW.size
    height, width = (max(1, int(LOW * min(a, b) / 2)) for a, b in zip(image_HW.shape, look_HW.shape, strict=True))
    here, there = (
        np.s_[h // 2 - height : h // 2 + height + 1, w // 2 - width : w // 2 + width + 1]
        for h, w in (image_HW.shape, look_HW.shape)
    )
    share, low = float(rng.random()), own[here]
    mixed = (1.0 - share) * np.abs(low) + share * np.abs(other[there])
    own[here] = mixed * np.exp(1j * np.angle(low))
    back = np.fft.ifft2(np.fft.ifftshift(own * image_HW.size)).real
    out: Image = back.clip(-1.0, 1.0).astype(np.float32)
    return out
