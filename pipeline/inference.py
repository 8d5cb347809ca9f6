"""A volume on its native grid → a mask on the same grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipeline.networks.sdnet import SDNet
from pipeline.networks.unet import UNet
from pipeline.preprocess import PreprocessConfig, even, normalise, working_scales
from pipeline.rescale import resampling_matrix, resized
from pipeline.training import autocast
from storage.intensities import Statistics


def network_input(
    volume: npt.NDArray[np.float32], stats: Statistics, spacing: tuple[float, float, float], config: PreprocessConfig
) -> npt.NDArray[np.float32]:
    """(Z, H, W) intensities → (Z, size, size) in [-1, 1]: normalised, working grid, centre crop, in one resampling.

    Beyond the image is the slice's own minimum. `spacing` is (slice, row, column) in mm.
    """
    scaled = normalise(volume, stats, config)[:, : even(volume.shape[1]), : even(volume.shape[2])]
    size = config.size
    scale_y, scale_x = working_scales(spacing[1], spacing[2], config)
    rows = resampling_matrix(scaled.shape[1], size, scale_y)
    cols = resampling_matrix(scaled.shape[2], size, scale_x)
    out = resized(scaled, rows, cols)
    outside = ~((rows.sum(1) > 0)[:, None] & (cols.sum(1) > 0)[None])
    if outside.any():
        fill = scaled.min((1, 2))
        out[:, outside] = fill[:, None]
    return out


def predict_volume(
    model: UNet | SDNet,
    volume: npt.NDArray[np.float32],
    stats: Statistics,
    spacing: tuple[float, float, float],
    config: PreprocessConfig,
    precision: str = "fp32",
    chunk: int = 16,
) -> npt.NDArray[np.uint8]:
    """Labels (Z, H, W) uint8 on the volume's own grid; background beyond the network's field of view.

    Probabilities, not labels, are resampled back, so that borders stay smooth.
    """
    model.eval()
    device = next(model.parameters()).device
    inputs = network_input(volume, stats, spacing, config)
    scale_y, scale_x = working_scales(spacing[1], spacing[2], config)
    height, width = even(volume.shape[1]), even(volume.shape[2])
    rows = resampling_matrix(config.size, height, 1.0 / scale_y)
    cols = resampling_matrix(config.size, width, 1.0 / scale_x)
    out = np.zeros(volume.shape, dtype=np.uint8)
    for i in range(0, len(inputs), chunk):
        with torch.inference_mode(), autocast(device, precision):
            image = torch.from_numpy(inputs[i : i + chunk, None]).to(device)
            logits = model(image.contiguous(memory_format=torch.channels_last))
        shares = logits.float().softmax(1).cpu().numpy()
        for k, share in enumerate(shares):  # a slice at a time: native grids can be large
            out[i + k, :height, :width] = resized(share, rows, cols).argmax(0)
    return out
