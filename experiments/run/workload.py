"""What an ablation would have to do: how much data there is, and the state of each stage.

The states follow from the same content hashes that the driver uses. This module reads listings, headers and the run
folder; it writes nothing and starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.train_job import DONE, read_history
from experiments import config
from experiments.arms import ARMS, PRETRAIN
from experiments.run import jobs
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.samples.plan import require_even_shares
from pipeline.samples.stream_config import require_bank_may_train
from pipeline.training.config import ArmConfig, LossConfig, TrainConfig
from storage import fs
from storage.bank.bank import FactorBank
from storage.errors import InputError
from storage.slices.store import TABLE, SliceStore
from storage.subjects import FrameSource, Subject

if TYPE_CHECKING:
    from actors.train_job import TrainJob
    from experiments.config import Settings


PHANTOM = "phantom"
PHANTOM_PIXELS = 78_000  # of a slice of the phantom, on average over its vendors, at `field_scale` 1


@dataclass(frozen=True)
class Contents:
    """How much data a run has.

    slices, pixels: of the whole run, on the native grids. train, train_pixels: of the training split. labelled:
    labelled training slices. known: counted from the run's own slices, not from headers or from the phantom's plan.
    unreadable: one error for each study that would be skipped. tested: subjects of the test split with a mask.
    validated, scored: labelled volumes of the validation split and of the test split.
    """

    slices: int
    pixels: float
    train: int
    train_pixels: float
    labelled: int
    known: bool
    unreadable: tuple[InputError, ...] = ()
    drawn: int = 0  # slices of a phantom that is still to be written
    tested: int = 0
    validated: int = 0
    scored: int = 0
    groups: jobs.Groups | None = None  # of the subjects; None if `known`


@dataclass(frozen=True)
class Training:
    """A network to train. `steps` and `epochs` are those that are left; `state` is text for the user."""

    label: str
    state: str
    arm: ArmConfig
    network: UNetConfig | SDNetConfig
    loss: LossConfig
    train: TrainConfig
    steps: int
    job: TrainJob | None = None
    epochs: int = 0


@dataclass(frozen=True)
class Workload:
    """All work of an ablation. stages: (name, state for the user). bank_slices: slices still to be extracted."""

    contents: Contents
    stages: list[tuple[str, str]]
    pretrain: Training | None
    arms: list[Training] = field(default_factory=list)
    bank_slices: int = 0


def workload(run: str, settings: Settings) -> Workload:
    """What is left to do for these settings. Raises InputError if data, a bank or a network cannot be used."""
    contents = _contents(run, settings)
    said = f"{contents.slices} slices"
    unreadable = len(contents.unreadable)
    skipped = f"; studies that would be skipped: {unreadable}" if unreadable else ""
    said = f"done: {said}; studies that are new or changed are read" if contents.known else f"to do: about {said}"
    stages = [("ingest", said + skipped)]
    pretrain = None
    if jobs.needs_sdnet(settings) and not (settings.pretrained or settings.bank):
        pretrain = _pretrain(run, settings, contents)
        stages.append(("pretrain", pretrain.state))
    bank_slices = 0
    borrows = settings.bank and settings.pretrained and not contents.known  # `makes_bank` needs the slices
    if jobs.needs_bank(settings) and (borrows or jobs.makes_bank(run, settings)):
        state, bank_slices = _bank(run, settings, contents, remade=bool(pretrain and pretrain.steps))
        stages.append(("extract", state))
    arms = _arms(run, settings, contents, new_sdnet=bool(pretrain and pretrain.steps), new_bank=bank_slices > 0)
    stages += [(arm.label, arm.state) for arm in arms]
    return Workload(contents, [*stages, ("report", "made anew")], pretrain, arms, bank_slices)


def _contents(run: str, settings: Settings) -> Contents:
    kept = config.load(run) if fs.exists(fs.join(run, config.CONFIG_FILE)) else None
    same = kept is not None and kept.data == settings.data
    there = fs.exists(fs.join(run, TABLE)) and (same or not settings.data)
    if there and jobs.split_options_of(run, kept or settings) == settings.layouts:
        return _stored(SliceStore.open(run))
    if settings.data:
        return _headers(settings.data, settings)
    folder = fs.join(run, PHANTOM)
    if fs.is_local(run) and _is_written(folder, settings):
        return _headers((folder,), settings)
    return _planned(settings)


def _is_written(folder: str, settings: Settings) -> bool:
    from pipeline.phantom import is_written

    return is_written(fs.local_path(folder), settings.phantom)


def _stored(store: SliceStore) -> Contents:
    pixels = store.column("height").astype(float) * store.column("width")
    train = store.column("split") == "train"
    labelled = int((train & store.column("labelled").astype(bool)).sum())
    counts = (len(store), float(pixels.sum()), int(train.sum()), float(pixels[train].sum()), labelled)
    validated, tested = ([v for v in store.volumes(split) if v.labelled] for split in ("validation", "test"))
    subjects = len({volume.subject for volume in tested})
    return Contents(*counts, known=True, tested=subjects, validated=len(validated), scored=len(tested))


def _headers(data: tuple[str, ...], settings: Settings) -> Contents:
    """The contents by the headers of the studies, as `ingest` would find and split them."""
    from storage.layouts import collect, splits

    subjects, skipped = collect(data, settings.layouts, settings.layout)
    read = fs.map_concurrently(data[0], _volumes, subjects)
    found = [(s, shapes) for s, shapes in zip(subjects, read, strict=True) if not isinstance(shapes, InputError)]
    unreadable = [skip.as_error() for skip in skipped] + [shapes for shapes in read if isinstance(shapes, InputError)]
    if not found and unreadable:
        first = unreadable[0]
        raise InputError(first.where, f"{first.problem} (no study can be read)", first.remedy)
    if not found:
        raise InputError(fs.base_name(data[0]), "has no study that can be read", "see `cardiomix inspect DATA`")
    entered = splits.assign([s for s, _ in found], settings.layouts)
    rows = [
        (z, z * h * w, s.split == "train", frame.mask is not None)
        for s, (_, shapes) in zip(entered, found, strict=True)
        for frame, (z, h, w) in zip(s.frames, shapes, strict=True)
    ]
    slices, pixels, train, labelled = (np.array(column) for column in zip(*rows, strict=True))
    return Contents(
        int(slices.sum()),
        float(pixels.sum()),
        int(slices[train].sum()),
        float(pixels[train].sum()),
        int(slices[train & labelled].sum()),
        False,
        tuple(unreadable),
        **_held_out(entered),
    )


def require_none_skipped(settings: Settings, contents: Contents) -> None:
    """Raises InputError for the first study that ingest would skip, as far as listings and headers can tell."""
    if contents.known and settings.data:
        contents = _headers(settings.data, settings)
    if contents.unreadable:
        raise contents.unreadable[0]


def _held_out(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The fields of `Contents` about subjects that are not trained on, and the groups."""
    return {
        "tested": sum(s.split == "test" and s.labelled for s in subjects),
        "validated": _labelled_volumes(subjects, "validation"),
        "scored": _labelled_volumes(subjects, "test"),
        "groups": _groups(subjects),
    }


