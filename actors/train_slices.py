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


def total_steps(job: TrainJob, store: SliceStore) -> tuple[int, int]:
    """(steps per epoch, steps in all). By default an epoch has enough steps for all labelled slices."""
    labelled = int(((store.column("split") == "train") & store.column("labelled").astype(bool)).sum())
    per_epoch = job.train.steps_per_epoch or -(-labelled // job.train.batch_size)
    return per_epoch, per_epoch * job.train.epochs


def training_vendors(store: SliceStore) -> npt.NDArray[np.str_]:
    """Vendors of the training slices, in the order in which the loss numbers them."""
    vendors: npt.NDArray[np.str_] = np.array(store.texts("vendor", store.column("split") == "train"), dtype=np.str_)
    return vendors


def taught_structures(store: SliceStore) -> npt.NDArray[np.bool_] | None:
    """Which of LV, MYO and RV the mask of each slice teaches, (len(store), 3) bool; None if every mask teaches all.

    A structure that is drawn in no training mask is taught as background by all of them. Otherwise nothing would teach
    the network the difference between the two, and it would invent the structure.
    """
    train = (store.column("split") == "train") & store.column("labelled").astype(bool)
    drawn = store.drawn
    taught: npt.NDArray[np.bool_] = drawn | ~drawn[train].any(axis=0)
    taught[~train] = True
    return None if taught.all() else taught


def validation_volumes(job: TrainJob, store: SliceStore) -> list[ValidationVolume]:
    """The labelled volumes of the validation subjects, as the network sees them."""
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
    """The training slices on which the factors are watched (see `some_slices`); None if the job does not watch them."""
    from pipeline.networks.config import SDNetConfig

    if not (job.train.watched_slices and isinstance(job.network, SDNetConfig)):
        return None
    return some_slices(job, store, job.train.watched_slices)


def some_slices(job: TrainJob, store: SliceStore, most: int) -> WatchedSlices:
    """About `most` training slices: the same number of each vendor that has enough, spread over its subjects."""
    import torch

    from pipeline.factors.disentanglement import WatchedSlices
    from pipeline.samples.preprocess import working_slice
    from pipeline.samples.rescale import resample_crop

    train, vendors = store.column("split") == "train", store.column("vendor")
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
