"""Make training jobs from settings and a run folder, and check that data, bank and SDNet allow them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from actors.stages import ArmRun
from actors.train_job import TrainJob
from experiments.arms import ARMS, PRETRAIN
from experiments.config import Settings
from pipeline.networks.description import CONFIG as MODEL
from pipeline.networks.description import read_config, sdnet_fingerprint, subject_key, vendors_seen
from pipeline.samples.plan import require_even_shares
from pipeline.samples.stream_config import StreamConfig, missing_of_training, name_of_banks, open_bank, step_plan
from pipeline.training.config import ArmConfig, LossConfig, TrainConfig
from storage import fs
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.errors import InputError
from storage.identity import identity
from storage.layouts import LayoutOptions
from storage.layouts.protocols import excludes_from_training
from storage.parquet import different_texts
from storage.slices.store import TABLE, SliceStore

SDNET, BANK, ARMS_FOLDER = "sdnet", "bank.zarr", "arms"


def bank_uri(run: str, settings: Settings) -> str:
    """The bank with the factors of the run's slices: the run's own, or the one that it reuses."""
    return settings.bank if settings.bank and not borrows_donors(run, settings) else fs.join(run, BANK)


def borrows_donors(run: str, settings: Settings) -> bool:
    """Whether a bank from elsewhere gives only its modalities, and the run encodes its slices into a bank of its own.

    That is so if a bank and the SDNet that filled it are given, and the bank lacks some of the run's training slices.
    """
    if not (settings.bank and settings.pretrained and fs.exists(fs.join(run, TABLE))):
        return False
    return len(missing_of_training(SliceStore.open(run), FactorBank.open(settings.bank))) > 0


def makes_bank(run: str, settings: Settings) -> bool:
    """Whether the run extracts a bank of its own."""
    return settings.bank is None or borrows_donors(run, settings)


def sdnet_uri(run: str, settings: Settings) -> str:
    """The folder of the pretrained SDNet: the one given, or the run's own."""
    return settings.pretrained or fs.join(run, SDNET)


def split_options_of(run: str, settings: Settings) -> LayoutOptions:
    """The options by which the run's slices were split; those of the settings if the slices do not say."""
    return SliceStore.open(run).layouts or settings.layouts


def require_split_by(run: str, settings: Settings) -> None:
    """Raises InputError if the run's slices were split by other options than the settings'."""
    made, wanted = (options.model_dump() for options in (split_options_of(run, settings), settings.layouts))
    others = [f"layouts.{name}={made[name]}, not {wanted[name]}" for name in made if made[name] != wanted[name]]
    if others:
        problem = f"its slices were split by {' and '.join(others)}"
        raise InputError(fs.base_name(run), problem, "run `cardiomix ingest` again, with the same --set")


def _stream(run: str, settings: Settings, arm: ArmConfig, train: TrainConfig, seed: int) -> StreamConfig:
    augmentation = arm.augmentation(settings.plan)
    judged = arm.fa and augmentation.guard == "reencoding"
    lent = arm.fa and augmentation.fa_policy != "own"  # a slice's own code is in the run's bank
    return StreamConfig(
        run=run,
        bank=bank_uri(run, settings) if arm.uses_bank else None,
        donors=settings.bank if lent and borrows_donors(run, settings) else None,
        sdnet=sdnet_uri(run, settings) if judged else None,
        preprocess=settings.preprocess,
        plan=augmentation,
        seed=seed,
        semi_supervised=arm.semi_supervised,
        ra=arm.ra,
        fa=arm.fa,
        batch_size=train.batch_size,
        appearance=arm.appearance,
        twins=arm.consistency,
    )


