"""A whole run of as many slices as the paper's bank has, 47,000, against a tenth of them: seconds and memory by stage.

Every frame of phantom cines of 25 frames is ingested; then a pretraining of 200 steps, the bank, and an SS SDNet+RA+FA
arm of 200 steps with its scores, all with the `cpu` preset's networks. Every stage is a command of its own, from start
to exit. Memory is the highest sum of PSS of the command and all processes below it, pages of files left out (see
`benchmarks.memory`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.memory import proportional_bytes
from pipeline.phantom import PhantomConfig, write_phantom

PHANTOM = PhantomConfig(labelled_a=19, labelled_b=19, unlabelled_c=0, testing=2, frames=25)
SAMPLE_S = 0.25
SETTINGS = (
    "layouts.frames=all",
    "pretrain.epochs=1",
    "pretrain.steps_per_epoch=200",
    "train.epochs=1",
    "train.steps_per_epoch=200",
    "arms=[ss_sdnet_ra_fa]",
)


def run() -> dict[str, Any]:
    """Peak memory of the whole run in MB, at 47,000 slices over 4,700."""
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="cardiomix-paper-size-") as place:
        root = Path(place)
        drawn = write_phantom(root / "drawn", PHANTOM)
        # One variant of every second subject, and five of every one: ten times as many.
        for name, subjects, times in (("tenth", drawn[::2], 1), ("whole", drawn, 5)):
            data.multiplied(root / "drawn", subjects, root / name, times)
            peaks[name] = max(stages(name, root / name, root / f"{name}.run"))
    small, large = (round(peaks[name] / 1e6) for name in ("tenth", "whole"))
    return {"ratio": round(large / small, 2), "ours": large, "reference": small, "unit": "MB"}


def stages(name: str, studies: Path, target: Path) -> list[int]:
    """Run every stage, print what it took, and return its peaks in bytes."""
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    commands = {
        "ingest": ["ingest", str(studies), "--run", str(target), "--preset", "cpu", *overrides],
        "pretrain": ["pretrain", "--run", str(target)],
        "extract": ["extract", "--run", str(target)],
        "arm and report": ["ablate", str(target / "config.yaml"), "--run", str(target)],
    }
    peaks = []
    for stage, words in commands.items():
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", "experiments", *words]) as process:
            peaks.append(_peak(process))
        if process.returncode:
            raise RuntimeError(f"{stage} ended with exit status {process.returncode}; its error stands above")
        print(f"{name}: {stage} {time.perf_counter() - began:.0f} s, {peaks[-1] / 1e6:.0f} MB at its peak", flush=True)
    disk = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{name}: {disk / 1e6:.0f} MB on disk, bank {_bytes(target / 'bank.zarr') / 1e6:.0f} MB", flush=True)
    return peaks


def _peak(process: subprocess.Popen[bytes]) -> int:
    seen: dict[int, tuple[bytes, int]] = {}
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid, seen))
        time.sleep(SAMPLE_S)
    return peak


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
