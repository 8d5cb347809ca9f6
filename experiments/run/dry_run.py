"""`ablate --dry-run`: which stages would run, on what, and at what cost. `require_fits` refuses before work begins.

Time and memory are estimates of `experiments.run.cost`. Disk space is estimated from the bytes per pixel and per weight
that finished runs took (the constants below).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from actors.cuda_build import cuda_is_missing, has_cuda
from actors.ray_start import inside_cluster, local_cluster, start_ray
from actors.resources import ResourcePlan, plan
from experiments.config import Settings
from experiments.run import jobs
from experiments.run.cost import cost_lines, slow_precision
from experiments.run.workload import Training, Workload, require_enough, require_none_skipped, workload
from experiments.tracking.store import require_answer
from pipeline.scores.compare_arms import ALPHA, FEWEST_SEEDS, FEWEST_SUBJECTS, WHOLE_SHARE, trainings
from pipeline.scores.power import POWER, SEED_SDS, SUBJECT_SDS, usually_detectable
from storage import fs
from storage.errors import InputError

# Bytes, measured on the phantom, ACDC and Sunnybrook (2026-11-25) and rounded up.
SLICE_BYTES_A_PIXEL = 1.1  # image and mask in the slice store, 0.99 to 1.08
PHANTOM_BYTES_A_PIXEL = 1.2  # NIfTI files of the phantom that the demo draws
BANK_BYTES_A_PIXEL = 0.25  # of the working grid; 0.09 with a trained SDNet, 0.2 with one that has hardly begun
WEIGHTS_STORED = 9.5  # copies of the weights in a network's folder (checkpoint, best, last) and in MLflow; 8.4 measured
NETWORK_BYTES = 2e6  # for the scores, examples and metrics of a network
REPORT_BYTES = 10e6  # for the report and MLflow's database

GB = 1e9


def show(run: str, settings: Settings, say: Callable[[str], None], strict: bool = False) -> None:
    """Say, line by line, what `ablate` would do with these settings.

    Leaves nothing behind and starts no Ray; inside a cluster it connects to that cluster. Raises InputError for what
    `ablate` would refuse; with `strict`, also for a subject that would be skipped, as far as listings and headers can
    tell.
    """
    cluster = start_ray() if inside_cluster() else local_cluster()
    work = workload(run, settings)
    if strict:
        require_none_skipped(settings, work.contents)
    if work.contents.known:
        jobs.require_trainable(run, settings)
        jobs.require_bank_without_other_masks(run, settings)
    else:
        require_enough(run, settings, work.contents)
    todo = [arm for arm in work.arms if arm.state != "done"]
    budget = plan(settings.resources, cluster, max(1, len(todo)))
    if not inside_cluster():
        _require_cuda(work, budget)
    _require_log(run, work)
    say(f"resources: {cluster}")
    for line in budget.describe().splitlines():
        say(f"  {line}")
    say("stages:")
    width = max(len(name) for name, _ in work.stages)
    for name, state in work.stages:
        say(f"  {name:{width}}  {state}")
    for line in cost_lines(work, settings, cluster, budget):
        say(line)
    trained = {"pretrain": [work.pretrain] if work.pretrain else [], "train": todo}
    slow = slow_precision(settings, budget, [name for name, some in trained.items() if any(t.steps for t in some)])
    if slow is not None:
        say(slow)
    say(_power(settings.seeds, work.contents.tested))
    needed, free = storage_needed(settings, work), _free(run)
    parts = ", ".join(f"{name} {_size(size)}" for name, size in needed.items() if size)
    say(f"storage: {_size(sum(needed.values()))} more ({parts}). An estimate by the bytes of earlier runs")
    if free is not None:
        say(f"  {_size(free)} are free where {fs.base_name(run)} lies")
        _enough(run, sum(needed.values()), free)


def require_fits(run: str, settings: Settings) -> None:
    """Refuse, before anything starts, a run that could not end.

    Raises InputError if the data that its studies' headers promise are not enough for the arms, as `require_enough`
    does; if this machine has no room for the actors, or has GPUs that its torch cannot use; or, with the shortfall, if
    the disk of a local run has less room than the run is going to need.
    """
    try:
        work = workload(run, settings)
    except InputError:  # ingest may mend it; otherwise the stage concerned raises it
        return
    if not inside_cluster():
        budget = plan(settings.resources, local_cluster(), max(1, sum(arm.state != "done" for arm in work.arms)))
        _require_cuda(work, budget)
    if not work.contents.known:
        require_enough(run, settings, work.contents)
    _require_log(run, work)
    free = _free(run)
    if free is not None:
        _enough(run, sum(storage_needed(settings, work).values()), free)


def _require_cuda(work: Workload, budget: ResourcePlan) -> None:
    """Raises InputError if something is to be trained on GPUs of this machine, and its torch cannot use them."""
    trains = any(training.steps for training in (work.pretrain, *work.arms) if training is not None)
    if trains and budget.trainer_gpus and not has_cuda():
        raise cuda_is_missing()


def _require_log(run: str, work: Workload) -> None:
    """Raises InputError if something is to be trained or scored, and MLflow cannot take it."""
    if any(training.state != "done" for training in (work.pretrain, *work.arms) if training is not None):
        require_answer(run)


def storage_needed(settings: Settings, work: Workload) -> dict[str, float]:
    """Bytes that are still to be written, by purpose."""
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
    """Bytes of the network's weights. They are not allocated."""
    import torch

    from pipeline.networks.files import build

    with torch.device("meta"):
        model = build(training.network)
    return float(sum(t.numel() * t.element_size() for t in model.state_dict().values()))


def _free(run: str) -> int | None:
    """Free bytes on the disk of a local run, which need not exist yet. None for a run in an object store."""
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


def _power(seeds: int, subjects: int) -> str:
    """One line on how small a difference between two arms this comparison can show."""
    enough = max(seeds, FEWEST_SEEDS)
    low, high = usually_detectable(enough, subjects, WHOLE_SHARE * ALPHA)
    few = f"{trainings(seeds)}, no verdict; " if trainings(seeds) else ""
    if subjects < FEWEST_SUBJECTS:
        return f"power: {few}test subjects with masks: {subjects}, fewer than {FEWEST_SUBJECTS} are not tested"
    return (
        f"power: {few}{enough} seeds and {subjects} test subjects show a difference of {low:.3f} to {high:.3f} "
        f"mean Dice in {POWER:.0%} of such runs. An estimate: one arm's seeds {SEED_SDS[0]} to {SEED_SDS[1]} apart and "
        f"subjects' differences {SUBJECT_SDS[0]} to {SUBJECT_SDS[1]} (standard deviations), as on real patients"
    )


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"
