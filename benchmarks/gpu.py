"""What a card does with the `paper` preset: a training step as the stream gives it, as it is and compiled, extraction,
synthesis, scoring.

`ours` is the time of a U-Net step of four images at width 64 and 224², `reference` that of the same step in plain eager
PyTorch; the other figures are printed. Without a card it says so and measures the CPU at a quarter of the width.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.timing import rates, ratio
from benchmarks.train_step import sides
from pipeline.factors.extract import FrozenSDNet, NetworkView
from pipeline.inference.config import InferenceConfig
from pipeline.inference.predictor import Predictor
from pipeline.networks.config import Precision, SDNetConfig, UNetConfig
from pipeline.networks.files import build, default_device
from pipeline.networks.sdnet import Decoder, SDNet
from pipeline.samples.maker import UPLOADED
from pipeline.samples.one_ahead import OneAhead
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.synthesis import synthesize, synthesize_together
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, settle, train_step

SIZE, WARM, STEPS, SLICES = 224, 20, 100, 128
TOGETHER = 16  # samples that a decoder draws at once
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def told(text: str) -> None:
    """A figure beside the ratio."""
    print(text, file=sys.stderr)


def rows(labelled: int, unlabelled: int) -> dict[str, torch.Tensor]:
    """A step's samples as makers give them, on the CPU."""
    count, draw = labelled + unlabelled, torch.Generator().manual_seed(0)
    image = torch.rand((count, 1, SIZE, SIZE), generator=draw) * 2 - 1
    mask = torch.randint(0, 4, (count, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    order = torch.arange(count)
    return {"image": image, "mask": mask, "labelled": order < labelled, "slice_id": order}


def batch(row: dict[str, torch.Tensor]) -> Batch:
    """As the train worker makes it."""
    return Batch(row["image"], row["mask"].long(), row["labelled"], row["slice_id"])


def endless(row: dict[str, torch.Tensor]) -> Generator[dict[str, torch.Tensor]]:
    """The same samples for ever."""
    while True:
        yield row


def milliseconds_a_step(
    network: UNetConfig | SDNetConfig, labelled: int, unlabelled: int, steps: int, compiled: bool = False
) -> float:
    """Of a long run of steps, each with its upload, as in a training; the device is waited for only at the end."""
    state = TrainState.create(network, TrainConfig(), seed=0)
    objective = Objective(state.model, LossConfig(), state.latent)
    if compiled:
        objective.compile_terms()
    device = next(state.model.parameters()).device
    with OneAhead(endless(rows(labelled, unlabelled)), str(device)) as stream:
        for row in islice(stream, min(WARM, steps)):
            train_step(objective, state, batch(row), TrainConfig())
        settle(state)
        began = time.perf_counter()
        for row in islice(stream, steps):
            train_step(objective, state, batch(row), TrainConfig())
        settle(state)
        return 1000 * (time.perf_counter() - began) / steps


def a_second(work: Callable[[], int]) -> float:
    """Items a second of the second call."""
    work()
    began = time.perf_counter()
    return work() / (time.perf_counter() - began)


def slices_encoded(
    config: SDNetConfig, precision: Precision, device: torch.device, views: Sequence[NetworkView]
) -> float:
    """A second, to factors on the CPU."""
    frozen = FrozenSDNet(SDNet(config).eval(), precision, device)
    return a_second(lambda: len(frozen.factors(views)))


def run() -> dict[str, Any]:
    """Steps a minute of a U-Net; all else on standard error."""
    device = default_device()
    card = device.type == "cuda"
    width, steps, slices = (64, STEPS, SLICES) if card else (16, 3, 4)
    told(torch.cuda.get_device_name(device) if card else "no GPU: the CPU, at width 16 and with a few items")
    unet, sdnet = UNetConfig(width=width), SDNetConfig(anatomy_width=width, modality_width=width, segmentor_width=width)
    for name, network, labelled, unlabelled in (("U-Net", unet, 4, 0), ("SDNet", sdnet, 4, 0), ("SDNet", sdnet, 4, 4)):
        text = f"{milliseconds_a_step(network, labelled, unlabelled, steps):.1f} ms"
        if card:  # on a CPU compiling takes minutes and gains nothing (docs/performance.md)
            began = time.perf_counter()
            ms = milliseconds_a_step(network, labelled, unlabelled, steps, compiled=True)
            start = time.perf_counter() - began - ms * steps / 1000
            text += f", compiled {ms:.1f} ms after {start:.0f} s"
        told(f"{name}, a step of {labelled} + {unlabelled}: {text}")
    rng = np.random.default_rng(0)
    images = (rng.random((slices, 256, 256)) * 2 - 1).astype(np.float32)
    views = [NetworkView(x, np.s_[:256, :256], x[:SIZE, :SIZE], np.zeros((256, 256), np.uint8)) for x in images]
    for precision in PRECISIONS:
        told(f"encoders, {precision}, in batches: {slices_encoded(sdnet, precision, device, views):.0f} slices/s")
    decoder = Decoder(sdnet).eval().to(device)
    anatomy, modality = (1 << rng.integers(0, 8, images.shape)).astype(np.uint8), rng.random((slices, 8), np.float32)
    drawn = a_second(lambda: len(synthesize(decoder, sdnet.anatomy_channels, anatomy, modality)))
    told(f"synthesis, one sample at a time: {drawn:.0f} samples/s")
    on_device, codes = torch.from_numpy(anatomy).to(device), torch.from_numpy(modality).to(device)
    parts = list(zip(on_device.split(TOGETHER), codes.split(TOGETHER), strict=True))
    channels = sdnet.anatomy_channels

    def drawn_together() -> int:
        images = [synthesize_together(decoder, channels, a, m, None) for a, m in parts]
        return len(torch.cat(images).cpu())

    told(f"synthesis, {min(TOGETHER, slices)} samples at a time: {a_second(drawn_together):.0f} samples/s")
    predictor = Predictor([build(unet).to(device)], PreprocessConfig(size=SIZE), InferenceConfig())
    told(f"segmentation: {a_second(lambda: len(predictor.shares(images[:, :SIZE, :SIZE]))):.0f} slices/s")
    samples = batch({name: values.to(device) if name in UPLOADED else values for name, values in rows(4, 0).items()})
    return ratio(rates(sides(unet, samples), rounds=3), "steps/minute")
