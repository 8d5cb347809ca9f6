"""Extraction to a committed bank, against a plain eager loop over the same network and slices that writes nothing.

Encoders of the paper's width (64), 224² crops, anatomy of the whole field of view of a phantom of vendor A; every actor
has one thread, and the loop is an actor like the others, with the slices in its memory. Counted from started actors and
an empty bank to the last ledger entry. The wide network is not trained, its batch-norms have the images' statistics;
what bits and images do is also told of a narrow network that has been trained for a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.extraction import ExtractionActors, extractors, fill, prepare_bank
from actors.extractor import ExtractionSpec
from actors.pool import Pool
from benchmarks import cluster, data, timing
from pipeline.factors.extract import FrozenSDNet, NetworkView, view
from pipeline.networks.config import Precision, SDNetConfig
from pipeline.networks.files import load_sdnet, save_model
from pipeline.networks.sdnet import SDNet
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples.preprocess import PreprocessConfig, working_slice
from pipeline.samples.rescale import resample_crop
from pipeline.samples.synthesis import synthesize
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, train_step
from storage.bank import ledger
from storage.bank.anatomy_codec import pack, unpack
from storage.bank.bank import FactorBank
from storage.layouts import LayoutOptions
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject

PAPER, NARROW = PreprocessConfig(), PreprocessConfig(size=96)
SHARD, BATCH, ROUNDS, STEPS = 2, 4, 2, 80
CHANNELS = 8
# ED and ES of six slices
PHANTOM = PhantomConfig(labelled_a=1, labelled_b=0, unlabelled_c=0, testing=0, frames=2, slices=(6, 6))

Factors = list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]


def slice_store(folder: Path, run: Path, options: LayoutOptions | None = None) -> str:
    """The slices of a folder of studies as a run, all of them for training; without Ray."""
    found = [replace(subject, split="train") for subject in data.subjects_of([str(folder)], options)]
    finalise(str(run), {s.subject: write_subject(str(run), s) for s in found}, [], found)
    return str(run)


def calibrated(views: list[NetworkView], config: SDNetConfig) -> SDNet:
    """An untrained network whose batch-norms have the statistics of these slices, so that its anatomy varies."""
    torch.manual_seed(0)
    model = SDNet(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative
    with torch.no_grad():
        model.train().encode_anatomy(torch.from_numpy(np.stack([seen.crop for seen in views[::4]]))[:, None])
    return model.eval()


def plain(model: SDNet, views: list[NetworkView], batch: int) -> Factors:
    """The loop that one would write: eager, fp32, contiguous, `batch` slices of one shape at a time."""
    found: Factors = []
    with torch.no_grad():
        for i in range(0, len(views), batch):
            seen = views[i : i + batch]
            canvases = torch.from_numpy(np.stack([v.canvas for v in seen]))[:, None]
            crops = torch.from_numpy(np.stack([v.crop for v in seen]))[:, None]
            anatomy, modality = model.encode_anatomy(canvases), model.encode_modality(crops)
            packed = pack(anatomy.bool().numpy())
            found += [(packed[k][v.extent], modality[k].numpy()) for k, v in enumerate(seen)]
    return found


class Loop:
    """The reference as an actor."""

    def __init__(self, run: str, sdnet: str) -> None:
        torch.set_num_threads(1)
        store = SliceStore.open(run)
        self._views = [view(store, i, PAPER) for i in range(len(store))]
        self._model = load_sdnet(sdnet)

    def run(self, batch: int) -> int:
        """Encode every slice; returns their number."""
        self._found = plain(self._model, self._views, batch)
        return len(self._found)

    def found(self) -> Factors:
        """The factors of the last run."""
        return self._found


@dataclass
class Side:
    """A warm pool and its bank, filled anew by every call."""

    pool: Pool[int]
    bank: FactorBank

    def __call__(self) -> int:
        for shard in range(self.bank.shards()):
            ledger.retract(self.bank.uri, shard)
        fill(self.pool, self.bank, range(self.bank.shards()), lambda _: None)
        assert self.bank.is_complete()
        return len(self.bank)

    def factors(self) -> Factors:
        """What the bank holds, cut to the slices' extents."""
        held, places = self.bank.load(), self.bank.index.select(["top", "left", "height", "width"]).to_pylist()
        cut = [np.s_[p["top"] : p["top"] + p["height"], p["left"] : p["left"] + p["width"]] for p in places]
        return [(held.anatomy[k][where], held.modality[k]) for k, where in enumerate(cut)]


