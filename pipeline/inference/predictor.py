"""Volumes on their native grid → masks on the same grid, by one network or by the mean of several."""

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

# By what flips a network was trained with (`plan.flips`): the sets of axes that run backwards.
MIRRORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "rows": ((), (2,)),
    "columns": ((), (3,)),
    "both": ((), (2,), (3,), (2, 3)),
}
BATCH = 32  # slices at once: enough for a GPU, and what a 64 wide network at 224² has memory for


@dataclass(frozen=True)
class Segmented:
    """mask (Z, H, W) uint8: LV 1, MYO 2, RV 3. `cut`: structures at the edge of the network's field of view, beyond
    which the image goes on. `expected`: the Dice that each structure can be expected to have (see `trust`); empty for
    networks that were not calibrated."""

    mask: Labels
    cut: tuple[str, ...]
    expected: Mapping[str, float]


def network_scales(spacing: Spacing, config: PreprocessConfig, pixel_area: float | None = None) -> tuple[float, float]:
    """Linear scales (rows, columns) from native to network pixels; `pixel_area` as in `InferenceConfig`."""
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
    """(Z, H, W) intensities → (Z, size, size) in [-1, 1]: normalised, working grid, crop, in one resampling.

    The crop's centre lies `shift` native rows and columns behind the image's. Beyond the image is the slice's own
    minimum. `spacing` is (slice, row, column) in mm.
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
    """(Z, H, W) labels on the grid of `network_input`, (Z, size, size); beyond the mask is background."""
    inside = mask_ZHW[:, : even(mask_ZHW.shape[1]), : even(mask_ZHW.shape[2])]
    return resized_labels(inside, *_to_network(inside.shape, spacing, config, None, (0, 0)))


def _to_network(
    shape: tuple[int, ...], spacing: Spacing, config: PreprocessConfig, pixel_area: float | None, shift: tuple[int, int]
) -> tuple[Floats, Floats]:
    """What resamples the rows and columns of an even (Z, H, W) to the network's grid."""
    scale_y, scale_x = network_scales(spacing, config, pixel_area)
    return (
        resampling_matrix(shape[1], config.size, scale_y, shift[0]),
        resampling_matrix(shape[2], config.size, scale_x, shift[1]),
    )


class Predictor:
    """Networks of one preprocessing, in eval mode on one device; their class shares are averaged."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        preprocess: PreprocessConfig,
        config: InferenceConfig | None = None,
        mirrors: Flips = "none",
        greys: Floats | None = None,
        trust: Mapping[str, float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        """`greys`: quantiles of grey, evenly spaced from 0 to 1, that each frame is given; None: it keeps its own.
        `trust`: by which Dice is expected (see `trust.expected_dice`); None: it is not. `temperature`: that of
        `probabilities`."""
        self.greys, self.trust, self.temperature = greys, trust or {}, temperature
        self.networks = [network.eval() for network in networks]
        self.preprocess, self.config, self.mirrors = preprocess, config or InferenceConfig(), MIRRORS[mirrors]
        self.device = next(self.networks[0].parameters()).device

    def masks(
        self, frames: Iterable[tuple[Floats, Statistics]], spacing: Spacing, shift: tuple[int, int] = (0, 0)
    ) -> Iterator[Segmented]:
        """Segment frames (Z, H, W) of one shape, each with its own statistics, in their order.

        The field of view's centre lies `shift` native rows and columns behind the image's. Probabilities, not labels,
        are resampled back, so that borders stay smooth; beyond the field of view all is background. Slices of several
        frames share a batch.
        """
        inputs: list[Floats] = []
        shape = (0, 0, 0)
        for volume, stats in frames:
            shape = volume.shape
            seen = network_input(volume, stats, spacing, self.preprocess, self.config.pixel_area, shift)
            inputs.append(seen if self.greys is None else with_greys(seen, self.greys))
            if sum(map(len, inputs)) >= BATCH:
                yield from self._segmented(inputs, shape, spacing, shift)
                inputs = []
        if inputs:
            yield from self._segmented(inputs, shape, spacing, shift)

    def shares(self, inputs_NHW: Floats) -> Floats:
        """Network inputs (N, S, S) in [-1, 1] → each class's share of each pixel, (N, classes, S, S), 0 to 1."""
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
        """`shares` as probabilities, by the networks' mean temperature; the same where they have none."""
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
        """A frame of that shape (Z, H, W) from its `shares`; `shift` as in `masks`. On any thread."""
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
    """The networks of these folders on the GPU if there is one, else the CPU; batch-norm folded, channels_last.

    Raises InputError for absent or damaged files, for networks that were trained with different preprocessing, if
    mirror images are asked for of a network that was trained without, and if grey values are to be matched of networks
    that do not know, or do not agree on, those of their training.
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
    greys = _trained_greys(folders, [document for _, document in loaded]) if config.match_histogram else None
    about = [document.get("about", {}) for _, document in loaded]
    temperatures = [facts.get("temperature") or 1.0 for facts in about]
    mirrors, temperature = flips if config.flips else "none", sum(temperatures) / len(temperatures)
    return Predictor(networks, PreprocessConfig(**first), config, mirrors, greys, _mean_trust(about), temperature)


def _mean_trust(about: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the networks' calibrations have in common, averaged; nothing if one of them has none."""
    each = [facts.get("trust", {}) for facts in about]
    return {name: sum(one[name] for one in each) / len(each) for name in STRUCTURES if all(name in one for one in each)}


