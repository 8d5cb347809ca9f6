"""One training step, validation and the state that a restart needs; no Ray, no MLflow."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pipeline.appearance import Appearance
from pipeline.losses import (
    LossConfig,
    VendorAlignment,
    channel_balance,
    code_kl,
    consistency_loss,
    latent_regression_loss,
    ramp,
    reconstruction_loss,
    sample_latent,
    segmentation_losses,
)
from pipeline.networks.files import build, default_device
from pipeline.networks.sdnet import SDNet, SDNetConfig, binarise
from pipeline.networks.unet import UNet, UNetConfig
from pipeline.sample_plan import FaPolicy, generator

STRUCTURES = ("LV", "MYO", "RV")


class ArmConfig(BaseModel):
    """What an arm of the ablation switches on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["unet", "sdnet"] = "sdnet"
    semi_supervised: bool = False
    ra: bool = False
    fa: bool = False
    policy: FaPolicy | None = Field(None, description="FA: in place of `plan.fa_policy`")
    appearance: Appearance = Field("none", description="augmentation of the images' looks, before RA")
    consistency: bool = Field(False, description="unlabelled samples and their twins must segment alike")


class TrainConfig(BaseModel):
    """Optimisation (paper section 3.2). An epoch is one pass over the labelled slices unless `steps_per_epoch` says
    otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(4, ge=1, description="labelled samples a step, over all workers")
    epochs: int = Field(50, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    plateau_patience: int = Field(
        1, ge=0, description="1: the second epoch in a row without improvement lowers the rate"
    )
    precision: Literal["fp32", "bf16"] = "bf16"
    update: Literal["joint", "separate"] = Field(
        "joint",
        description="one optimiser step for labelled and unlabelled samples together, so that batch norm sees both, or "
        "one for each in turn (authors' code)",
    )
    start: Literal["scratch", "pretrained"] = Field(
        "scratch", description="an arm's SDNet: untrained, or the weights of the one that fills the bank"
    )
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient; None: unclipped (paper)")
    watched_slices: int = Field(
        40, ge=0, description="training slices on which SDNet's factors are measured after each epoch; 0: none"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a running average of the weights, which is then validated and kept; None: off (paper)",
    )


@dataclass(frozen=True)
class Batch:
    """image (N, 1, S, S) float32 in [-1, 1]; mask (N, S, S) int64; labelled (N,) bool; slice_id (N,) int64; vendor
    (N,) int64, numbers from 0, where the loss asks for it; twin like image, for arms with consistency."""

    image: Tensor
    mask: Tensor
    labelled: Tensor
    slice_id: Tensor
    vendor: Tensor | None = None
    twin: Tensor | None = None

    def parts(self) -> list[Batch]:
        """Its labelled and its unlabelled samples; a batch of one kind is its only part."""
        count = int(self.labelled.sum())
        cuts = [slice(0, count), slice(count, len(self.image))]
        taken = [c for c in cuts if c.start < c.stop]
        return [
            Batch(
                self.image[c],
                self.mask[c],
                self.labelled[c],
                self.slice_id[c],
                *(None if rest is None else rest[c] for rest in (self.vendor, self.twin)),
            )
            for c in taken
        ]


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite; names the step and the slices of the batch."""


class OutOfMemoryError(RuntimeError):
    """A batch does not fit the memory; says how large it was and what to try."""


@contextmanager
def _memory_advice(batch: Batch, config: TrainConfig) -> Iterator[None]:
    """Turns torch's words for a lack of memory into ours. On the CPU it has no class of its own."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not lacking and not any(words in str(error) for words in ("allocate memory", "not enough memory")):
            raise
        count, _, height, width = batch.image.shape
        raise OutOfMemoryError(
            f"out of memory on {batch.image.device} with {count} samples of {height} × {width} a worker "
            f"(train.batch_size={config.batch_size}, {config.precision}); lower train.batch_size, preprocess.size or "
            "resources.lanes, or share the batch with more resources.train_workers"
        ) from error


def _not_finite(what: str, step: int, batch: Batch) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"step {step}: {what}, slices {batch.slice_id.tolist()}; lower train.learning_rate or set train.gradient_clip, "
        "and look at these slices"
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast where asked for, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def network_seed(seed: int, name: str, *counters: int) -> int:
    """A seed for torch's generators that depends on its arguments alone."""
    return int(generator(seed, name, *counters).integers(0, 2**62))


