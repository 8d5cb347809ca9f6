"""Predict masks of volumes on their native grid, with one network or with the mean of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.inference.calibration import tempered
from pipeline.inference.config import InferenceConfig
from pipeline.inference.trust import expected_dice
from pipeline.networks.sdnet import SDNet
from pipeline.networks.unet import UNet
from pipeline.samples.plan import Flips
from pipeline.samples.preprocess import PreprocessConfig, even, normalise, working_scales
from pipeline.samples.rescale import linear_scale, resampling_matrix, resized, resized_labels
from pipeline.training.step import autocast
from storage import fs
from storage.errors import InputError
from storage.nifti.header import Spacing
from storage.slices.intensities import Statistics
from storage.subjects import STRUCTURES

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

# For each setting of `plan.flips` in training, the sets of axes to reverse.
MIRRORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "rows": ((), (2,)),
    "columns": ((), (3,)),
    "both": ((), (2,), (3,), (2, 3)),
}
BATCH = 32  # slices at once: enough for a GPU, and few enough for a network of width 64 at 224²


@dataclass(frozen=True)
class Segmented:
    """A segmented frame.

    mask: (Z, H, W) uint8, LV 1, MYO 2, RV 3. cut: structures at an edge of the network's field of view beyond which the
    image continues. expected: the expected Dice (0 to 1) of each structure (see `trust`); empty if the networks were
    not calibrated.
    """

    mask: Labels
    cut: tuple[str, ...]
    expected: Mapping[str, float]


def network_scales(spacing: Spacing, config: PreprocessConfig, pixel_area: float | None = None) -> tuple[float, float]:
    """Linear scales (rows, columns) from native to network pixels. `pixel_area` in mm², as in `InferenceConfig`."""
    scale_y, scale_x = working_scales(spacing[1], spacing[2], config)
    further = 1.0 if pixel_area is None else linear_scale(spacing[1] * spacing[2], pixel_area)
    return scale_y * further, scale_x * further


def network_input(
    volume: Floats,
    stats: Statistics,
    spacing: Spacing,
    config: PreprocessConfig,
    pixel_area: float | None = None,
    shift: tuple[int, int] = (0, 0),
) -> Floats:
    """(Z, H, W) intensities → (Z, size, size) float32 in [-1, 1]: normalise, resample to the working grid, and crop.

    One resampling does both steps. `shift` is the way from the image's centre to the crop's, in native rows (down) and
    columns (right). Beyond the image, each slice is filled with its minimum. `spacing` is (slice, row, column) in mm.
    """
    scaled = normalise(volume, stats, config)[:, : even(volume.shape[1]), : even(volume.shape[2])]
    rows, cols = _to_network(scaled.shape, spacing, config, pixel_area, shift)
    out = resized(scaled, rows, cols)
    outside = ~((rows.sum(1) > 0)[:, None] & (cols.sum(1) > 0)[None])
    if outside.any():
        fill = scaled.min((1, 2))
        out[:, outside] = fill[:, None]
    return out


def network_labels(mask_ZHW: Labels, spacing: Spacing, config: PreprocessConfig) -> Labels:
    """Resample labels (Z, H, W) to the grid of `network_input`: (Z, size, size). Beyond the mask is background."""
    inside = mask_ZHW[:, : even(mask_ZHW.shape[1]), : even(mask_ZHW.shape[2])]
    return resized_labels(inside, *_to_network(inside.shape, spacing, config, None, (0, 0)))


def _to_network(
    shape: tuple[int, ...], spacing: Spacing, config: PreprocessConfig, pixel_area: float | None, shift: tuple[int, int]
) -> tuple[Floats, Floats]:
    """The matrices that resample the rows and columns of a (Z, H, W) array, H and W even, to the network's grid."""
    scale_y, scale_x = network_scales(spacing, config, pixel_area)
    return (
        resampling_matrix(shape[1], config.size, scale_y, shift[0]),
        resampling_matrix(shape[2], config.size, scale_x, shift[1]),
    )


