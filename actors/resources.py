"""Divide a cluster between trainers, data actors and tasks, in one budget, so that none of them starves another.

A plan is made node by node. An actor cannot span nodes, so a cluster may have enough CPUs in total and still no node
with room for one more actor. Ray decides which of the planned places a trainer takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.waiting import MINUTES
from storage.errors import InputError
from storage.identity import added

# Shares of a lane's cores, as Ray books them. The trainer books half, so data actors and short tasks have room.
TRAINER_SHARE, DATA_SHARE, TASK_CPUS = 0.5, 0.25, 0.25
MOST_BESIDE_GPU = 16.0  # most CPUs of an extraction actor on a GPU; they read and compress what the GPU encodes
LEAST_CORES = 0.5  # least cores for a trainer together with its data actors
MOST_DATA_ACTORS = 8  # per train worker, if the configuration asks for no number
# What a data actor may book if trainers use GPUs; the largest that fits is chosen. It makes samples in one thread.
DATA_CPUS: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)


class ResourceConfig(BaseModel):
    """What to ask of the cluster. Where a field is None, the plan chooses, as its description says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanes: int | None = Field(
        None, ge=1, description="arms trained at the same time; None: two, or one a node, on CPUs, one a GPU"
    )
    train_workers: int = Field(1, ge=1, description="Ray Train workers an arm; batch_size is over all of them")
    data_actors: int | None = Field(
        None, ge=1, description="actors that make samples, for each train worker; None: as many as keep it busy, 1 to 8"
    )
    synthesis: Literal["actors", "trainer"] = added(
        "actors",
        description="who makes samples (FA, RA): data actors on CPUs, or each train worker itself, on its own device, "
        "a whole batch at a time; then there are no data actors",
    )
    data_gpus: float = added(
        0.0,
        ge=0,
        lt=1,
        description="share of a GPU that each data actor books and draws on; a train worker books what is left of its "
        "card. 0: data actors draw on CPUs",
    )
    stream_mb: int = Field(
        256, ge=1, description="MB of made samples that wait in the object store for each train worker, about"
    )
    extract_actors: int | None = Field(None, ge=1, description="None: one a core, or one a GPU")
    gpus: bool | None = Field(None, description="None: use them if there are any; True: fail without")
    arm_retries: int = Field(1, ge=0, description="how often a failed arm is tried again before it is reported")
    wait_minutes: float = added(
        MINUTES, gt=0, description="how long work that no node has room for waits before it is given up"
    )
    compile: bool | None = added(
        None, description="training steps by torch.compile; None: on a GPU, where so many steps are left that it pays"
    )
    deterministic: bool = added(
        False, description="training gives the same bits again on the same kind of GPU, more slowly; on CPUs it does"
    )

    @model_validator(mode="after")
    def _compiled_for_one(self) -> ResourceConfig:
        if self.compile and self.deterministic:
            raise ValueError("compile=true chooses kernels by their speed; leave it out where deterministic=true")
        if self.compile and self.train_workers > 1:
            raise ValueError("compile=true is for one train worker an arm; leave it out, or set train_workers=1")
        return self

    @model_validator(mode="after")
    def _cards_shared(self) -> ResourceConfig:
        if self.data_gpus and (self.synthesis == "trainer" or self.gpus is False):
            raise ValueError("data_gpus is for data actors on GPUs; leave out synthesis=trainer and gpus=false")
        return self


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine of the cluster, as Ray counts them."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{self.cpus:g} CPU{'s' * (self.cpus != 1)}{gpus}"


@dataclass(frozen=True)
class Cluster:
    """The machines that work together."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes together."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes together."""
        return sum(node.gpus for node in self.nodes)

    @property
    def node_cpus(self) -> float:
        """CPUs of the largest node; 0 without nodes."""
        return max((node.cpus for node in self.nodes), default=0.0)

    def __str__(self) -> str:
        return ", ".join(f"{n} × {node}" for node, n in Counter(self.nodes).items()) or "no nodes"


@dataclass(frozen=True)
class NodeShare:
    """How many actors of each kind have a place on a node while arms train."""

    node: Node
    trainers: int
    data_actors: int


@dataclass(frozen=True)
class ResourcePlan:
    """A budget that fits the cluster.

    `threads` is the number of torch threads of each trainer. The CPUs and GPUs are what one trainer, data actor or
    extraction actor books in Ray. `data_actors` is per train worker; if it is 0, each train worker makes its own
    samples. `shares` has one entry per node.
    """

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
    data_gpus: float = 0.0
    arm_retries: int = 1
    wait_minutes: float = MINUTES
    compile: bool | None = None
    deterministic: bool = False
    shares: tuple[NodeShare, ...] = ()

    def describe(self) -> str:
        """One line for the terminal. If there are several nodes, one more line for each kind of node."""
        where = "GPU" if self.trainer_gpus else f"{self.threads} thread{'s' * (self.threads > 1)}"
        makers = f"with {self.data_actors} data actor{'s' * (self.data_actors > 1)}"
        lines = [
            f"{self.lanes} arm{'s' * (self.lanes > 1)} at a time, each {self.train_workers} train worker"
            f"{'s' * (self.train_workers > 1)} ({where}) {makers if self.data_actors else 'without data actors'}; "
            f"{self.extract_actors} extraction actor{'s' * (self.extract_actors > 1)}"
        ]
        kinds = Counter(self.shares) if len(self.shares) > 1 else {}
        lines += [
            f"  {n} × {share.node}: {share.trainers} trainers of {self.trainer_cpus:g} CPUs"
            + (f", {share.data_actors} data actors of {self.data_cpus:g}" if self.data_actors else "")
            for share, n in kinds.items()
        ]
        return "\n".join(lines)


