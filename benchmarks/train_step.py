"""One training step at width 64, 224² and batch 4 with the project's defaults (channels_last, bf16 autocast, fused
Adam) against the same networks and losses in plain eager PyTorch (contiguous, fp32, Adam a parameter at a time)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import rates, ratio
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, settle, train_step

SIZE, LABELLED, UNIT = 224, 4, "steps/minute"


def labelled_batch() -> Batch:
    """What a fully supervised arm sees in a step: four labelled slices, none without labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(LABELLED, 1, SIZE, SIZE, generator=generator) * 2 - 1
    mask = torch.randint(0, 4, (LABELLED, SIZE, SIZE), generator=generator)
    return Batch(image, mask, torch.ones(LABELLED, dtype=torch.bool), torch.arange(LABELLED))


def sides(network: UNetConfig | SDNetConfig, batch: Batch) -> dict[str, Callable[[], int]]:
    """A step of each side, as 60 items so that a rate is steps a minute; both do forward, all terms, backward, Adam."""
    config = TrainConfig()
    tuned, plain = (TrainState.create(network, config, seed=0) for _ in range(2))
    tuned_objective, plain_objective = (Objective(s.model, LossConfig(), s.latent) for s in (tuned, plain))
    plain.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(plain.model.parameters(), lr=config.learning_rate, foreach=False, fused=False)

    def ours() -> int:
        train_step(tuned_objective, tuned, batch, config)
        settle(tuned)
        return 60

    def reference() -> int:
        plain.model.train()
        terms = plain_objective(batch.image, batch.mask, int(batch.labelled.sum()))
        optimiser.zero_grad()
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        optimiser.step()
        total.item()
        return 60

    return {"ours": ours, "reference": reference}


def run() -> dict[str, Any]:
    """SDNet steps a minute; U-Net's are printed beside them."""
    torch.set_num_threads(1)
    batch = labelled_batch()
    unet = ratio(rates(sides(UNetConfig(), batch), rounds=3), UNIT)
    print(f"U-Net alone: {unet['ours']} {UNIT} against {unet['reference']}, ratio {unet['ratio']}", file=sys.stderr)
    return ratio(rates(sides(SDNetConfig(), batch), rounds=3), UNIT)
