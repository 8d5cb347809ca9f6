"""U-Net with four poolings, batch-norm and bilinear upsampling (paper section 2.2).

The authors' code has the widths 64, 128, 256, 512 and 512.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def double_conv(inputs: int, outputs: int, middle: int | None = None) -> nn.Sequential:
    """A 3 × 3 convolution, batch-norm and ReLU, twice. `middle` is the width between the two; by default `outputs`."""
    middle = middle or outputs
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 3, padding=1),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _dense_gradient(x_NCHW: Tensor) -> Tensor:
    """Return `x` with a hook that makes its gradient contiguous in the memory layout of `x`.

    The gradient arrives as a view into the gradient of the concatenated maps. Without the hook, the backward pass of
    the interpolation copies it too, but leaves channels_last, which costs many times more. A compiled graph gets no
    hook: the compiler chooses the layout itself, and a hook would break its graph.
    """
    if x_NCHW.requires_grad and not torch.compiler.is_compiling():
        channels_last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x_NCHW.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))
    return x_NCHW


class UNet(nn.Module):
    """Image (N, 1, H, W) → logits (N, outputs, H, W). H and W are multiples of 16.

    `deep` (0 to 3) is the number of heads on coarser levels. They are used in training only.
    """

    def __init__(self, width: int, outputs: int, deep: int = 0) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip([1, *widths], widths, strict=False))
        # (skip + below) → narrower: 16w → 4w, 8w → 2w, 4w → w, 2w → w
        ups = [(16 * width, 4 * width), (8 * width, 2 * width), (4 * width, width), (2 * width, width)]
        self.up = nn.ModuleList(double_conv(i, o, i // 2) for i, o in ups)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, outputs, 1)
        self.deep_heads = nn.ModuleList(nn.Conv2d(o, outputs, 1) for _, o in ups[-2::-1][:deep])

    def forward(self, image_N1HW: Tensor) -> Tensor:
        """Logits (N, outputs, H, W)."""
        logits: Tensor = self.head(self.features(image_N1HW))
        return logits

    def logits_by_level(self, image_N1HW: Tensor) -> list[Tensor]:
        """Logits at the image's size, then those of the deep heads at a half, a quarter and an eighth of that size."""
        finest, *coarser = self._levels(image_N1HW)
        return [self.head(finest), *(head(x) for head, x in zip(self.deep_heads, coarser, strict=False))]

    def features(self, image_N1HW: Tensor) -> Tensor:
        """The features that the head reads: (N, width, H, W), not negative."""
        return self._levels(image_N1HW)[0]

    def _levels(self, image_N1HW: Tensor) -> list[Tensor]:
        """The outputs of the blocks on the way up, the finest first."""
        x, skips = image_N1HW, []
        levels: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = _dense_gradient(nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            x = block(torch.cat([skip, x], dim=1))
            levels.insert(0, x)
        return levels
