"""The state of a training, all that a restart needs: network, optimiser, schedule, running average, best weights."""

from __future__ import annotations

import copy
import io
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR, ReduceLROnPlateau

from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.files import build, default_device
from pipeline.networks.sdnet import SDNet
from pipeline.networks.unet import UNet
from pipeline.samples.plan import generator
from pipeline.training.config import TrainConfig
from pipeline.training.losses import VendorAlignment

Scheduler = ReduceLROnPlateau | CosineAnnealingLR | PolynomialLR
POWER = 0.9  # exponent of the polynomial schedule, as in nnU-Net (Isensee et al. 2021)


def network_seed(seed: int, name: str, *counters: int) -> int:
    """A seed in [0, 2⁶²) for torch's generators. It depends on the arguments alone."""
    return int(generator(seed, name, *counters).integers(0, 2**62))


def _scheduler(optimiser: torch.optim.Optimizer, config: TrainConfig) -> Scheduler:
    """The scheduler that sets the learning rate at the end of each epoch."""
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimiser, T_max=config.epochs)
    if config.schedule == "polynomial":
        return PolynomialLR(optimiser, total_iters=config.epochs, power=POWER)
    return ReduceLROnPlateau(
        optimiser, mode="max", factor=config.plateau_factor, patience=config.plateau_patience, threshold=0.0
    )


@dataclass(frozen=True)
class Unread:
    """A step that the host has not checked yet.

    finite: bool scalar, whether loss and gradient were finite. sent: the event of its arrival on the host, None on a
    CPU. norm: the gradient's norm, a scalar on the device.
    """

    step: int
    slice_id: Tensor
    terms: dict[str, Tensor]
    norm: Tensor
    finite: Tensor
    sent: torch.cuda.Event | None


@dataclass
class TrainState:
    """Everything a restart needs.

    model: the raw network; a wrapper for several workers shares its weights. average: the running average of `model`,
    or None if `TrainConfig.ema` is off. best_dice: in [0, 1], or -1 before the first validation. revived: how often an
    anatomy channel was revived (`channel_revival`). unread: steps that `step.settle` has not checked yet.
    """

    model: UNet | SDNet
    optimiser: torch.optim.Optimizer
    scheduler: Scheduler
    latent: torch.Generator
    seed: int
    rank: int = 0
    step: int = 0
    epoch: int = 0
    best_dice: float = -1.0
    revived: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: UNet | SDNet | None = None
    alignment: VendorAlignment | None = None
    unread: deque[Unread] = field(default_factory=deque)

    @classmethod
    def create(
        cls, network: UNetConfig | SDNetConfig, config: TrainConfig, seed: int, rank: int = 0, vendors: int = 0
    ) -> TrainState:
        """Make a fresh state on the default device.

        The weights depend on `seed` alone, latent samples on (seed, rank, step). `vendors` is the number of vendors
        between which an SDNet's anatomy is aligned; 0 means no alignment.
        """
        torch.manual_seed(network_seed(seed, "weights"))
        model = build(network).to(default_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        scheduler = _scheduler(optimiser, config)
        average = None if config.ema is None else copy.deepcopy(model).requires_grad_(False)
        alignment = None
        if vendors and isinstance(network, SDNetConfig):
            alignment = VendorAlignment(vendors, network.anatomy_channels).to(default_device())
        return cls(model, optimiser, scheduler, torch.Generator(), seed, rank, average=average, alignment=alignment)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load weights into the network and its running average."""
        self.model.load_state_dict(weights)
        if self.average is not None:
            self.average.load_state_dict(weights)

    @property
    def candidate(self) -> UNet | SDNet:
        """The network to validate and keep: the running average if there is one, else the model."""
        return self.model if self.average is None else self.average

    def to_bytes(self) -> bytes:
        """The checkpoint as the bytes of one file, readable with `weights_only=True`.

        It holds no random state, since samples and latent vectors depend on (seed, rank, step) alone.
        """
        document = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "best": self.best_weights,
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "best_dice": self.best_dice,
            "revived": self.revived,
            "threads": torch.get_num_threads(),
        }
        buffer = io.BytesIO()
        torch.save(document, buffer)
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        """Restore a checkpoint of `to_bytes`, with its number of threads: with another one, sums round differently."""
        document = torch.load(io.BytesIO(checkpoint), weights_only=True, map_location=default_device())
        self.model.load_state_dict(document["model"])
        if self.average is not None:
            self.average.load_state_dict(document["average"])
        if self.alignment is not None:
            self.alignment.load_state_dict(document["alignment"])
        self.best_weights = document["best"]
        self.optimiser.load_state_dict(document["optimiser"])
        self.scheduler.load_state_dict(document["scheduler"])
        self.step, self.epoch, self.best_dice = document["step"], document["epoch"], document["best_dice"]
        self.revived = document["revived"]
        torch.set_num_threads(document["threads"])

    def update_average(self, decay: float) -> None:
        """Move the average towards the weights by a share that falls with the number of steps, down to `1 - decay`."""
        if self.average is None:
            return
        # At first the average holds mostly untrained weights. The usual warm-up lets it forget them.
        share = 1.0 - min(decay, (1.0 + self.step) / (10.0 + self.step))
        ours, theirs = self.average.state_dict(), self.model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], share)
        for name in ours.keys() - set(floating):  # batch-norm's counters
            ours[name].copy_(theirs[name])

    def end_epoch(self, dice: float) -> None:
        """Set the next learning rate. Keep the candidate's weights if its validation `dice` is the best so far."""
        self.epoch += 1
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(dice)
        else:
            self.scheduler.step()
        if dice > self.best_dice:
            self.best_dice = dice
            self.best_weights = {k: v.detach().clone() for k, v in self.candidate.state_dict().items()}
