"""What a training job takes from the slice store before its first step: counts, vendors, held-out volumes, a sample of
its slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actors.train_job import TrainJob
from storage.slices.store import SliceStore

if TYPE_CHECKING:
    from pipeline.factors.disentanglement import WatchedSlices
    from pipeline.training.validation import ValidationVolume

GREYS_OF = 64  # training slices whose grey values a network remembers


def total_steps(job: TrainJob, store: SliceStore) -> tuple[int, int]:
    """(steps an epoch, steps in all)."""
    labelled = int(((store.column("split") == "train") & store.column("labelled").astype(bool)).sum())
    per_epoch = job.train.steps_per_epoch or -(-labelled // job.train.batch_size)
    return per_epoch, per_epoch * job.train.epochs


def training_vendors(store: SliceStore) -> npt.NDArray[np.str_]:
    """Vendors of the training slices, in the order in which the loss numbers them."""
    vendors: npt.NDArray[np.str_] = np.array(store.texts("vendor", store.column("split") == "train"), dtype=np.str_)
    return vendors


def taught_structures(store: SliceStore) -> npt.NDArray[np.bool_] | None:
    """Of each slice, which of LV, MYO and RV its mask teaches, (len(store), 3); None where every mask teaches all.

    What is drawn in no training slice is background in all of them: a network could not know it from background, and
    would make it up.
    """
    train = (store.column("split") == "train") & store.column("labelled").astype(bool)
    drawn = store.drawn
    taught: npt.NDArray[np.bool_] = drawn | ~drawn[train].any(axis=0)
    taught[~train] = True
    return None if taught.all() else taught


def validation_volumes(job: TrainJob, store: SliceStore) -> list[ValidationVolume]:
    """Labelled volumes of held-out subjects, as the network sees them."""
    from pipeline.inference.predictor import network_input
    from pipeline.samples.preprocess import middle, stored_statistics, working_slice
    from pipeline.samples.rescale import resample_crop
    from pipeline.training.validation import ValidationVolume

    config = job.stream.preprocess
    out = []
    for volume in store.volumes("validation"):
        if not volume.labelled:
            continue
        images, _ = store.volume(volume.rows)
        stats = stored_statistics(store, volume.rows[0], config)
        inputs = network_input(images, stats, volume.spacing, config, shift=middle(store, volume.rows[0], config))
        slices = [working_slice(store, i, config) for i in volume.rows]
        masks = np.stack([resample_crop(s.image, s.mask, 1.0, config.size, 0.0)[1] for s in slices])
        out.append(ValidationVolume(inputs, masks, volume.structures))
    return out


def watched_slices(job: TrainJob, store: SliceStore) -> WatchedSlices | None:
    """Training slices for what is watched, see `some_slices`; None where nothing is."""
    from pipeline.networks.config import SDNetConfig

    if not (job.train.watched_slices and isinstance(job.network, SDNetConfig)):
        return None
    return some_slices(job, store, job.train.watched_slices)


def grey_quantiles(job: TrainJob, store: SliceStore) -> list[float]:
    """101 quantiles, from 0 to 1, of what the network sees of the slices that it trains on, before augmentation."""
    seen = some_slices(job, store, GREYS_OF, labelled_alone=not job.stream.semi_supervised).image.numpy()
    return [round(float(q), 4) for q in np.quantile(seen, np.linspace(0.0, 1.0, 101))]


def some_slices(job: TrainJob, store: SliceStore, most: int, labelled_alone: bool = False) -> WatchedSlices:
    """About that many training slices, as many of each vendor if it has them, spread over its subjects."""
    import torch

    from pipeline.factors.disentanglement import WatchedSlices
    from pipeline.samples.preprocess import working_slice
    from pipeline.samples.rescale import resample_crop

    train, vendors = store.column("split") == "train", store.column("vendor")
    if labelled_alone:
        train = train & store.column("labelled").astype(bool)
    present = np.unique(vendors[train])
    rows: list[int] = []
    for vendor in present:
        own = np.flatnonzero(train & (vendors == vendor))
        count = min(len(own), -(-most // len(present)))
        rows += own[np.arange(count) * len(own) // count].tolist()
    config = job.stream.preprocess
    slices = (working_slice(store, i, config) for i in rows)
    images = [resample_crop(s.image, s.mask, 1.0, config.size, float(s.image.min()))[0] for s in slices]
    return WatchedSlices(torch.from_numpy(np.stack(images))[:, None], vendors[rows], store.column("subject")[rows])
