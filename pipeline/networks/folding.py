"""Batch-norm folded into the convolution before it: the same function in evaluation, one pass over memory less."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn


def folded(network: nn.Module) -> nn.Module:
    """A copy of `network` for evaluation, in which (convolution, batch-norm) in any `nn.Sequential` is one convolution.

    Equal to `network.eval()` but for rounding, of which there is one: scaled weights are computed in float64. The
    copy's parameters ask for no gradient. Batch-norms that stand elsewhere stay as they are.
    """
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, nn.Sequential):
            layers = list(module)
            for i, (layer, norm) in enumerate(pairwise(layers)):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    _fold(layer, norm)
                    module[i + 1] = nn.Identity()
    return frozen


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """norm(convolution(x)) = (w·x + b - mean) · scale + shift = (w · scale)·x + (b - mean) · scale + shift."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch-norm without running statistics depends on its batch and cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    bias = convolution.bias.double() if convolution.bias is not None else torch.zeros_like(scale)
    dtype = convolution.weight.dtype
    weight = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(((bias - norm.running_mean.double()) * scale + shift).to(dtype), False)
