"""Images of several sizes in one tensor: each in the top left corner of a canvas of zeros, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Shape = tuple[int, int]  # height, width

MOST_PIXELS = 2**22  # in all canvases that are decoded together: sixteen of 512²
MOST_PADDING = 2  # most pixels of the canvases, over those of the images alone


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it. On the CPU, the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def on_canvases(
    arrays: Sequence[npt.NDArray[Any] | None], size: Shape, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Put arrays (h, w) on canvases (N, H, W), and copy them to the device at once. None gives a canvas of zeros."""
    canvas = torch.zeros((len(arrays), *size), dtype=dtype, pin_memory=device.type == "cuda")
    for place, array in zip(canvas.numpy(), arrays, strict=True):
        if array is not None:
            place[: array.shape[0], : array.shape[1]] = array
    return canvas.to(device, non_blocking=True)


def inside(shapes: Sequence[Shape], size: Shape, device: torch.device) -> Tensor | None:
    """Which pixels of the canvases are image: (N, H, W) bool, or None if all are."""
    if all(shape == size for shape in shapes):
        return None
    ends = upload(np.array(shapes, dtype=np.int64), device)
    rows, columns = (torch.arange(n, device=device) < ends[:, axis, None] for axis, n in enumerate(size))
    return rows[:, :, None] & columns[:, None, :]


def lowest(image_NHW: Tensor, inside_NHW: Tensor | None) -> Tensor:
    """The minimum of each image, (N,)."""
    values = image_NHW if inside_NHW is None else image_NHW.where(inside_NHW, torch.inf)
    return values.amin((1, 2))


def largest(shapes: Sequence[Shape]) -> Shape:
    """The smallest canvas that holds every one of these shapes."""
    return max(h for h, _ in shapes), max(w for _, w in shapes)


def alike(shapes: Sequence[Shape]) -> list[list[int]]:
    """Group the shapes, by their numbers, for one canvas size a group.

    There are few groups, but each has at most `MOST_PIXELS` and `MOST_PADDING` times the pixels of its images, or a
    single image.
    """
    groups: list[list[int]] = []
    for k in sorted(range(len(shapes)), key=lambda k: shapes[k][0] * shapes[k][1]):
        together = [*groups[-1], k] if groups else [k]
        height, width = largest([shapes[i] for i in together])
        padded, needed = len(together) * height * width, sum(shapes[i][0] * shapes[i][1] for i in together)
        if groups and padded <= min(MOST_PIXELS, MOST_PADDING * needed):
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups
