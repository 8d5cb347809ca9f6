"""The verb `export`: it writes samples of one arm's stream to disk."""

from __future__ import annotations

from typing import get_args

from experiments.arms import ARMS
from experiments.config import Settings
from experiments.progress import Progress
from experiments.run.jobs import arm_stream
from storage.errors import InputError


def write_samples(run: str, settings: Settings, out: str, kind: str, samples: int, arm: str) -> str:
    """Write samples of an arm's stream to `out`. Returns a line for the user. Starts Ray.

    Raises InputError for an unknown format or arm, and as `actors.export_samples.export` does.
    """
    from actors.export_samples import Format, export
    from actors.ray_start import start_ray
    from actors.resources import ResourceConfig, plan
    from actors.waiting import Patience

    if kind not in get_args(Format):
        raise InputError(f"--format {kind}", "there is no such format", f"choose from {', '.join(get_args(Format))}")
    if arm not in ARMS:
        raise InputError(f"--arm {arm}", "there is no such arm", f"choose from {', '.join(ARMS)}")
    progress = Progress()
    with progress.stage("start Ray"):
        cluster = start_ray()
    # Samples are made on CPUs, whatever else is there.
    asked = ResourceConfig(extract_actors=settings.resources.extract_actors, gpus=False)
    budget = plan(asked, cluster)
    with progress.stage("export") as step:
        count = export(
            arm_stream(run, settings, arm),
            out,
            kind,  # type: ignore[arg-type]
            samples,
            actors=budget.extract_actors,
            cpus=budget.extract_cpus,
            progress=step.update,
            patience=Patience(settings.resources.wait_minutes, progress.say),
        )
    return f"{count} samples in {out}"
