"""The only file that imports private names of Ray, where Ray has no public name for the same.

`tests/actors/test_ray_internals.py` fails when a new version of Ray moves one of these names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from storage.errors import one_line

log = logging.getLogger(__name__)


def machine_cpus() -> int:
    """CPUs that `ray.init` would find on this machine, within a container's limit. Ray need not run."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def machine_gpus() -> int:
    """GPUs that `ray.init` would find on this machine. Ray need not run."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    return int(manager.get_current_node_num_accelerators()) if manager is not None else 0


def noted_cluster() -> str:
    """host:port of the cluster that `RAY_ADDRESS=auto` means. Raises ConnectionError if there is none to be found."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def any_placed(calls: Mapping[Any, Any]) -> bool:
    """Whether Ray has found a node for any of these calls.

    A key is the reference of a call; the value is its actor, or None for a task. If Ray does not know a call, or its
    answer fails, the call counts as placed: a failed question must not end any work.
    """
    try:
        return _any_placed(calls)
    except Exception as error:
        log.warning("Ray does not say whether work has its place: %s", one_line(error))
        return True


def _any_placed(calls: Mapping[Any, Any]) -> bool:
    from ray._private import state

    actors = {actor for actor in calls.values() if actor is not None}
    if any(_actor_placed(state.actors(actor._actor_id.hex())) for actor in actors):
        return True
    tasks = {reference.task_id().binary() for reference, actor in calls.items() if actor is None}
    return bool(tasks) and not tasks <= _pending_tasks()


def _actor_placed(facts: dict[str, Any]) -> bool:
    return not facts or facts["State"] == "DEAD" or bool(facts["Address"]["IPAddress"])


def _pending_tasks() -> set[bytes]:
    """Ids of the tasks whose last attempt has no worker yet. Ray's public API for this needs a dashboard."""
    from ray._private.state import state
    from ray.core.generated import common_pb2

    statuses: Any = common_pb2
    last: dict[bytes, tuple[int, int]] = {}  # task id: (attempt, furthest state)
    for event in state._get_all_task_events():
        if event.HasField("state_updates") and event.attempt_number >= last.get(event.task_id, (-1, 0))[0]:
            last[event.task_id] = event.attempt_number, max(event.state_updates.state_ts_ns, default=0)
    return {task for task, (_, reached) in last.items() if reached < statuses.SUBMITTED_TO_WORKER}


def is_train_error(error: BaseException) -> bool:
    """Whether Ray Train itself failed, rather than the code that it ran."""
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(error, RayTrainError)


def waited_for_a_node(error: BaseException | None) -> bool:
    """Whether Ray Train gave up because no node had room for its workers."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)
