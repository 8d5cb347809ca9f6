"""One training step on one batch, and what it raises when it cannot go on; no Ray, no MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.networks.sdnet import SDNet
from pipeline.training.channel_revival import revive
from pipeline.training.config import TrainConfig
from pipeline.training.errors import NonFiniteLossError, OutOfMemoryError
from pipeline.training.kernels import fastest_convolutions
from pipeline.training.state import TrainState, Unread, network_seed

LAG = 4  # steps after which a loss that is not finite is told


@dataclass(frozen=True)
class Batch:
    """image (N, 1, S, S) float32 in [-1, 1]; mask (N, S, S) int64; labelled (N,) bool and slice_id (N,) int64, both on
    the CPU; vendor (N,) int64, numbers from 0, where the loss asks for it; twin like image, for arms with consistency;
    drawn (N, 3) bool, whether LV, MYO and RV are drawn in the mask, None where all of them are."""

    image: Tensor
    mask: Tensor
    labelled: Tensor
    slice_id: Tensor
    vendor: Tensor | None = None
    twin: Tensor | None = None
    drawn: Tensor | None = None

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
                *(None if rest is None else rest[c] for rest in (self.vendor, self.twin, self.drawn)),
            )
            for c in taken
        ]


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


def settle(state: TrainState, lag: int = 0) -> None:
    """Raise NonFiniteLossError for a step whose loss or gradient was not finite; the last `lag` steps are not waited
    for. Such a step has changed no weight, but the batch-norm statistics: nothing may be kept before this was called.
    """
    while len(state.unread) > lag:
        was = state.unread.popleft()
        if was.sent is not None:
            was.sent.synchronize()
        if bool(was.finite.numpy()):
            continue
        terms = {name: float(term) for name, term in was.terms.items()}
        loss, norm = sum(terms.values()), float(was.norm)
        what = (
            f"norm of the gradient is {norm}, loss {loss}" if math.isfinite(loss) else f"loss is {loss}, terms {terms}"
        )
        raise NonFiniteLossError(
            f"step {was.step}: {what}, slices {was.slice_id.tolist()}; lower train.learning_rate or set "
            "train.gradient_clip, and look at these slices"
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast where asked for, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def train_step(objective: nn.Module, state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One step of training: one update of the weights, or two (`TrainConfig.update`); returns the terms and `total` as
    scalars that stay on the device: nothing here waits for it.

    Where there are two updates, a term is the mean of those that have it. A step whose loss or gradient is not finite
    touches no weight; NonFiniteLossError is raised for it here at most `LAG` steps later, or by `settle`. Raises
    OutOfMemoryError if the batch is too large.
    """
    state.model.train()
    state.latent.manual_seed(network_seed(state.seed, f"latent/{state.rank}", state.step))
    parts = batch.parts() if config.update == "separate" else [batch]
    found = [_update(objective, state, part, config) for part in parts]
    state.step += 1
    settle(state, LAG)
    # between the ends of epochs, so that what is validated and kept has settled since
    if config.revive_every and state.step % config.revive_every == config.revive_every // 2:
        _revive(state, batch, config)
    if config.ema is not None:
        state.update_average(config.ema)
    names = dict.fromkeys(name for terms in found for name in terms)
    means = {name: _mean([terms[name] for terms in found if name in terms]) for name in names}
    return {**means, "total": torch.stack(list(means.values())).sum()}


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def _revive(state: TrainState, batch: Batch, config: TrainConfig) -> None:
    if isinstance(state.model, SDNet):
        with _memory_advice(batch, config):
            revive(state, batch.image)


def _update(objective: nn.Module, state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """One forward, backward and optimiser step; returns the weighted terms."""
    device = batch.image.device
    state.optimiser.zero_grad(set_to_none=True)  # first: a compiled step writes its gradients over the last ones
    with _memory_advice(batch, config), fastest_convolutions(device):
        with autocast(device, config.precision):
            given = (batch.image, batch.mask, batch.labelled, batch.vendor, batch.twin, state.step, batch.drawn)
            found = objective(*given)
        values = torch.stack(list(found.values()))  # a copy, which no later step overwrites
        total = values.sum()
        total.backward()
        norm = _clip(state.model, config.gradient_clip)
        finite = total.detach().isfinite() & norm.isfinite()
        # the fused kernel leaves weights and moments as they are where this is 1, without asking the host
        state.optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        state.optimiser.step()
    terms = dict(zip(found, values.detach().unbind(), strict=True))
    state.unread.append(Unread(state.step, batch.slice_id, terms, norm.detach(), *_sent(finite)))
    return terms


def _sent(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A flag on its way to the host, and what says that it has arrived."""
    if flag.device.type != "cuda":
        return flag, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _clip(model: nn.Module, largest: float | None) -> Tensor:
    """Norm of the gradient over all parameters, as it was before it was cut down to `largest`."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
