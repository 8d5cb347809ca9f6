"""What Ray keeps private and we need: is it still where `actors.ray_internals` looks, and does it say what Ray says?"""

from __future__ import annotations

import pytest

from actors.ray_internals import is_train_error, machine_cpus, machine_gpus, waited_for_a_node


def test_the_machine_is_what_ray_finds_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_cpus() >= 1 and machine_gpus() == 0


def test_errors_of_ray_train_are_told_from_others() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    error = WorkerGroupStartupTimeoutError(2)
    assert waited_for_a_node(error) and is_train_error(error)
    assert not waited_for_a_node(RuntimeError()) and not is_train_error(RuntimeError()) and not waited_for_a_node(None)
