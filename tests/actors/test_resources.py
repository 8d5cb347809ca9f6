from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.resources import ResourceConfig, plan
from storage.errors import InputError


@given(st.integers(1, 64), st.integers(0, 8), st.integers(1, 10), st.integers(1, 4))
def test_a_plan_never_books_more_than_the_cluster_has(cpus: int, gpus: int, jobs: int, workers: int) -> None:
    try:
        budget = plan(ResourceConfig(train_workers=workers), cpus, gpus, jobs)
    except InputError as error:
        assert "CPUs" in str(error)
        return
    trainers = budget.lanes * budget.train_workers
    assert trainers * (budget.trainer_cpus + budget.data_actors * budget.data_cpus) <= cpus
    assert trainers * budget.trainer_gpus <= gpus
    assert budget.extract_actors * budget.extract_cpus <= cpus
    assert budget.lanes <= jobs


def test_two_cores_train_two_arms_of_one_thread_or_one_of_two() -> None:
    assert (plan(ResourceConfig(), 2, 0, 5).lanes, plan(ResourceConfig(), 2, 0, 5).threads) == (2, 1)
    assert (plan(ResourceConfig(), 2, 0, 1).lanes, plan(ResourceConfig(), 2, 0, 1).threads) == (1, 2)


def test_what_does_not_fit_is_refused_at_once_with_the_shortfall() -> None:
    with pytest.raises(InputError, match="4 GPUs asked for, 1 in the cluster"):
        plan(ResourceConfig(gpus=True, train_workers=4), 8, 1)
    with pytest.raises(InputError, match=r"need 4 CPUs, 2 in the cluster"):
        plan(ResourceConfig(train_workers=8, lanes=1), 2, 0)