def _job(
    run: str,
    settings: Settings,
    name: str,
    arm: ArmConfig,
    loss: LossConfig,
    train: TrainConfig,
    seed: int,
    out: str,
    store: SliceStore,
    open_at: Callable[[str], FactorBank] = FactorBank.open,
) -> TrainJob:
    stream = _stream(run, settings, arm, train, seed)
    bank = open_bank(stream, store, open_at)
    fingerprint = name_of_banks(stream, bank) if bank else None
    start = sdnet_uri(run, settings) if train.start == "pretrained" and arm.network == "sdnet" else None
    return TrainJob(
        name=name,
        out=out,
        network=settings.unet if arm.network == "unet" else settings.sdnet,
        stream=stream.model_copy(update={"bank_name": fingerprint}),
        loss=loss,
        train=train,
        workers=settings.resources.train_workers,
        bank_fingerprint=fingerprint,
        start=start,
        start_fingerprint=sdnet_fingerprint(start) if start else None,
        data_fingerprint=store.fingerprint,
    )


def with_finished(run: str, settings: Settings) -> Settings:
    """The settings, their arms followed by all others that the run holds trained and scored with this configuration.

    So an arm that `train` or an earlier `--arms` trained keeps its place in the report.
    """
    folders = fs.list_names(fs.join(run, ARMS_FOLDER)) if fs.exists(fs.join(run, ARMS_FOLDER)) else []
    others = tuple(arm for arm in ARMS if arm in folders and arm not in settings.arms)
    try:
        known = arm_runs(run, trainable_settings(run, settings.model_copy(update={"arms": others}))) if others else []
    except InputError:  # their bank is of an earlier SDNet or damaged: nothing made with it is of this configuration
        return settings
    finished = {each.arm for each in known if each.evaluated()}
    return settings.model_copy(update={"arms": (*settings.arms, *(arm for arm in others if arm in finished))})


def arm_stream(run: str, settings: Settings, arm: str) -> StreamConfig:
    """The stream of samples on which an arm's first replicate trains."""
    return _stream(run, settings, ARMS[arm], settings.train, settings.seed)


def pretrain_job(run: str, settings: Settings) -> TrainJob:
    """The training of the SDNet that fills the bank. It is fully supervised if no training slice is unlabelled."""
    store = SliceStore.open(run)
    unlabelled = bool(((store.column("split") == "train") & ~store.column("labelled").astype(bool)).any())
    arm = PRETRAIN.model_copy(update={"semi_supervised": unlabelled})
    out = fs.join(run, SDNET)
    return _job(run, settings, "pretrain", arm, settings.pretrain_loss, settings.pretrain, settings.seed, out, store)


def arm_runs(run: str, settings: Settings) -> list[ArmRun]:
    """Every arm and replicate of the settings, in their order.

    Raises InputError if an arm needs a bank, and the bank is absent, incomplete, made with an earlier SDNet, or does
    not fit the run (see `open_bank`).
    """
    if needs_bank(settings) and stale_bank(run, settings):
        raise InputError(BANK, "is of an earlier SDNet, preprocessing or data", "run `cardiomix extract --run RUN`")
    store, open_at, runs = SliceStore.open(run), cache(FactorBank.open), []
    for arm in settings.arms:
        for k in range(settings.seeds):
            out = fs.join(run, ARMS_FOLDER, arm, f"seed{k}")
            job = _job(
                run, settings, arm, ARMS[arm], settings.loss, settings.train, settings.seed + k, out, store, open_at
            )
            runs.append(ArmRun(arm, k, job))
    return runs


def require_trainable(run: str, settings: Settings) -> None:
    """Check, before hours are spent, that the run's data can train these arms.

    Raises InputError if there is no labelled validation volume to choose weights by, an arm has nothing to train on,
    the train workers cannot share a step evenly, or as `require_plan_fits_arms` does. If an arm needs the SDNet, also
    as `check_pretrained` does.
    """
    require_plan_fits_arms(settings)
    store = SliceStore.open(run)
    if not any(volume.labelled for volume in store.volumes("validation")):
        raise InputError(
            fs.base_name(run),
            "has no labelled validation subject to choose by",
            "see splits.csv; add labelled subjects",
        )
    if needs_sdnet(settings):
        check_pretrained(run, settings)
    if needs_sdnet(settings) and settings.pretrained is None and settings.bank is None:
        require_pretraining_shared(pretrain_job(run, settings), settings, store)
    for name in settings.arms:
        stream = _stream(run, settings, ARMS[name], settings.train, settings.seed)
        try:
            step = step_plan(stream, store)
        except InputError as error:
            raise InputError(f"arm {name}", error.problem, error.remedy) from error
        require_even_shares(step.labelled_per_step, step.unlabelled_per_step, settings.resources.train_workers)