class Predictor:
    """Networks with one preprocessing, in eval mode on one device. Their class shares are averaged."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        preprocess: PreprocessConfig,
        config: InferenceConfig | None = None,
        mirrors: Flips = "none",
        trust: Mapping[str, float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        """mirrors: the flips to average over. trust: the calibration for `trust.expected_dice`; without it no Dice is
        expected. temperature: that of `probabilities`.
        """
        self.trust, self.temperature = trust or {}, temperature
        self.networks = [network.eval() for network in networks]
        self.preprocess, self.config, self.mirrors = preprocess, config or InferenceConfig(), MIRRORS[mirrors]
        self.device = next(self.networks[0].parameters()).device

    def masks(
        self, frames: Iterable[tuple[Floats, Statistics]], spacing: Spacing, shift: tuple[int, int] = (0, 0)
    ) -> Iterator[Segmented]:
        """Segment frames (Z, H, W) of one shape, each with its own statistics. Yields the results in their order.

        `spacing` is (slice, row, column) in mm, `shift` as in `network_input`. Class shares, not labels, are resampled
        back to the native grid, so that borders stay smooth. Beyond the field of view is background. Slices of several
        frames share a batch.
        """
        inputs: list[Floats] = []
        shape = (0, 0, 0)
        for volume, stats in frames:
            shape = volume.shape
            seen = network_input(volume, stats, spacing, self.preprocess, self.config.pixel_area, shift)
            inputs.append(seen)
            if sum(map(len, inputs)) >= BATCH:
                yield from self._segmented(inputs, shape, spacing, shift)
                inputs = []
        if inputs:
            yield from self._segmented(inputs, shape, spacing, shift)

    def shares(self, inputs_NHW: Floats) -> Floats:
        """Network inputs (N, S, S) in [-1, 1] → class shares (N, classes, S, S), mean over networks and flips."""
        parts = np.array_split(inputs_NHW, -(-len(inputs_NHW) // BATCH))
        out = []
        for part in parts:
            image = torch.from_numpy(part[:, None]).to(self.device)
            with torch.inference_mode(), autocast(self.device, self.config.precision):
                total: torch.Tensor | float = 0.0
                for axes in self.mirrors:
                    seen = image.flip(axes).contiguous(memory_format=torch.channels_last)
                    for network in self.networks:
                        total = total + network(seen).float().softmax(1).flip(axes)
            out.append((total / (len(self.mirrors) * len(self.networks))).cpu().numpy())  # type: ignore[union-attr]
        return np.concatenate(out)

    def probabilities(self, inputs_NHW: Floats) -> Floats:
        """`shares` as probabilities, by the networks' mean temperature. Without a temperature they stay the same."""
        return tempered(self.shares(inputs_NHW), self.temperature, axis=1)

    def _segmented(
        self, inputs: Sequence[Floats], shape: tuple[int, int, int], spacing: Spacing, shift: tuple[int, int]
    ) -> Iterator[Segmented]:
        shares = self.shares(np.concatenate(inputs))
        for first in range(0, len(shares), shape[0]):
            yield self.on_grid(shares[first : first + shape[0]], shape, spacing, shift)

    def on_grid(
        self,
        shares_ZCHW: Floats,
        shape: tuple[int, int, int],
        spacing: Spacing,
        shift: tuple[int, int] = (0, 0),
    ) -> Segmented:
        """Segment a frame of shape (Z, H, W) from its `shares`. `shift` is as in `masks`. May run on any thread."""
        _, height, width = shape
        scale_y, scale_x = network_scales(spacing, self.preprocess, self.config.pixel_area)
        rows = resampling_matrix(self.preprocess.size, even(height), 1.0 / scale_y, -shift[0] * scale_y)
        cols = resampling_matrix(self.preprocess.size, even(width), 1.0 / scale_x, -shift[1] * scale_x)
        mask = np.zeros(shape, dtype=np.uint8)
        for out, share in zip(mask, shares_ZCHW, strict=True):
            out[: len(rows), : len(cols)] = _native_labels(share, rows, cols)
        cut = _cut(mask, rows, cols)
        return Segmented(
            keep_largest(mask) if self.config.keep_largest else mask, cut, expected_dice(shares_ZCHW, self.trust)
        )


