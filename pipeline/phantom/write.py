"""Writes the phantom as M&Ms is laid out: folders by split, 4D NIfTI, masks at ED and ES only, one information CSV."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.phantom.acquisition import SYSTOLE, Protocol, acquire
from pipeline.phantom.anatomy import PATHOLOGIES, Patient, draw_patient
from pipeline.phantom.vendors import VENDORS, Vendor
from storage.errors import InputError

INFORMATION_CSV: Final = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
COLUMNS: Final = (
    "External code",
    "VendorName",
    "Vendor",
    "Centre",
    "ED",
    "ES",
    "Age",
    "Pathology",
    "Sex",
    "Height",
    "Weight",
)
NOTE: Final = "phantom.json"  # says that the folder is a phantom, and of which configuration
_OURS = re.compile(r"(Training/Labeled|Training/Unlabeled|Testing)/[A-Z0-9]{6}")
_GOLDEN = 0.6180339887498949  # steps of a golden-ratio sequence cover [0, 1) evenly for any count
_GZIP_LEVEL = 1  # noise does not compress, so a higher level only costs time


class PhantomConfig(BaseModel):
    """What to write. The defaults take under half a minute on one core and about 0.25 GB of disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labelled_a: int = Field(10, ge=0, description="labelled training subjects of vendor A")
    labelled_b: int = Field(10, ge=0, description="labelled training subjects of vendor B")
    unlabelled_c: int = Field(4, ge=0, description="unlabelled training subjects of vendor C")
    testing: int = Field(3, ge=0, description="test subjects of each of A, B, C and D")
    subjects: float = Field(1.0, gt=0, description="multiplies all four counts; none that is not 0 drops below 1")
    frames: int = Field(8, ge=2, le=100, description="frames of a cine")
    slices: tuple[int, int] = Field((7, 9), description="fewest and most slices of a study")
    field_scale: float = Field(1.0, ge=0.55, le=1.3, description="multiplies every vendor's field of view")
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _slices_in_order(self) -> PhantomConfig:
        if not 1 <= self.slices[0] <= self.slices[1]:
            raise ValueError("slices must be (fewest, most) with 1 ≤ fewest ≤ most")
        return self


@dataclass(frozen=True)
class PhantomSubject:
    """One subject as written. `folder` is relative to the data set's root; `row` is its line in the information CSV."""

    code: str
    vendor: str
    split: str
    folder: str
    patient: Patient
    protocol: Protocol
    row: tuple[str, ...]


@dataclass(frozen=True)
class _Order:
    """One subject to make: `serial` counts within vendor and split."""

    vendor: str
    split: str
    serial: int

    @property
    def stream(self) -> int:
        """Number of the subject's random stream; does not depend on how many others there are."""
        splits = ("Training/Labeled", "Training/Unlabeled", "Testing")
        return (ord(self.vendor) << 40) | (splits.index(self.split) << 32) | self.serial


def write_phantom(
    out: Path, config: PhantomConfig, progress: Callable[[int, int], None] | None = None
) -> list[PhantomSubject]:
    """Write the data set under `out` and return its subjects, in the order of the information CSV.

    Equal configurations give equal bytes, and a subject's bytes do not depend on how many others are asked for. Files
    appear whole or not at all; the CSV comes last. A phantom already there is replaced, subjects no longer wanted are
    removed. `progress(done, total)` is called after each subject. Raises InputError where `out` holds anything else.
    """
    out = Path(out)
    orders = _orders(config)
    codes = _codes(orders, config.seed)
    _claim(out, config, [f"{order.split}/{code}" for order, code in zip(orders, codes, strict=True)])
    subjects = []
    for done, (order, code) in enumerate(zip(orders, codes, strict=True), start=1):
        subjects.append(_write_subject(out, config, order, code))
        if progress is not None:
            progress(done, len(orders))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(subject.row for subject in subjects)
    _replace(out / INFORMATION_CSV, text.getvalue().encode())
    return subjects


