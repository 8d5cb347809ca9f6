"""A training job: one network trained from one stream, and the files it leaves.

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
validation volumes are shared among them. Batch norm is over the whole batch on GPUs; on CPUs, where torch has no
synchronised one, it is over each worker's share, and the first worker's running statistics are kept.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.waiting import MINUTES
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.description import WEIGHTS, read_config
from pipeline.samples.stream_config import StreamConfig
from pipeline.training.config import LossConfig, TrainConfig
from storage import fs
from storage.errors import InputError
from storage.identity import identity

HISTORY, DONE, FAILED, LAST = "history.jsonl", "done.json", "failed.json", "last"
WAITING = "waiting.txt"  # what a job last waited for


class WorkerBudget(BaseModel):
    """What one train worker may use: torch threads; data actors, none if it makes its samples itself, and CPUs for
    each; MB of blocks in flight; GPUs; minutes that it waits for room; see `ResourceConfig` for the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int
    data_actors: int
    data_cpus: float
    stream_mb: int
    gpus: float
    wait_minutes: float = MINUTES
    compile: bool | None = None
    deterministic: bool = False


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
        document = identity(self, exclude={"out": True, "start": True, "stream": {"run", "bank", "bank_name", "sdnet"}})
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

    def say_waiting(self, line: str) -> None:
        """Leave a line for the driver, from wherever the job runs."""
        fs.write_text(fs.join(self.out, WAITING), line)

    def waiting(self) -> str | None:
        """The last line of `say_waiting`."""
        path = fs.join(self.out, WAITING)
        return fs.read_text(path) if fs.exists(path) else None

    def replaces_a_result(self) -> bool:
        """Whether training would make anew what `out` holds: a result of another configuration, data or bank."""
        return fs.exists(fs.join(self.out, DONE)) and not self.finished() and not fs.exists(self.checkpoint)


def read_history(job: TrainJob) -> list[dict[str, Any]]:
    """Epoch records that this very job wrote; what another configuration left in the folder is not its history."""
    path = fs.join(job.out, HISTORY)
    records = read_records(path) if fs.exists(path) else []
    return [record for record in records if record.get("config_hash") == job.config_hash]


def read_records(path: str) -> list[dict[str, Any]]:
    """Every record of a `history.jsonl`, which is only ever written whole."""
    return [json.loads(line) for line in fs.read_text(path).splitlines() if line]
