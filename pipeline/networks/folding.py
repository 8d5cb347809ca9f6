"""Fold each batch-norm into the convolution before it. Evaluation gives the same result with one memory pass less."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn


def folded(network: nn.Module) -> nn.Module:
    """Copy `network` for evaluation. Every (convolution, batch-norm) in an `nn.Sequential` becomes one convolution.

    The copy equals `network.eval()` up to rounding: the weights are scaled in float64 and rounded once. Its parameters
    require no gradient. Batch-norms elsewhere stay as they are. Raises ValueError for a batch-norm without running
    statistics.
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