def _groups(subjects: Sequence[Subject]) -> jobs.Groups:
    split_of = {s.subject: s.split for s in subjects}
    return jobs.Groups(
        frozenset(name for name, split in split_of.items() if split != "train"),
        frozenset(name for name, split in split_of.items() if split in ("test", "excluded")),
        frozenset(s.subject for s in subjects if s.split == "train" and not s.labelled),
    )


def _labelled_volumes(subjects: Iterable[Subject], split: str) -> int:
    return sum(frame.mask is not None for s in subjects if s.split == split for frame in s.frames)


def _volumes(subject: Subject) -> list[tuple[int, int, int]] | InputError:
    """(slices, height, width) of each frame, or why ingest would skip the subject, as far as headers can tell."""
    from storage.slices.frames import frame_shapes

    try:
        return frame_shapes(subject)
    except InputError as error:
        return InputError(f"{subject.subject}, {error.where}", error.problem, error.remedy)


def _planned(settings: Settings) -> Contents:
    """The contents of a phantom that is not drawn yet, as if all its volumes had the largest number of slices."""
    from pipeline.phantom.plan import codes, orders
    from storage.layouts import splits
    from storage.layouts.mnms import PARTS

    wanted, phantom = orders(settings.phantom), settings.phantom
    frames = phantom.frames if settings.layouts.frames == "all" else 2
    area, depth = PHANTOM_PIXELS * phantom.field_scale**2, phantom.slices[1]
    subjects = []
    for order, name in zip(wanted, codes(wanted, phantom.seed), strict=True):
        split, reason = PARTS[order.split.lower()]
        with_mask = [FrameSource(p, i, "", 0, "" if order.labelled else None, 0) for i, p in enumerate(("ED", "ES"))]
        without = [FrameSource("-", i, "", 0, None, None) for i in range(2, frames)]
        place = ("mnms", order.vendor, "")
        subjects.append(Subject(name, *place, (*with_mask, *without), split, reason, labels=(), terms=""))
    entered = splits.assign(subjects, settings.layouts)
    trained = [s for s in entered if s.split == "train"]
    slices, train = (len(of) * frames * depth for of in (subjects, trained))
    labelled = sum(frame.mask is not None for s in trained for frame in s.frames) * depth
    drawn = len(wanted) * depth * phantom.frames
    counts = (slices, slices * area, train, train * area, labelled)
    return Contents(*counts, known=False, drawn=drawn, **_held_out(entered))


