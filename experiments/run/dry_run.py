"""`ablate --dry-run`: on what, which stages, how long, how much disk; and the check of the disk before real work.

Time and disk are estimates. A step of each kind of network is timed here and now, or taken from the run's own history;
disk is by the bytes a pixel and a weight that finished runs took (see the constants).
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable
from pathlib import Path

from actors.resources import Cluster, ResourcePlan, inside_cluster, local_cluster, plan, start_ray
from actors.train_job import read_history
from experiments.config import Settings
from experiments.run import jobs
from experiments.run.workload import Training, Workload, workload
from pipeline.scores.compare_arms import ALPHA, FEWEST_SEEDS, FEWEST_SUBJECTS, WHOLE_SHARE, trainings
from pipeline.scores.power import POWER, SEED_SDS, SUBJECT_SDS, usually_detectable
from storage import fs
from storage.errors import InputError

# Bytes, seen on the phantom, ACDC and Sunnybrook (2026-11-25), rounded up.
SLICE_BYTES_A_PIXEL = 1.1  # image and mask in the slice store, 0.99 to 1.08
PHANTOM_BYTES_A_PIXEL = 1.2  # of the NIfTI files that the demo draws
BANK_BYTES_A_PIXEL = 0.25  # working grid; 0.09 of a trained SDNet, 0.2 of one that has hardly begun
WEIGHTS_STORED = 9.5  # copies of its weights in a network's folder (checkpoint, best, last) and in MLflow; 8.4 seen
NETWORK_BYTES = 2e6  # scores, examples and metrics of a network
REPORT_BYTES = 10e6  # and MLflow's database

START_S = 15.0  # Ray Train's start-up of a network, about
GB = 1e9


def show(run: str, settings: Settings, say: Callable[[str], None]) -> None:
    """Say, line by line, what `ablate` would do with these settings. Writes nothing and starts no Ray; inside a cluster
    it asks that one. Raises InputError for what `ablate` would refuse."""
    cluster = start_ray() if inside_cluster() else local_cluster()
    work = workload(run, settings)
    if work.contents.known:
        jobs.require_trainable(run, settings)
        jobs.check_pretrained(run, settings)
    todo = [arm for arm in work.arms if arm.state != "done"]
    budget = plan(settings.resources, cluster, max(1, len(todo)))
    say(f"resources: {cluster}")
    for line in budget.describe().splitlines():
        say(f"  {line}")
    say("stages:")
    width = max(len(name) for name, _ in work.stages)
    for name, state in work.stages:
        say(f"  {name:{width}}  {state}")
    say(_time(work, settings, cluster, budget))
    say(_power(settings.seeds, work.contents.tested))
    needed, free = storage_needed(settings, work), _free(run)
    parts = ", ".join(f"{name} {_size(size)}" for name, size in needed.items() if size)
    say(f"storage: {_size(sum(needed.values()))} more ({parts}). An estimate by the bytes of earlier runs")
    if free is not None:
        say(f"  {_size(free)} are free where {fs.base_name(run)} lies")
        _enough(run, sum(needed.values()), free)


def require_space(run: str, settings: Settings) -> None:
    """Raises InputError, with the shortfall, if a local run's disk has less room than the run is going to take."""
    free = _free(run)
    if free is None:
        return
    try:
        work = workload(run, settings)
    except InputError:  # ingest may mend it; else the stage that it concerns says so
        return
    _enough(run, sum(storage_needed(settings, work).values()), free)


def storage_needed(settings: Settings, work: Workload) -> dict[str, float]:
    """Bytes that are still to be written, by what for."""
    seen = work.contents
    shrink = settings.preprocess.factor**2
    share = work.bank_slices / seen.train if seen.train else 0.0
    trained = [t for t in (work.pretrain, *work.arms) if t is not None and t.steps]
    return {
        "phantom": seen.drawn * seen.pixels / max(1, seen.slices) * PHANTOM_BYTES_A_PIXEL,
        "slices": 0.0 if seen.known else seen.pixels * SLICE_BYTES_A_PIXEL,
        "bank": share * seen.train_pixels * shrink * BANK_BYTES_A_PIXEL,
        "networks": sum(_weights(t) * WEIGHTS_STORED + NETWORK_BYTES for t in trained),
        "report": REPORT_BYTES,
    }


