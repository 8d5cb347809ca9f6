"""A dead anatomy channel takes over part of a live one's pixels.

A channel near 0 in every pixel has no gradient through the softmax, so that no loss brings it back. As vector-quantised
networks reset codes that nothing chooses (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1), its weights are set
anew: to those of the channel whose pixels are drawn worst, and the two are parted where that channel's features differ
most. The rest of the network is left as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.disentanglement import FIRES
from pipeline.networks.sdnet import SDNet

PARTED = 2.0  # standard deviation, within the divided channel's pixels, of the difference between the two new logits


def revive(model: SDNet, optimiser: torch.optim.Optimizer, image_N1HW: Tensor) -> int | None:
    """Set one dead channel anew if there is one; its number, or None.

    image: training images, float32 in [-1, 1]. Dead is what fires in less than 0.1 % of their pixels. A pure function
    of weights and images; of several workers the first one's images decide.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        dead, divided, direction, offset = _division(model, image_N1HW)
    model.train(training)
    head = model.anatomy_encoder.head
    assert head.bias is not None
    with torch.no_grad():
        if dead >= 0:
            weight, bias = head.weight[divided, :, 0, 0].clone(), head.bias[divided].clone()
            for channel, side in ((dead, 0.5), (divided, -0.5)):
                head.weight[channel, :, 0, 0] = weight + side * direction
                head.bias[channel] = bias + side * offset
        if torch.distributed.is_initialized():
            chosen = torch.tensor([dead, divided], device=image_N1HW.device)
            for value in (chosen, head.weight.data, head.bias.data):
                torch.distributed.broadcast(value, src=0)
            dead, divided = chosen.tolist()
        if dead < 0:
            return None
        for parameter in (head.weight, head.bias):  # its moments are of other weights
            for name, value in optimiser.state[parameter].items():
                if name != "step":
                    value[[dead, divided]] = 0.0
    return dead


def _division(model: SDNet, image_N1HW: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Number of the dead channel and of the one to divide (-1 where none is dead); the difference of their new weights
    (width,) and of their biases."""
    features = model.anatomy_encoder.features(image_N1HW)
    anatomy = model.anatomy_encoder.head(features).softmax(dim=1).round()
    error = (model.decode(anatomy, model.encode_modality(image_N1HW)) - image_N1HW).abs()
    usage = anatomy.mean(dim=(0, 2, 3))
    dead, divided = int(usage.argmin()), int((anatomy * error).sum(dim=(0, 2, 3)).argmax())
    own = features.movedim(1, -1)[anatomy[:, divided] > 0].float()  # (pixels, width)
    none = torch.zeros(features.shape[1], device=own.device)
    if usage[dead] >= FIRES or len(own) < 2 or dead == divided:
        return -1, -1, none, none.sum()
    mean = own.mean(dim=0)
    variances, axes = torch.linalg.eigh((own - mean).T @ (own - mean) / len(own))
    direction = PARTED * axes[:, -1] / variances[-1].clamp_min(1e-12).sqrt()
    return dead, divided, direction, -(direction @ mean)