def require_enough(run: str, settings: Settings, contents: Contents) -> None:
    """Check slices that are counted but not ingested yet, and a bank and a network from elsewhere against them.

    Raises InputError as the driver would after ingest: if the data are not enough for the arms, or the bank or the
    network has seen what it must not.
    """
    name = fs.base_name(run)
    if settings.pretrained is not None and contents.groups is not None:
        jobs.require_sdnet_may_train(settings.pretrained, contents.groups, settings.layouts)
    if settings.bank is not None and contents.groups is not None:
        bank = FactorBank.open(settings.bank)
        policies = {ARMS[arm].augmentation(settings.plan).fa_policy for arm in settings.arms if ARMS[arm].uses_bank}
        if policies:
            own_alone = policies == {"styles"}
            require_bank_may_train(bank, contents.groups.held_out, settings.layouts, settings.bank, own_alone)
        jobs.require_no_other_masks(bank, contents.groups)
    if not contents.validated:
        remedy = "see `cardiomix inspect`; add labelled subjects"
        raise InputError(name, "has no labelled validation subject to choose by", remedy)
    if not contents.labelled:
        raise InputError(name, "no labelled training slices", "ingest labelled subjects whose split is train")
    unlabelled = contents.train - contents.labelled

    def share_evenly(train: TrainConfig, semi_supervised: bool, batch_size: str) -> None:
        more = round(train.batch_size * settings.plan.unlabelled_ratio) if semi_supervised else 0
        require_even_shares(train.batch_size, more, settings.resources.train_workers, batch_size)

    if jobs.needs_sdnet(settings) and settings.pretrained is None and settings.bank is None:
        share_evenly(settings.pretrain, unlabelled > 0, "pretrain.batch_size")
    for arm in settings.arms:
        semi_supervised = ARMS[arm].semi_supervised
        if semi_supervised and settings.plan.unlabelled_ratio and not unlabelled:
            problem = "a semi-supervised arm needs unlabelled training slices"
            others = ",".join(a for a in settings.arms if not ARMS[a].semi_supervised)
            remedy = (
                f"add unlabelled subjects, or leave it out: --arms {others}" if others else "add unlabelled subjects"
            )
            raise InputError(f"arm {arm}", problem, remedy)
        share_evenly(settings.train, semi_supervised, "train.batch_size")


