"""Ray Train around `pipeline.training`: one job trains one network from one stream."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from actors.resources import ResourcePlan
from actors.streaming import StreamConfig, batches
from pipeline.losses import LossConfig
from pipeline.networks.sdnet import SDNetConfig
from pipeline.networks.unet import UNetConfig
from pipeline.training import TrainConfig
from storage import uri
from storage.slice_store import SliceStore

if TYPE_CHECKING:
    from pipeline.training import TrainState, ValidationVolume

HISTORY, DONE, FAILED = "history.jsonl", "done.json", "failed.json"


class TrainJob(BaseModel):
    """One network to train: what it is, what it sees, where it goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    out: str
    network: UNetConfig | SDNetConfig
    stream: StreamConfig
    loss: LossConfig
    train: TrainConfig
    workers: int = 1
    bank_fingerprint: str | None = None
    data_fingerprint: str

    @property
    def config_hash(self) -> str:
        """First 12 hex digits of SHA-256 over all that determines the result, and nothing about where it lies."""
        document = self.model_dump(exclude={"out": True, "stream": {"run", "bank"}})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    def finished(self) -> bool:
        """Whether `out` holds this very job's result."""
        path = uri.join(self.out, DONE)
        return uri.exists(path) and json.loads(uri.read_text(path)).get("config_hash") == self.config_hash


def total_steps(job: TrainJob, store: SliceStore) -> tuple[int, int]:
    """(steps an epoch, steps in all)."""
    labelled = int(((store.column("split") == "train") & store.column("labelled").astype(bool)).sum())
    per_epoch = job.train.steps_per_epoch or -(-labelled // job.train.batch_size)
    return per_epoch, per_epoch * job.train.epochs


def validation_volumes(job: TrainJob, store: SliceStore) -> list[ValidationVolume]:
    """Labelled volumes of held-out subjects, as the network sees them."""
    from pipeline.inference import network_input
    from pipeline.preprocess import working_slice
    from pipeline.rescale import resample_crop
    from pipeline.training import ValidationVolume

    config = job.stream.preprocess
    out = []
    for volume in store.volumes("validation"):
        if not volume.labelled:
            continue
        images, _ = store.volume(volume.rows)
        inputs = network_input(images, store.statistics(volume.rows[0]), volume.spacing, config)
        slices = [working_slice(store, i, config) for i in volume.rows]
        masks = np.stack([resample_crop(s.image, s.mask, 1.0, config.size, 0.0)[1] for s in slices])
        out.append(ValidationVolume(inputs, masks))
    return out


class _History:
    """Epoch records, rewritten whole: a repeated epoch replaces its first try, another configuration's are dropped."""

    def __init__(self, path: str, config_hash: str, epoch: int) -> None:
        self.path, self.config_hash = path, config_hash
        self.records: list[dict[str, Any]] = []
        if epoch and uri.exists(path):
            lines = [json.loads(line) for line in uri.read_text(path).splitlines() if line]
            self.records = [r for r in lines if r["epoch"] <= epoch and r.get("config_hash") == config_hash]

    def append(self, record: dict[str, Any]) -> None:
        self.records.append({**record, "config_hash": self.config_hash})
        uri.write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))


