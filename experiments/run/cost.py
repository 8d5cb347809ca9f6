"""Estimate what an ablation costs with this data on this cluster: hours, GPU-hours and memory.

A training step, the encoding of a slice and the scoring of a volume are timed on this machine, or taken from the run's
history. What depends on no setting has a constant below, measured on one core of 2 (Zen 4, docs/performance.md).
"""

from __future__ import annotations

import heapq
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from actors.resources import Cluster, ResourcePlan, plan
from actors.train_job import read_history
from experiments.config import Settings
from experiments.run.workload import Contents, Training, Workload
from pipeline.samples.maker import CACHE_BYTES

START_S = 15.0  # until Ray Train has started the training of a network, about
OVERHEAD_S = 45.0  # to start Ray and to write the report
DRAW_S = 0.012  # to draw a slice of the phantom
INGEST_PIXELS_S = 45e6  # pixels a second on one core; measured with 804 slices of 56,000 pixels
PACK_S = 0.0053  # to read, prepare and compress a slice of the bank

# Bytes of resident memory.
RAY_BYTES, DRIVER_BYTES = 0.5e9, 0.5e9  # Ray's own processes on a node; a driver
MAKER_BYTES = 0.41e9  # a data actor with its libraries, without slices (`python -m benchmarks scale`)
WORKING_BYTES = 5  # per pixel of a slice on the working grid: float32 image and uint8 mask
VOLUME = (10, 224, 224)  # slices, rows and columns of a typical test volume, with pixels of 1.25 mm
PART = 4  # how many of its slices are segmented to time it
GB, HOUR = 1e9, 3600.0


@dataclass(frozen=True)
class Cost:
    """What the rest of an ablation costs.

    stages: seconds of each stage; the stages follow one another. gpu_seconds: sum over all GPUs. memory: bytes on the
    busiest node while arms train, by purpose. cache: bytes on each node's disk for the bank's cache.
    """

    stages: dict[str, float]
    gpu_seconds: float
    memory: dict[str, float]
    cache: float

    def lines(self) -> list[str]:
        """The lines that the user sees."""
        total = sum(self.stages.values())
        parts = ", ".join(f"{name} {_duration(took)}" for name, took in self.stages.items() if took)
        memory = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.memory.items() if size)
        cache = f"; the bank's cache takes {self.cache / GB:.1f} GB of each node's disk" if self.cache else ""
        return [
            f"time: about {_duration(total)} ({parts}). An estimate: a step of each kind of network, a slice to "
            f"extract and a volume to score timed here just now or in this run, {START_S:.0f} s a network to start",
            f"cost: about {total / HOUR:.1f} hours of the cluster, {self.gpu_seconds / HOUR:.1f} GPU-hours",
            f"memory: about {sum(self.memory.values()) / GB:.1f} GB a node while arms train ({memory}){cache}",
        ]


def cost_lines(work: Workload, settings: Settings, cluster: Cluster, budget: ResourcePlan) -> list[str]:
    """Lines on the cost of what is left to do.

    If training would use GPUs and this machine has none to time a step on, one line says that there is no estimate.
    """
    import torch

    if not any(training.steps for training in (work.pretrain, *work.arms) if training) and not work.bank_slices:
        return ["time: nothing is left to train"]
    if budget.trainer_gpus and not torch.cuda.is_available():
        return ["time: not estimated, training would be on GPUs and this machine has none to time a step on"]
    return cost(work, settings, cluster, budget).lines()


def slow_precision(settings: Settings, budget: ResourcePlan, sections: Sequence[str]) -> str | None:
    """A line, if these sections (`train`, `pretrain`) train in bf16 on processors like this one, which has no bf16."""
    from pipeline.training.kernels import lacks_bf16

    slow = [f"--set {name}.precision=fp32" for name in sections if getattr(settings, name).precision == "bf16"]
    if not slow or budget.trainer_gpus or not lacks_bf16():
        return None
    return (
        "precision: this machine's processor has no bf16, so fp32 is faster (1.9 times where measured): "
        f"{' '.join(slow)} (rounds differently, so results differ)"
    )


def cost(work: Workload, settings: Settings, cluster: Cluster, budget: ResourcePlan) -> Cost:
    """The cost of all that is left of an ablation. Steps, slices and volumes are timed on this machine if necessary."""
    timed: dict[str, float] = {}

    def once(kind: str, measure: Callable[[], float]) -> float:
        if kind not in timed:
            timed[kind] = measure()
        return timed[kind]

    def seconds(training: Training, threads: int) -> float:
        """Seconds for one network: its steps, its validations and its scoring."""
        scored = 0 if training is work.pretrain or training.state == "done" else work.contents.scored
        if not training.steps and not scored:
            return 0.0
        network = f"{training.network!r}{threads}"
        volume = once(f"volume{network}", partial(_volume, training, settings, threads))
        kind = f"step{network}{training.loss!r}{training.train!r}{training.arm!r}"
        step = once(kind, partial(_step, training, settings, threads)) if training.steps else 0.0
        validated = work.contents.validated * training.epochs
        return START_S + training.steps * step / budget.train_workers + (validated + scored) * volume

    contents, alone = work.contents, plan(settings.resources, cluster, 1)
    slice_s = _slice(settings, contents) / alone.threads if work.bank_slices else 0.0
    arms = [seconds(arm, budget.threads) for arm in work.arms]
    stages = {
        "phantom": contents.drawn * DRAW_S,
        "ingest": 0.0 if contents.known else contents.pixels / INGEST_PIXELS_S / max(1.0, cluster.cpus),
        "pretrain": seconds(work.pretrain, alone.threads) if work.pretrain else 0.0,
        "extract": work.bank_slices * (slice_s + PACK_S) / budget.extract_actors,
        "arms": _in_lanes(arms, budget.lanes),
        "Ray and report": OVERHEAD_S,
    }
    on_gpu = stages["pretrain"] + sum(arms)
    gpu_seconds = budget.trainer_gpus * budget.train_workers * on_gpu
    gpu_seconds += budget.extract_gpus * budget.extract_actors * stages["extract"]
    uses_bank = any(arm.arm.uses_bank for arm in work.arms)
    working = contents.train_pixels * settings.preprocess.factor**2
    return Cost(stages, gpu_seconds, _memory(budget, working), working if uses_bank else 0.0)


