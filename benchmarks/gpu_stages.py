"""What a card does in the stages of a run, through Ray, Zarr and MLflow as `cardiomix` calls them.

Four figures, each printed with its goal: a short training from start to exit, extraction to a bank, the wait of a train
worker for samples, the scores of an arm. `ours` is the time of `cardiomix pretrain` over two epochs, from start to
exit; `reference` is the time of its steps.

On a card: the `paper` preset (width 64, 224²), about 2,200 training slices, 72 test volumes. Without a card, the
benchmark says so and takes a few steps of tiny networks. That shows that it runs; its figures mean nothing.
`python -m benchmarks gpu` measures steps and networks alone, without Ray.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import PRECISIONS, told
from pipeline.networks.files import default_device
from pipeline.phantom import PhantomConfig, write_phantom

ARM, EPOCHS, ROUNDS = "ss_sdnet_ra_fa", 2, 3
COMPILED = "resources.compile=true"  # as a training of the preset's length is
ALWAYS = (f"arms=[{ARM}]", f"train.epochs={EPOCHS}", f"pretrain.epochs={EPOCHS}")


@dataclass(frozen=True)
class Size:
    """Two phantoms, of training and of test subjects, and the overrides of the preset `paper`."""

    training: PhantomConfig
    testing: PhantomConfig
    settings: tuple[str, ...]


def phantoms(training: int, frames: int, testing: int) -> tuple[PhantomConfig, PhantomConfig]:
    """`training` labelled subjects of A and of B, with cines; `testing` subjects of each vendor, with ED and ES alone.

    More than two frames give training slices without masks, which an SS arm needs.
    """
    return (
        PhantomConfig(labelled_a=training, labelled_b=training, unlabelled_c=0, testing=0, frames=frames),
        PhantomConfig(labelled_a=0, labelled_b=0, unlabelled_c=0, testing=testing, frames=2),
    )


# An epoch may begin with 127 batches that lie ready. So the arm's epochs have many more steps, which shows how long the
# train worker waits.
CARD = Size(
    *phantoms(training=20, frames=8, testing=9),
    ("train.steps_per_epoch=600", "pretrain.steps_per_epoch=150"),
)
SMALL = Size(
    *phantoms(training=2, frames=3, testing=1),
    (
        "train.steps_per_epoch=6",
        "pretrain.steps_per_epoch=6",
        "preprocess.size=64",
        "preprocess.field=224",
        "sdnet.anatomy_width=4",
        "sdnet.modality_width=4",
        "sdnet.segmentor_width=4",
        "sdnet.decoder_width=4",
        "bank_shard=8",
    ),
)


def run() -> dict[str, Any]:
    """Seconds of a two-epoch pretraining from start to exit, over those of its steps."""
    card = default_device().type == "cuda"
    told(torch.cuda.get_device_name() if card else "no GPU: the CPU, with tiny networks and a few slices and steps")
    size = CARD if card else SMALL
    # what `python -m benchmarks` sets for itself must not reach a run
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}

    def timed(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], env=environment, check=True)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(prefix="cardiomix-gpu-") as place:
        root = Path(place)
        folders, where = (str(root / "training"), str(root / "testing")), str(root / "run")
        for folder, phantom in zip(folders, (size.training, size.testing), strict=True):
            write_phantom(Path(folder), phantom)
        overrides = [word for setting in (*ALWAYS, *size.settings) for word in ("--set", setting)]
        timed("-m", "experiments", "ingest", *folders, "--run", where, "--preset", "paper", *overrides)
        ours = timed("-m", "experiments", "pretrain", "--run", where)
        reference = pretraining(where, ours)
        timed("-c", f"from benchmarks.gpu_stages import stages; stages({where!r})")
    return {"ratio": round(ours / reference, 2), "ours": round(ours, 1), "reference": round(reference, 1), "unit": "s"}


def pretraining(run: str, seconds: float) -> float:
    """Print what a pretraining of `seconds` took beside its steps; returns the seconds of the steps.

    Every epoch counts as the last one does. What the first takes longer is start-up: it waits for the first batch, and
    cuDNN chooses its kernels.
    """
    from actors.train_job import HISTORY, read_records

    records = read_records(f"{run}/sdnet/{HISTORY}")
    last = records[-1]
    steps: float = len(records) * last["train_seconds"] * (1 - last["data_wait_fraction"])
    validation = sum(record["validation_seconds"] for record in records)
    told(
        f"pretraining of {last['step']} steps in {len(records)} epochs: {seconds:.1f} s from start to exit, which is "
        f"{seconds - steps:.1f} s more than its steps (goal on a card: under 20), {validation:.1f} s of them validation"
    )
    return steps


def stages(run: str) -> None:
    """Fill the bank, train the arm and score it, by the run's driver in this process; print what each took."""
    from experiments import config
    from experiments.progress import Progress
    from experiments.run.driver import Ablation

    settings = config.load(run)
    if default_device().type == "cuda":
        settings = config.override(settings, [COMPILED])
    with Ablation(run, settings, Progress()) as driver:
        driver.budget()  # starts Ray
        extraction(driver)
        failed = driver.train()
        if failed:
            raise RuntimeError(f"{ARM} failed: {failed}")
        waiting(driver)
        scoring(driver)


