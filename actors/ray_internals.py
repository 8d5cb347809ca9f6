"""The one file that imports what Ray keeps private, where Ray has no public name for it.

`tests/actors/test_ray_internals.py` fails when a new version of Ray moves one of them.
"""

from __future__ import annotations


def machine_cpus() -> int:
    """CPUs that `ray.init` would find on this machine, a container's limit included; Ray need not run."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def machine_gpus() -> int:
    """GPUs that `ray.init` would find on this machine; Ray need not run."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    return int(manager.get_current_node_num_accelerators()) if manager is not None else 0


def is_train_error(error: BaseException) -> bool:
    """Whether Ray Train itself failed, rather than the code that it ran."""
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(error, RayTrainError)


def waited_for_a_node(error: BaseException | None) -> bool:
    """Whether Ray Train gave up since no node had room for its workers."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)
