"""The definition of an arm's stream of samples, and the checks that data and bank can provide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipeline.samples.appearance import NNUNET, Appearance
from pipeline.samples.plan import PlanConfig, StepPlan, Stream, StreamSpec
from pipeline.samples.preprocess import PreprocessConfig
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.bank.styles import different_donors, donor_texts
from storage.errors import InputError
from storage.identity import added, identity
from storage.layouts import LayoutOptions
from storage.layouts.protocols import excludes_from_training
from storage.parquet import different_texts
from storage.slices.store import SliceStore

# A slice's own grid, in pixels and mm: columns of the slice store, and those of a bank's index.
NATIVE_GRID: Final = {
    "height": "native_height",
    "width": "native_width",
    "row_mm": "native_row_mm",
    "col_mm": "native_col_mm",
}


class StreamConfig(BaseModel):
    """All that defines an arm's stream: data, augmentation and seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    bank: str | None
    bank_name: str | None = added(None)  # `name_of_banks` when the job was made; None: not checked
    sdnet: str | None = None  # folder of the bank's SDNet, for the guard `reencoding` (`PlanConfig.fa_guard`)
    preprocess: PreprocessConfig
    plan: PlanConfig
    seed: int
    semi_supervised: bool
    ra: bool
    fa: bool
    batch_size: int
    appearance: Appearance = "none"
    donors: str | None = added(None)  # another bank, whose codes are used instead of those of `bank`
    twins: bool = False  # a second image of each unlabelled sample, with another modality or look

    @property
    def uses_bank(self) -> bool:
        """Whether the stream reads a factor bank, to draw images or to take regions from anatomies."""
        return self.fa or self.plan.fa_regions == "anatomy"

    @property
    def unlabelled_per_step(self) -> int:
        """The number of unlabelled samples of a step, beside `batch_size` labelled ones, over all workers."""
        return round(self.batch_size * self.plan.unlabelled_ratio) if self.semi_supervised else 0

    @property
    def samples_per_step(self) -> int:
        """The number of labelled and unlabelled samples of a step, over all workers."""
        return self.batch_size + self.unlabelled_per_step


def step_plan(config: StreamConfig, store: SliceStore, bank: FactorBank | None = None) -> StepPlan:
    """The plan over the store's training slices.

    Modality donors are the rows of the bank (of `config.donors`, if set) and its imported styles; for the policy
    `styles`, the imported styles alone. Raises InputError if a pool or donors that the arm needs are lacking, or a
    package is not installed.
    """
    if config.appearance in NNUNET and find_spec("batchgeneratorsv2") is None:
        raise InputError(config.run, "nnU-Net's transforms need batchgeneratorsv2", "pip install 'cardiomix[nnunet]'")
    train = store.column("split") == "train"
    labelled_mask = store.column("labelled").astype(bool)
    vendors = store.column("vendor")
    labelled, unlabelled = np.flatnonzero(train & labelled_mask), np.flatnonzero(train & ~labelled_mask)
    if not len(labelled):
        raise InputError(config.run, "no labelled training slices", "ingest labelled subjects whose split is train")
    per_step = config.unlabelled_per_step
    if per_step and not len(unlabelled):
        raise InputError(
            config.run,
            "a semi-supervised arm needs unlabelled training slices",
            "add unlabelled subjects or leave it out",
        )
    lender = donor_bank(config, bank)
    donor_vendors = donor_texts(lender, "vendor") if lender is not None and config.fa else None
    own = config.fa and config.plan.fa_policy == "own"
    rows = rows_of(bank.index, store.table) if bank is not None and own else None
    # imported donors follow the rows of the bank
    first_imported = len(lender) if lender is not None and config.plan.fa_policy == "styles" else 0
    if donor_vendors is not None and first_imported == len(donor_vendors):
        raise InputError(config.run, "the bank has no imported styles", "run `cardiomix bank import-styles`")

    looks = config.plan.fa_regions != "none" or config.appearance != "none"  # a twin gets a look of its own

    def stream(name: str, pool: npt.NDArray[np.int64], fa: bool = True, ra: bool = True) -> Stream:
        spec = StreamSpec(
            config.seed,
            name,
            pool,
            fa_share=config.plan.fa_share if donor_vendors is not None and fa else 0.0,
            ra_range=config.plan.area_range_mm2 if config.ra and ra else None,
            pairs=config.plan.pairs,
            donors=np.arange(first_imported, len(donor_vendors)) if donor_vendors is not None else None,
            donor_vendors=donor_vendors[first_imported:] if donor_vendors is not None else None,
            pool_vendors=vendors[pool],
            flips=config.plan.flips,
            policy=config.plan.fa_policy,
            own_bank_rows=rows[pool] if rows is not None else None,
            style_sources=np.flatnonzero(train) if config.appearance != "none" else None,
            style_vendors=vendors[train] if config.appearance == "histogram" else None,
            twins=config.twins and fa and (donor_vendors is not None or looks),
            steps=config.plan.fa_step if donor_vendors is not None else (1.0, 1.0),
            seeded=config.plan.fa_regions != "none" or (config.twins and looks),
            turn_degrees=config.plan.turn_degrees,
            zoom=config.plan.zoom,
            bends=config.plan.elastic > 0,
        )
        return Stream(spec)

    return StepPlan(
        stream("labelled", labelled),
        stream("unlabelled", unlabelled, config.plan.fa_anatomy == "any", config.plan.ra_unlabelled)
        if per_step
        else None,
        config.batch_size,
        per_step,
    )


