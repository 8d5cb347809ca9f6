"""Which processes of a Ray are ours to kill, and what of an epoch's record is the clock's."""

from __future__ import annotations

from pathlib import Path

CLOCK = {
    "train_seconds",
    "validation_seconds",
    "data_wait_fraction",
    "actor_utilisation",
    "queue_depth",
    "samples_per_s",
}


def train_workers(ancestor: int) -> list[int]:
    """Pids of the Ray Train workers below this process."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes()
            except OSError:  # gone meanwhile
                continue
    below = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return [pid for pid in below if titles.get(pid, b"").startswith(b"ray::RayTrainWorker")]
