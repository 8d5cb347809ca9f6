"""Measure how long a training step takes on this machine, with random images, to estimate the time of a training."""

from __future__ import annotations

import time

import torch

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, train_step

SLOW_S = 5.0  # if the first step takes longer than this, its own time counts: the warm-up is a small part of it


def seconds_a_step(
    network: UNetConfig | SDNetConfig,
    loss: LossConfig,
    config: TrainConfig,
    labelled: int,
    unlabelled: int,
    size: int,
    *,
    threads: int = 1,
    twins: bool = False,
) -> float:
    """Seconds of one training step, on the GPU if there is one, else with `threads` CPU threads.

    A step has `labelled` + `unlabelled` samples of size × size pixels. The second step is timed, or the first if that
    takes more than `SLOW_S`. Making samples and the end of an epoch are not included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vendors = 2 if loss.align > 0 else 0
        state = TrainState.create(network, config, seed=0, vendors=vendors)
        objective = Objective(state.model, loss, state.latent, state.alignment, state.average)
        batch = _noise(labelled, unlabelled, size, next(state.model.parameters()).device, twins)
        first = _timed(objective, state, batch, config)
        return first if first > SLOW_S else _timed(objective, state, batch, config)
    finally:
        torch.set_num_threads(before)


def _noise(labelled: int, unlabelled: int, size: int, device: torch.device, twins: bool) -> Batch:
    count = labelled + unlabelled
    draw = torch.Generator().manual_seed(0)
    image = torch.rand((count, 1, size, size), generator=draw) * 2 - 1  # (N, 1, S, S) in [-1, 1]
    mask = torch.randint(0, 4, (count, size, size), generator=draw)
    order = torch.arange(count)
    image, mask, order = image.to(device), mask.to(device), order.to(device)
    return Batch(image, mask, order.cpu() < labelled, order.cpu(), order % 2, image.flip(-1) if twins else None)


def _timed(objective: Objective, state: TrainState, batch: Batch, config: TrainConfig) -> float:
    began = time.perf_counter()
    float(train_step(objective, state, batch, config)["total"])  # `float` waits for the device
    return time.perf_counter() - began
