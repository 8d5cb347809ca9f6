"""What ends an arm for good, through everything that an arm runs in: its lane, Ray Train and the makers of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors import stages
from actors.resources import ResourcePlan
from pipeline.samples.maker import SampleMaker
from storage.errors import FinalError
from tests.actors.test_streaming import dying
from tests.actors.test_trainer import PLAN, training, write_run


def lane_with(maker: type) -> Callable[[stages.ArmRun, ResourcePlan], None]:
    """A lane whose train workers make their samples by `maker`."""

    def loop(settings: dict[str, object]) -> None:
        from actors import streaming, train_worker

        train_worker.batches = functools.partial(streaming.batches, maker=maker)
        train_worker.train_loop(settings)

    def lane(arm: stages.ArmRun, budget: ResourcePlan) -> None:
        from actors import train_worker, trainer

        train_worker.train_loop = loop  # in this process alone, which hands it to Ray Train
        trainer.run_job(arm.job, budget)

    return lane


@pytest.mark.slow
def test_a_slice_that_ends_every_maker_ends_its_arm_by_name_and_at_the_first_try(
    ray_local: None, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "marks").mkdir()
    job = training(write_run(tmp_path / "data"), tmp_path / "arm", sdnet=False)
    maker = SampleMaker(job.stream)
    at = maker.plan.labelled(3).slice_id
    where = "slice {} of frame {} of subject {}".format(
        *(maker.store.column(name)[at] for name in ("slice", "frame", "subject"))
    )
    arm = stages.ArmRun("unet_ra", 0, job)
    lane = lane_with(dying(at, 10**6, tmp_path / "marks"))
    failed = stages.run_arms([arm], replace(PLAN, arm_retries=1), lambda _: None, body=lane)
    reason = failed["unet_ra/seed0"]
    assert reason.startswith(f"{where} ended 3 makers of samples; leave the subject out") and " tries)" not in reason
    assert arm.failure() == reason
    assert len(list((tmp_path / "marks").iterdir())) <= 7  # one beside others, three with their block, three alone


@pytest.mark.slow
def test_scoring_that_no_node_has_room_for_is_given_up(no_room: None, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    arm = stages.ArmRun("unet_ra", 0, training(write_run(tmp_path / "data"), tmp_path / "arm"))
    lines: list[str] = []
    with pytest.raises(FinalError, match=r"^score: waited .* for 0\.5 CPUs for its scoring; "):
        stages.evaluate([arm], replace(PLAN, wait_minutes=0.05), say=lines.append)
    assert lines
