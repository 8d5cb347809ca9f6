"""Augmentations of an image's look from other papers, as comparisons for FA on the same stream.

- `bigaug`: the intensity transformations of BigAug (Zhang et al. 2020): gamma, contrast, brightness and noise. The bias
  field of MR is added.
- `fourier`: low-frequency amplitudes are mixed with another image's (FDA, Yang and Soatto 2020; as a mixture, Xu et al.
  2021).
- `histogram`: the grey values of another vendor's image (Nyúl and Udupa 1999, here between two images).
- `mixstyle`: mean and spread are mixed with another image's (Zhou et al. 2021, there for feature maps).
- `gin`: two random shallow networks, blended by a smooth map (Ouyang et al. 2022).

These leave the geometry, and so the mask, as they are. `nnunet`, in `nnunet_transforms`, does not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from pipeline.samples.smooth import smooth_field

Image = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Appearance = Literal["none", "bigaug", "fourier", "histogram", "mixstyle", "gin", "nnunet", "nnunet_mirrors"]
NNUNET: Final = ("nnunet", "nnunet_mirrors")  # looks that also move image and mask; another package makes them

LOW = 0.1  # share of the spectrum's width and height, around its centre, whose amplitudes are mixed
CHANNELS = (1, 2, 2, 2, 1)  # of GIN's networks, layer by layer, as in the authors' code
LEAK = 0.01  # slope of their rectifiers below zero


def bigaug(image_HW: Image, rng: np.random.Generator) -> Image:
    """Change an image's intensities, each kind of change with probability one half: (H, W) float32 in [-1, 1]."""
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
    """A smooth positive field (H, W) around 1: the exponential of a polynomial of degree two."""
    y, x = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in shape), indexing="ij")
    field: npt.NDArray[np.float64] = np.exp(np.tensordot(weights_5, np.stack([y, x, x * y, x * x, y * y]), 1))
    return field


def fourier(image_HW: Image, look_HW: Image, rng: np.random.Generator) -> Image:
    """Mix the amplitudes of low frequencies with those of `look_HW`, and keep the phase. All images are in [-1, 1].

    The share of `look_HW` is uniform in [0, 1). It may have another size: frequencies are matched from the spectrum's
    centre.
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


def histogram(image_HW: Image, look_HW: Image, rng: np.random.Generator) -> Image:
    """With probability one half, give the image the grey values of `look_HW`. All images are in [-1, 1].

    Equal grey values stay equal, and their order stays the same: a grey value becomes the one of `look_HW` at the same
    quantile.
    """
    if rng.random() < 0.5:
        return image_HW
    _, where, counts = np.unique(image_HW, return_inverse=True, return_counts=True)
    theirs, their_counts = np.unique(look_HW, return_counts=True)
    darker, their_darker = (np.cumsum(n) / n.sum() for n in (counts, their_counts))
    matched: Image = np.interp(darker, their_darker, theirs)[where].reshape(image_HW.shape).astype(np.float32)
    return matched


def mixstyle(image_HW: Image, look_HW: Image, rng: np.random.Generator) -> Image:
    """With probability one half, mix mean and standard deviation with those of `look_HW`. All images are in [-1, 1].

    The image's share is drawn from Beta(0.1, 0.1), which is mostly close to 0 or 1.
    """
    share = float(rng.beta(0.1, 0.1))
    if rng.random() < 0.5:
        return image_HW
    mean, std, their_mean, their_std = (float(f(x)) for x in (image_HW, look_HW) for f in (np.mean, np.std))
    to_mean, to_std = share * mean + (1.0 - share) * their_mean, share * std + (1.0 - share) * their_std
    out: Image = ((image_HW - mean) * (to_std / max(std, 1e-6)) + to_mean).clip(-1.0, 1.0).astype(np.float32)
    return out


def gin(image_HW: Image, rng: np.random.Generator, strength: float = 1.0) -> Image:
    """Pass the image through two random networks, and blend the results with a smooth random map: in [-1, 1].

    Each network (GIN) has four untrained convolutions of 1 or 3 pixels a side. Its output is mixed with the image, with
    a random share from 0 to `strength`, and scaled to the image's norm. The map (IPA), 0 to 1, gives the share of the
    first network at each pixel.
    """
    mean, std = float(image_HW.mean()), max(float(image_HW.std()), 1e-6)
    image = (image_HW.astype(np.float64) - mean) / std
    one, other = (_random_network(image, rng, strength) for _ in range(2))
    field = smooth_field(image.shape, max(image.shape) / 2, rng)
    share = (field - field.min()) / max(float(np.ptp(field)), 1e-6)
    mixed = share * one + (1.0 - share) * other
    out: Image = (mixed * std + mean).clip(-1.0, 1.0).astype(np.float32)
    return out


def _random_network(image_HW: Floats, rng: np.random.Generator, strength: float) -> Floats:
    x = image_HW[None]
    for layer, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        size = 3 if rng.random() < 0.5 else 1
        x = convolved(x, rng.standard_normal((outputs, inputs, size, size))) + rng.standard_normal((outputs, 1, 1))
        if layer < len(CHANNELS) - 2:
            x = np.where(x > 0.0, x, LEAK * x)
    share = strength * rng.random()
    mixed: Floats = share * x[0] + (1.0 - share) * image_HW
    return mixed * (np.linalg.norm(image_HW) / (np.linalg.norm(mixed) + 1e-5))


def convolved(x_CHW: Floats, kernel_OCKK: Floats) -> Floats:
    """A cross-correlation with zeros around the image, as in networks: (O, H, W).

    Every pixel is summed in a fixed order, so that the bytes do not depend on the number of threads.
    """
    size, (height, width) = kernel_OCKK.shape[-1], x_CHW.shape[1:]
    padded = np.pad(x_CHW, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
    out = np.zeros((len(kernel_OCKK), height, width))
    for row, column in np.ndindex(size, size):
        shifted = padded[:, row : row + height, column : column + width]
        out += np.einsum("oc,chw->ohw", kernel_OCKK[:, :, row, column], shifted)
    return out


# Looks that need only the image, and looks that also need another slice.
ALONE: Final[dict[str, Callable[[Image, np.random.Generator], Image]]] = {"bigaug": bigaug, "gin": gin}
WITH_ANOTHER: Final[dict[str, Callable[[Image, Image, np.random.Generator], Image]]] = {
    "fourier": fourier,
    "histogram": histogram,
    "mixstyle": mixstyle,
}
