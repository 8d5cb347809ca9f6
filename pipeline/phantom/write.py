"""Write the phantom in the layout of M&Ms: folders by split, 4D NIfTI, masks at ED and ES only, one information CSV."""

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
from storage import fs
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
NOTE: Final = "phantom.json"  # a note that the folder is a phantom, with its configuration
FORMAT: Final = "cardiomix-phantom"  # the note's field `format`
# Without these terms, those of M&Ms, the layout's default, would go into every bank and network made from a phantom.
TERMS: Final = """cardiomix phantom: synthetic, of no patient; the terms of M&Ms do not apply to it

Drawn by a program in the layout of M&Ms, with none of its data. phantom.json holds the configuration, which draws the
same bytes again.
"""
_OURS = re.compile(rf"({'|'.join(SPLITS)})/[A-Z0-9]{{6}}")
_GOLDEN = 0.6180339887498949  # steps of a golden-ratio sequence cover [0, 1) evenly for any count
# These hold for every vendor. Without a stated source they are choices.
_BEAT_S = 0.9  # 67 beats a minute
_SLICE_DISTANCE_MM = (5.0, 10.0)  # M&Ms' range
_PAST_APEX_MM = 4.0  # how far a stack extends beyond the ventricle's length
_ED_FRAME = (0, 0, 0, 0, 0, -1, 1)  # choices for ED: triggered on the R wave, it is the first frame or next to it
_GZIP_LEVEL = 1  # noise does not compress, so a higher level only costs time


@dataclass(frozen=True)
class PhantomSubject:
    """A written subject. `folder` is relative to the data set's root. `row` is its line in the information CSV."""

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

    Equal configurations give equal bytes, and a subject's bytes do not depend on the number of other subjects. Files
    appear whole or not at all, and the CSV comes last. A phantom that is already there is removed first.
    `progress(done, total)` is called after each subject. Raises InputError if `out` is a file, holds something else
    than a phantom, or cannot be created.
    """
    out = Path(os.path.abspath(out))  # an absolute path has a name, which error messages need
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
    fs.write_bytes(str(out / INFORMATION_CSV), csv_text(COLUMNS, rows).encode())
    return subjects


def is_written(out: Path, config: PhantomConfig) -> bool:
    """Whether `out` holds the complete phantom of this configuration. Raises InputError if its note is damaged."""
    note = _read_note(Path(out)) or {}
    return note.get("config") == identity(config) and (Path(out) / INFORMATION_CSV).exists()


def _claim(out: Path, config: PhantomConfig, folders: list[str]) -> None:
    """Prepare `out`: remove an earlier phantom, and write the note of what will be there, and the terms."""
    if out.exists() and not out.is_dir():
        raise InputError(out.name, "is a file", "name a folder for the phantom")
    note = _read_note(out)
    if note is None and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(out.name, "holds something else than a phantom", "choose an empty folder for it")
    if note is not None:
        _clear(out, note)
    out.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "config": identity(config), "subjects": folders}
    fs.write_bytes(str(out / NOTE), (json.dumps(document, indent=1) + "\n").encode())
    fs.write_bytes(str(out / TERMS_FILE), TERMS.encode())


def _read_note(out: Path) -> dict[str, Any] | None:
    """The note of the phantom in `out`, or None. Raises InputError for a file that is no such note."""
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
    """Remove the phantom that `note` describes. The CSV goes first, because it marks completeness."""
    (out / INFORMATION_CSV).unlink(missing_ok=True)
    for folder in map(str, note["subjects"]):
        if _OURS.fullmatch(folder):  # only folders of our own layout are removed
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
    # The real release has zeros for the ED and ES of unlabelled subjects.
    ed, es = (protocol.ed, protocol.es) if order.labelled else (0, 0)
    row: tuple[object, ...] = (code, vendor.name, vendor.code, centre, ed, es, patient.age, patient.pathology)
    row += (patient.sex, patient.height_cm, patient.weight_kg)
    return PhantomSubject(
        code, vendor.code, order.split, f"{order.split}/{code}", patient, protocol, tuple(str(v) for v in row)
    )


def _protocol(
    rng: np.random.Generator, config: PhantomConfig, order: Order, vendor: Vendor, patient: Patient
) -> Protocol:
    # A golden-ratio sequence, whose start depends on the seed: a few subjects already cover the vendor's distribution.
    digest = hashlib.sha256(f"{config.seed}:area:{order.vendor}:{order.split}".encode()).digest()
    start = int.from_bytes(digest[:6], "big") / 2**48
    pixel = float(np.sqrt(vendor.pixel_area((start + order.serial * _GOLDEN) % 1.0)))
    width_mm = float(rng.uniform(*vendor.field_mm)) * config.field_scale
    thickness = float(rng.uniform(*vendor.thickness_mm))
    spacing = thickness + float(rng.uniform(*vendor.gap_mm))
    # The slices cover the ventricles. If their number is limited, they lie closer together or further apart.
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
    # Columns run to the patient's left, rows downwards (inferior), slices from base to apex. The origin is the centre.
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
    fs.write_bytes(str(path), packed.getvalue())