def plan(config: ResourceConfig, cluster: Cluster, jobs: int = 1) -> ResourcePlan:
    """Divide a cluster between `jobs` trainings.

    There is at least one way to place all actors so that no node is booked beyond what it has. If there is none, raises
    InputError with the shortfall, so that no actor waits for ever.
    """
    nodes, use_gpu = cluster.nodes, _use_gpus(config, cluster)
    lanes, seats = _choose_lanes(config, cluster, jobs, use_gpu)
    trainers = lanes * config.train_workers
    cores = min(node.cpus / taken for node, taken in zip(nodes, seats, strict=True) if taken)
    trainer_cpus = _fraction(min(cores, max(1, int(cores))) * TRAINER_SHARE)
    alone = config.synthesis == "trainer"
    # One thread feeds the GPU. A second one makes samples, unless data actors do that on the other cores.
    if use_gpu:
        trainer_cpus = min(2.0 if alone else 1.0, trainer_cpus)
    free = [node.cpus - taken * trainer_cpus for node, taken in zip(nodes, seats, strict=True)]
    data_gpus = config.data_gpus if use_gpu else 0.0
    if data_gpus:  # data actors are on nodes with a card
        least = min(left / taken for left, taken in zip(free, seats, strict=True) if taken)
        free = [least] * trainers
    each, data_cpus = (0, 0.0) if alone else _data_actors(config, free, trainers, cores, use_gpu)
    extract, extract_cpus = _extraction(config, cluster, use_gpu)
    if data_gpus or not each:
        data = [taken * each for taken in seats]
    else:
        data = _place_data_actors(nodes, free, data_cpus, trainers * each)
    return ResourcePlan(
        lanes=lanes,
        train_workers=config.train_workers,
        threads=max(1, int(trainer_cpus if use_gpu else cores)),
        trainer_cpus=trainer_cpus,
        trainer_gpus=_left_of_card(each, data_gpus) if use_gpu else 0.0,
        data_actors=each,
        data_cpus=data_cpus,
        data_gpus=data_gpus,
        stream_mb=config.stream_mb,
        extract_actors=extract,
        extract_cpus=extract_cpus,
        extract_gpus=1.0 if use_gpu else 0.0,
        arm_retries=config.arm_retries,
        wait_minutes=config.wait_minutes,
        compile=config.compile,
        deterministic=config.deterministic,
        shares=tuple(NodeShare(*share) for share in zip(nodes, seats, data, strict=True)),
    )


def _left_of_card(data_actors: int, share: float) -> float:
    """What a train worker books of its GPU beside data actors with a share of it each.

    Raises InputError if that is not more than half, with which Ray could put two train workers on one card.
    """
    left = round(1.0 - data_actors * share, 4)
    if left <= 0.5:
        problem = f"{data_actors} data actors with {share:g} of a GPU each leave {left:g} of it to the training"
        raise InputError("resources.data_gpus", problem, "lower it, or set resources.data_actors to fewer")
    return left


def _use_gpus(config: ResourceConfig, cluster: Cluster) -> bool:
    """Whether trainers run on GPUs. A part of a GPU does not count. Raises InputError if `gpus` is set and too few."""
    gpus = sum(int(node.gpus) for node in cluster.nodes)
    if config.gpus and gpus < config.train_workers:
        raise InputError(
            "resources",
            f"{config.train_workers} GPUs asked for, {gpus:g} in the cluster",
            "add GPU nodes or pass --set resources.gpus=null",
        )
    return gpus >= config.train_workers and config.gpus is not False