@dataclass
class TrainState:
    """Everything a restart needs. `model` is the raw network; a wrapper for several workers shares its weights.

    `average` is the running average of `model`, or None where `TrainConfig.ema` is off.
    """

    model: UNet | SDNet
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    latent: torch.Generator
    seed: int
    rank: int = 0
    step: int = 0
    epoch: int = 0
    best_dice: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: UNet | SDNet | None = None
    alignment: VendorAlignment | None = None

    @classmethod
    def create(
        cls, network: UNetConfig | SDNetConfig, config: TrainConfig, seed: int, rank: int = 0, vendors: int = 0
    ) -> TrainState:
        """A fresh state; weights depend on `seed` alone, latent samples on (seed, rank, step).

        `vendors` is the number of those between which the anatomy is aligned; 0 for no alignment.
        """
        torch.manual_seed(network_seed(seed, "weights"))
        model = build(network).to(default_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", factor=config.plateau_factor, patience=config.plateau_patience, threshold=0.0
        )
        average = None if config.ema is None else copy.deepcopy(model).requires_grad_(False)
        alignment = None
        if vendors and isinstance(network, SDNetConfig):
            alignment = VendorAlignment(vendors, network.anatomy_channels).to(default_device())
        return cls(model, optimiser, scheduler, torch.Generator(), seed, rank, average=average, alignment=alignment)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Replace the untrained weights, the running average's too."""
        self.model.load_state_dict(weights)
        if self.average is not None:
            self.average.load_state_dict(weights)

    @property
    def candidate(self) -> UNet | SDNet:
        """The network to validate and keep: the running average where there is one."""
        return self.model if self.average is None else self.average

    def to_bytes(self) -> bytes:
        """A checkpoint: one file, readable with `weights_only=True`.

        Random numbers need no entry: samples and latent vectors depend on (seed, rank, step) alone.
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
            "threads": torch.get_num_threads(),
        }
        buffer = io.BytesIO()
        torch.save(document, buffer)
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        """Go on from what `to_bytes` gave, and with as many threads: sums over another number round differently."""
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
        torch.set_num_threads(document["threads"])

    def update_average(self, decay: float) -> None:
        """Move the average towards the weights, by less the more steps there were, down to `1 - decay`."""
        if self.average is None:
            return
        # At first the average is mostly of untrained weights; the usual warm-up lets it forget them.
        share = 1.0 - min(decay, (1.0 + self.step) / (10.0 + self.step))
        ours, theirs = self.average.state_dict(), self.model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], share)
        for name in ours.keys() - set(floating):  # batch-norm's counters
            ours[name].copy_(theirs[name])

    def end_epoch(self, dice: float) -> None:
        """Plateau rule and best weights, by the candidate's validation Dice."""
        self.epoch += 1
        self.scheduler.step(dice)
        if dice > self.best_dice:
            self.best_dice = dice
            self.best_weights = {k: v.detach().clone() for k, v in self.candidate.state_dict().items()}


