"""Who gets which share of the machine. One budget for trainers, data actors and tasks, so that none starves another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import InputError

# Of a lane's cores, as Ray books them: the trainer's half leaves room for its data actors and for short tasks.
TRAINER_SHARE, DATA_SHARE, TASK_CPUS = 0.5, 0.25, 0.25


class ResourceConfig(BaseModel):
    """What to ask of the cluster; None means as much as fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanes: int | None = Field(None, ge=1, description="arms trained at the same time; None: two on a CPU, one a GPU")
    train_workers: int = Field(1, ge=1, description="Ray Train workers an arm; batch_size is over all of them")
    data_actors: int = Field(1, ge=1, description="actors that make samples, for each train worker")
    stream_mb: int = Field(
        256, ge=1, description="MB of made samples that wait in the object store for each train worker, about"
    )
    extract_actors: int | None = Field(None, ge=1, description="None: one a core, or one a GPU")
    gpus: bool | None = Field(None, description="None: use them if there are any; True: fail without")


@dataclass(frozen=True)
class ResourcePlan:
    """A budget that fits. `threads` are torch's in each trainer; cpus are Ray's bookings."""

    lanes: int
    train_workers: int
    threads: int
    trainer_cpus: float
    trainer_gpus: float
    data_actors: int
    data_cpus: float
    stream_mb: int
    extract_actors: int
    extract_cpus: float
    extract_gpus: float

    def describe(self) -> str:
        """One line for the terminal."""
        where = "GPU" if self.trainer_gpus else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.lanes} arm{'s' * (self.lanes > 1)} at a time, each {self.train_workers} train worker"
            f"{'s' * (self.train_workers > 1)} ({where}) with {self.data_actors} data actor"
            f"{'s' * (self.data_actors > 1)}; {self.extract_actors} extraction actors"
        )


@dataclass(frozen=True)
class Cluster:
    """CPUs and GPUs in all, and CPUs of the largest node: no actor spans nodes."""

    cpus: float
    gpus: float
    node_cpus: float


def plan(config: ResourceConfig, cluster: Cluster, jobs: int = 1) -> ResourcePlan:
    """Divide a cluster for `jobs` trainings.

    Raises InputError at once, with the shortfall, if they do not fit; nothing is left to wait for ever.
    """
    cpus, gpus = cluster.cpus, cluster.gpus
    if config.gpus and gpus < config.train_workers:
        raise InputError(
            "resources",
            f"{config.train_workers} GPUs asked for, {gpus:g} in the cluster",
            "add GPU nodes or pass --set resources.gpus=null",
        )
    use_gpu = gpus >= config.train_workers and config.gpus is not False
    most = int(gpus // config.train_workers) if use_gpu else 2
    lanes = max(1, min(config.lanes or most, jobs))
    cores = min(cpus / lanes / config.train_workers, cluster.node_cpus)
    if cores < 0.5:
        raise InputError(
            "resources",
            f"{lanes} lanes of {config.train_workers} train workers need {lanes * config.train_workers / 2:g} CPUs, "
            f"{cpus:g} in the cluster",
            "lower resources.lanes or resources.train_workers, or add nodes",
        )
    extract = config.extract_actors or (int(gpus) if use_gpu else max(1, int(cpus)))
    return ResourcePlan(
        lanes=lanes,
        train_workers=config.train_workers,
        threads=max(1, int(cores)),
        trainer_cpus=_fraction(min(cores, max(1, int(cores))) * TRAINER_SHARE),
        trainer_gpus=1.0 if use_gpu else 0.0,
        data_actors=config.data_actors,
        data_cpus=_fraction(cores * DATA_SHARE / config.data_actors),
        stream_mb=config.stream_mb,
        extract_actors=extract,
        extract_cpus=_fraction(min(1.0, cpus / extract) * (1 - TASK_CPUS)),
        extract_gpus=1.0 if use_gpu else 0.0,
    )


def _fraction(cpus: float) -> float:
    """Ray takes whole CPUs above one, and multiples of 0.0001 below."""
    return float(int(cpus)) if cpus >= 1 else max(0.05, int(cpus * 1000) / 1000)


def start_ray(cpus: int | None = None) -> Cluster:
    """Join the cluster this process belongs to, or start a local one without a dashboard."""
    import logging

    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # whoever books no GPU sees none: two lanes on one unbooked card would fight over its memory
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # fractional CPUs mean more processes than cores, as planned; without this Ray warns of them one by one
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    if not ray.is_initialized():
        inside_cluster = "RAY_ADDRESS" in os.environ
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not inside_cluster:
            options |= {"include_dashboard": False, "num_cpus": cpus}
        ray.init(**options)
    total = ray.cluster_resources()
    nodes = [float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]]
    return Cluster(float(total.get("CPU", 0.0)), float(total.get("GPU", 0.0)), max(nodes, default=0.0))