def _claim(out: Path, config: PhantomConfig, folders: list[str]) -> None:
    """Make `out` ours: note what will be in it, and clear what an earlier phantom left there."""
    note = out / NOTE
    if out.exists() and not out.is_dir():
        raise InputError(out.name, "is a file", "name a folder for the phantom")
    if note.is_file():
        try:
            old = [str(folder) for folder in json.loads(note.read_text())["subjects"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(NOTE, "is not a phantom's note", "choose an empty folder") from error
        for folder in set(old) - set(folders):
            if _OURS.fullmatch(folder):  # nothing outside our own layout is ever removed
                shutil.rmtree(out / folder, ignore_errors=True)
        (out / INFORMATION_CSV).unlink(missing_ok=True)
    elif (out / INFORMATION_CSV).exists() or (out / "Training").exists() or (out / "Testing").exists():
        raise InputError(out.name, "holds another data set", "choose an empty folder for the phantom")
    out.mkdir(parents=True, exist_ok=True)
    document = {"format": "cardiomix-phantom", "config": config.model_dump(mode="json"), "subjects": folders}
    _replace(note, (json.dumps(document, indent=1) + "\n").encode())


def _orders(config: PhantomConfig) -> list[_Order]:
    def scaled(count: int) -> int:
        return max(1, round(count * config.subjects)) if count else 0

    groups = [("A", "Training/Labeled", config.labelled_a), ("B", "Training/Labeled", config.labelled_b)]
    groups += [("C", "Training/Unlabeled", config.unlabelled_c)]
    groups += [(vendor, "Testing", config.testing) for vendor in VENDORS]
    return [_Order(vendor, split, i) for vendor, split, count in groups for i in range(scaled(count))]


def _codes(orders: list[_Order], seed: int) -> list[str]:
    """Codes as M&Ms writes them, such as A0S9V9; distinct."""
    letters, digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    codes: list[str] = []
    for order in orders:
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{seed}:{order.stream}:{attempt}".encode()).digest()
            code = "".join((digits if i % 2 else letters)[b % (10 if i % 2 else 26)] for i, b in enumerate(digest[:6]))
            if code not in codes:
                break
            attempt += 1
        codes.append(code)
    return codes


def _write_subject(out: Path, config: PhantomConfig, order: _Order, code: str) -> PhantomSubject:
    vendor = VENDORS[order.vendor]
    rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, order.stream], dtype=np.uint64)))
    patient = draw_patient(rng, PATHOLOGIES[order.serial % len(PATHOLOGIES)])
    protocol = _protocol(rng, config, order, vendor, patient)
    cine = acquire(rng, patient, vendor, protocol)
    centre = vendor.centres[order.serial % len(vendor.centres)]
    folder = out / order.split / code
    folder.mkdir(parents=True, exist_ok=True)
    labelled = order.split != "Training/Unlabeled"
    if labelled:
        mask = np.zeros(cine.image.shape, dtype=np.uint8)
        mask[[protocol.ed, protocol.es]] = cine.mask
        _write_nifti(folder / f"{code}_sa_gt.nii.gz", mask, protocol)
    _write_nifti(folder / f"{code}_sa.nii.gz", cine.image, protocol)
    # The real release has no ED and ES for the unlabelled subjects: zeros stand there.
    ed, es = (protocol.ed, protocol.es) if labelled else (0, 0)
    row: tuple[object, ...] = (code, vendor.name, vendor.code, centre, ed, es, patient.age, patient.pathology)
    row += (patient.sex, patient.height_cm, patient.weight_kg)
    return PhantomSubject(
        code, vendor.code, order.split, f"{order.split}/{code}", patient, protocol, tuple(str(v) for v in row)
    )


def _protocol(
    rng: np.random.Generator, config: PhantomConfig, order: _Order, vendor: Vendor, patient: Patient
) -> Protocol:
    # A golden-ratio sequence from a start of the seed's: few subjects already look like the vendor's distribution.
    digest = hashlib.sha256(f"{config.seed}:area:{order.vendor}:{order.split}".encode()).digest()
    start = int.from_bytes(digest[:6], "big") / 2**48
    pixel = float(np.sqrt(vendor.pixel_area((start + order.serial * _GOLDEN) % 1.0)))
    width_mm = float(rng.uniform(*vendor.field_mm)) * config.field_scale
    thickness = float(rng.uniform(*vendor.thickness_mm))
    spacing = thickness + float(rng.uniform(*vendor.gap_mm))
    # Cover the ventricles if the count allows; a patient too long or short for it gets slices further apart or closer.
    reach = patient.length + 4.0
    slices = int(np.clip(round(reach / spacing), *config.slices))
    spacing = float(np.clip(reach / slices, 5.0, 10.0)) if slices > 2 else spacing
    ed = int(rng.choice([0, 0, 0, 0, 0, config.frames - 1, 1]))
    es = (ed + max(1, round(SYSTOLE * config.frames))) % config.frames
    return Protocol(
        pixel_mm=pixel,
        height=_even(width_mm * vendor.aspect / pixel),
        width=_even(width_mm / pixel),
        slices=slices,
        thickness_mm=min(thickness, spacing),
        spacing_mm=round(spacing, 2),
        frames=config.frames,
        ed=ed,
        es=es,
    )


def _even(pixels: float) -> int:
    return 2 * round(pixels / 2)


def _write_nifti(path: Path, data: npt.NDArray[np.int16] | npt.NDArray[np.uint8], protocol: Protocol) -> None:
    """Write (T, Z, H, W) as a 4D NIfTI (X, Y, slices, frames), gzip without a time stamp."""
    import nibabel as nib

    p = protocol
    # Columns run to the patient's left, rows downwards (inferior), slices from base to apex; centred on the scanner.
    affine = np.diag([-p.pixel_mm, -p.pixel_mm, p.spacing_mm, 1.0])
    affine[:3, 3] = [
        p.pixel_mm * (p.width - 1) / 2,
        p.pixel_mm * (p.height - 1) / 2,
        -p.spacing_mm * (p.slices - 1) / 2,
    ]
    image = nib.nifti1.Nifti1Image(data.transpose(3, 2, 1, 0), affine)
    image.header.set_zooms((p.pixel_mm, p.pixel_mm, p.spacing_mm, round(0.9 / p.frames, 4)))
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"synthetic phantom, no patient"
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=packed, mtime=0) as stream:
        stream.write(image.to_bytes())
    _replace(path, packed.getvalue())


def _replace(path: Path, data: bytes) -> None:
    """Write atomically: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