def _trained_greys(folders: Sequence[str], documents: Sequence[Mapping[str, Any]]) -> Floats:
    """The quantiles of grey that all these networks were trained on."""
    quantiles = [document.get("about", {}).get("grey_quantiles") for document in documents]
    for folder, found in zip(folders, quantiles, strict=True):
        if not found or found != quantiles[0]:
            differs = "was trained on other grey values than the first model"
            problem = differs if found else "does not say which grey values it was trained on"
            raise InputError(fs.base_name(folder), problem, "leave out --match-histogram, or train again")
    return np.array(quantiles[0], dtype=np.float32)


def with_greys(inputs_ZHW: Floats, quantiles: Floats) -> Floats:
    """The same slices with grey values of this distribution, in their own order: all slices by one curve."""
    own = np.quantile(inputs_ZHW, np.linspace(0.0, 1.0, len(quantiles)))
    # a grey value that fills several quantiles becomes their middle, as if its pixels were spread over them
    values, which = np.unique(own, return_inverse=True)
    theirs = np.bincount(which, weights=quantiles) / np.bincount(which)
    return np.interp(inputs_ZHW, values, theirs).astype(np.float32)


def trained_flips(document: Mapping[str, Any]) -> Flips:
    """Which axes ran backwards in half of a network's training samples; none if its `model.json` does not say."""
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
    """Labels (Z, H, W) uint8 on the volume's own grid, as the network says: nothing is cleaned up."""
    plain = InferenceConfig.model_validate({"precision": precision, "keep_largest": False})
    (found,) = Predictor([model], config, plain).masks([(volume, stats)], spacing)
    return found.mask


def keep_largest(mask_ZHW: Labels) -> Labels:
    """The mask with the largest connected part of each structure alone; the other parts become background.

    Voxels that share a face, an edge or a corner are connected. Of parts of one size the first stays.
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
    """Class of the largest share at every native pixel.

    Where all network pixels that a native one is drawn from are background, so is that one: only the rest is resampled.
    """
    out = np.zeros((len(rows), len(cols)), dtype=np.uint8)
    found = shares_CHW.argmax(0) > 0
    if found.any():
        y, x = _reached(rows, found.any(1)), _reached(cols, found.any(0))
        out[y, x] = resized(shares_CHW, rows[y], cols[x]).argmax(0)
    return out


def _reached(matrix: Floats, pixels: npt.NDArray[np.bool_]) -> slice:
    """From the first to the last output pixel that is drawn from any of these input pixels."""
    at = np.flatnonzero((matrix[:, pixels] > 0).any(1))
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)


def _cut(mask_ZHW: Labels, rows: Floats, cols: Floats) -> tuple[str, ...]:
    """Structures in the outermost rows and columns that the network saw, where the image goes on behind them."""
    found: set[int] = set()
    for axis, matrix in ((1, rows), (2, cols)):
        seen = np.flatnonzero(matrix.sum(1) > 0)
        for at, goes_on in ((seen[0], seen[0] > 0), (seen[-1], seen[-1] < len(matrix) - 1)):
            if goes_on:
                found |= set(np.unique(mask_ZHW.take(at, axis)).tolist())
    return tuple(name for name, label in STRUCTURES.items() if label in found)
