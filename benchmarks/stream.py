"""Samples that reach one Ray Train worker, against a torch DataLoader whose workers do the same with MONAI.

Both decode factors for half of the samples (decoder 16 wide), rescale and crop image and mask (antialiased when
shrinking), and collate batches of the `cpu` preset's size and input, 128². Ours are two data actors, the reference is
two DataLoader workers, a thread each, with slices and bank in memory. Counted in the train worker, which does nothing
else, once 64 batches have come. fp32 is the ratio; bf16 decoding on both sides is printed above, and so is what the
worker makes itself on its own device (`resources.synthesis=trainer`) beside what the actors make.

Above it too, the trainer's side: the `cpu` preset's SDNet on this stream, on two cores that it shares with one data
actor, against the same steps on batches that lie in memory; and how much of its time it waits for data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from actors.resources import Cluster, Node, ResourceConfig, plan
from actors.streaming import batches
from actors.train_job import TrainJob, read_history
from actors.trainer import run_job
from benchmarks import cluster
from benchmarks.timing import ratio
from experiments.config import cpu
from pipeline.networks.config import Precision
from pipeline.networks.files import default_device, load_decoder, save_model
from pipeline.networks.sdnet import SDNet
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples.batch_maker import batches_ahead
from pipeline.samples.maker import SampleMaker
from pipeline.samples.stream_config import StreamConfig
from pipeline.samples.synthesis import unpack_planes
from pipeline.training.config import LossConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, train_step

SETTINGS = cpu()
PHANTOM = PhantomConfig(labelled_a=5, labelled_b=5, unlabelled_c=4, testing=1, frames=2)
ACTORS, WARM_UP, COUNTED, ROUNDS = 2, 64, 160, 3
STEPS_PER_EPOCH, EPOCHS = 40, 3


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor, bool, int]]):
    """The stream's samples one by one, as one would write them with PyTorch and MONAI: index k of step s is k + s ·
    batch."""

    def __init__(self, config: StreamConfig, steps: int) -> None:
        from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd

        self.maker, self.steps = SampleMaker(config), steps
        self.rows = self.maker.plan.rows()
        size, keys = config.preprocess.size, ["image", "mask"]
        self.fit = ResizeWithPadOrCropd(keys, (size, size))
        weights, document = self.maker.bank.decoder()
        self.decoder = load_decoder(weights, document).eval()
        self.channels, self.precision = int(document["anatomy_channels"]), config.plan.fa_precision
        for k in range(len(self.maker.store)):  # slices in memory before workers are forked
            self.maker.working(k)

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, bool, int]:
        from monai.transforms.spatial.dictionary import RandZoomd

        step, k = divmod(index, self.rows)
        sample, labelled = self.maker.plan.samples(step)[k]
        source = self.maker.working(sample.slice_id)
        image = torch.from_numpy(source.image)[None]
        if sample.donor_id is not None:
            image = self._drawn(sample.slice_id, sample.donor_id)
        zoom = self.maker.scale(sample, source.area)
        zoomed = RandZoomd(
            ["image", "mask"],
            prob=1.0,
            min_zoom=zoom,
            max_zoom=zoom,
            mode=["bilinear", "nearest"],
            keep_size=False,
            antialias=[zoom < 1, False],
        )
        made = self.fit(zoomed({"image": image, "mask": torch.from_numpy(source.mask)[None]}))
        mask = made["mask"][0].as_tensor() * labelled
        return made["image"].as_tensor(), mask, labelled, sample.slice_id

    def _drawn(self, slice_id: int, donor: int) -> torch.Tensor:
        planes = unpack_planes(torch.tensor(self.maker.anatomy(slice_id)[None]), self.channels).contiguous()
        style = torch.from_numpy(self.maker.drawing.donors.modality[donor : donor + 1])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return self.decoder(planes, style)[0].float().clone()


def _loaded(config: StreamConfig, steps: int) -> Iterator[Any]:
    data = Plain(config, steps)
    workers = {"num_workers": ACTORS, "prefetch_factor": 16, "worker_init_fn": _one_thread}
    yield from DataLoader(data, batch_size=data.rows, **workers)  # type: ignore[arg-type]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _streamed(config: StreamConfig, steps: int) -> Iterator[Any]:
    yield from batches(config, range(steps), actors=ACTORS, cpus=0.5)


def _made_here(config: StreamConfig, steps: int) -> Iterator[Any]:
    yield from batches_ahead(config, range(steps), device=str(default_device()))


def _rate(stream: Iterator[Any], samples: int) -> float:
    """Samples a second once the first batches have come."""
    for _ in range(WARM_UP):
        next(stream)
    began = time.perf_counter()
    count = sum(1 for _ in stream)
    return count * samples / (time.perf_counter() - began)


def _delivered(settings: dict[str, Any]) -> None:
    """Body of the train worker: rates of both sides in turns, to a file."""
    torch.set_num_threads(1)
    config = StreamConfig.model_validate(settings["stream"])
    rates: dict[str, list[float]] = {"ours": [], "reference": [], "trainer": []}
    for _ in range(ROUNDS):
        for name, side in (("ours", _streamed), ("reference", _loaded), ("trainer", _made_here)):
            rates[name].append(_rate(side(config, WARM_UP + COUNTED), config.samples_per_step))
    Path(settings["out"]).write_text(json.dumps({name: median(values) for name, values in rates.items()}))


def _in_train_worker(config: StreamConfig, out: Path) -> dict[str, float]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _delivered,
        train_loop_config={"stream": config.model_dump(), "out": str(out)},
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=torch.cuda.is_available(), resources_per_worker={"CPU": 0.5}
        ),
        run_config=RunConfig(name="stream", storage_path=str(out.parent)),
    ).fit()
    found: dict[str, float] = json.loads(out.read_text())
    beside = ratio({"ours": found.pop("trainer"), "reference": found["ours"]}, "samples/s")
    print(f"made by the train worker on {default_device()}, against {ACTORS} actors:", beside, flush=True)
    return found


def _job(stream: StreamConfig, out: Path) -> TrainJob:
    return TrainJob(
        name="stream",
        out=str(out),
        network=SETTINGS.sdnet,
        stream=stream,
        loss=LossConfig(),
        train=SETTINGS.train.model_copy(update={"epochs": EPOCHS, "steps_per_epoch": STEPS_PER_EPOCH}),
        data_fingerprint="",
    )


def in_memory(document: str) -> None:
    """Print the seconds of a step of this job, as JSON, on batches that lie in memory; two threads."""
    job = TrainJob.model_validate_json(document)
    torch.set_num_threads(2)
    maker, state = SampleMaker(job.stream, threads=2), TrainState.create(job.network, job.train, seed=0)
    objective = Objective(state.model, job.loss, state.latent)
    held = []
    for step in range(8):
        made = {k: torch.from_numpy(v) for k, v in maker({"step": np.array([step])}).items()}
        held.append(Batch(made["image"], made["mask"].long(), made["labelled"], made["slice_id"]))
    took = []
    for number in range(STEPS_PER_EPOCH + 5):
        began = time.perf_counter()
        train_step(objective, state, held[number % len(held)], job.train)
        took.append(time.perf_counter() - began)
    print(sum(took[5:]) / STEPS_PER_EPOCH)


def _trainer(stream: StreamConfig, out: Path) -> None:
    """Print what the stream costs the `cpu` preset's SDNet arm."""
    job = _job(stream, out)
    run_job(job, plan(ResourceConfig(), Cluster((Node(2),))))
    warm = read_history(job)[1:]  # the first epoch waits for the actors to start
    streamed = median(record["train_seconds"] for record in warm) / STEPS_PER_EPOCH
    waited = median(record["data_wait_fraction"] for record in warm)
    code = "import sys; from benchmarks.stream import in_memory; in_memory(sys.argv[1])"
    # a process of its own: this one has been told to use a single thread
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    words = [sys.executable, "-c", code, job.model_dump_json()]
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    held = float(said.splitlines()[-1])
    print(
        f"trainer, 2 cores: {streamed * 1000:.0f} ms a step on the stream, {held * 1000:.0f} ms on batches in memory, "
        f"{streamed / held:.2f} times; data_wait_fraction {waited:.3f}; queue of "
        f"{median(r['queue_depth'] for r in warm):.0f} batches, actor busy "
        f"{median(r['actor_utilisation'] for r in warm):.0%}",
        flush=True,
    )


