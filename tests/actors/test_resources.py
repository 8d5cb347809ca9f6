from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.resources import Cluster, ResourceConfig, plan
from storage.errors import InputError


@given(st.integers(1, 64), st.integers(0, 8), st.integers(1, 10), st.integers(1, 4))
def test_a_plan_never_books_more_than_the_cluster_has(cpus: int, gpus: int, jobs: int, workers: int) -> None:
    try:
        budget = plan(ResourceConfig(train_workers=workers), Cluster(cpus, gpus, cpus), jobs)
    except InputError as error:
        assert "CPUs" in str(error)
        return
    trainers = budget.lanes * budget.train_workers
    assert trainers * (budget.trainer_cpus + budget.data_actors * budget.data_cpus) <= cpus
    assert trainers * budget.trainer_gpus <= gpus
    assert budget.extract_actors * budget.extract_cpus <= cpus
    assert budget.lanes <= jobs


def test_two_cores_train_two_arms_of_one_thread_or_one_of_two() -> None:
    many, alone = (plan(ResourceConfig(), Cluster(2, 0, 2), jobs) for jobs in (5, 1))
    assert (many.lanes, many.threads) == (2, 1)
    assert (alone.lanes, alone.threads) == (1, 2)


def test_a_trainer_never_books_more_than_one_node_has() -> None:
    budget = plan(ResourceConfig(), Cluster(48, 0, 8), 1)
    assert budget.trainer_cpus <= 8
    assert budget.threads <= 8


def test_what_does_not_fit_is_refused_at_once_with_the_shortfall() -> None:
    with pytest.raises(InputError, match="4 GPUs asked for, 1 in the cluster"):
        plan(ResourceConfig(gpus=True, train_workers=4), Cluster(8, 1, 8))
    with pytest.raises(InputError, match=r"need 4 CPUs, 2 in the cluster"):
        plan(ResourceConfig(train_workers=8, lanes=1), Cluster(2, 0, 2))