def _weights(training: Training) -> float:
    """Bytes of the network's weights; nothing is allocated."""
    import torch

    from pipeline.networks.files import build

    with torch.device("meta"):
        model = build(training.network)
    return float(sum(t.numel() * t.element_size() for t in model.state_dict().values()))


def _free(run: str) -> int | None:
    """Bytes free on the disk that a local run lies on, or would."""
    if not fs.is_local(run):
        return None
    folder = Path(fs.local_path(run)).absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def _enough(run: str, needed: float, free: float) -> None:
    if needed > free:
        raise InputError(
            fs.base_name(run),
            f"needs about {_size(needed)} more and its disk has {_size(free)} free, {_size(needed - free)} too few",
            "free some, or choose --run on another disk",
        )


def _time(work: Workload, settings: Settings, cluster: Cluster, budget: ResourcePlan) -> str:
    """One line on how long training takes: the pretraining, then the arms in their lanes."""
    import torch

    if budget.trainer_gpus and not torch.cuda.is_available():
        return "time: not estimated, training would be on GPUs and this machine has none to time a step on"
    timed: dict[str, float] = {}

    def seconds(training: Training, threads: int) -> float:
        if not training.steps:
            return 0.0
        kind = f"{training.network!r}{training.loss!r}{training.train!r}{training.arm!r}{threads}"
        if kind not in timed:
            timed[kind] = _step(training, settings, threads)
        return timed[kind] * training.steps / budget.train_workers + START_S

    alone = plan(settings.resources, cluster, 1)
    first = seconds(work.pretrain, alone.threads) if work.pretrain else 0.0
    total = first + _in_lanes(work.arms, budget.lanes, lambda arm: seconds(arm, budget.threads))
    if not total:
        return "time: nothing is left to train"
    took = f"{total / 60:.0f} minutes" if total < 5400 else f"{total / 3600:.1f} hours"
    return (
        f"time: about {took} of training. An estimate: a step of each kind of network timed here just now or in this "
        f"run, {START_S:.0f} s a network to start; ingest, extraction, evaluation and the report come on top"
    )


def _power(seeds: int, subjects: int) -> str:
    """One line on what the comparison of two arms will be able to show."""
    enough = max(seeds, FEWEST_SEEDS)
    low, high = usually_detectable(enough, subjects, WHOLE_SHARE * ALPHA)
    if subjects < FEWEST_SUBJECTS:
        return f"power: test subjects with masks: {subjects}; fewer than {FEWEST_SUBJECTS} are not tested"
    few = f"{trainings(seeds)}, no verdict; " if trainings(seeds) else ""
    return (
        f"power: {few}{enough} seeds and {subjects} test subjects show a difference of {low:.3f} to {high:.3f} "
        f"mean Dice in {POWER:.0%} of such runs. An estimate: one arm's seeds {SEED_SDS[0]} to {SEED_SDS[1]} apart and "
        f"subjects' differences {SUBJECT_SDS[0]} to {SUBJECT_SDS[1]} (standard deviations), as on real patients"
    )


def _in_lanes(arms: list[Training], lanes: int, seconds: Callable[[Training], float]) -> float:
    """When the last lane ends, the longest arms first."""
    ends = [0.0] * lanes
    for took in sorted(map(seconds, arms), reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + took)
    return max(ends)


def _step(training: Training, settings: Settings, threads: int) -> float:
    """Seconds a step: of the job's own last epoch if it has one, else timed."""
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


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
