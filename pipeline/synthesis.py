"""Factor-based augmentation: an image drawn from one slice's anatomy and another's modality (paper section 2.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipeline.networks.sdnet import Decoder

# A decoder's bits depend a little on the batch size: a fixed chunk makes a sample's bytes independent of its
# neighbours.
CHUNK = 1


def unpack_planes(anatomy: npt.NDArray[np.uint8], channels: int) -> torch.Tensor:
    """(N, H, W) uint8, channel c in bit c → (N, channels, H, W) float32 of 0 and 1."""
    shifts = torch.arange(channels, dtype=torch.uint8)[None, :, None, None]
    return ((torch.from_numpy(anatomy)[:, None] >> shifts) & 1).float()


def synthesize(
    decoder: Decoder, channels: int, anatomy: npt.NDArray[np.uint8], modality: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Decode anatomies (N, H, W) uint8 with modalities (N, M) float32 → images (N, H, W) float32 in (-1, 1)."""
    out = np.empty(anatomy.shape, dtype=np.float32)
    device = next(decoder.parameters()).device
    with torch.inference_mode():
        for i in range(0, len(anatomy), CHUNK):
            planes = unpack_planes(anatomy[i : i + CHUNK], channels).to(device)
            styles = torch.from_numpy(modality[i : i + CHUNK]).to(device)
            out[i : i + CHUNK] = decoder(planes, styles)[:, 0].float().cpu().numpy()
    return out
