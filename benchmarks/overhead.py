"""One `cpu`-preset arm through the command line, against the same steps in one plain process without Ray or MLflow.

SS SDNet+RA+FA on the phantom: FA, RA, the same networks and losses, validation after every epoch, the same weights
written, the test subjects scored. Both are processes of their own and counted from start to exit, imports included;
slices and bank are there beforehand. The plain one makes every batch, then steps on it, with two threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARM = "ss_sdnet_ra_fa"
EPOCHS, STEPS = 5, 80
SETTINGS = (
    f"train.epochs={EPOCHS}",
    f"train.steps_per_epoch={STEPS}",
    "pretrain.epochs=1",
    "pretrain.steps_per_epoch=20",
    f"arms=[{ARM}]",
)
PHANTOM = ("labelled_a=4", "labelled_b=4", "unlabelled_c=4", "testing=1", "frames=4")


def plain_arm(run: str, out: str) -> None:
    """Train and score the arm of a run, here and now, into the folder `out`; what a loop without a cluster does."""
    import numpy as np
    import torch

    from actors.evaluate_arm import evaluate_job
    from actors.train_slices import total_steps, training_vendors, validation_volumes, watched_slices
    from actors.train_worker import factors_seen, finish_job, first_state
    from experiments import config
    from experiments.run import jobs
    from pipeline.samples.maker import SampleMaker
    from pipeline.training.objective import Objective
    from pipeline.training.step import Batch, train_step
    from pipeline.training.validation import mean_scores, volume_scores
    from storage.slices.store import SliceStore

    torch.set_num_threads(2)
    job = jobs.arm_runs(run, config.load(run))[0].job.model_copy(update={"out": out})
    store, maker = SliceStore.open(run), SampleMaker(job.stream, threads=2)
    state, held_out, watched = first_state(job, store, 0), validation_volumes(job, store), watched_slices(job, store)
    objective = Objective(state.model, job.loss, state.latent, state.alignment)
    vendor_of = torch.from_numpy(np.searchsorted(training_vendors(store), store.column("vendor")))
    per_epoch, total = total_steps(job, store)
    began, apart = time.perf_counter(), 0.0
    for step in range(total):
        made = {name: torch.from_numpy(rows) for name, rows in maker({"step": [step]}).items()}
        vendor = None if state.alignment is None else vendor_of[made["slice_id"]]
        batch = Batch(made["image"], made["mask"].long(), made["labelled"], made["slice_id"], vendor)
        train_step(objective, state, batch, job.train)
        if (step + 1) % per_epoch == 0:
            looked = time.perf_counter()
            factors_seen(job, state, watched)
            apart += time.perf_counter() - looked  # the history counts it nowhere
            state.end_epoch(mean_scores(volume_scores(state.candidate, held_out, job.train.precision))["dice"])
            Path(out, "checkpoint").write_bytes(state.to_bytes())
    print(json.dumps({"epochs_s": time.perf_counter() - began - apart}))
    finish_job(job, store, state)
    evaluate_job(run, out, ARM, 0, 2, job.train.precision)


def run() -> dict[str, Any]:
    """Wall time, ours over the reference's; without start-up above it."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}

    def timed(*words: str) -> tuple[float, str]:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return time.perf_counter() - began, done.stdout

    def cardiomix(*words: str) -> float:
        return timed("-m", "experiments", *words)[0]

    with tempfile.TemporaryDirectory(prefix="cardiomix-overhead-") as place:
        root = Path(place)
        data, where, out = str(root / "data"), ("--run", str(root / "run")), root / "plain"
        cardiomix("phantom", data, *(part for field in PHANTOM for part in ("--set", field)))
        sets = [part for field in SETTINGS for part in ("--set", field)]
        cardiomix("ingest", data, *where, "--preset", "cpu", *sets)
        cardiomix("pretrain", *where)
        cardiomix("extract", *where)
        out.mkdir()
        call = f"from benchmarks.overhead import plain_arm; plain_arm({str(root / 'run')!r}, {str(out)!r})"
        reference, said = timed("-c", call)
        ours = cardiomix("train", ARM, *where)
        history = (root / "run" / "arms" / ARM / "seed0" / "history.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in history]
        epochs = sum(r["train_seconds"] + r["validation_seconds"] for r in records)
        # the first epoch waits for the stream's actors: that is start-up
        epochs -= records[0]["data_wait_fraction"] * records[0]["train_seconds"]
        plain = json.loads(said.splitlines()[-1])["epochs_s"]
    print(f"{EPOCHS * STEPS} steps and {EPOCHS} validations, without start-up: {epochs:.0f} s, {plain:.0f} s plain,")
    print(f"  {epochs / plain:.2f} times; data_wait_fraction {records[-1]['data_wait_fraction']:.3f}")
    return {
        "ratio": round(ours / reference, 2),
        "ours": round(ours, 1),
        "reference": round(reference, 1),
        "unit": "s of wall time",
    }