def require_plan_fits_arms(settings: Settings) -> None:
    """Raises InputError, naming the arm, if the plan would spoil an arm's samples (`ArmConfig.conflict`).

    A run that was trained so by an earlier version can still be opened, so the configuration itself does not refuse.
    """
    for arm in settings.arms:
        problem = ARMS[arm].conflict(settings.plan)
        if problem:
            raise InputError(f"arm {arm}", problem, "change the plan, or leave the arm out")


def require_pretraining_shared(job: TrainJob, settings: Settings, store: SliceStore) -> None:
    """Raises InputError unless the train workers share a step of the pretraining evenly."""
    step = step_plan(job.stream, store)
    workers = settings.resources.train_workers
    require_even_shares(step.labelled_per_step, step.unlabelled_per_step, workers, "pretrain.batch_size")


def check_pretrained(run: str, settings: Settings) -> None:
    """Check that an SDNet from elsewhere may fill this run's bank.

    Raises InputError if it was trained with another preprocessing, if it did not fill the bank whose modalities are
    borrowed, or as `require_sdnet_may_train` does.
    """
    if settings.pretrained is None:
        return
    document, where = read_config(settings.pretrained), fs.base_name(settings.pretrained)
    if document["preprocess"] != identity(settings.preprocess):
        raise InputError(
            where, "was trained with another preprocessing", f"set preprocess as it was: {document['preprocess']}"
        )
    if borrows_donors(run, settings):
        from pipeline.factors.names import factors_name

        made_by = FactorBank.open(str(settings.bank)).spec.sdnet_fingerprint
        if factors_name(sdnet_fingerprint(settings.pretrained), settings.bank_precision) != made_by:
            remedy = f"give the one with fingerprint {made_by}, and bank_precision as it was"
            raise InputError(where, f"is not the SDNet that filled {fs.base_name(str(settings.bank))}", remedy)
    require_sdnet_may_train(settings.pretrained, groups_of(SliceStore.open(run)), split_options_of(run, settings))


@dataclass(frozen=True)
class Groups:
    """Subjects of a run. held_out: not trained on. kept_out: those of them that are tested on or excluded.
    without_masks: trained on without any mask."""

    held_out: frozenset[str]
    kept_out: frozenset[str]
    without_masks: frozenset[str]


def groups_of(store: SliceStore) -> Groups:
    """The groups of a store's subjects."""
    split, labelled = store.column("split"), store.column("labelled").astype(bool)
    train = split == "train"
    return Groups(
        frozenset(store.texts("subject", ~train)),
        frozenset(store.texts("subject", (split == "test") | (split == "excluded"))),
        frozenset(store.texts("subject", train)).difference(store.texts("subject", train & labelled)),
    )


def require_sdnet_may_train(folder: str, groups: Groups, protocol: LayoutOptions) -> None:
    """Raises InputError if an SDNet from elsewhere was trained on a subject that is kept out, on masks of a subject
    that this run trains on without masks, or on a vendor that the protocol keeps out."""
    document, where = read_config(folder), fs.base_name(folder)
    trained_on = set(document.get("trained_on", ()))
    seen = sorted(name for name in groups.kept_out if subject_key(name) in trained_on)
    if seen:
        problem = f"was trained on {seen[0]}, which this run tests on or excludes"
        raise InputError(where, problem, "pretrain without these subjects")
    _require_no_other_masks(groups, set(document.get("masks_of", ())), where)
    forbidden = [vendor for vendor in vendors_seen(document) if excludes_from_training(protocol, vendor)]
    if forbidden:
        problem = f"was trained on vendor {forbidden[0]}, which may not train under {protocol.protocol_label}"
        raise InputError(where, problem, "pretrain without this vendor")


