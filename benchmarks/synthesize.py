"""An FA sample from stored factors against making it without a bank: both encoders and the decoder, width 64.

The decoder is 16 wide. The reference encodes two images, the anatomy of one and the modality of the other, and decodes;
its network is in `channels_last`, which is faster on a CPU. fp32 is the ratio; bf16 on both sides is printed above, and
so is what a residual sample costs beside a decoded one, its texture being there already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.timing import rates, ratio
from pipeline.networks.config import Precision, SDNetConfig
from pipeline.networks.sdnet import SDNet
from pipeline.samples.synthesis import synthesize
from storage.bank.anatomy_codec import pack

SIZE, SAMPLES = 224, 2


def run() -> dict[str, Any]:
    """FA samples a second on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SDNet(SDNetConfig()).eval().to(memory_format=torch.channels_last)
    images = torch.rand(SAMPLES, 1, SIZE, SIZE) * 2 - 1
    with torch.inference_mode():
        anatomy = pack(model.encode_anatomy(images).bool().numpy())
        modality = model.encode_modality(images).numpy()
    print("residual against decoded:", _residual(model, images, anatomy, modality))
    print("bf16:", _compared(model, images, anatomy, modality, "bf16"))
    return _compared(model, images, anatomy, modality, "fp32")


def _residual(model: SDNet, images: torch.Tensor, anatomy: np.ndarray, modality: np.ndarray) -> dict[str, Any]:
    textures = images[:, 0].numpy() - synthesize(model.decoder, 8, anatomy, modality)
    swapped = np.ascontiguousarray(modality[::-1])

    def decoded() -> int:
        for _ in range(10):
            synthesize(model.decoder, 8, anatomy, swapped)
        return 10 * SAMPLES

    def residual() -> int:
        for _ in range(10):
            (synthesize(model.decoder, 8, anatomy, swapped) + textures).clip(-1.0, 1.0)
        return 10 * SAMPLES

    return ratio(rates({"ours": residual, "reference": decoded}, rounds=5), "FA samples/s")


def _compared(
    model: SDNet, images: torch.Tensor, anatomy: np.ndarray, modality: np.ndarray, precision: Precision
) -> dict[str, Any]:
    swapped = np.ascontiguousarray(modality[::-1])

    def ours() -> int:
        for _ in range(10):
            synthesize(model.decoder, 8, anatomy, swapped, precision)
        return 10 * SAMPLES

    def reference() -> int:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for k in range(SAMPLES):
                donor = images[SAMPLES - 1 - k][None]
                model.decode(model.encode_anatomy(images[k][None]), model.encode_modality(donor))
        return SAMPLES

    return ratio(rates({"ours": ours, "reference": reference}, rounds=3), "FA samples/s")