def flipped(found: Factors, reference: Factors) -> str:
    """Share of anatomy's bits that differ, and the largest difference of modality."""
    pairs = [(a, b) for (a, _), (b, _) in zip(found, reference, strict=True)]
    differ = sum(int((unpack(a, CHANNELS) != unpack(b, CHANNELS)).sum()) for a, b in pairs)
    bits = sum(CHANNELS * a.size for a, _ in pairs)
    modality = max(float(np.abs(a - b).max()) for (_, a), (_, b) in zip(found, reference, strict=True))
    return f"{1 - differ / bits:.5%} of {bits} bits the same, modality within {modality:.1g}"


def trained_briefly(run: str) -> None:
    """Bits and decoded images of a network of width 16 after a minute's training, in both precisions."""
    store = SliceStore.open(run)
    views = [view(store, i, NARROW) for i in range(len(store))]
    images = torch.from_numpy(np.stack([seen.crop for seen in views]))[:, None]
    masks = torch.from_numpy(np.stack([_cropped(store, i) for i in range(len(store))])).long()
    config, network = TrainConfig(batch_size=4, precision="fp32"), SDNetConfig(anatomy_width=16, modality_width=16)
    state = TrainState.create(network, config, seed=0)
    objective, generator = Objective(state.model, LossConfig(), state.latent), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        k = torch.randint(0, len(images), (4,), generator=generator)
        train_step(objective, state, Batch(images[k], masks[k], torch.ones(4, dtype=torch.bool), k), config)
    model = state.model.eval().to(memory_format=torch.contiguous_format)
    assert isinstance(model, SDNet)
    reference = plain(model, views, 1)
    for precision in ("fp32", "bf16"):
        frozen = FrozenSDNet(model, precision)
        found = frozen.factors(views)
        ours, theirs = (
            [synthesize(model.decoder, CHANNELS, a[None], m[None])[0] for a, m in factors]
            for factors in (found, reference)
        )
        differences = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{precision}, trained for {STEPS} steps, width 16: {flipped(found, reference)}; decoded images (-1 to 1) "
            f"differ by {np.mean([d.mean() for d in differences]):.2g} on average, "
            f"{max(float(d.max()) for d in differences):.2g} at most",
            flush=True,
        )


def _cropped(store: SliceStore, i: int) -> npt.NDArray[np.uint8]:
    working = working_slice(store, i, NARROW)
    return resample_crop(working.image, working.mask, 1.0, NARROW.size, 0.0)[1]


def run() -> dict[str, Any]:
    """Slices a second, one actor in fp32 against the loop; bf16, two actors, bits and images are printed."""
    import ray

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cardiomix-extract-") as place, cluster.local(8):
        root = Path(place)
        write_phantom(root / "drawn", PHANTOM)
        run, sdnet = slice_store(root / "drawn", root / "run"), str(root / "sdnet")
        store = SliceStore.open(run)
        views = [view(store, i, PAPER) for i in range(len(store))]
        model = calibrated(views, SDNetConfig())
        save_model(sdnet, model, model.config, PAPER.model_dump(), ["phantom"])
        print(f"{len(store)} slices, canvases of {sorted({seen.canvas.shape for seen in views})}", flush=True)

        def side(name: str, precision: Precision, actors: int) -> Side:
            work = ExtractionSpec(run, sdnet, str(root / f"{name}.zarr"), PAPER, precision)
            bank = prepare_bank(replace(work, shard_slices=SHARD))
            pool = extractors(work, bank, ExtractionActors(actors))
            pool.start()
            return Side(pool, bank)

        ours, two, half = side("one", "fp32", 1), side("two", "fp32", 2), side("half", "bf16", 1)
        remote: Any = ray.remote(num_cpus=1)(Loop)
        loop = remote.remote(run, sdnet)
        sides: dict[str, Callable[[], int]] = {
            "one by one": lambda: int(ray.get(loop.run.remote(1))),
            "reference": lambda: int(ray.get(loop.run.remote(BATCH))),
            "ours": ours,
            "bf16": half,
            "two": two,
        }
        found = timing.rates(sides, ROUNDS)
        reference = ray.get(loop.found.remote())
        print(f"slices a second: {', '.join(f'{name} {rate:.2f}' for name, rate in found.items())}")
        print(f"against a loop over single slices: {found['ours'] / found['one by one']:.2f}")
        print(f"bf16 against the loop: {found['bf16'] / found['reference']:.2f}")
        print(f"two actors against one: {found['two'] / found['ours']:.2f}")
        for name, made in (("fp32", ours), ("bf16", half)):
            print(f"{name}, untrained, width 64: {flipped(made.factors(), reference)}", flush=True)
        trained_briefly(run)
        return timing.ratio(found, "slices/s")
