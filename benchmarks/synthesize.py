"""An FA sample from stored factors against making it without a bank: both encoders and the decoder, width 64, fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.timing import rates, ratio
from pipeline.networks.sdnet import SDNet, SDNetConfig
from pipeline.synthesis import synthesize
from storage.anatomy_codec import pack

SIZE, SAMPLES = 224, 2


def run() -> dict[str, Any]:
    """FA samples a second at decoder width 16."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SDNet(SDNetConfig()).eval()
    images = torch.rand(SAMPLES, 1, SIZE, SIZE) * 2 - 1
    with torch.inference_mode():
        anatomy = pack(model.encode_anatomy(images).bool().numpy())
        modality = model.encode_modality(images).numpy()
    swapped = np.ascontiguousarray(modality[::-1])

    def ours() -> int:
        for _ in range(10):
            synthesize(model.decoder, 8, anatomy, swapped)
        return 10 * SAMPLES

    def reference() -> int:
        with torch.inference_mode():
            for k in range(SAMPLES):
                donor = images[SAMPLES - 1 - k][None]
                model.decode(model.encode_anatomy(images[k][None]), model.encode_modality(donor))
        return SAMPLES

    return ratio(rates({"ours": ours, "reference": reference}, rounds=3), "FA samples/s")
