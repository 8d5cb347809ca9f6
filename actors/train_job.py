"""A training job: one network trained from one stream, and the files that it leaves.

A job's folder holds

- `model.safetensors`, `model.json`: the network at its best epoch by validation Dice; `model_card.md` describes it;
- `last/`: the same two files at the last epoch;
- `done.json`, written last;
- `history.jsonl`: one record per epoch;
- `checkpoint-<config hash>.pt`: the state after the last complete epoch: weights, best weights so far, running average,
  optimiser, learning-rate schedule. An interrupted job continues from it, whatever died.

The checkpoint is one file that appears whole or not at all. It is not a `ray.train.Checkpoint`: Ray lists those in a
file that it rewrites in place, and a driver killed at that moment could never continue. So Ray Train stores nothing
that outlives a try, and a run in an object store needs no credentials but fsspec's.

With several workers, `batch_size` counts the samples of all of them. Each worker takes an equal share of a step's
labelled and of its unlabelled samples. The loss is the mean of the workers' losses (Dice is over a share, not over the
whole batch), and the workers share the validation volumes. On GPUs batch norm is over the whole batch. On CPUs torch
has no synchronised batch norm: there it is over each worker's share, and the first worker's running statistics are
kept.
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
WAITING = "waiting.txt"  # holds a line on what a job last waited for


class WorkerBudget(BaseModel):
    """What one train worker may use.

    threads: torch threads. data_actors: actors that make its samples; 0 if it makes them itself. data_cpus, data_gpus:
    what one data actor books. stream_mb: MB of blocks that are made or being made. gpus: what it has booked itself.
    wait_minutes: how long it waits for room. compile, deterministic: as in `ResourceConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int
    data_actors: int
    data_cpus: float
    stream_mb: int
    gpus: float
    data_gpus: float = 0.0
    wait_minutes: float = MINUTES
    compile: bool | None = None
    deterministic: bool = False


FOLDERS = {"run", "bank", "bank_name", "sdnet", "donors"}  # fields of a stream; `bank_fingerprint` has their content


class TrainJob(BaseModel):
    """One network to train: its configuration, the samples that it sees, and the folder for its results."""

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
        """First 12 hex digits of the SHA-256 over everything that determines the result. Folders do not count."""
        document = identity(self, exclude={"out": True, "start": True, "stream": FOLDERS})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def checkpoint(self) -> str:
        """The file with the state after the last complete epoch. Its name keeps other configurations away from it."""
        return fs.join(self.out, f"checkpoint-{self.config_hash}.pt")

    def finished(self) -> bool:
        """Whether `out` holds the complete result of this very job: the marker, and the network that it names."""
        try:
            done = json.loads(fs.read_text(fs.join(self.out, DONE)))
            named = {"config_hash": self.config_hash, "fingerprint": read_config(self.out)["fingerprint"]}
            weights_bytes = fs.size(fs.join(self.out, WEIGHTS))
            return bool(done == done | named | {"weights_bytes": weights_bytes})
        except (FileNotFoundError, ValueError, TypeError, InputError):  # files are absent or half copied
            return False

    def say_waiting(self, line: str) -> None:
        """Write a line for the driver to read. The job may run on another node."""
        fs.write_text(fs.join(self.out, WAITING), line)

    def waiting(self) -> str | None:
        """The last line of `say_waiting`; None if there is none."""
        path = fs.join(self.out, WAITING)
        return fs.read_text(path) if fs.exists(path) else None

    def replaces_a_result(self) -> bool:
        """Whether training would start anew and replace a result in `out`, of another configuration, data or bank."""
        return fs.exists(fs.join(self.out, DONE)) and not self.finished() and not fs.exists(self.checkpoint)


def read_history(job: TrainJob) -> list[dict[str, Any]]:
    """The epoch records that this very job wrote, without those that another configuration left in the folder."""
    path = fs.join(job.out, HISTORY)
    records = read_records(path) if fs.exists(path) else []
    return [record for record in records if record.get("config_hash") == job.config_hash]


def read_records(path: str) -> list[dict[str, Any]]:
    """Every record of a `history.jsonl`. The file is always written as a whole, so its last line is complete."""
    return [json.loads(line) for line in fs.read_text(path).splitlines() if line]