def _pretrain(run: str, settings: Settings, contents: Contents) -> Training:
    job = jobs.pretrain_job(run, settings) if contents.known else None
    whole = (PRETRAIN, settings.sdnet, settings.pretrain_loss, settings.pretrain)
    return _training("pretrain", job, *whole, contents, done=job is not None and job.finished())


def _bank(run: str, settings: Settings, contents: Contents, remade: bool) -> tuple[str, int]:
    bank = jobs.bank_uri(run, settings)
    if remade or not contents.known or not fs.exists(bank):
        anew = " anew, with the new SDNet" if fs.exists(bank) else ""
        return f"to do{anew}: {'' if contents.known else 'about '}{contents.train} slices", contents.train
    if jobs.stale_bank(run, settings):
        return f"made anew, it is of another SDNet, preprocessing or data: {contents.train} slices", contents.train
    opened = FactorBank.open(bank, partial=True)
    if jobs.bank_is_complete(run, settings):
        return f"done: {len(opened)} slices", 0
    there = sum(len(opened.shard_rows(shard)) for shard in opened.committed())
    return f"goes on after {there} of {contents.train} slices", contents.train - there


def _arms(run: str, settings: Settings, contents: Contents, new_sdnet: bool, new_bank: bool) -> list[Training]:
    ready = jobs.trainable_settings(run, settings) if contents.known else settings.model_copy(update={"arms": ()})
    if new_bank:
        ready = ready.model_copy(update={"arms": tuple(arm for arm in ready.arms if not ARMS[arm].uses_bank)})
    known = {r.label: r for r in jobs.arm_runs(run, ready)} if ready.arms else {}
    out = []
    for name in settings.arms:
        arm = ARMS[name]
        waits = new_sdnet and settings.train.start == "pretrained" and arm.network == "sdnet"
        for k in range(settings.seeds):
            label = f"{name}/seed{k}"
            run_of = None if waits else known.get(label)
            network = settings.unet if arm.network == "unet" else settings.sdnet
            what = (arm, network, settings.loss, settings.train, contents)
            done, job = run_of is not None and run_of.evaluated(), run_of.job if run_of else None
            training = _training(label, job, *what, done=done)
            before = fs.exists(fs.join(run, jobs.ARMS_FOLDER, name, f"seed{k}", DONE))
            if job is None and before:
                training = replace(training, state="made anew: what it is trained from will be new")
            elif run_of is not None and not done and run_of.failure():
                training = replace(training, state=f"{training.state}; the last try failed: {run_of.failure()}")
            out.append(training)
    return out


def _training(
    label: str,
    job: TrainJob | None,
    arm: ArmConfig,
    network: UNetConfig | SDNetConfig,
    loss: LossConfig,
    train: TrainConfig,
    contents: Contents,
    done: bool,
) -> Training:
    per_epoch = train.steps_per_epoch or -(-contents.labelled // train.batch_size)
    if done:
        return Training(label, "done", arm, network, loss, train, 0, job)
    if job is not None and job.finished():
        return Training(label, "trained, not evaluated", arm, network, loss, train, 0, job)
    reached = len(read_history(job)) if job is not None and fs.exists(job.checkpoint) else 0
    state = f"{train.epochs} epochs of {per_epoch} steps"
    if reached:
        state = f"goes on after epoch {reached} of {train.epochs}"
    elif job is not None and job.replaces_a_result():
        state = f"made anew, its configuration or data are others now: {state}"
    else:
        state = f"to do: {state}"
    return Training(
        label, state, arm, network, loss, train, per_epoch * (train.epochs - reached), job, train.epochs - reached
    )