def load_predictor(folders: Sequence[str], config: InferenceConfig | None = None) -> Predictor:
    """Load the networks of these folders on the GPU if there is one, else the CPU; batch-norm folded, channels_last.

    Raises InputError if files are absent or damaged, or if the networks were trained with different preprocessing. With
    `config.flips`, also if they were trained with different flips or none.
    """
    from pipeline.networks.files import default_device, load_model
    from pipeline.networks.folding import folded

    config = config or InferenceConfig()
    loaded = [load_model(folder) for folder in folders]
    first, flips = loaded[0][1]["preprocess"], trained_flips(loaded[0][1])
    for folder, (_, document) in zip(folders, loaded, strict=True):
        if document["preprocess"] != first:
            problem = "was trained with another preprocessing than the first model"
            raise InputError(fs.base_name(folder), problem, "predict with each on its own")
        if config.flips and trained_flips(document) != flips:
            problem = "was trained with other flips than the first model"
            raise InputError(fs.base_name(folder), problem, "leave out --flips")
    if config.flips and flips == "none":
        problem = "was trained without flips, so it does not know a mirrored heart"
        raise InputError(fs.base_name(folders[0]), problem, "leave out --flips, or train with plan.flips")
    networks = [folded(network).to(default_device(), memory_format=torch.channels_last) for network, _ in loaded]  # type: ignore[call-overload]
    about = [document.get("about", {}) for _, document in loaded]
    temperatures = [facts.get("temperature") or 1.0 for facts in about]
    mirrors, temperature = flips if config.flips else "none", sum(temperatures) / len(temperatures)
    return Predictor(networks, PreprocessConfig(**first), config, mirrors, _mean_trust(about), temperature)


def _mean_trust(about: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of the networks' calibrations, for the structures that all of them have."""
    each = [facts.get("trust", {}) for facts in about]
    return {name: sum(one[name] for one in each) / len(each) for name in STRUCTURES if all(name in one for one in each)}


def trained_flips(document: Mapping[str, Any]) -> Flips:
    """The flips that a network was trained with, from its `model.json`; `none` if the file does not say."""
    flips: Flips = document.get("about", {}).get("training", {}).get("flips", "none")
    return flips


def predict_volume(
    model: UNet | SDNet,
    volume: Floats,
    stats: Statistics,
    spacing: Spacing,
    config: PreprocessConfig,
    precision: str = "fp32",
) -> Labels:
    """Labels (Z, H, W) uint8 on the volume's own grid, without any cleaning of the network's result."""
    plain = InferenceConfig.model_validate({"precision": precision, "keep_largest": False})
    (found,) = Predictor([model], config, plain).masks([(volume, stats)], spacing)
    return found.mask


def keep_largest(mask_ZHW: Labels) -> Labels:
    """Keep only the largest connected part of each structure. All other parts become background.

    Voxels that share a face, an edge or a corner are connected. Of several parts of equal size, the first is kept.
    """
    from scipy import ndimage

    out = mask_ZHW.copy()
    for label, box in enumerate(ndimage.find_objects(mask_ZHW), start=1):
        if box is not None:
            inside = mask_ZHW[box] == label
            parts, count = ndimage.label(inside, np.ones((3, 3, 3)))
            if count > 1:
                out[box][inside & (parts != np.bincount(parts[inside]).argmax())] = 0
    return out


def _native_labels(shares_CHW: Floats, rows: Floats, cols: Floats) -> Labels:
    """The class with the largest share at every native pixel: (H, W) uint8.

    If all network pixels that contribute to a native pixel are background, the native pixel is too. So only the other
    pixels are resampled.
    """
    out = np.zeros((len(rows), len(cols)), dtype=np.uint8)
    found = shares_CHW.argmax(0) > 0
    if found.any():
        y, x = _reached(rows, found.any(1)), _reached(cols, found.any(0))
        out[y, x] = resized(shares_CHW, rows[y], cols[x]).argmax(0)
    return out


def _reached(matrix: Floats, pixels: npt.NDArray[np.bool_]) -> slice:
    """The range of output pixels to which any of these input pixels contributes."""
    at = np.flatnonzero((matrix[:, pixels] > 0).any(1))
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)


def _cut(mask_ZHW: Labels, rows: Floats, cols: Floats) -> tuple[str, ...]:
    """Structures in the outermost rows and columns that the network saw, if the image continues beyond them."""
    found: set[int] = set()
    for axis, matrix in ((1, rows), (2, cols)):
        seen = np.flatnonzero(matrix.sum(1) > 0)
        for at, goes_on in ((seen[0], seen[0] > 0), (seen[-1], seen[-1] < len(matrix) - 1)):
            if goes_on:
                found |= set(np.unique(mask_ZHW.take(at, axis)).tolist())
    return tuple(name for name, label in STRUCTURES.items() if label in found)
