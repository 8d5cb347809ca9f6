"""Factor-based augmentation: draw an image from the anatomy of one slice and the modality of another (section 2.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.config import Precision
from pipeline.networks.sdnet import Decoder

# The last bits of a decoder depend on the batch size. With a fixed chunk, a sample's bytes do not depend on the other
# samples.
CHUNK = 1
EPSILON = 1e-5  # added to the variance in instance norm, as in training


def convolve(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, ...] = (1, 1),
    stride: tuple[int, ...] = (1, 1),
) -> Tensor:
    """`conv2d` in full float32 on a GPU too, with deterministic kernels.

    By default cuDNN convolves with ten bits of mantissa (TF32). Its switches hold for the whole process, in which
    another thread may be training. So this function passes them as arguments.
    """
    benchmark, deterministic, cudnn, allow_tf32 = False, True, True, False
    return torch._convolution(
        x_NCHW, weight, bias, stride, padding, (1, 1), False, (0, 0), 1, benchmark, deterministic, cudnn, allow_tf32
    )


def encode_exactly(encoder: nn.Sequential, image_N1HW: Tensor) -> Tensor:
    """The modality encoder's result (N, M), with the exact float32 of `convolve`."""
    x = image_N1HW
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            x = convolve(x, layer.weight, layer.bias, layer.padding, layer.stride)
        else:
            x = layer(x)
    return x


def unpack_planes(anatomy_NHW: Tensor, channels: int) -> Tensor:
    """Packed anatomies (N, H, W) uint8, channel c in bit c → (N, channels, H, W) float32 of 0 and 1, channels_last."""
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

    Anatomies are packed, channel c in bit c. The decoder's device is used. `fp32` stays within 1e-5 of the decoder in
    float64. `bf16` convolves in bfloat16 and normalises in float32.
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
    """`synthesize` of all images at once, on tensors of the decoder's device. Few large kernels suit a GPU.

    Anatomies may differ in size: each is in the top left corner of its canvas, where `inside_NHW` (bool) is true; None
    if all fill their canvases. Pixels outside are meaningless. `fp32` stays within 1e-5 of `synthesize`. The last bits
    depend on what is decoded together.
    """
    inside = None if inside_NHW is None else inside_NHW[:, None].float()
    with torch.no_grad():  # not inference mode, since a network trains on these tensors
        return _decode(decoder, unpack_planes(anatomy_NHW, channels), modality_NM, precision, inside)


def _decode(
    decoder: Decoder, x_NCHW: Tensor, modality_NM: Tensor, precision: Precision, inside_N1HW: Tensor | None = None
) -> Tensor:
    """The decoder's result (N, H, W) float32, in less than half of its time on a CPU and closer to float64.

    `inside_N1HW` is 1 where a pixel belongs to an image, else 0. AdaIN averages over the image alone, and convolutions
    see zeros elsewhere, as at an image's border.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = decoder.modulation == "none"
    styles = [None] * len(decoder.convolutions) if plain else decoder.styles(modality_NM)
    state = {name: value.to(dtype) for name, value in decoder.named_parameters()}
    for i, style in enumerate(styles):
        weight = state[f"convolutions.{i}.weight"].contiguous(memory_format=torch.channels_last)
        bias = state[f"convolutions.{i}.bias"] if style is None else None  # instance norm removes a bias again
        x = convolve(x_NCHW.to(dtype), weight, bias).float()
        x_NCHW = F.relu_(x if style is None else _normalised(x, *style, inside_N1HW))
        if inside_N1HW is not None:
            x_NCHW *= inside_N1HW
    return torch.tanh_(_to_one_channel(x_NCHW.to(dtype), state["out.weight"]) + state["out.bias"].float())


def _normalised(x_NCHW: Tensor, scale_NC: Tensor, shift_NC: Tensor, inside_N1HW: Tensor | None) -> Tensor:
    """AdaIN, in place. The mean is subtracted before squaring, since one pass would cancel to 1e-4 of the image."""
    x_NCHW -= _mean(x_NCHW, inside_N1HW)
    factor = scale_NC[..., None, None] * torch.rsqrt(_mean(x_NCHW.square(), inside_N1HW) + EPSILON)
    # in place, since new memory costs a CPU more time than the arithmetic
    return torch.addcmul(shift_NC[..., None, None], x_NCHW, factor, out=x_NCHW)


def _mean(x_NCHW: Tensor, inside_N1HW: Tensor | None) -> Tensor:
    """The mean of each image and channel, (N, C, 1, 1), over the pixels of the image."""
    if inside_N1HW is None:
        return x_NCHW.mean((2, 3), keepdim=True)
    return (x_NCHW * inside_N1HW).sum((2, 3), keepdim=True) / inside_N1HW.sum((2, 3), keepdim=True)


def _to_one_channel(x_NCHW: Tensor, weight_1Ckk: Tensor) -> Tensor:
    """`conv2d` to a single channel, same size: (N, H, W) float32.

    CPU kernels compute 16 output channels at a time and would waste 15. So each column of the kernel gives a channel of
    its own. The channels are then shifted and added up.
    """
    n, _, height, width = x_NCHW.shape
    k = weight_1Ckk.shape[-1]
    columns = weight_1Ckk[0].permute(2, 0, 1)[..., None]  # (k, C, k, 1)
    padding = (k // 2, k // 2)
    parts = convolve(x_NCHW, columns.contiguous(memory_format=torch.channels_last), padding=padding).float()
    step_n, step_part, step_y, step_x = parts.stride()
    return parts.as_strided((n, height, width, k), (step_n, step_y, step_x, step_part + step_x)).sum(-1)
