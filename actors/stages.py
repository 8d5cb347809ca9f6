"""Run training jobs side by side, one in each lane of the budget. Each job is trained, then evaluated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.evaluate_arm import CASES, SCORING, evaluate_job
from actors.ray_internals import any_placed
from actors.resources import ResourcePlan
from actors.train_job import FAILED, WAITING, TrainJob
from actors.trainer import run_job
from actors.waiting import Patience, Wait
from storage import fs
from storage.errors import FinalError, InputError, StageError, one_line
from storage.lease import fences, under


@dataclass(frozen=True)
class ArmRun:
    """A training job as an arm of an ablation. `seed` is the number of the replicate."""

    arm: str
    seed: int
    job: TrainJob

    @property
    def label(self) -> str:
        """Arm and replicate, such as `unet_ra/seed0`."""
        return f"{self.arm}/seed{self.seed}"

    def failure(self) -> str | None:
        """Why the last try failed. None if it did not fail, or if a later try was evaluated."""
        path = fs.join(self.job.out, FAILED)
        return None if self.evaluated() or not fs.exists(path) else str(json.loads(fs.read_text(path))["reason"])

    def evaluated(self) -> bool:
        """Whether the job was trained with this configuration, and scored since."""
        return self.job.finished() and fs.exists(fs.join(self.job.out, CASES))


def _train_and_evaluate(run: ArmRun, budget: ResourcePlan) -> None:
    """What a lane runs. It first removes the results of another configuration: the scores before the weights, so that
    no scores are left without the weights that they came from."""
    out = run.job.out
    if not run.job.finished():
        for name in (CASES, FAILED, SCORING):
            fs.remove(fs.join(out, name))
        run_job(run.job, budget)
    if not fs.exists(fs.join(out, CASES)):
        evaluate([run], budget)


def run_arms(
    runs: Sequence[ArmRun],
    budget: ResourcePlan,
    on_tick: Callable[[list[str]], None],
    tick_s: float = 1.0,
    body: Callable[[ArmRun, ResourcePlan], None] = _train_and_evaluate,
) -> dict[str, str]:
    """Train and evaluate all runs that are not evaluated yet, the costliest first. Returns {label: reason} of those
    that failed.

    One failing arm does not stop the others. It is tried again `budget.arm_retries` times, at once and from its last
    checkpoint, unless another try would fail in the same way: bad input, a loss that is not finite, too little memory.
    `on_tick` is called about every `tick_s` seconds with the labels that are running. `body` is what a lane runs.
    Raises FinalError if no node has had room for a lane's process for too long.
    """
    import ray

    lane = ray.remote(num_cpus=0, num_gpus=0, max_retries=2)(under)
    queue = sorted((r for r in runs if not r.evaluated()), key=_cost, reverse=True)
    running: dict[Any, ArmRun] = {}
    tries: Counter[str] = Counter()
    failed: dict[str, str] = {}
    patience = Patience(budget.wait_minutes, lambda line: next(iter(running.values())).job.say_waiting(line))
    wait = Wait(patience, "train", "a process for an arm")
    while queue or running:
        while queue and len(running) < budget.lanes:
            run = queue.pop(0)
            tries[run.label] += 1
            fs.remove(fs.join(run.job.out, WAITING))
            running[lane.options(name=run.label).remote(fences(), body, run, budget)] = run
        for reference in _finished(running, wait, tick_s):
            run = running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # any failure of one arm is reported, and the others go on
                if tries[run.label] <= budget.arm_retries and not _is_final(error):
                    queue.insert(0, run)
                    continue
                again = f" (in {tries[run.label]} tries)" if tries[run.label] > 1 else ""
                failed[run.label] = one_line(error, last=True) + again
                fs.write_text(fs.join(run.job.out, FAILED), json.dumps({"reason": failed[run.label]}))
        on_tick([r.label for r in running.values()])
    return failed


def _finished(running: Mapping[Any, ArmRun], wait: Wait, tick_s: float) -> list[Any]:
    """The references that have finished, after at most `tick_s` seconds. Raises FinalError as `wait` does."""
    import ray

    finished, _ = ray.wait(list(running), timeout=tick_s)
    if finished:
        wait.over()
    else:
        wait.check(lambda: any_placed(dict.fromkeys(running)))
    return list(finished)


def _is_final(error: BaseException) -> bool:
    """Whether another try would fail in the same way."""
    return isinstance(getattr(error, "cause", None) or error, (InputError, FinalError))


def _cost(run: ArmRun) -> float:
    """A rough cost of one step, by which the costliest arm starts first."""
    stream = run.job.stream
    share = 1.0 + (stream.plan.unlabelled_ratio if stream.semi_supervised else 0.0)
    is_sdnet = hasattr(run.job.network, "anatomy_width")
    return share * (1.5 if is_sdnet else 1.0) + 0.2 * stream.fa


def pretrain(job: TrainJob, budget: ResourcePlan, on_tick: Callable[[list[str]], None], tick_s: float = 1.0) -> None:
    """Train the SDNet that fills the bank, unless that is done. It runs an arm's loop and is not evaluated.

    Raises StageError with the reason.
    """
    import ray

    if job.finished():
        return
    fs.remove(fs.join(job.out, WAITING))
    wait = Wait(Patience(budget.wait_minutes, job.say_waiting), "pretrain", "a process for the training")
    reference = ray.remote(num_cpus=0, max_retries=2)(under).remote(fences(), run_job, job, budget)
    while not ray.wait([reference], timeout=tick_s)[0]:
        wait.check(lambda: any_placed({reference: None}))
        on_tick(["pretrain"])
    try:
        ray.get(reference)
    except Exception as error:
        raise StageError(f"pretrain: {one_line(error, last=True)}") from error
    on_tick([])


def evaluate(
    runs: Sequence[ArmRun],
    budget: ResourcePlan,
    on_tick: Callable[[], None] = lambda: None,
    say: Callable[[str], None] | None = None,
    tick_s: float = 1.0,
) -> dict[str, int]:
    """Score trained arms, and replace their `cases.csv`. Returns {label: volumes scored}.

    As many run side by side as there are lanes. A task books as much as one train worker; its arm's own train workers
    have ended. `on_tick` is called about every `tick_s` seconds. While there is no room, `say` is given a line. Raises
    FinalError if no node has had room for too long. What a scoring raises is raised once those under way have ended.
    """
    import ray

    task = ray.remote(num_cpus=budget.trainer_cpus, num_gpus=budget.trainer_gpus, max_retries=2)(under)
    need = {"CPU": budget.trainer_cpus, "GPU": budget.trainer_gpus}
    queue = list(runs)
    running: dict[Any, ArmRun] = {}
    volumes: dict[str, int] = {}
    failed: Exception | None = None
    wait = Wait(Patience(budget.wait_minutes, say or runs[0].job.say_waiting), "score", "its scoring", need)
    while running or (queue and failed is None):
        while queue and failed is None and len(running) < budget.lanes:
            run = queue.pop(0)
            what = (run.job.stream.run, run.job.out, run.arm, run.seed, budget.threads, run.job.train.precision)
            running[task.remote(fences(), evaluate_job, *what)] = run
        try:
            finished = _finished(running, wait, tick_s)
        except FinalError:
            for reference in running:  # they wait, and would run as soon as there is room
                ray.cancel(reference)
            raise
        for reference in finished:
            run = running.pop(reference)
            try:
                volumes[run.label] = int(ray.get(reference))
            except Exception as error:  # raised once the others have ended
                failed = failed or error
        on_tick()
    if failed is not None:
        raise failed
    return {run.label: volumes[run.label] for run in runs}
