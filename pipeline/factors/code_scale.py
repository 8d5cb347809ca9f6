"""The modality codes in units of their own spread.

Nothing in the paper's loss sets the scale of the codes: its encoder gives real images a tenth of the spread of the
prior N(0, 1) that latent regression draws from, and a term that enforces the prior's (`LossConfig.kl`) costs
reconstruction and what the codes tell of the vendor (docs/fidelity.md). The scale is a choice of coordinates, though:
the encoder's last layer and the decoder's first are linear, and take up any other without a change of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.networks.sdnet import SDNet

NARROWEST = 0.01  # of the widest dimension: what varies less is next to constant, and its noise is not to be spread
TINY = 1e-6  # a spread of nothing but rounding


@torch.no_grad()
def standardise_codes(model: SDNet, image_N1HW: Tensor, chunk: int = 16) -> None:
    """Give the codes of these images mean 0 and standard deviation 1, less where a dimension is next to constant; the
    model draws as before.

    image: float32 in [-1, 1], two or more. `model` is changed in place: what it decodes from its own codes is the same
    up to rounding, and codes from elsewhere mean something else. Without modulation nothing is done.
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
