"""Rescale the modality codes to mean 0 and standard deviation 1.

Nothing in the paper's loss sets the scale of the codes. Trained with it, codes of real images have a tenth of the
spread of the prior N(0, 1), from which latent regression draws. A loss that enforces the prior (`LossConfig.kl`) makes
reconstruction worse and removes vendor information from the codes (docs/fidelity.md). But the scale is only a choice of
coordinates: the encoder's last layer and the decoder's first layer are linear, so both can absorb another scale while
the drawn images stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.networks.sdnet import SDNet

NARROWEST = 0.01  # of the widest spread: a narrower dimension is nearly constant, and its noise must not grow
TINY = 1e-6  # smallest spread that is not rounding alone


@torch.no_grad()
def standardise_codes(model: SDNet, image_N1HW: Tensor, chunk: int = 16) -> None:
    """Give the codes of these images mean 0 and standard deviation 1. Changes `model` in place.

    image: (N, 1, H, W) float32 in [-1, 1], N ≥ 2. A nearly constant dimension gets a smaller deviation. The images that
    the model decodes from its own codes stay the same up to rounding. Codes from before the change no longer fit. If
    the decoder has no modulation, nothing is changed. `chunk` images are encoded at a time.
    """
    if not len(model.decoder.style):
        return
    head, style = model.modality_encoder[-1], model.decoder.style[0]
    assert isinstance(head, nn.Linear) and isinstance(style, nn.Linear)
    training = model.training
    model.eval()
    device = head.weight.device
    codes = torch.cat([model.encode_modality(part.to(device)) for part in image_N1HW.split(chunk)]).double()
    model.train(training)
    mean, spread = codes.mean(dim=0), codes.std(dim=0, unbiased=False)
    spread = spread.clamp_min(max(NARROWEST * float(spread.max()), TINY))
    for layer, weight, bias in (
        (head, head.weight.double() / spread[:, None], (head.bias.double() - mean) / spread),
        (style, style.weight.double() * spread, style.bias.double() + style.weight.double() @ mean),
    ):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
