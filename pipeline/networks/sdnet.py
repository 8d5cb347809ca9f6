"""SDNet (Chartsias et al. 2019) with an AdaIN decoder (Huang and Belongie 2017), as in the paper's section 2.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.config import SDNetConfig
from pipeline.networks.unet import UNet

EPSILON = 1e-5  # added to the variance in instance norm


def binarise(soft: Tensor) -> Tensor:
    """Round shares in [0, 1] to exactly 0 or 1. The gradient passes unchanged (straight-through; section 2.2)."""
    return soft + (soft.round() - soft).detach() if soft.requires_grad else soft.round()


def adain(x_NCHW: Tensor, scale_NC: Tensor, shift_NC: Tensor) -> Tensor:
    """`instance_norm(x) · scale + shift`, one scale and shift for each image and channel (Huang and Belongie 2017).

    If scale and shift are (N, 1), they hold for all channels of an image. Returns (N, C, H, W) in the dtype of x.
    """
    if x_NCHW.device.type != "cpu":
        return adain_at_once(x_NCHW, scale_NC, shift_NC)
    # Batch-norm of a single image is instance norm. F.instance_norm does not keep channels_last, which made it and the
    # gradients around it three times as slow.
    channels = x_NCHW.shape[1]
    images = zip(x_NCHW.split(1), scale_NC, shift_NC, strict=True)
    return torch.cat(
        [F.batch_norm(x, None, None, w.expand(channels), b.expand(channels), training=True) for x, w, b in images]
    )


def adain_at_once(x_NCHW: Tensor, scale_NC: Tensor, shift_NC: Tensor) -> Tensor:
    """`adain` of all images together, in float32. A GPU then starts a few kernels for all of them, not for each."""
    x = x_NCHW.float()
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    factor = scale_NC.float()[..., None, None] * torch.rsqrt(variance + EPSILON)
    return ((x - mean) * factor + shift_NC.float()[..., None, None]).to(x_NCHW.dtype)


class Decoder(nn.Module):
    """Draws an image (N, 1, H, W) in (-1, 1) from an anatomy (N, C, H, W) and a modality (N, M)."""

    def __init__(self, config: SDNetConfig) -> None:
        super().__init__()
        width = config.decoder_width
        inputs = [config.anatomy_channels, width, width]
        self.convolutions = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1) for i in inputs)
        self.modulation = config.modulation
        styles = 2 if config.modulation == "scalars" else 2 * width * len(inputs)
        # The last layer has no activation, since a scale may be negative.
        self.style = nn.Sequential(
            nn.Linear(config.modality_size, config.style_width),
            nn.ReLU(inplace=True),
            nn.Linear(config.style_width, styles),
        )
        if self.modulation == "none":
            self.style = nn.Sequential()
        self.out = nn.Conv2d(width, 1, 7, padding=3)

    def forward(self, anatomy_NCHW: Tensor, modality_NM: Tensor) -> Tensor:
        """Draw the anatomies (N, C, H, W) in the style of the modalities (N, M): (N, 1, H, W) in (-1, 1)."""
        x = anatomy_NCHW
        if self.modulation == "none":
            for convolution in self.convolutions:
                x = F.relu(convolution(x))
            return torch.tanh(self.out(x))
        for convolution, (scale, shift) in zip(self.convolutions, self.styles(modality_NM), strict=True):
            x = F.relu(adain(convolution(x), scale, shift))
        return torch.tanh(self.out(x))

    def styles(self, modality_NM: Tensor) -> list[tuple[Tensor, Tensor]]:
        """AdaIN's scale and shift for each layer: (N, width) each, or (N, 1) and equal in all layers for `scalars`.

        Not defined for the modulation `none`.
        """
        style = self.style(modality_NM)
        layers = len(self.convolutions)
        if self.modulation == "scalars":
            style = style.repeat(1, layers)
        parts = style.chunk(2 * layers, dim=1)
        # The network predicts the scale minus 1, so that an untrained decoder starts close to plain instance norm.
        pairs = [(1.0 + scale, shift) for scale, shift in zip(parts[::2], parts[1::2], strict=True)]
        return [(s.relu(), b.relu()) for s, b in pairs] if self.modulation == "adain_relu" else pairs


class ModalityEncoder(nn.Sequential):
    """Image (N, 1, H, W) → modality (N, modality_size).

    One 7 × 7 convolution, two 4 × 4 convolutions of stride 2, a global average, and a linear layer.
    """

    def __init__(self, config: SDNetConfig) -> None:
        width = config.modality_width
        super().__init__(
            nn.Conv2d(1, width, 7, padding=3),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, config.modality_size),
        )


def segmentor(config: SDNetConfig) -> nn.Sequential:
    """Make the segmentor: anatomy (N, C, H, W) → logits (N, classes, H, W)."""
    width = config.segmentor_width
    return nn.Sequential(
        nn.Conv2d(config.anatomy_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, config.classes, 1),
    )


class SDNet(nn.Module):
    """Anatomy encoder, modality encoder, segmentor and AdaIN decoder. `forward` segments an image.

    Images are (N, 1, H, W) in [-1, 1]; H and W are multiples of 16.
    """

    def __init__(self, config: SDNetConfig) -> None:
        super().__init__()
        self.config = config
        self.anatomy_encoder = UNet(config.anatomy_width, config.anatomy_channels)
        # A softmax over 8 nearly equal logits never exceeds 0.5. All channels would round to 0, and decoder and
        # segmentor would see an empty anatomy for hundreds of steps.
        with torch.no_grad():
            self.anatomy_encoder.head.weight.mul_(config.anatomy_gain)
        self.modality_encoder = ModalityEncoder(config)
        self.segmentor = segmentor(config)
        self.decoder = Decoder(config)

    def encode_anatomy(self, image_N1HW: Tensor) -> Tensor:
        """The anatomy (N, C, H, W), exactly 0 or 1: a rounded softmax. At most one channel of a pixel is 1."""
        return binarise(self.anatomy_shares(image_N1HW))

    def anatomy_shares(self, image_N1HW: Tensor) -> Tensor:
        """The softmax before rounding: (N, C, H, W) in [0, 1]. The shares of a pixel add up to 1 over the channels."""
        shares: Tensor = self.anatomy_encoder(image_N1HW).softmax(dim=1)
        return shares

    def encode_modality(self, image_N1HW: Tensor) -> Tensor:
        """The modality (N, modality_size), unbounded floats."""
        modality: Tensor = self.modality_encoder(image_N1HW)
        return modality

    def decode(self, anatomy_NCHW: Tensor, modality_NM: Tensor) -> Tensor:
        """Draw an image (N, 1, H, W) in (-1, 1)."""
        image: Tensor = self.decoder(anatomy_NCHW, modality_NM)
        return image

    def segment(self, anatomy_NCHW: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of an anatomy."""
        logits: Tensor = self.segmentor(anatomy_NCHW)
        return logits

    def forward(self, image_N1HW: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of an image."""
        return self.segment(self.encode_anatomy(image_N1HW))
