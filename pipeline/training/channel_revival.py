"""Revive a dead anatomy channel: it takes over part of the pixels of a live one.

A channel that is near 0 in every pixel gets almost no gradient through the softmax, and balancing the shares did not
bring it back (docs/fidelity.md). Vector-quantised networks reset codes that are never chosen (Dhariwal et al. 2020,
arXiv:2005.00341, section 3.1). In the same way, the dead channel gets the weights of the channel with the largest sum
of reconstruction errors. The two are then separated along the direction in which that channel's features vary most.
The rest of the network stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.factors.disentanglement import FIRES
from pipeline.networks.sdnet import SDNet
from pipeline.training.state import TrainState

PARTED = 2.0  # standard deviation of the difference of the two new logits, over the divided channel's pixels


@torch.no_grad()
def revive(state: TrainState, image_N1HW: Tensor) -> int | None:
    """Revive one dead channel, if there is one. Returns its number, or None if nothing was changed.

    image: (N, 1, H, W) training images, float32 in [-1, 1]. A channel is dead if it is 1 in less than 0.1 % of the
    pixels of all workers together. The first worker's images determine which channel is divided, and how. Weights,
    running average, optimiser moments and the alignment's running means change in `state`. The result depends on
    weights and images alone.
    """
    model, workers = state.model, _workers()
    assert isinstance(model, SDNet)
    training = model.training
    model.eval()
    features = model.anatomy_encoder.features(image_N1HW)
    anatomy = model.anatomy_encoder.head(features).softmax(dim=1).round()
    usage = anatomy.mean(dim=(0, 2, 3))
    if workers > 1:
        torch.distributed.all_reduce(usage)
        usage /= workers
    dead = int(usage.argmin())
    divided, direction = -1, torch.zeros(features.shape[1] + 1, device=features.device)
    if usage[dead] < FIRES and (workers == 1 or torch.distributed.get_rank() == 0):
        error = (model.decode(anatomy, model.encode_modality(image_N1HW)) - image_N1HW).abs()
        divided = int((anatomy * error).sum(dim=(0, 2, 3)).argmax())
        own = features.movedim(1, -1)[anatomy[:, divided] > 0].float()  # (pixels, width)
        if len(own) > 1 and divided != dead:
            direction = _direction(own)
        else:
            divided = -1
    model.train(training)
    if workers > 1 and usage[dead] < FIRES:
        chosen = torch.tensor(divided, device=features.device)
        for value in (chosen, direction):
            torch.distributed.broadcast(value, src=0)
        divided = int(chosen)
    if divided < 0:
        return None
    for network in (model, state.average):
        if isinstance(network, SDNet):
            _part(network.anatomy_encoder.head, dead, divided, direction)
    _follow(state, dead, divided)
    state.revived += 1
    return dead


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _direction(features_PW: Tensor) -> Tensor:
    """The difference of the two channels' new weights, and, last, of their biases: (width + 1,).

    It points along the first principal component of the features and is 0 at their mean, so that about half of the
    pixels fall to either channel.
    """
    mean = features_PW.mean(dim=0)
    apart = features_PW - mean
    variances, axes = torch.linalg.eigh(apart.T @ apart / len(apart))
    weights = PARTED * axes[:, -1] / variances[-1].clamp_min(1e-12).sqrt()
    return torch.cat([weights, -(weights @ mean)[None]])


def _part(head: nn.Conv2d, dead: int, divided: int, direction: Tensor) -> None:
    assert head.bias is not None
    weight, bias = head.weight[divided, :, 0, 0].clone(), head.bias[divided].clone()
    for channel, side in ((dead, 0.5), (divided, -0.5)):
        head.weight[channel, :, 0, 0] = weight + side * direction[:-1]
        head.bias[channel] = bias + side * direction[-1]


def _follow(state: TrainState, dead: int, divided: int) -> None:
    """Adapt the optimiser's moments and the alignment's running means to two channels that share what one had."""
    assert isinstance(state.model, SDNet)
    head = state.model.anatomy_encoder.head
    for parameter in head.parameters():
        moments = state.optimiser.state[parameter]
        if moments:
            moments["exp_avg"][[dead, divided]] = 0.0
            # Zeros here too would make the next steps several times too large, since the bias correction is long over.
            moments["exp_avg_sq"][dead] = moments["exp_avg_sq"][divided]
    if state.alignment is not None:
        for values in (state.alignment.mean.T, state.alignment.variance):
            values[[dead, divided]] = values[divided] / 2