def _choose_lanes(config: ResourceConfig, cluster: Cluster, jobs: int, use_gpu: bool) -> tuple[int, list[int]]:
    """(lanes, trainers on each node).

    If the configuration sets no number of lanes, there are as many as there are GPUs for; on CPUs two, or one per node
    if that is more. If they do not fit, there are fewer. Raises InputError if the lanes asked for, or a single one, do
    not fit.
    """
    workers = config.train_workers
    most = sum(int(node.gpus) for node in cluster.nodes) if use_gpu else max(2 * workers, len(cluster.nodes))
    lanes = max(1, min(config.lanes or most // workers, jobs))
    while True:
        seats = _place_trainers(cluster.nodes, lanes * workers, use_gpu)
        if seats is not None:
            return lanes, seats
        if config.lanes or lanes == 1:
            raise _no_seats(cluster, lanes, workers, use_gpu)
        lanes -= 1


def _place_trainers(nodes: Sequence[Node], trainers: int, use_gpu: bool) -> list[int] | None:
    """Trainers on each node, such that the smallest share of cores is as large as possible; None if they do not fit."""
    seats = [0] * len(nodes)
    for _ in range(trainers):
        room = [i for i, node in enumerate(nodes) if not use_gpu or node.gpus >= seats[i] + 1]
        best = max(room, key=lambda i: nodes[i].cpus / (seats[i] + 1), default=None)
        if best is None or nodes[best].cpus / (seats[best] + 1) < LEAST_CORES:
            return None
        seats[best] += 1
    return seats


def _no_seats(cluster: Cluster, lanes: int, workers: int, use_gpu: bool) -> InputError:
    trainers = lanes * workers
    asked = f"{lanes} lane{'s' * (lanes > 1)} of {workers} train worker{'s' * (workers > 1)}"
    places = sum(min(int(n.cpus / LEAST_CORES), int(n.gpus) if use_gpu else trainers) for n in cluster.nodes)
    one = f"a GPU and {LEAST_CORES:g} CPUs beside it" if use_gpu else f"{LEAST_CORES:g} CPUs of one node"
    problem = (
        f"{asked} need {trainers * LEAST_CORES:g} CPUs, {cluster.cpus:g} in the cluster ({cluster}): each train worker "
        f"wants {one}, there are places for {places}, {trainers - places} too few"
    )
    return InputError("resources", problem, "lower resources.lanes or resources.train_workers, or add nodes")


def _data_actors(
    config: ResourceConfig, free: Sequence[float], trainers: int, cores: float, use_gpu: bool
) -> tuple[int, float]:
    """(data actors of each trainer, CPUs of each data actor) that fit into the `free` CPUs of the nodes.

    `cores` is the share of one trainer. Raises InputError if nothing fits.
    """
    share = cores * DATA_SHARE
    each = config.data_actors or min(MOST_DATA_ACTORS, max(1, int(share)))
    sizes = DATA_CPUS if use_gpu else (_fraction(min(1.0, share / each)),)
    kept = 1 - TASK_CPUS if use_gpu else 1.0  # on CPUs, DATA_SHARE already leaves as much for tasks
    for size in sizes:
        places = sum(_fit(kept * cpus, size) for cpus in free)
        if use_gpu and config.data_actors is None:
            each = min(MOST_DATA_ACTORS, places // trainers)
        if each and places >= each * trainers:
            return each, size
    each = max(1, each)
    problem = (
        f"{trainers} train workers with {each} data actor{'s' * (each > 1)} each need {trainers * each} places of "
        f"{sizes[-1]:g} CPUs beside them, there are {places}, {trainers * each - places} too few"
    )
    raise InputError("resources", problem, "lower resources.data_actors or resources.lanes, or add nodes")


def _extraction(config: ResourceConfig, cluster: Cluster, use_gpu: bool) -> tuple[int, float]:
    """(extraction actors, CPUs of each). Some CPUs are left for tasks. Raises InputError if the actors do not fit."""
    if use_gpu:
        shares = [node.cpus / int(node.gpus) for node in cluster.nodes if int(node.gpus) and node.cpus]
        cpus = min(MOST_BESIDE_GPU, min(shares, default=0.0) * (1 - TASK_CPUS))
        actors = config.extract_actors or sum(int(node.gpus) for node in cluster.nodes if node.cpus)
    else:
        actors = config.extract_actors or max(1, sum(int(node.cpus) for node in cluster.nodes))
        cpus = min(1.0, cluster.cpus / actors, cluster.node_cpus) * (1 - TASK_CPUS)

    def places(cpus: float) -> int:
        return sum(min(int(n.gpus) if use_gpu else actors, _fit(n.cpus, _fraction(cpus))) for n in cluster.nodes)

    while places(cpus) < actors and cpus > DATA_CPUS[-1]:
        cpus /= 2
    if places(cpus) < actors:
        kind = "a GPU" if use_gpu else f"{_fraction(cpus):g} CPUs"
        problem = f"{actors} extraction actors want {kind} each, {cluster} have places for {places(cpus)}"
        raise InputError("resources", problem, "lower resources.extract_actors, or add nodes")
    return actors, _fraction(cpus)


def _place_data_actors(nodes: Sequence[Node], free: Sequence[float], size: float, actors: int) -> list[int]:
    """How many of the data actors each node takes. Nodes without GPUs are filled first, as Ray does."""
    taken = [0] * len(nodes)
    for i in sorted(range(len(nodes)), key=lambda i: nodes[i].gpus):
        taken[i] = min(actors, _fit(free[i], size))
        actors -= taken[i]
    return taken


def _fit(cpus: float, size: float) -> int:
    """How many bookings of this size fit. The tolerance is for sums of fractions, which come out slightly too small."""
    return max(0, int(cpus / size + 1e-6))


def _fraction(cpus: float) -> float:
    """Round down to what Ray accepts: whole CPUs from 1 on, below that multiples of 0.001, at least 0.05."""
    return float(int(cpus)) if cpus >= 1 else max(0.05, int(cpus * 1000) / 1000)
