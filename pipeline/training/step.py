"""One training step on one batch, and the errors that it raises. Uses neither Ray nor MLflow."""

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

LAG = 4  # steps: a loss that is not finite is reported at most this much later


@dataclass(frozen=True)
class Batch:
    """A batch of training samples. The labelled ones come first.

    image: (N, 1, S, S) float32 in [-1, 1]. mask: (N, S, S) int64 labels. labelled: (N,) bool, on the CPU. slice_id:
    (N,) int64, on the CPU. vendor: (N,) int64 numbers from 0, if the loss needs them. twin: as image, for arms with
    consistency. drawn: (N, 3) bool, whether LV, MYO and RV are drawn in the mask; None if all are in every mask.
    """

    image: Tensor
    mask: Tensor
    labelled: Tensor
    slice_id: Tensor
    vendor: Tensor | None = None
    twin: Tensor | None = None
    drawn: Tensor | None = None

    def parts(self) -> list[Batch]:
        """The labelled and the unlabelled samples as separate batches; a kind without samples is left out."""
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
    """Turn a lack of memory into an OutOfMemoryError with advice. On a CPU, torch raises a plain RuntimeError."""
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
    """Raise NonFiniteLossError if the loss or gradient of a step was not finite. The last `lag` steps are not checked.

    Such a step has changed no weight, but it has changed batch-norm's statistics. So call this before you keep a
    network.
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
            "train.gradient_clip, and look at these slices",
            own=not math.isfinite(loss),
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast if `precision` is `bf16`, else a context that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def train_step(objective: nn.Module, state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Take one training step, with one or two updates of the weights (`TrainConfig.update`).

    Returns the loss terms and their sum `total` as scalars on the device; the step does not wait for the device. With
    two updates, a term is the mean over the updates that have it. If the loss or gradient is not finite, no weight
    changes, and NonFiniteLossError is raised at most `LAG` steps later, or by `settle`. Raises OutOfMemoryError if the
    batch is too large.
    """
    state.model.train()
    state.latent.manual_seed(network_seed(state.seed, f"latent/{state.rank}", state.step))
    parts = batch.parts() if config.update == "separate" else [batch]
    found = [_update(objective, state, part, config) for part in parts]
    state.step += 1
    settle(state, LAG)
    # At half a period: if epochs are whole periods, a revived channel has settled when an epoch ends.
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
    """One forward pass, backward pass and optimiser step. Returns the weighted terms."""
    device = batch.image.device
    state.optimiser.zero_grad(set_to_none=True)  # first, since a compiled step overwrites the last gradients
    with _memory_advice(batch, config), fastest_convolutions(device):
        with autocast(device, config.precision):
            count = int(batch.labelled.sum())  # on the CPU, so this waits for no GPU
            given = (batch.image, batch.mask, count, batch.vendor, batch.twin, state.step, batch.drawn)
            found = objective(*given)
        values = torch.stack(list(found.values()))  # a copy, which no later step overwrites
        total = values.sum()
        total.backward()
        norm = _clip(state.model, config.gradient_clip)
        finite = total.detach().isfinite() & norm.isfinite()
        # If this is 1, the fused optimiser leaves weights and moments as they are, without asking the host.
        state.optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        state.optimiser.step()
    terms = dict(zip(found, values.detach().unbind(), strict=True))
    state.unread.append(Unread(state.step, batch.slice_id, terms, norm.detach(), *_sent(finite)))
    return terms


def _sent(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a flag to the host. Returns the copy and the event of its arrival; on a CPU the flag and None."""
    if flag.device.type != "cuda":
        return flag, None
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _clip(model: nn.Module, largest: float | None) -> Tensor:
    """Clip the gradient to the norm `largest`, if given. Returns its norm over all parameters before clipping."""
    if largest is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
