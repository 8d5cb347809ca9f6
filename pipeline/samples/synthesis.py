"""Factor-based augmentation: an image drawn from one slice's anatomy and another's modality (paper section 2.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.networks.config import Precision
from pipeline.networks.sdnet import Decoder

# A decoder's bits depend a little on the batch size: a fixed chunk makes a sample's bytes independent of its
# neighbours.
CHUNK = 1
EPSILON = 1e-5  # of instance norm, as in training


def unpack_planes(anatomy: npt.NDArray[np.uint8], channels: int) -> Tensor:
    """(N, H, W) uint8, channel c in bit c → (N, channels, H, W) float32 of 0 and 1, channels last in memory."""
    bits = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(channels, dtype=np.uint8) & 1  # (256, channels)
    return torch.from_numpy(bits.astype(np.float32).take(anatomy, 0)).permute(0, 3, 1, 2)


def synthesize(
    decoder: Decoder,
    channels: int,
    anatomy: npt.NDArray[np.uint8],
    modality: npt.NDArray[np.float32],
    precision: Precision = "fp32",
) -> npt.NDArray[np.float32]:
    """Decode anatomies (N, H, W) uint8 with modalities (N, M) float32 → images (N, H, W) float32 in (-1, 1).

    Runs where the decoder is. `fp32` stays within 1e-5 of the decoder in float64; `bf16` convolves in bfloat16 and
    normalises in float32.
    """
    out = np.empty(anatomy.shape, dtype=np.float32)
    device = next(decoder.parameters()).device
    # cuDNN would otherwise convolve with ten bits of mantissa, and choose among kernels by timing them
    with torch.inference_mode(), torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        for i in range(0, len(anatomy), CHUNK):
            planes = unpack_planes(anatomy[i : i + CHUNK], channels).to(device)
            styles = torch.tensor(modality[i : i + CHUNK], device=device)
            out[i : i + CHUNK] = _decode(decoder, planes, styles, precision).cpu().numpy()
    return out


def _decode(decoder: Decoder, x_NCHW: Tensor, modality_NM: Tensor, precision: Precision) -> Tensor:
    """What `decoder` computes, (N, H, W) float32, in less than half of its time on a CPU and closer to float64."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = decoder.modulation == "none"
    styles = [None] * len(decoder.convolutions) if plain else decoder.styles(modality_NM)
    state = {name: value.to(dtype) for name, value in decoder.named_parameters()}
    for i, style in enumerate(styles):
        weight = state[f"convolutions.{i}.weight"].contiguous(memory_format=torch.channels_last)
        bias = state[f"convolutions.{i}.bias"] if style is None else None  # instance norm would take it away again
        x = F.conv2d(x_NCHW.to(dtype), weight, bias, padding=1).float()
        x_NCHW = F.relu_(x if style is None else _normalised(x, *style))
    return torch.tanh_(_to_one_channel(x_NCHW.to(dtype), state["out.weight"]) + state["out.bias"].float())


def _normalised(x_NCHW: Tensor, scale_NC: Tensor, shift_NC: Tensor) -> Tensor:
    """AdaIN, in place. The mean goes before squares are summed: in one pass they cancel to 1e-4 of the image."""
    x_NCHW -= x_NCHW.mean((2, 3), keepdim=True)
    variance = x_NCHW.square().mean((2, 3))
    factor = scale_NC * torch.rsqrt(variance + EPSILON)
    # fresh memory costs a CPU more than the arithmetic
    return torch.addcmul(shift_NC[..., None, None], x_NCHW, factor[..., None, None], out=x_NCHW)


def _to_one_channel(x_NCHW: Tensor, weight_1Ckk: Tensor) -> Tensor:
    """`conv2d` to a single channel, same size: (N, H, W) float32.

    CPU kernels work on 16 output channels at a time and would waste 15. So each column of the kernel makes a channel of
    its own, and these are added up, each shifted by its place.
    """
    n, _, height, width = x_NCHW.shape
    k = weight_1Ckk.shape[-1]
    columns = weight_1Ckk[0].permute(2, 0, 1)[..., None]  # (k, C, k, 1)
    parts = F.conv2d(x_NCHW, columns.contiguous(memory_format=torch.channels_last), padding=k // 2).float()
    step_n, step_part, step_y, step_x = parts.stride()
    return parts.as_strided((n, height, width, k), (step_n, step_y, step_x, step_part + step_x)).sum(-1)
