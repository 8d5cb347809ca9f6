"""Factor-based augmentation: an image drawn from one slice's anatomy and another's modality (paper section 2.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.config import Precision
from pipeline.networks.sdnet import Decoder

# A decoder's bits depend a little on the batch size: a fixed chunk makes a sample's bytes independent of its
# neighbours.
CHUNK = 1
EPSILON = 1e-5  # of instance norm, as in training


def convolve(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, ...] = (1, 1),
    stride: tuple[int, ...] = (1, 1),
) -> Tensor:
    """`conv2d` whose float32 is float32 on a card too, by kernels that do not depend on timing.

    cuDNN would otherwise convolve with ten bits of mantissa. Its switches are the whole process's, and another thread
    may be training: here they are arguments.
    """
    benchmark, deterministic, cudnn, allow_tf32 = False, True, True, False
    return torch._convolution(
        x_NCHW, weight, bias, stride, padding, (1, 1), False, (0, 0), 1, benchmark, deterministic, cudnn, allow_tf32
    )


def encode_exactly(encoder: nn.Sequential, image_N1HW: Tensor) -> Tensor:
    """What the modality encoder computes, (N, M), in float32 as `convolve` means it."""
    x = image_N1HW
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            x = convolve(x, layer.weight, layer.bias, layer.padding, layer.stride)
        else:
            x = layer(x)
    return x


def unpack_planes(anatomy_NHW: Tensor, channels: int) -> Tensor:
    """(N, H, W) uint8, channel c in bit c → (N, channels, H, W) float32 of 0 and 1, channels last in memory."""
    device = anatomy_NHW.device
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(channels, device=device) & 1  # (256, channels)
    return F.embedding(anatomy_NHW.int(), bits.float()).permute(0, 3, 1, 2)


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
    with torch.inference_mode():
        for i in range(0, len(anatomy), CHUNK):
            planes = unpack_planes(torch.tensor(anatomy[i : i + CHUNK], device=device), channels)
            styles = torch.tensor(modality[i : i + CHUNK], device=device)
            out[i : i + CHUNK] = _decode(decoder, planes, styles, precision).cpu().numpy()
    return out


def synthesize_together(
    decoder: Decoder,
    channels: int,
    anatomy_NHW: Tensor,
    modality_NM: Tensor,
    inside_NHW: Tensor | None,
    precision: Precision = "fp32",
) -> Tensor:
    """`synthesize` in one call, on tensors where the decoder is: fewer, larger kernels, which is what a card wants.

    The anatomies may differ in size: each is in the top left corner of its canvas, where `inside_NHW` (bool) is true;
    None where all fill theirs. What the decoder draws outside is without meaning. `fp32` stays within 1e-5 of
    `synthesize`; the bits depend on what is decoded together.
    """
    inside = None if inside_NHW is None else inside_NHW[:, None].float()
    with torch.no_grad():  # not inference mode: a network is trained on these tensors
        return _decode(decoder, unpack_planes(anatomy_NHW, channels), modality_NM, precision, inside)


def _decode(
    decoder: Decoder, x_NCHW: Tensor, modality_NM: Tensor, precision: Precision, inside_N1HW: Tensor | None = None
) -> Tensor:
    """What `decoder` computes, (N, H, W) float32, in less than half of its time on a CPU and closer to float64.

    `inside_N1HW`, 1 and 0, says which pixels are image where sizes differ: AdaIN averages over these alone, and to a
    convolution the others are the zeros that stand around an image.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = decoder.modulation == "none"
    styles = [None] * len(decoder.convolutions) if plain else decoder.styles(modality_NM)
    state = {name: value.to(dtype) for name, value in decoder.named_parameters()}
    for i, style in enumerate(styles):
        weight = state[f"convolutions.{i}.weight"].contiguous(memory_format=torch.channels_last)
        bias = state[f"convolutions.{i}.bias"] if style is None else None  # instance norm would take it away again
        x = convolve(x_NCHW.to(dtype), weight, bias).float()
        x_NCHW = F.relu_(x if style is None else _normalised(x, *style, inside_N1HW))
        if inside_N1HW is not None:
            x_NCHW *= inside_N1HW
    return torch.tanh_(_to_one_channel(x_NCHW.to(dtype), state["out.weight"]) + state["out.bias"].float())


def _normalised(x_NCHW: Tensor, scale_NC: Tensor, shift_NC: Tensor, inside_N1HW: Tensor | None) -> Tensor:
    """AdaIN, in place. The mean goes before squares are summed: in one pass they cancel to 1e-4 of the image."""
    x_NCHW -= _mean(x_NCHW, inside_N1HW)
    factor = scale_NC[..., None, None] * torch.rsqrt(_mean(x_NCHW.square(), inside_N1HW) + EPSILON)
    # fresh memory costs a CPU more than the arithmetic
    return torch.addcmul(shift_NC[..., None, None], x_NCHW, factor, out=x_NCHW)


def _mean(x_NCHW: Tensor, inside_N1HW: Tensor | None) -> Tensor:
    """Of each image and channel, (N, C, 1, 1), over the pixels that are image."""
    if inside_N1HW is None:
        return x_NCHW.mean((2, 3), keepdim=True)
    return (x_NCHW * inside_N1HW).sum((2, 3), keepdim=True) / inside_N1HW.sum((2, 3), keepdim=True)


def _to_one_channel(x_NCHW: Tensor, weight_1Ckk: Tensor) -> Tensor:
    """`conv2d` to a single channel, same size: (N, H, W) float32.

    CPU kernels work on 16 output channels at a time and would waste 15. So each column of the kernel makes a channel of
    its own, and these are added up, each shifted by its place.
    """
    n, _, height, width = x_NCHW.shape
    k = weight_1Ckk.shape[-1]
    columns = weight_1Ckk[0].permute(2, 0, 1)[..., None]  # (k, C, k, 1)
    padding = (k // 2, k // 2)
    parts = convolve(x_NCHW, columns.contiguous(memory_format=torch.channels_last), padding=padding).float()
    step_n, step_part, step_y, step_x = parts.stride()
    return parts.as_strided((n, height, width, k), (step_n, step_y, step_x, step_part + step_x)).sum(-1)
