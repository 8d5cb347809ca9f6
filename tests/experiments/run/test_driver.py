"""What the driver tells while arms are under way."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from actors.train_job import WAITING
from experiments.config import demo
from experiments.progress import Progress, ProgressBar
from experiments.run.driver import Ablation
from storage import fs
from tests.actors.test_trainer import training


def test_what_an_arm_waits_for_is_told_once_a_wait(tmp_path: Path) -> None:
    out, line = io.StringIO(), "score: waiting 1 minute for 1 CPU for its scoring; the cluster has 4 CPUs, 0 free"
    console = Console(file=out)
    driver, bar = Ablation(str(tmp_path), demo(), Progress(console)), ProgressBar(None, console, "a/seed0")
    job = training("-", tmp_path / "a")
    for _ in range(2):  # it is tried again, and waits again
        job.say_waiting(line)
        for _ in range(3):
            driver._follow("a", 0, job, bar)
        fs.remove(fs.join(job.out, WAITING))
        driver._follow("a", 0, job, bar)
    assert out.getvalue() == 2 * f"a/seed0, {line}\n"