def train_loop(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Resumes from the last reported checkpoint with the samples that come next."""
    import ray.train
    import torch

    from pipeline.training import TrainState

    job = TrainJob.model_validate(settings["job"])
    plan: dict[str, Any] = settings["plan"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan["threads"])
    store = SliceStore.open(job.stream.run)
    state = TrainState.create(job.network, job.train, job.stream.seed, rank)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.restore(Path(folder))
    _run_epochs(job, plan, store, state, rank, world)
    if rank == 0:
        finish_job(job, store, state)


def _run_epochs(
    job: TrainJob, plan: dict[str, Any], store: SliceStore, state: TrainState, rank: int, world: int
) -> None:
    import ray.train.torch

    from pipeline.training import Batch, Objective, train_step

    per_epoch, total = total_steps(job, store)
    objective: Any = Objective(state.model, job.loss, state.latent)
    device = next(state.model.parameters()).device
    if world > 1:
        objective = ray.train.torch.prepare_model(objective)
    held_out = validation_volumes(job, store) if rank == 0 else []
    history = _History(uri.join(job.out, HISTORY), job.config_hash, state.epoch)
    stream = batches(
        job.stream,
        range(state.step, total),
        rank=rank,
        world=world,
        actors=plan["data_actors"],
        cpus=plan["data_cpus"],
        device=str(device),
    )
    sums: dict[str, float] = {}
    waited, began = 0.0, time.perf_counter()
    before = began
    for row in stream:
        waited += time.perf_counter() - before
        batch = Batch(row["image"], row["mask"].long(), row["labelled"], row["slice_id"])
        for name, value in train_step(objective, state, batch, job.train).items():
            sums[name] = sums.get(name, 0.0) + value
        if state.step % per_epoch == 0:
            took = time.perf_counter() - began
            record = {f"loss/{name}": value / per_epoch for name, value in sums.items()}
            record |= {"data_wait_fraction": waited / took, "train_seconds": took}
            _end_epoch(job, state, record, held_out, history, rank, world)
            sums, waited, began = {}, 0.0, time.perf_counter()
        before = time.perf_counter()


def _end_epoch(
    job: TrainJob,
    state: TrainState,
    record: dict[str, Any],
    held_out: list[ValidationVolume],
    history: _History,
    rank: int,
    world: int,
) -> None:
    import ray.train
    import torch

    from pipeline.training import validate

    started = time.perf_counter()
    scores = [validate(state.model, held_out, job.train.precision) if rank == 0 else {}]
    if world > 1:
        torch.distributed.broadcast_object_list(scores, src=0)
    rate = float(state.optimiser.param_groups[0]["lr"])
    state.end_epoch(scores[0]["dice"])
    record = {
        "epoch": state.epoch,
        "step": state.step,
        **record,
        **{f"val/{name}": value for name, value in scores[0].items()},
        "lr": rate,
        "validation_seconds": time.perf_counter() - started,
    }
    if rank != 0:
        ray.train.report(record)
        return
    history.append(record)
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder))
        ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))


def finish_job(job: TrainJob, store: SliceStore, state: TrainState) -> None:
    """Write the best weights by validation, then the marker that the job is done."""
    from pipeline.networks.files import save_model

    state.model.load_state_dict(state.best_weights)
    terms = sorted({str(t) for t in store.column("terms")[store.column("split") == "train"]})
    seen = store.column("subject")[np.isin(store.column("split"), ("train", "validation"))]
    preprocess = job.stream.preprocess.model_dump(mode="json")
    name = save_model(job.out, state.model, job.network, preprocess, terms, seen.tolist())
    done = {
        "config_hash": job.config_hash,
        "fingerprint": name,
        "steps": state.step,
        "best_val_dice": state.best_dice,
    }
    uri.write_text(uri.join(job.out, DONE), json.dumps(done, indent=1))


def run_job(job: TrainJob, plan: ResourcePlan) -> None:
    """Train a job to its end, with a few restarts from its checkpoint; raises what the last try raised."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": plan.trainer_cpus}
    if plan.trainer_gpus:
        resources["GPU"] = plan.trainer_gpus
    storage = str(Path(job.out).resolve()) if uri.is_local(job.out) else job.out
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "job": job.model_dump(),
            "plan": {"threads": plan.threads, "data_actors": plan.data_actors, "data_cpus": plan.data_cpus},
        },
        scaling_config=ScalingConfig(
            num_workers=plan.train_workers, use_gpu=plan.trainer_gpus > 0, resources_per_worker=resources
        ),
        # the hash in the name: an equal name would silently resume another configuration's run
        run_config=RunConfig(
            name=f"train-{job.config_hash}",
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()
