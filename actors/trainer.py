"""Run the training loop in Ray Train. Dead workers are started again; errors that would only come again are raised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from actors.cuda_build import cuda_is_missing, has_cuda
from actors.ray_internals import is_train_error, waited_for_a_node
from actors.resources import ResourcePlan
from actors.train_job import DONE, TrainJob, WorkerBudget, read_history
from actors.waiting import Patience, Wait
from pipeline.training.errors import NonFiniteLossError, OutOfMemoryError
from storage import fs
from storage.errors import FinalError, InputError, StageError, one_line
from storage.lease import fences

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

ANSWER_S = 60.0  # for a node to say which build of torch it has
MAX_DEATHS = 3  # of workers in a row, without a new epoch in between


def run_job(job: TrainJob, budget: ResourcePlan) -> None:
    """Train a job to its end. If workers die, they are started again, as long as a new epoch ends in between.

    Raises FinalError if the loss is not finite, memory runs out, or no node has room; StageError if the loop itself
    fails, or workers die `MAX_DEATHS` times in a row without a new epoch; InputError if torch cannot use GPUs where
    the cluster has them, or the loop met bad input.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    if budget.trainer_gpus:
        _require_cuda()
    fs.remove(fs.join(job.out, DONE))
    need = {"CPU": budget.trainer_cpus * budget.train_workers, "GPU": budget.trainer_gpus * budget.train_workers}
    wait = Wait(Patience(budget.wait_minutes, job.say_waiting), "train", "its train workers", need)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{max(wait.look_s, 10.0)}"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how late Ray may notice that a training ended
    deaths, reached = 0, -1
    while True:
        try:
            with TemporaryDirectory() as scratch:
                _trainer(job, budget, scratch).fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            if job.finished():  # a worker died after its work was done
                return
            if waited_for_a_node(getattr(error, "controller_failure", None)):
                wait.check(lambda: False)  # the machine that replaces a lost one is not there yet
                continue
            wait.over()
            errors = list(getattr(error, "worker_failures", {}).values()) or [error]
            _raise_ours(job, budget, errors)
            epoch = len(read_history(job))
            deaths = deaths + 1 if epoch == reached else 1
            reached = epoch
            if deaths == MAX_DEATHS:
                raise StageError(
                    f"a training worker died {deaths} times in a row after epoch {epoch} of {job.train.epochs}: "
                    f"{one_line(errors[0], last=True)}; the same command goes on from there; if memory ran out, lower "
                    "train.batch_size or resources.lanes first"
                ) from error


def _require_cuda(has_cuda: Callable[[], bool] = has_cuda) -> None:
    """Raises InputError if torch is a build without CUDA here and on some node that has GPUs.

    This process may be on a node without GPUs, which may have torch's smaller build.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if has_cuda():
        return
    with_gpus = [str(n["NodeID"]) for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
    task: Any = ray.remote(num_cpus=0)(has_cuda)
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in with_gpus]
    asked = [task.options(scheduling_strategy=strategy).remote() for strategy in there]
    try:
        usable = all(ray.get(asked, timeout=ANSWER_S))  # if no such node is there now, the training waits for one
    except (RayError, GetTimeoutError):  # a node that is lost or too busy to answer: the training itself will tell
        for question in asked:
            ray.cancel(question)
        return
    if not usable:
        raise cuda_is_missing()


def _raise_ours(job: TrainJob, budget: ResourcePlan, errors: Iterable[Exception]) -> None:
    """Raise an error that another try would only repeat. Returns if workers only died.

    With several workers, an unknown error of the loop is not raised: a worker that lost its peer fails with one.
    """
    from ray.exceptions import RayError, RayTaskError

    for error in sorted(errors, key=_says_least):
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, (InputError, FinalError)):
            raise cause
        lost = isinstance(error, (RayError, StageError, OSError)) or is_train_error(error)
        lost = lost and not isinstance(error, RayTaskError)
        if isinstance(cause, (NonFiniteLossError, OutOfMemoryError)):
            raise FinalError(one_line(cause, last=True)) from error
        if not lost and budget.train_workers == 1:
            raise StageError(one_line(cause, last=True)) from error


def _says_least(error: Exception) -> bool:
    """Whether a worker only shares the gradient of another one's slices, which that one's error names."""
    cause = getattr(error, "cause", None) or error
    return isinstance(cause, NonFiniteLossError) and not cause.own


def _trainer(job: TrainJob, budget: ResourcePlan, scratch: str) -> TorchTrainer:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    from actors.train_worker import train_loop

    resources = {"CPU": budget.trainer_cpus}
    if budget.trainer_gpus:
        resources["GPU"] = budget.trainer_gpus
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "fences": fences(),
            "job": job.model_dump(),
            "budget": WorkerBudget(
                threads=budget.threads,
                data_actors=budget.data_actors,
                data_cpus=budget.data_cpus,
                data_gpus=budget.data_gpus,
                stream_mb=budget.stream_mb,
                wait_minutes=budget.wait_minutes,
                compile=budget.compile,
                deterministic=budget.deterministic,
                gpus=budget.trainer_gpus,
            ).model_dump(),
        },
        scaling_config=ScalingConfig(
            num_workers=budget.train_workers, use_gpu=budget.trainer_gpus > 0, resources_per_worker=resources
        ),
        # Ray itself must not retry: it cannot tell a lost machine from a loss that is not finite, and it would go on
        # for ever if workers die while they start.
        run_config=RunConfig(
            name=job.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
