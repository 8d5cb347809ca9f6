"""Lanes on a real Ray: what is tried again, what is not, and what becomes of the others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors import stages
from actors.resources import Cluster, Node, ResourceConfig, ResourcePlan, plan
from actors.stages import ArmRun, run_arms
from storage.errors import FinalError, InputError, StageError
from tests.actors.test_trainer import PLAN, training


@pytest.fixture
def arms(tmp_path: Path) -> list[ArmRun]:
    return [ArmRun(name, 0, training("-", tmp_path / name)) for name in ("a", "b", "c")]


def failing(error: Exception | None, times: int, tries: Path) -> Callable[[ArmRun, ResourcePlan], None]:
    """What a lane runs: arm "b" fails so many times; each try leaves a mark."""

    def body(run: ArmRun, plan: ResourcePlan) -> None:
        with (tries / f"{run.arm}.tries").open("a") as file:
            file.write("x")
        if run.arm == "b" and len((tries / "b.tries").read_text()) <= times:
            raise error or RuntimeError("first line\nlast line")

    return body


@pytest.mark.parametrize(
    ("error", "times", "retries", "tries", "reason"),
    [
        (StageError("a worker died"), 1, 1, 2, None),
        (None, 1, 1, 2, None),
        (StageError("a worker died"), 9, 1, 2, "a worker died (in 2 tries)"),
        (None, 9, 2, 3, "last line (in 3 tries)"),
        (StageError("a worker died"), 9, 0, 1, "a worker died"),
        (
            InputError("slices.parquet", "is damaged", "ingest again"),
            1,
            1,
            1,
            "slices.parquet: is damaged; ingest again",
        ),
        (FinalError("the loss is not finite"), 1, 1, 1, "the loss is not finite"),
    ],
)
def test_a_failing_arm_is_tried_again_unless_that_is_hopeless_and_the_others_go_on(
    ray_local: None,
    tmp_path: Path,
    arms: list[ArmRun],
    error: Exception | None,
    times: int,
    retries: int,
    tries: int,
    reason: str | None,
) -> None:
    plan = replace(PLAN, arm_retries=retries)
    failed = run_arms(arms, plan, lambda _: None, body=failing(error, times, tmp_path))
    assert failed == ({} if reason is None else {"b/seed0": reason})
    assert {arm: len((tmp_path / f"{arm}.tries").read_text()) for arm in "abc"} == {"a": 1, "b": tries, "c": 1}
    kept = tmp_path / "b" / "failed.json"
    assert kept.exists() == (reason is not None)
    assert reason is None or json.loads(kept.read_text()) == {"reason": reason}


def test_scorings_run_side_by_side_and_those_under_way_end_before_one_that_failed_is_told(
    ray_local: None, tmp_path: Path, arms: list[ArmRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = str(tmp_path)

    def scoring(run: str, out: str, arm: str, *_: object) -> int:
        (Path(marks) / f"{arm}.began").touch()
        until = time.monotonic() + 60
        while not all((Path(marks) / f"{one}.began").exists() for one in "ab") and time.monotonic() < until:
            time.sleep(0.05)  # each waits for the other
        if arm == "a":
            raise InputError("slices.parquet", "is damaged", "ingest again")
        time.sleep(1.0)
        (Path(marks) / f"{arm}.ended").touch()
        return 7

    monkeypatch.setattr(stages, "evaluate_job", scoring)
    budget = replace(PLAN, lanes=2, trainer_cpus=0.5)
    with pytest.raises(InputError, match="is damaged; ingest again"):
        stages.evaluate(arms, budget)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.began", "b.began", "b.ended"]  # c never began
    assert stages.evaluate(arms[1:2], budget) == {"b/seed0": 7}


def test_once_is_the_default() -> None:
    assert plan(ResourceConfig(), Cluster((Node(2),))).arm_retries == 1
    assert plan(ResourceConfig(arm_retries=3), Cluster((Node(2),))).arm_retries == 3