def _memory(budget: ResourcePlan, working: float) -> dict[str, float]:
    """Bytes on the busiest node. `working`: pixels of all training slices on the working grid.

    A trainer's memory is taken as the peak of this process, which has just trained each kind of network.
    """
    trainer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    maker = MAKER_BYTES + min(working * WORKING_BYTES, 1.25 * CACHE_BYTES)
    trainers, makers = max(((share.trainers, share.data_actors) for share in budget.shares), default=(1, 1))
    return {
        "Ray and driver": RAY_BYTES + DRIVER_BYTES,
        "trainers": trainers * trainer,
        "data actors": makers * maker,
        "samples": trainers * budget.stream_mb * 1e6,
    }


def _in_lanes(seconds: list[float], lanes: int) -> float:
    """Seconds until the last lane ends, if the longest arms start first."""
    ends = [0.0] * lanes
    for took in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + took)
    return max(ends)


def _step(training: Training, settings: Settings, threads: int) -> float:
    """Seconds per step: those of the job's last epoch if there is one, otherwise timed."""
    from pipeline.training.step_time import seconds_a_step

    records = read_history(training.job) if training.job is not None else []
    if records and training.train.steps_per_epoch:
        return float(records[-1]["train_seconds"]) / training.train.steps_per_epoch
    labelled = training.train.batch_size
    unlabelled = round(labelled * settings.plan.unlabelled_ratio) if training.arm.semi_supervised else 0
    return seconds_a_step(
        training.network,
        training.loss,
        training.train,
        labelled,
        unlabelled,
        settings.preprocess.size,
        threads=threads,
        twins=training.arm.consistency,
    )


def _slice(settings: Settings, contents: Contents) -> float:
    """Seconds in which one thread, or the GPU, encodes a slice of average size."""
    from pipeline.factors.extract import FrozenSDNet, NetworkView
    from pipeline.networks.files import default_device
    from pipeline.networks.sdnet import SDNet

    pixels = contents.train_pixels / max(1, contents.train) * settings.preprocess.factor**2
    side = max(16, round(pixels**0.5 / 16) * 16)  # canvases are multiples of 16
    image = np.random.default_rng(0).random((side, side), dtype=np.float32)
    crop = np.zeros((settings.preprocess.size,) * 2, dtype=np.float32)
    seen = NetworkView(image, np.s_[0:side, 0:side], crop, np.zeros((side, side), dtype=np.uint8))
    network = FrozenSDNet(SDNet(settings.sdnet).eval(), settings.bank_precision, default_device())
    return _timed(lambda: network.factors([seen]), 1)


def _volume(training: Training, settings: Settings, threads: int) -> float:
    """Seconds in which a network segments a volume and the result is scored."""
    from pipeline.inference.predictor import predict_volume
    from pipeline.networks.files import build, default_device
    from pipeline.samples.preprocess import volume_statistics
    from pipeline.scores.metrics import score_volume

    image = np.random.default_rng(0).random((PART, *VOLUME[1:]), dtype=np.float32)
    model = build(training.network).eval().to(default_device())
    spacing = (10.0, 1.25, 1.25)
    stats = volume_statistics(image, spacing, settings.preprocess)
    reference, found = _rings(0.0), _rings(2.0)
    segmented = _timed(lambda: predict_volume(model, image, stats, spacing, settings.preprocess), threads)
    return VOLUME[0] / PART * segmented + _timed(lambda: score_volume(found, reference, spacing), threads)


def _rings(shift: float) -> npt.NDArray[np.uint8]:
    """Labels of a volume with structures of about the size of a heart, `shift` pixels off."""
    rows, columns = np.mgrid[: VOLUME[1], : VOLUME[2]] - VOLUME[1] / 2.0
    radius, beside = np.hypot(rows - shift, columns), np.hypot(rows, columns + 40)
    labels = np.where(radius < 18, 1, np.where(radius < 26, 2, np.where(beside < 18, 3, 0)))
    return np.repeat(labels[None].astype(np.uint8), VOLUME[0], axis=0)


def _timed(work: Callable[[], object], threads: int) -> float:
    """Seconds of the second call of `work`, with this number of torch threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / HOUR:.1f} hours"