def extraction(driver: Any) -> None:
    """Fill the run's bank by the stage; then fill another one again and again by its actors, once they are warm."""
    from actors.extraction import ExtractionActors, extractors, prepare_bank
    from actors.extractor import ExtractionSpec
    from benchmarks.extract import Side
    from benchmarks.timing import rates
    from experiments.run import jobs
    from storage.bank.bank import FactorBank

    settings, budget = driver.settings, driver.budget()
    began = time.perf_counter()
    driver.extract()
    took = time.perf_counter() - began
    slices = len(FactorBank.open(jobs.bank_uri(driver.run, settings)))
    told(f"extraction, the stage as a whole: {slices} slices in {took:.1f} s")
    actors = ExtractionActors(budget.extract_actors, budget.extract_cpus, budget.extract_gpus)
    for precision in PRECISIONS:
        work = ExtractionSpec(
            driver.run,
            jobs.sdnet_uri(driver.run, settings),
            f"{driver.run}/again-{precision}.zarr",
            settings.preprocess,
            precision,
            shard_slices=settings.bank_shard,
            gpu=actors.gpus > 0,
            helpers=max(1, int(actors.cpus)) if actors.gpus > 0 else 1,
        )
        bank = prepare_bank(work)
        with extractors(work, bank, actors) as pool:
            rate = rates({"ours": Side(pool, bank)}, ROUNDS)["ours"]
        told(
            f"extraction, {precision}, {actors.count} started actor{'s' * (actors.count > 1)}, to the last committed "
            f"shard: {rate:.1f} slices/s (goal on a card: 1,500)"
        )


def waiting(driver: Any) -> None:
    """Print how long the arm's train worker waited for samples in its last epoch."""
    from actors.train_job import read_history
    from experiments.run import jobs

    last = read_history(jobs.arm_runs(driver.run, driver.settings)[0].job)[-1]
    told(
        f"{ARM}, epoch {last['epoch']}: data_wait_fraction {last['data_wait_fraction']:.3f} (goal on a card: .02), "
        f"{last['samples_per_s']:.1f} samples/s, actors busy {last['actor_utilisation']:.2f} of their time, "
        f"{last['queue_depth']:.0f} batches ready"
    )


def scoring(driver: Any) -> None:
    """Score the arm again, and print how long that took and for how many structures there was an HD95."""
    from actors.evaluate_arm import CASES
    from experiments.run import jobs

    began = time.perf_counter()
    volumes = sum(driver.evaluate().values())
    took = time.perf_counter() - began
    out = jobs.arm_runs(driver.run, driver.settings)[0].job.out
    with Path(out, CASES).open(newline="") as file:
        distances = [float(row["hd95_mm"] or "nan") for row in csv.DictReader(file)]
    told(
        f"scores of an arm with {volumes} volumes: {took:.1f} s (goal on a card: under 60 for 70 volumes); HD95 of "
        f"{sum(map(math.isfinite, distances))} of {len(distances)} structures, the network missed the others"
    )
