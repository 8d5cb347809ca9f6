"""Writes the phantom as M&Ms is laid out: folders by split, 4D NIfTI, masks at ED and ES only, one information CSV."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.phantom.acquisition import SYSTOLE, Protocol, acquire
from pipeline.phantom.anatomy import PATHOLOGIES, Patient, draw_patient
from pipeline.phantom.plan import SPLITS, Order, PhantomConfig, codes, orders
from pipeline.phantom.vendors import VENDORS, Vendor
from storage.csv_table import csv_text
from storage.errors import InputError
from storage.identity import identity
from storage.layouts.terms import TERMS_FILE

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
FORMAT: Final = "cardiomix-phantom"  # of the note
# Without it the layout's usual terms, M&Ms', would go into every bank and network made from a phantom.
TERMS: Final = """cardiomix phantom: synthetic, of no patient; the terms of M&Ms do not apply to it

Drawn by a program in the layout of M&Ms, with none of its data. phantom.json holds the configuration, which draws the
same bytes again.
"""
_OURS = re.compile(rf"({'|'.join(SPLITS)})/[A-Z0-9]{{6}}")
_GOLDEN = 0.6180339887498949  # steps of a golden-ratio sequence cover [0, 1) evenly for any count
# The same for every vendor; choices where nothing else is said.
_BEAT_S = 0.9  # 67 beats a minute
_SLICE_DISTANCE_MM = (5.0, 10.0)  # M&Ms' range
_PAST_APEX_MM = 4.0  # how far a stack covers beyond the ventricle's length
_ED_FRAME = (0, 0, 0, 0, 0, -1, 1)  # drawn from: triggered on the R wave, ED is the first frame or next to it
_GZIP_LEVEL = 1  # noise does not compress, so a higher level only costs time


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


def write_phantom(
    out: Path, config: PhantomConfig, progress: Callable[[int, int], None] | None = None
) -> list[PhantomSubject]:
    """Write the data set under `out` and return its subjects, in the order of the information CSV.

    Equal configurations give equal bytes, and a subject's bytes do not depend on how many others are asked for. Files
    appear whole or not at all; the CSV comes last. A phantom already there is removed first. `progress(done, total)` is
    called after each subject. Raises InputError where `out` is a file, cannot be written or holds anything else.
    """
    out = Path(os.path.abspath(out))  # so that it has a name, whatever was given
    wanted = orders(config)
    named = list(zip(wanted, codes(wanted, config.seed), strict=True))
    try:
        _claim(out, config, [f"{order.split}/{code}" for order, code in named])
    except OSError as error:
        raise InputError(out.name, f"cannot be written ({error.strerror})", "choose another folder") from error
    subjects = []
    for done, (order, code) in enumerate(named, start=1):
        subjects.append(_write_subject(out, config, order, code))
        if progress is not None:
            progress(done, len(named))
    rows = [dict(zip(COLUMNS, subject.row, strict=True)) for subject in subjects]
    _replace(out / INFORMATION_CSV, csv_text(COLUMNS, rows).encode())
    return subjects


def is_written(out: Path, config: PhantomConfig) -> bool:
    """Whether `out` holds the whole phantom of this configuration."""
    note = _read_note(Path(out)) or {}
    return note.get("config") == identity(config) and (Path(out) / INFORMATION_CSV).exists()


def _claim(out: Path, config: PhantomConfig, folders: list[str]) -> None:
    """Make `out` ours: clear what an earlier phantom left there, note what will be in it, and state its terms."""
    if out.exists() and not out.is_dir():
        raise InputError(out.name, "is a file", "name a folder for the phantom")
    note = _read_note(out)
    if note is None and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(out.name, "holds something else than a phantom", "choose an empty folder for it")
    if note is not None:
        _clear(out, note)
    out.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "config": identity(config), "subjects": folders}
    _replace(out / NOTE, (json.dumps(document, indent=1) + "\n").encode())
    _replace(out / TERMS_FILE, TERMS.encode())


def _read_note(out: Path) -> dict[str, Any] | None:
    """The note of the phantom in `out`; None where there is none."""
    try:
        note = json.loads((out / NOTE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        note = None
    if not isinstance(note, dict) or note.get("format") != FORMAT or not isinstance(note.get("subjects"), list):
        raise InputError(NOTE, "is not a phantom's note", "choose an empty folder for the phantom")
    return note


def _clear(out: Path, note: dict[str, Any]) -> None:
    """Remove the phantom that `note` tells of. The CSV goes first: without it nobody takes the rest for whole."""
    (out / INFORMATION_CSV).unlink(missing_ok=True)
    for folder in map(str, note["subjects"]):
        if _OURS.fullmatch(folder):  # nothing outside our own layout is ever removed
            shutil.rmtree(out / folder, ignore_errors=True)
    for split in (*SPLITS, "Training"):
        with suppress(OSError):  # not there, or not empty
            (out / split).rmdir()


def _write_subject(out: Path, config: PhantomConfig, order: Order, code: str) -> PhantomSubject:
    vendor = VENDORS[order.vendor]
    rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, order.stream], dtype=np.uint64)))
    patient = draw_patient(rng, PATHOLOGIES[order.serial % len(PATHOLOGIES)])
    protocol = _protocol(rng, config, order, vendor, patient)
    cine = acquire(rng, patient, vendor, protocol)
    centre = vendor.centres[order.serial % len(vendor.centres)]
    folder = out / order.split / code
    folder.mkdir(parents=True, exist_ok=True)
    if order.labelled:
        mask = np.zeros(cine.image.shape, dtype=np.uint8)
        mask[[protocol.ed, protocol.es]] = cine.mask
        _write_nifti(folder / f"{code}_sa_gt.nii.gz", mask, protocol)
    _write_nifti(folder / f"{code}_sa.nii.gz", cine.image, protocol)
    # The real release has no ED and ES for the unlabelled subjects: zeros stand there.
    ed, es = (protocol.ed, protocol.es) if order.labelled else (0, 0)
    row: tuple[object, ...] = (code, vendor.name, vendor.code, centre, ed, es, patient.age, patient.pathology)
    row += (patient.sex, patient.height_cm, patient.weight_kg)
    return PhantomSubject(
        code, vendor.code, order.split, f"{order.split}/{code}", patient, protocol, tuple(str(v) for v in row)
    )


def _protocol(
    rng: np.random.Generator, config: PhantomConfig, order: Order, vendor: Vendor, patient: Patient
) -> Protocol:
    # A golden-ratio sequence from a start of the seed's: few subjects already look like the vendor's distribution.
    digest = hashlib.sha256(f"{config.seed}:area:{order.vendor}:{order.split}".encode()).digest()
    start = int.from_bytes(digest[:6], "big") / 2**48
    pixel = float(np.sqrt(vendor.pixel_area((start + order.serial * _GOLDEN) % 1.0)))
    width_mm = float(rng.uniform(*vendor.field_mm)) * config.field_scale
    thickness = float(rng.uniform(*vendor.thickness_mm))
    spacing = thickness + float(rng.uniform(*vendor.gap_mm))
    # Cover the ventricles if the count allows; a patient too long or short for it gets slices further apart or closer.
    reach = patient.length + _PAST_APEX_MM
    slices = int(np.clip(round(reach / spacing), *config.slices))
    spacing = float(np.clip(reach / slices, *_SLICE_DISTANCE_MM)) if slices > 2 else spacing
    ed = int(rng.choice(_ED_FRAME)) % config.frames
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
    image.header.set_zooms((p.pixel_mm, p.pixel_mm, p.spacing_mm, round(_BEAT_S / p.frames, 4)))
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
