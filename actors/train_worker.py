"""What each worker of a training job runs: epochs, their validation, the checkpoint, and the result at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.streaming import StreamStats, batches
from actors.train_job import DONE, HISTORY, LAST, TrainJob, WorkerBudget, read_history
from actors.train_slices import (
    some_slices,
    taught_structures,
    total_steps,
    training_vendors,
    validation_volumes,
    watched_slices,
)
from actors.waiting import Patience
from pipeline.networks.description import WEIGHTS, read_config, vendors_seen
from pipeline.samples.maker import TWIN
from pipeline.samples.stream_config import training_terms
from storage import fs
from storage.errors import InputError
from storage.identity import identity
from storage.lease import work_for
from storage.slices.store import SliceStore
from storage.subjects import ALL_STRUCTURES

if TYPE_CHECKING:
    import torch

    from pipeline.factors.disentanglement import WatchedSlices
    from pipeline.training.state import TrainState
    from pipeline.training.validation import ValidationVolume

SCALED_BY = 256  # training slices that set the scale of the codes if `TrainConfig.standardise_codes` is on


def factors_seen(job: TrainJob, state: TrainState, watched: WatchedSlices | None) -> dict[str, Any]:
    """Numbers about the factors of the watched slices, and warnings, for the epoch's record. Empty without an SDNet."""
    from pipeline.factors.disentanglement import warnings, watch
    from pipeline.networks.sdnet import SDNet
    from pipeline.training.step import autocast

    model = state.candidate
    if watched is None or not isinstance(model, SDNet):
        return {}
    with autocast(next(model.parameters()).device, job.train.precision):
        numbers = watch(model, watched)
    sections = ("pretrain", "pretrain_loss") if job.name == "pretrain" else ("train", "loss")
    found = warnings(numbers, model.config.anatomy_channels, *sections)
    numbers["revived"] = float(state.revived)
    return {**{f"factors/{name}": value for name, value in numbers.items()}, "warnings": found}


class _History:
    """The epoch records of `history.jsonl`, which each epoch rewrites as a whole.

    An epoch that is repeated replaces its earlier record. Records of another configuration are dropped.
    """

    def __init__(self, job: TrainJob, epoch: int) -> None:
        self.job, self.records = job, [r for r in read_history(job) if r["epoch"] <= epoch]

    def append(self, record: dict[str, Any]) -> None:
        self.records.append({**record, "config_hash": self.job.config_hash})
        fs.write_text(fs.join(self.job.out, HISTORY), "".join(json.dumps(r) + "\n" for r in self.records))