def require_bank_without_other_masks(run: str, settings: Settings) -> None:
    """Raises InputError if a bank from elsewhere holds masks of subjects that this run trains on without masks."""
    if settings.bank is not None:
        require_no_other_masks(FactorBank.open(settings.bank), groups_of(SliceStore.open(run)))


def require_no_other_masks(bank: FactorBank, groups: Groups) -> None:
    """As `require_bank_without_other_masks`, for an open bank and known groups."""
    masks_of = set(map(subject_key, different_texts(bank.index["subject"].filter(bank.index["labelled"]))))
    _require_no_other_masks(groups, masks_of, fs.base_name(bank.uri))


def _require_no_other_masks(groups: Groups, masks_of: set[str], where: str) -> None:
    """Raises InputError if `masks_of` has a subject that the run trains on without masks.

    An SDNet that has learned from such masks passes them on through its anatomy, which would look like a gain.
    """
    leaked = sorted(name for name in groups.without_masks if subject_key(name) in masks_of)
    if leaked:
        raise InputError(
            where,
            f"learned from masks of {len(leaked)} subjects that this run trains on without, such as {leaked[0]}",
            "its anatomy would hand these masks on: pretrain within this run",
        )


def bank_is_complete(run: str, settings: Settings) -> bool:
    """Whether the bank for FA is there, complete, of the run's preprocessing, and with all its training slices."""
    bank = bank_uri(run, settings)
    if not fs.exists(bank):
        return False
    opened = FactorBank.open(bank, partial=True)
    whole = opened.is_complete() and opened.spec.preprocess == identity(settings.preprocess)
    return whole and not len(missing_of_training(SliceStore.open(run), opened))


def trainable_settings(run: str, settings: Settings) -> Settings:
    """The settings without those arms whose bank, or whose SDNet to start from, is not there yet."""
    bank = not needs_bank(settings) or bank_is_complete(run, settings)
    sdnet = not starts_from_sdnet(settings) or fs.exists(fs.join(sdnet_uri(run, settings), MODEL))
    arms = [
        arm for arm in settings.arms if (bank or not ARMS[arm].uses_bank) and (sdnet or ARMS[arm].network == "unet")
    ]
    # not validated again, because no arm may be left
    return settings.model_copy(update={"arms": tuple(arms)})


def stale_bank(run: str, settings: Settings) -> bool:
    """Whether the run's own bank was made with another SDNet or preprocessing than the run has now, or holds slices
    that the run no longer trains on. A bank that lacks slices is not stale: an extraction appends them."""
    from pipeline.factors.names import factors_name

    bank = fs.join(run, BANK)
    if not makes_bank(run, settings) or not fs.exists(bank):
        return False
    opened = FactorBank.open(bank, partial=True)
    made_by = factors_name(sdnet_fingerprint(sdnet_uri(run, settings)), settings.bank_precision)
    return (
        opened.spec.sdnet_fingerprint != made_by
        or opened.spec.preprocess != identity(settings.preprocess)
        or _holds_others(opened, SliceStore.open(run))
    )


def _holds_others(bank: FactorBank, store: SliceStore) -> bool:
    """Whether a bank has slices that are not training slices of a store."""
    rows = rows_of(store.table, bank.index)
    return bool((rows < 0).any() or (store.column("split")[rows] != "train").any())


def needs_sdnet(settings: Settings) -> bool:
    """Whether any arm needs the pretrained SDNet: for its bank, or to start from it."""
    return starts_from_sdnet(settings) or needs_bank(settings)


def starts_from_sdnet(settings: Settings) -> bool:
    """Whether any arm starts with the weights of the pretrained SDNet."""
    return settings.train.start == "pretrained" and any(ARMS[arm].network == "sdnet" for arm in settings.arms)


def needs_bank(settings: Settings) -> bool:
    """Whether any arm makes samples from the bank's factors."""
    return any(ARMS[arm].uses_bank for arm in settings.arms)
