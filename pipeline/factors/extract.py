"""A slice's factors: what the frozen SDNet sees of it and what it says, as a bank holds it.

A slice's factors depend on the slice, the network, its precision and the kind of processor, and on nothing else: no
other slice is in its batch, and it is seen on its own canvas, not on the bank's, which depends on the largest slice
there. So a bank to which subjects are added keeps every byte that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.networks.config import Precision
from pipeline.networks.folding import folded
from pipeline.networks.sdnet import SDNet
from pipeline.samples.preprocess import PreprocessConfig, canvas_size, centre_on, working_slice
from pipeline.samples.rescale import resample_crop
from storage.bank.anatomy_codec import pack
from storage.bank.bank import PackedBank
from storage.slices.store import SliceStore


@dataclass(frozen=True)
class NetworkView:
    """What the network sees of a slice, and its mask.

    canvas: (H, W) float32, the working image centred on the smallest canvas for it; extent: where it stands there;
    crop: (size, size) float32; mask: (h, w) uint8, of the extent.
    """

    canvas: npt.NDArray[np.float32]
    extent: tuple[slice, slice]
    crop: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]


def view(store: SliceStore, slice_id: int, preprocess: PreprocessConfig) -> NetworkView:
    """One slice of a store as the network sees it.

    Anatomy is wanted of the whole field of view, so it is taken from the image on a canvas. The modality encoder
    averages over all it sees: over a canvas it would also average padding, whose share depends on the matrix size. It
    gets the very crop that training made, half-pixel shifts of odd sizes included. Both are filled with the slice's
    minimum.
    """
    working = working_slice(store, slice_id, preprocess)
    fill, (height, width) = float(working.image.min()), working.image.shape
    canvas, top, left = centre_on(working.image, canvas_size(store, [slice_id], preprocess), fill)
    crop, _ = resample_crop(working.image, working.mask, 1.0, preprocess.size, fill)
    return NetworkView(canvas, np.s_[top : top + height, left : left + width], crop, working.mask)


class FrozenSDNet:
    """An SDNet's two encoders for inference: batch-norm folded, channels_last, in one precision on one device."""

    def __init__(self, model: SDNet, precision: Precision = "fp32", device: torch.device | str = "cpu") -> None:
        self.config = model.config
        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._anatomy, self._modality = map(self._prepared, (model.anatomy_encoder, model.modality_encoder))

    def factors(self, seen: NetworkView) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Packed anatomy (h, w) uint8 of the slice's extent and its modality (M,) float32."""
        with torch.inference_mode():
            logits = self._anatomy(self._tensor(seen.canvas)).float()
            binary = logits.softmax(dim=1).round().bool()[0]  # as SDNet.encode_anatomy
            modality = self._modality(self._tensor(seen.crop)).float()[0]
        return pack(binary.cpu().numpy())[seen.extent], modality.cpu().numpy()

    def _prepared(self, network: nn.Module) -> nn.Module:
        return folded(network).to(self._device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def _tensor(self, image_HW: npt.NDArray[np.float32]) -> Tensor:
        batch = torch.from_numpy(image_HW)[None, None]
        return batch.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)


def bank_row(
    network: FrozenSDNet, seen: NetworkView, canvas: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """A view's packed anatomy, modality and mask as a row of a bank of that canvas; zeros around its extent."""
    found, modality = network.factors(seen)
    anatomy, _, _ = centre_on(found, canvas, 0)
    mask, _, _ = centre_on(seen.mask, canvas, 0)
    return anatomy, modality, mask


def bank_rows(network: FrozenSDNet, views: Sequence[NetworkView], canvas: tuple[int, int]) -> PackedBank:
    """`bank_row` of one view after the other."""
    anatomy, modality, mask = zip(*(bank_row(network, seen, canvas) for seen in views), strict=True)
    return PackedBank(np.stack(anatomy), np.stack(mask), np.stack(modality))