def run() -> dict[str, Any]:
    """Samples a second that reach a Ray Train worker."""
    from actors.extraction import extract
    from actors.extractor import ExtractionSpec
    from actors.ingest import ingest

    with tempfile.TemporaryDirectory(prefix="cardiomix-stream-") as place, cluster.local(2):
        root = Path(place)
        write_phantom(root / "drawn", PHANTOM)
        run, sdnet = str(root / "run"), str(root / "sdnet")
        ingest([str(root / "drawn")], run)
        torch.manual_seed(0)
        save_model(sdnet, SDNet(SETTINGS.sdnet), SETTINGS.sdnet, SETTINGS.preprocess.model_dump(), ["phantom"])
        bank = str(root / "bank.zarr")
        extract(ExtractionSpec(run, sdnet, bank, SETTINGS.preprocess))

        def stream(precision: Precision) -> StreamConfig:
            return StreamConfig(
                run=run,
                bank=bank,
                preprocess=SETTINGS.preprocess,
                plan=SETTINGS.plan.model_copy(update={"fa_precision": precision}),
                seed=0,
                semi_supervised=True,
                ra=True,
                fa=True,
                batch_size=SETTINGS.train.batch_size,
            )

        _trainer(stream("fp32"), root / "arm")
        print("bf16:", ratio(_in_train_worker(stream("bf16"), root / "bf16.json"), "samples/s"), flush=True)
        return ratio(_in_train_worker(stream("fp32"), root / "fp32.json"), "samples/s")
