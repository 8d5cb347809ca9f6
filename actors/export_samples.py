"""Write the stream's samples (FA, then RA) to disk with Ray actors, for trainings elsewhere.

Every file appears whole or not at all, and depends on its samples alone. So an export that was interrupted continues
where it stopped, and its bytes are the same for any number of actors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from actors.crew import Crew
from actors.pool import Pool
from actors.progress import Progress
from actors.waiting import PATIENCE, Patience
from pipeline.samples.maker import SampleMaker
from pipeline.samples.plan import Sample, StepPlan
from pipeline.samples.stream_config import (
    StreamConfig,
    donor_bank,
    name_of_banks,
    open_bank,
    step_plan,
    training_terms,
)
from storage import fs
from storage.bank.styles import donor_texts
from storage.csv_table import csv_text
from storage.errors import InputError
from storage.identity import identity
from storage.nifti import nnunet
from storage.slices.store import SAMPLES_LAYOUT, SliceStore
from storage.slices.writer import StoredSubject, SubjectArrays, finalise, write_made
from storage.subjects import Subject

Format = Literal["nnunet", "slices"]

REQUEST, SAMPLES = "export.json", "samples.csv"
UNIT: Final = 64  # samples that an actor makes in one call
STEPS: Final = 32767  # the int16 value that stands for an intensity of 1


@dataclass(frozen=True)
class PlannedSample:
    """One sample of an export: its number, its plan, and whether its mask may be used."""

    number: int
    sample: Sample
    labelled: bool


@dataclass(frozen=True)
class ExportChunk:
    """Samples that are written in one call. In a slice store they share a vendor; for nnU-Net `vendor` is empty."""

    name: str
    vendor: str
    samples: tuple[PlannedSample, ...]


def export(
    stream: StreamConfig,
    out: str,
    kind: Format,
    samples: int,
    *,
    actors: int = 1,
    cpus: float = 0.25,
    progress: Progress | None = None,
    patience: Patience = PATIENCE,
) -> int:
    """Write the first `samples` samples of a stream to the folder `out`. Returns their number. Ray must be initialised.

    `nnunet`: labelled samples only, as a raw data set of nnU-Net v2 with one case per slice. `slices`: labelled and
    unlabelled samples as the stream mixes them, as a slice store. `samples.csv` says what each sample was made from;
    its vendor is the donor's if FA drew the image. `progress` is called with ("", samples done, samples in all).
    Raises InputError if `out` holds something else, or if nnU-Net would learn from masks in which some structure is not
    drawn; StageError if a unit cannot be made, or no node has room for an actor.
    """
    if kind == "nnunet":
        nnunet.check_name(out)
    places = {name: getattr(stream, name) for name in ("run", "bank", "sdnet", "donors")}
    stream = stream.model_copy(update={name: place and fs.absolute(place) for name, place in places.items()})
    out = fs.absolute(out)
    store = SliceStore.open(stream.run)
    if kind == "nnunet":
        _require_all_drawn(store)
    bank = open_bank(stream, store)
    planned = _planned(step_plan(stream, store, bank), samples, labelled_alone=kind == "nnunet")
    lender = donor_bank(stream, bank)
    donors = donor_texts(lender, "vendor") if lender is not None and stream.fa else None
    vendors = [_vendor(p.sample, store, donors) for p in planned]
    named = name_of_banks(stream, bank) if bank is not None else None
    request = {"format": kind, "samples": samples, "stream": _identity(stream), "bank": named}
    _begin(out, request)
    units = _units(planned, vendors, together=kind == "nnunet")
    _run((stream, out, kind), units, actors, cpus, progress, patience)
    fs.write_text(fs.join(out, SAMPLES), _samples_csv(planned, vendors, store))
    terms = "; ".join(training_terms(stream, store))
    if kind == "nnunet":
        groups = [(_case(p.number), str(store.column("subject")[p.sample.slice_id])) for p in planned]
        about = f"{samples} slices with factor-based and resolution augmentation (Liu et al. 2020), made by cardiomix"
        nnunet.write_dataset(out, groups, about, terms)
    else:
        subjects = [_subject(unit, terms) for unit in units]
        stored = {unit.name: write_made(out, unit.name, _source(unit, out), _absent) for unit in units}
        finalise(out, stored, [], subjects)
    return len(planned)


def _require_all_drawn(store: SliceStore) -> None:
    partly = (store.column("split") == "train") & store.column("labelled") & ~store.drawn.all(axis=1)
    if partly.any():
        subject = store.column("subject")[partly][0]
        raise InputError(
            f"{subject}",
            "has masks in which some structure is not drawn, and nnU-Net would learn it as background",
            "ingest without such subjects, or export --format slices, whose index says what is drawn",
        )


class _Exporter:
    """The object in an export actor: it makes and writes whole units."""

    def __init__(self, stream: StreamConfig, out: str, kind: Format) -> None:
        self.maker, self.out, self.kind = SampleMaker(stream), out, kind
        self.there = nnunet.cases(out) if kind == "nnunet" else set()

    def write(self, unit: ExportChunk) -> int:
        """Make and write the samples of a unit that are not there yet. Returns the number of all its samples."""
        if self.kind == "nnunet":
            self._cases(unit)
        else:
            write_made(self.out, unit.name, _source(unit, self.out), lambda: self._made(unit))
        return len(unit.samples)

    def _cases(self, unit: ExportChunk) -> None:
        for planned in unit.samples:
            if _case(planned.number) not in self.there:
                image, mask = self.maker.make(planned.sample)
                nnunet.write_case(self.out, _case(planned.number), image, mask, self._spacing(planned.sample))

    def _made(self, unit: ExportChunk) -> SubjectArrays:
        images, masks, facts, digests = [], [], [], []
        for planned in unit.samples:
            image, mask = self.maker.make(planned.sample)
            images.append(np.rint(image * STEPS).astype(np.int16))
            masks.append(mask if planned.labelled else np.zeros_like(mask))
            facts.append(self._facts(planned, image.shape))
            digests.append(hashlib.sha256(images[-1].tobytes()).hexdigest())
        return SubjectArrays(np.stack(images), np.stack(masks), StoredSubject(tuple(facts), tuple(digests)))

    def _facts(self, planned: PlannedSample, shape: tuple[int, ...]) -> dict[str, Any]:
        """The sample's facts in a slice store.

        Every normalisation by these volume statistics leaves the image unchanged; `statistics=slice` ignores them.
        """
        slice_mm, row_mm, col_mm = self._spacing(planned.sample)
        config = self.maker.config.preprocess
        store = self.maker.store
        told = store.partly_labelled and planned.labelled
        drawn = {"structures": str(store.column("structures")[planned.sample.slice_id])} if told else {}
        return drawn | {
            "phase": str(self.maker.store.column("phase")[planned.sample.slice_id]),
            "frame": planned.number,
            "slices": 1,
            "height": shape[0],
            "width": shape[1],
            "slice_mm": slice_mm,
            "row_mm": row_mm,
            "col_mm": col_mm,
            "pixel_area_mm2": row_mm * col_mm,
            "labelled": planned.labelled,
            "scale": 1.0 / STEPS,
            "offset": 0.0,
            "volume_mean": 0.0,
            "volume_std": 1.0 / config.clip_sigma,
            "volume_min": -1.0,
            "volume_max": 1.0,
            "volume_p005": -1.0,
            "volume_p995": 1.0,
        }

    def _spacing(self, sample: Sample) -> tuple[float, float, float]:
        """Spacing (slice, row, column) of the sample in mm. Its pixels are square."""
        side = float(np.sqrt(self.maker.pixel_area(sample)))
        return float(self.maker.store.column("slice_mm")[sample.slice_id]), side, side


def _run(
    arguments: tuple[StreamConfig, str, Format],
    units: list[ExportChunk],
    actors: int,
    cpus: float,
    progress: Progress | None,
    patience: Patience,
) -> None:
    """Have a pool of actors write the units."""
    total, done = sum(len(unit.samples) for unit in units), 0
    crew = Crew[ExportChunk](
        stage="export",
        what="an export actor",
        make=_Exporter,
        arguments=arguments,
        method="write",
        size=min(actors, len(units)),
        cpus=cpus,
        named=lambda unit: unit.name,
        remedy="lower resources.extract_actors, or use a machine with more memory",
    )
    with Pool(crew, patience) as pool:
        for _, count in pool.run(units):
            done += count
            if progress is not None:
                progress("", done, total)


def _planned(steps: StepPlan, count: int, labelled_alone: bool) -> list[PlannedSample]:
    if labelled_alone:
        return [PlannedSample(i, steps.labelled(i), True) for i in range(count)]
    out: list[PlannedSample] = []
    step = 0
    while len(out) < count:
        out += [
            PlannedSample(len(out) + k, sample, labelled) for k, (sample, labelled) in enumerate(steps.samples(step))
        ]
        step += 1
    return out[:count]


def _units(planned: list[PlannedSample], vendors: list[str], together: bool) -> list[ExportChunk]:
    """Groups of at most `UNIT` samples, in order. Without `together`, a group holds samples of one vendor only."""
    groups: dict[str, list[PlannedSample]] = {}
    for one, vendor in zip(planned, vendors, strict=True):
        groups.setdefault("" if together else vendor, []).append(one)
    return [
        ExportChunk(f"samples-{vendor}-{i // UNIT:05d}", vendor, tuple(group[i : i + UNIT]))
        for vendor, group in sorted(groups.items())
        for i in range(0, len(group), UNIT)
    ]


def _vendor(sample: Sample, store: SliceStore, donors: npt.NDArray[np.str_] | None) -> str:
    """The vendor whose scanner the image looks like: the donor's for FA, else the slice's own."""
    if sample.donor_id is not None and donors is not None:
        return str(donors[sample.donor_id])
    return str(store.column("vendor")[sample.slice_id])


def _begin(out: str, request: dict[str, Any]) -> None:
    """Write to the folder what it will hold. Raises InputError if it holds something else already."""
    path, text = fs.join(out, REQUEST), json.dumps(request, sort_keys=True)
    if fs.exists(path):
        if fs.read_text(path) != text:
            raise InputError(fs.base_name(out), "holds another export", "name a new folder")
    elif fs.exists(out) and fs.list_names(out):
        raise InputError(fs.base_name(out), "is not empty", "name a new folder")
    else:
        fs.write_text(path, text)


def _identity(stream: StreamConfig) -> dict[str, Any]:
    return identity(stream, exclude={"run", "bank", "sdnet", "donors"})


def _source(unit: ExportChunk, out: str) -> str:
    request = fs.read_text(fs.join(out, REQUEST))
    return hashlib.sha256(f"{request}\0{_text(unit)}".encode()).hexdigest()


def _subject(unit: ExportChunk, terms: str) -> Subject:
    reason = "samples of an export"
    return Subject(unit.name, SAMPLES_LAYOUT, unit.vendor, "-", (), "train", reason, (), terms)


def _absent() -> SubjectArrays:
    raise RuntimeError("a unit that was written is gone")


def _samples_csv(planned: list[PlannedSample], vendors: list[str], store: SliceStore) -> str:
    """The text of `samples.csv`, one line per sample."""
    columns = ("case", "kind", "labelled", "subject", "frame", "slice", "anatomy_vendor", "vendor", "area_mm2")
    rows = []
    for one, vendor in zip(planned, vendors, strict=True):
        sample = one.sample
        facts = [store.column(name)[sample.slice_id] for name in ("subject", "frame", "slice", "vendor")]
        kind = "real" if sample.donor_id is None else "fa"
        area = "" if sample.area is None else f"{sample.area:.4f}"
        values = (_case(one.number), kind, int(one.labelled), *facts, vendor, area)
        rows.append(dict(zip(columns, values, strict=True)))
    return csv_text(columns, rows)


def _case(number: int) -> str:
    return f"sample_{number:06d}"


def _text(unit: ExportChunk) -> str:
    samples = [[p.number, p.labelled, *vars(p.sample).values()] for p in unit.samples]
    return json.dumps([unit.name, unit.vendor, samples])