def train_loop(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. It continues from the last checkpoint, with the samples that come next.

    `settings` has "fences" (leases that the job works for), "job" (a dumped `TrainJob`) and "budget" (a dumped
    `WorkerBudget`). Raises InputError if Ray gave a GPU that torch cannot use, or as `first_state` does.
    """
    import ray.train
    import torch

    from pipeline.training.kernels import same_bits_every_time

    work_for(settings["fences"])
    job = TrainJob.model_validate(settings["job"])
    budget = WorkerBudget.model_validate(settings["budget"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if budget.gpus and not torch.cuda.is_available():
        raise InputError(
            "resources",
            "torch finds no GPU where Ray booked one",
            "mend its driver, or pass --set resources.gpus=false",
        )
    torch.set_num_threads(budget.threads)
    if budget.deterministic:
        same_bits_every_time()
    store = SliceStore.open(job.stream.run)
    state = first_state(job, store, rank)
    run_epochs(job, budget, store, state, rank, world)
    if rank == 0:
        finish_job(job, store, state)


def first_state(job: TrainJob, store: SliceStore, rank: int) -> TrainState:
    """The state with which worker `rank` begins: the checkpoint, else the SDNet that the job starts from, else new.

    Raises InputError if the checkpoint is damaged, or if that SDNet has another configuration.
    """
    from pipeline.networks.files import load_sdnet
    from pipeline.training.state import TrainState

    vendors = len(training_vendors(store)) if job.loss.align > 0 else 0
    state = TrainState.create(job.network, job.train, job.stream.seed, rank, vendors)
    if fs.exists(job.checkpoint):
        try:
            state.restore(fs.read_bytes(job.checkpoint))
        except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise InputError(
                fs.base_name(job.checkpoint), "is damaged or of another version", "delete it to start anew"
            ) from error
    elif job.start is not None:
        model = load_sdnet(job.start)
        if model.config != job.network:
            raise InputError(fs.base_name(job.start), "is another SDNet than the arm's", "set sdnet as it was trained")
        state.start_from(model.state_dict())
    return state


def run_epochs(
    job: TrainJob, budget: WorkerBudget, store: SliceStore, state: TrainState, rank: int, world: int
) -> None:
    """Run the steps and epochs that are left, as worker `rank` of `world`."""
    from pipeline.samples.canvas import upload
    from pipeline.training.step import Batch, settle, train_step

    per_epoch, total = total_steps(job, store)
    if state.step >= total:  # killed after the last epoch
        return
    device = next(state.model.parameters()).device
    history = _History(job, state.epoch)
    makers = budget.data_actors or 1
    vendor_of = np.searchsorted(training_vendors(store), store.column("vendor"))
    taught = taught_structures(store)
    sums: dict[str, torch.Tensor] = {}
    with _stream(job, budget, range(state.step, total), rank, world, str(device)) as stream:
        # while the makers start
        objective = _objective(job, budget, state, total - state.step, world)
        held_out = validation_volumes(job, store)
        watched = watched_slices(job, store) if rank == 0 else None
        flow, before = StreamStats(makers), time.perf_counter()
        for row in stream:
            flow.add(row, time.perf_counter() - before)
            vendor = None
            if state.alignment is not None:
                vendor = upload(vendor_of[row["slice_id"].numpy()], device)
            drawn = None
            if taught is not None:  # then every batch of the run has it, so that compiled steps need only one graph
                drawn = upload(taught[row["slice_id"].numpy()], device)
            mask = row["mask"].long()
            batch = Batch(row["image"], mask, row["labelled"], row["slice_id"], vendor, row.get(TWIN), drawn)
            for name, value in train_step(objective, state, batch, job.train).items():
                sums[name] = sums[name].add_(value) if name in sums else value.double()
            if state.step % per_epoch == 0:
                settle(state)  # raises for a loss that is not finite, before anything is saved
                seen = flow.numbers()
                record = {f"loss/{name}": value / per_epoch for name, value in _over_workers(sums, world).items()}
                record |= seen | {"samples_per_s": per_epoch * job.stream.samples_per_step / seen["train_seconds"]}
                _end_epoch(job, state, record | factors_seen(job, state, watched), held_out, history, rank, world)
                sums = {}
                flow = StreamStats(makers)
            before = time.perf_counter()


def _stream(
    job: TrainJob, budget: WorkerBudget, steps: range, rank: int, world: int, device: str
) -> AbstractContextManager[Iterable[dict[str, torch.Tensor]]]:
    """The worker's batches. Data actors make them; if there are none, a thread of the worker does."""
    if not budget.data_actors:
        from pipeline.samples.batch_maker import batches_ahead

        return closing(batches_ahead(job.stream, steps, rank=rank, world=world, device=device, threads=budget.threads))
    from pipeline.samples.one_ahead import OneAhead

    made = batches(
        job.stream,
        steps,
        rank=rank,
        world=world,
        actors=budget.data_actors,
        cpus=budget.data_cpus,
        gpus=budget.data_gpus,
        stream_mb=budget.stream_mb,
        patience=Patience(budget.wait_minutes, job.say_waiting),
    )
    return OneAhead(made, device)


def _objective(job: TrainJob, budget: WorkerBudget, state: TrainState, steps: int, world: int) -> Any:
    """Network and losses as one module.

    A single worker compiles it if `budget.compile` is true; if that is None, it compiles on a GPU if that pays for
    `steps` steps. A worker that makes samples with nnU-Net's transforms itself never does. Nor do several workers; Ray
    wraps it so that their gradients are averaged.
    """
    import ray.train.torch
    from torch import nn

    from pipeline.samples.appearance import NNUNET
    from pipeline.training.kernels import WORTH_COMPILING
    from pipeline.training.objective import Objective

    objective: Any = Objective(state.model, job.loss, state.latent, state.alignment, state.average)
    on_card = next(state.model.parameters()).device.type == "cuda"
    if world == 1:
        pays = on_card and steps >= WORTH_COMPILING and not budget.deterministic
        # Compiling sets torch's global generator back, from which nnU-Net's transforms draw in another thread.
        if not budget.data_actors and job.stream.appearance in NNUNET:
            return objective
        if pays if budget.compile is None else budget.compile:
            objective.compile_terms()
        return objective
    if on_card:
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # in place: the optimiser's parameters stay
    # with separate updates, that of the unlabelled samples leaves the segmentor without gradients
    lone = {"find_unused_parameters": job.train.update == "separate"}
    return ray.train.torch.prepare_model(objective, parallel_strategy_kwargs=lone)


def _over_workers(sums: dict[str, torch.Tensor], world: int) -> dict[str, float]:
    """The mean of each float64 scalar over all workers. All scalars come from the device in one copy."""
    import torch

    values = torch.stack(list(sums.values()))
    if world > 1:
        torch.distributed.all_reduce(values)
    return dict(zip(sums, (values / world).tolist(), strict=True))


def _end_epoch(
    job: TrainJob,
    state: TrainState,
    record: dict[str, Any],
    held_out: list[ValidationVolume],
    history: _History,
    rank: int,
    world: int,
) -> None:
    started = time.perf_counter()
    scores = _validated(job, state, held_out, rank, world)
    rate = float(state.optimiser.param_groups[0]["lr"])
    state.end_epoch(scores["dice"])
    if rank != 0:
        return
    record = {
        "epoch": state.epoch,
        "step": state.step,
        **record,
        **{f"val/{name}": value for name, value in scores.items()},
        "lr": rate,
        "validation_seconds": time.perf_counter() - started,
    }
    history.append(record)  # before the checkpoint: a kill in between repeats the epoch and loses no record
    fs.write_bytes(job.checkpoint, state.to_bytes())


def _validated(
    job: TrainJob, state: TrainState, held_out: list[ValidationVolume], rank: int, world: int
) -> dict[str, float]:
    """Mean scores of the validation volumes. One worker scores each volume, with the first worker's network."""
    import torch.distributed

    from pipeline.training.validation import mean_scores, volume_scores

    if world > 1:
        for buffer in state.candidate.buffers():  # running statistics of batch norm, which differ between workers
            torch.distributed.broadcast(buffer, src=0)
    mine = volume_scores(state.candidate, held_out[rank::world], job.train.precision)
    parts = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, mine)
    drawn = [name for name in ALL_STRUCTURES if any(name in volume.structures for volume in held_out)]
    return mean_scores([parts[i % world][i // world] for i in range(len(held_out))], drawn or ALL_STRUCTURES)


def finish_job(job: TrainJob, store: SliceStore, state: TrainState) -> None:
    """Write the last weights, the best weights by validation Dice with their card, then the marker `done.json`."""
    from pipeline.factors.code_scale import standardise_codes
    from pipeline.inference.model_card import write_card
    from pipeline.networks.files import save_model
    from pipeline.networks.sdnet import SDNet

    terms, start = training_terms(job.stream, store), read_config(job.start) if job.start else {}
    terms = sorted({*terms, *start.get("terms", ())})
    seen = store.texts("subject", np.isin(store.column("split"), ("train", "validation")))
    labelled = (store.column("split") == "train") & store.column("labelled").astype(bool)
    masks_of = store.texts("subject", labelled)
    preprocess = identity(job.stream.preprocess)
    model = state.candidate
    records = read_history(job)
    last, best = (
        _training_description(job, store, state, records[-1:], start),
        _training_description(job, store, state, records, start),
    )
    scaled = job.train.standardise_codes and isinstance(model, SDNet)
    of = some_slices(job, store, SCALED_BY).image if scaled else None
    if of is not None and isinstance(model, SDNet):
        standardise_codes(model, of)
    save_model(fs.join(job.out, LAST), model, job.network, preprocess, terms, seen, last, masks_of, start)
    model.load_state_dict(state.best_weights)
    if of is not None and isinstance(model, SDNet):
        standardise_codes(model, of)
    name = save_model(job.out, model, job.network, preprocess, terms, seen, best, masks_of, start)
    write_card(job.out)
    done = {
        "config_hash": job.config_hash,
        "fingerprint": name,
        "weights_bytes": fs.size(fs.join(job.out, WEIGHTS)),
        "steps": state.step,
        "best_val_dice": state.best_dice,
    }
    fs.write_text(fs.join(job.out, DONE), json.dumps(done, indent=1))


def _training_description(
    job: TrainJob, store: SliceStore, state: TrainState, records: list[dict[str, Any]], start: dict[str, Any]
) -> dict[str, Any]:
    """The part of the network's description about its training. Its Dice is that of the best epoch in `records`.

    `start` is the `model.json` of the network that it started from; empty if it started from none.
    """
    from pipeline.inference.model_card import describe_training

    stream, best = job.stream, max(records, key=lambda record: record["val/dice"], default={})
    training = {
        "steps": state.step,
        "ra": stream.ra,
        "area_range_mm2": list(stream.plan.area_range_mm2) if stream.ra else None,
        "fa": stream.fa,
        "flips": "both" if stream.appearance == "nnunet_mirrors" else stream.plan.flips,
        "config_hash": job.config_hash,
        "data_fingerprint": job.data_fingerprint,
        "bank_fingerprint": job.bank_fingerprint,
    }
    scores = {name.removeprefix("val/"): best[name] for name in sorted(best) if name.startswith("val/dice")}
    return describe_training(
        store,
        arm=job.name,
        semi_supervised=stream.semi_supervised,
        training=training,
        validation=scores,
        start=vendors_seen(start),
    )
