"""Ray Train around `pipeline.training.step`: one job trains one network from one stream.

A job's folder holds

- `model.safetensors`, `model.json`: the network at its best epoch by validation Dice; `model_card.md` for a reader;
- `last/`: the same two files at the last epoch;
- `done.json`, written last;
- `history.jsonl`: a record an epoch;
- `checkpoint-<config hash>.pt`: state after the last whole epoch: weights, best weights so far, running average,
  optimiser, plateau rule. A job that was interrupted goes on from it, whatever died.

The checkpoint is one file that appears whole or not at all, rather than a `ray.train.Checkpoint`: Ray keeps account of
those in a file that it rewrites in place, and a driver killed at that moment could never go on. So Ray Train stores
nothing that outlives a try, and a run in an object store needs no other credentials than fsspec's.

With several workers, `batch_size` is of all together. Each takes an equal share of a step's labelled and of its
unlabelled samples, the loss is the mean of the shares' losses (Dice is over a share, not over the whole batch), and the
first validates. Batch norm is over the whole batch on GPUs; on CPUs, where torch has no synchronised one, it is over
each worker's share, and the first worker's running statistics are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from actors.resources import ResourcePlan
from pipeline.networks.files import WEIGHTS, read_config
from pipeline.networks.sdnet import SDNetConfig
from pipeline.networks.unet import UNetConfig
from pipeline.samples.stream_config import StreamConfig
from pipeline.training.config import TrainConfig
from pipeline.training.losses import LossConfig
from pipeline.training.step import NonFiniteLossError, OutOfMemoryError
from storage import fs
from storage.errors import FinalError, InputError, StageError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

HISTORY, DONE, FAILED, LAST = "history.jsonl", "done.json", "failed.json", "last"
MAX_DEATHS = 3  # in a row, without a new epoch in between


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
    start: str | None = None  # folder of the SDNet that it starts from
    start_fingerprint: str | None = None
    bank_fingerprint: str | None = None
    data_fingerprint: str

    @property
    def config_hash(self) -> str:
        """First 12 hex digits of SHA-256 over all that determines the result, and nothing about where it lies."""
        document = self.model_dump(exclude={"out": True, "start": True, "stream": {"run", "bank", "sdnet"}})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def checkpoint(self) -> str:
        """Where the state after the last whole epoch lies; another configuration must not go on from it."""
        return fs.join(self.out, f"checkpoint-{self.config_hash}.pt")

    def finished(self) -> bool:
        """Whether `out` holds this very job's result, whole: the marker, and the network that the marker names."""
        try:
            done = json.loads(fs.read_text(fs.join(self.out, DONE)))
            named = {"config_hash": self.config_hash, "fingerprint": read_config(self.out)["fingerprint"]}
            weights_bytes = fs.size(fs.join(self.out, WEIGHTS))
            return bool(done == done | named | {"weights_bytes": weights_bytes})
        except (FileNotFoundError, ValueError, TypeError, InputError):  # absent or half copied
            return False


def run_job(job: TrainJob, plan: ResourcePlan) -> None:
    """Train a job to its end. Workers may die as often as they like, as long as there is a new epoch now and then.

    Raises FinalError if the loss is not finite or memory runs out; StageError if the loop itself fails, or workers die
    `MAX_DEATHS` times in a row without a new epoch; InputError if Ray has GPUs that this torch cannot use, or the loop
    met bad input. Only deaths are tried again.
    """
    import torch
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    if plan.trainer_gpus and not torch.backends.cuda.is_built():
        raise InputError(
            "torch",
            "is a build without CUDA, and the cluster has GPUs",
            "install a CUDA build, or pass --set resources.gpus=false",
        )
    fs.remove(fs.join(job.out, DONE))
    deaths, reached = 0, -1
    while True:
        try:
            with TemporaryDirectory() as scratch:
                _trainer(job, plan, scratch).fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            if job.finished():  # its worker died with nothing left to do
                return
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                continue  # a lost machine's successor is not there yet
            errors = list(getattr(error, "worker_failures", {}).values()) or [error]
            _raise_ours(job, plan, errors)
            epoch = len(read_history(job))
            deaths = deaths + 1 if epoch == reached else 1
            reached = epoch
            if deaths == MAX_DEATHS:
                raise StageError(
                    f"a training worker died {deaths} times in a row after epoch {epoch} of {job.train.epochs}: "
                    f"{_last_line(errors[0])}; the same command goes on from there; if memory ran out, lower "
                    "train.batch_size or resources.lanes first"
                ) from error


def _raise_ours(job: TrainJob, plan: ResourcePlan, errors: Iterable[Exception]) -> None:
    """Raise what no other try would mend. A worker that lost its peer fails too, with an error of torch's."""
    from ray.exceptions import RayError, RayTaskError
    from ray.train.v2._internal.exceptions import RayTrainError

    for error in errors:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, InputError):
            raise cause
        lost = isinstance(error, (RayError, RayTrainError, StageError, OSError)) and not isinstance(error, RayTaskError)
        if isinstance(cause, (NonFiniteLossError, OutOfMemoryError)):
            raise FinalError(_last_line(cause)) from error
        if not lost and plan.train_workers == 1:
            raise StageError(_last_line(cause)) from error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def read_history(job: TrainJob) -> list[dict[str, Any]]:
    """Epoch records that this very job wrote; what another configuration left in the folder is not its history."""
    path = fs.join(job.out, HISTORY)
    lines = fs.read_text(path).splitlines() if fs.exists(path) else []
    return [record for record in map(json.loads, filter(None, lines)) if record.get("config_hash") == job.config_hash]


def _trainer(job: TrainJob, plan: ResourcePlan, scratch: str) -> TorchTrainer:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    from actors.train_worker import train_loop

    resources = {"CPU": plan.trainer_cpus}
    if plan.trainer_gpus:
        resources["GPU"] = plan.trainer_gpus
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "job": job.model_dump(),
            "plan": {
                "threads": plan.threads,
                "data_actors": plan.data_actors,
                "data_cpus": plan.data_cpus,
                "stream_mb": plan.stream_mb,
                "gpus": plan.trainer_gpus,
            },
        },
        scaling_config=ScalingConfig(
            num_workers=plan.train_workers, use_gpu=plan.trainer_gpus > 0, resources_per_worker=resources
        ),
        # no retries of Ray's own: they know no difference between a lost machine and a loss that is not a number, and
        # would go on for ever where workers die while they start
        run_config=RunConfig(
            name=job.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