class Objective(nn.Module):
    """Network and losses as one module, so that a wrapper for several workers sees a single forward."""

    def __init__(
        self,
        model: UNet | SDNet,
        config: LossConfig,
        latent: torch.Generator,
        alignment: VendorAlignment | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.latent, self.alignment = model, config, latent, alignment
        self.segmentation = segmentation_losses(config)

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        labelled: Tensor,
        vendor: Tensor | None = None,
        twin: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """Weighted terms by name. Labelled samples come first in a batch; only they reach the segmentor, unless there
        are twins."""
        count = int(labelled.sum())
        model = self.model
        terms: dict[str, Tensor] = {}
        if isinstance(model, SDNet):
            shares = model.anatomy_encoder(image)  # before the softmax
            anatomy = binarise(shares.softmax(dim=1))
            codes = model.encode_modality(image)
            reconstruction = model.decode(anatomy, codes)
            terms["reconstruction"] = self.config.reconstruction * reconstruction_loss(reconstruction.float(), image)
            terms["latent"] = self.config.latent * self._latent(model, anatomy, codes, reconstruction)
            if self.config.kl > 0:
                terms["kl"] = self.config.kl * code_kl(codes.float())
            if self.config.balance > 0:
                soft = (shares.float() / self.config.balance_temperature).softmax(dim=1)
                terms["balance"] = self.config.balance * channel_balance(soft)
            if self.alignment is not None and vendor is not None:
                terms["align"] = self.config.align * self.alignment(anatomy, vendor)
            seen = anatomy if twin is not None else anatomy[:count]
            logits = model.segment(seen) if len(seen) else None
        else:
            seen = image if twin is not None else image[:count]
            logits = model(seen) if len(seen) else None
        again = model(twin[count:]) if twin is not None and count < len(image) else None
        if logits is not None and again is not None:
            share = self.config.consistency * ramp(step, self.config.consistency_ramp)
            terms["consistency"] = share * consistency_loss(logits[count:].float(), again.float())
        if logits is not None and count:
            terms |= self.segmentation(logits[:count].float(), mask[:count])
        return terms

    def _latent(self, model: SDNet, anatomy: Tensor, codes: Tensor, reconstruction: Tensor) -> Tensor:
        if self.config.latent_source == "reconstruction":
            return latent_regression_loss(model.encode_modality(reconstruction).float(), codes.float())
        sampled = sample_latent(codes, self.latent)
        return latent_regression_loss(model.encode_modality(model.decode(anatomy, sampled)).float(), sampled.float())


def train_step(objective: nn.Module, state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, float]:
    """One step of training: one update of the weights, or two (`TrainConfig.update`); returns the terms and `total`.

    Where there are two, a term is the mean of those that have it. Raises NonFiniteLossError before the weights are
    touched by what is not finite, OutOfMemoryError if the batch is too large.
    """
    state.model.train()
    state.latent.manual_seed(network_seed(state.seed, f"latent/{state.rank}", state.step))
    parts = batch.parts() if config.update == "separate" else [batch]
    found = [_update(objective, state, part, config) for part in parts]
    state.step += 1
    if config.ema is not None:
        state.update_average(config.ema)
    names = dict.fromkeys(name for terms in found for name in terms)
    means = {name: float(np.mean([terms[name] for terms in found if name in terms])) for name in names}
    return {**means, "total": sum(means.values())}


def _update(objective: nn.Module, state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, float]:
    """One forward, backward and optimiser step; returns the weighted terms."""
    device = batch.image.device
    with _memory_advice(batch, config):
        with autocast(device, config.precision):
            terms = objective(batch.image, batch.mask, batch.labelled, batch.vendor, batch.twin, state.step)
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            found = {name: term.item() for name, term in terms.items()}
            raise _not_finite(f"loss is {total.item()}, terms {found}", state.step, batch)
        state.optimiser.zero_grad(set_to_none=True)
        total.backward()
        norm = _clip(state.model, config.gradient_clip)
        if not torch.isfinite(norm):
            raise _not_finite(f"norm of the gradient is {norm.item()}, loss {total.item()}", state.step, batch)
        state.optimiser.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def _clip(model: nn.Module, largest: float | None) -> Tensor:
    """Norm of the gradient over all parameters, as it was before it was cut down to `largest`."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@dataclass(frozen=True)
class ValidationVolume:
    """A held-out volume as the network sees it: image (Z, S, S) float32, mask (Z, S, S) uint8."""

    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]


def validate(model: UNet | SDNet, volumes: list[ValidationVolume], precision: str, chunk: int = 16) -> dict[str, float]:
    """Mean volume Dice on the network's grid: `dice` over structures, `dice_LV`, `dice_MYO`, `dice_RV`; 0 to 1.

    A structure absent from mask and prediction is left out.
    """
    model.eval()
    device = next(model.parameters()).device
    scores: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for volume in volumes:
        parts = []
        with torch.inference_mode(), autocast(device, precision):
            for i in range(0, len(volume.image), chunk):
                image = torch.from_numpy(volume.image[i : i + chunk, None]).to(device)
                parts.append(model(image.contiguous(memory_format=torch.channels_last)).argmax(1).cpu().numpy())
        found = np.concatenate(parts)
        for label, name in enumerate(STRUCTURES, start=1):
            ours, theirs = found == label, volume.mask == label
            size = int(ours.sum() + theirs.sum())
            if size:
                scores[name].append(2.0 * int((ours & theirs).sum()) / size)
    means = {f"dice_{name}": float(np.mean(values)) if values else 0.0 for name, values in scores.items()}
    return {"dice": float(np.mean(list(means.values()))), **means}