def open_bank(
    config: StreamConfig, store: SliceStore, open_at: Callable[[str], FactorBank] = FactorBank.open
) -> FactorBank | None:
    """Open the bank of an arm and check it against the run. None if the arm uses no bank.

    `open_at` opens a complete bank, or returns one that is already open. Raises InputError if

    - no bank is configured, it was made with another preprocessing, or it lacks one of the run's training slices;
    - it holds a subject that the run validates or tests on, or excludes;
    - it holds a vendor that the run's protocol keeps out (with `fa_policy=styles`, imported styles may be of it);
    - one of the last two holds for the bank `donors`, or another preprocessing or SDNet made that bank;
    - a bank has changed since the job was made.
    """
    if not config.uses_bank:
        return None
    if config.bank is None:
        raise InputError(config.run, "an arm with FA needs a factor bank", "run `cardiomix extract`, or pass --bank")
    bank = open_at(config.bank)
    if bank.spec.preprocess != identity(config.preprocess):
        raise InputError(
            config.bank,
            "was made with another preprocessing",
            f"use --set preprocess… as in the bank: {bank.spec.preprocess}",
        )
    _require_may_train(config, store, bank, config.bank)
    missing = len(missing_of_training(store, bank))
    if missing:
        raise InputError(
            config.bank,
            f"lacks {missing} of the run's training slices, or has others of the same names",
            "run `cardiomix extract`; or pass the SDNet that filled the bank too, with --sdnet: the run's slices are "
            "then encoded, and the bank gives the modalities",
        )
    if config.donors is not None:
        lender = open_at(config.donors)
        for what in ("preprocess", "sdnet_fingerprint"):
            if getattr(lender.spec, what) != getattr(bank.spec, what):
                raise InputError(config.donors, f"was made with another {what}", "codes of two networks do not mix")
        _require_may_train(config, store, lender, config.donors)
    if config.bank_name not in (None, name_of_banks(config, bank)):
        remedy = "give the same command again: the arm is then trained anew"
        raise InputError(config.bank, "is another bank now than when the arm began", remedy)
    return bank


def name_of_banks(config: StreamConfig, bank: FactorBank) -> str:
    """The fingerprint of an arm's bank. If codes come from another bank, `+` and its fingerprint follow."""
    if config.donors is None:
        return bank.fingerprint
    return f"{bank.fingerprint}+{FactorBank.open(config.donors).fingerprint}"


def donor_bank(config: StreamConfig, bank: FactorBank | None) -> FactorBank | None:
    """The bank that gives the codes for drawing: `config.donors` if set, else `bank`."""
    return FactorBank.open(config.donors) if config.donors is not None else bank


def training_terms(config: StreamConfig, store: SliceStore) -> list[str]:
    """The terms of all data that the stream's samples are made from: the training slices, and the donors of FA."""
    terms = set(store.texts("terms", store.column("split") == "train"))
    if config.fa and config.bank is not None:
        lender = donor_bank(config, FactorBank.open(config.bank))
        terms |= set(different_donors(lender, "terms") if lender is not None else ())
    return sorted(terms)


def _require_may_train(config: StreamConfig, store: SliceStore, bank: FactorBank, where: str) -> None:
    held_out = store.texts("subject", store.column("split") != "train")
    own_alone = config.plan.fa_policy == "styles"
    require_bank_may_train(bank, held_out, store.layouts or LayoutOptions(), where, own_alone)


def require_bank_may_train(
    bank: FactorBank, held_out: Iterable[str], protocol: LayoutOptions, where: str, own_alone: bool = False
) -> None:
    """Raise InputError if a run must not train on this bank.

    That is so if it holds a subject of `held_out` (those that the run validates or tests on, or excludes), or a vendor
    that the protocol keeps out. With `own_alone`, imported styles may be of such a vendor.
    """
    leaked = sorted(set(held_out).intersection(different_donors(bank, "subject")))
    if leaked:
        raise InputError(
            where,
            f"holds {leaked[0]}, which this run validates or tests on, or excludes",
            "use a bank made without these subjects",
        )
    vendors = different_texts(bank.index["vendor"]) if own_alone else different_donors(bank, "vendor")
    forbidden = [vendor for vendor in vendors if excludes_from_training(protocol, vendor)]
    if forbidden:
        raise InputError(
            where,
            f"holds vendor {forbidden[0]}, which may not train under {protocol.protocol_label}",
            "use a bank, and styles, without this vendor",
        )


def missing_of_training(store: SliceStore, bank: FactorBank) -> npt.NDArray[np.int64]:
    """The ids (n,) of a store's training slices that a bank lacks.

    A slice of the same name but with another number or size of native pixels is another slice: hospitals number their
    patients alike.
    """
    train = np.flatnonzero(store.column("split") == "train")
    rows = rows_of(bank.index, store.table)[train]
    same = rows >= 0
    for ours, theirs in NATIVE_GRID.items():
        seen = bank.index[theirs].to_numpy()
        same[same] = np.isclose(store.column(ours)[train[same]], seen[rows[same]], rtol=1e-4)
    return train[~same]
