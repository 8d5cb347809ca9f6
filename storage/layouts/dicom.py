"""DICOM as it comes from a scanner or an archive: the short-axis cine of each study, without masks.

    DATA/<subject>/…/any file names, one folder a study; or DATA itself is one study's folder

The vendor is the scanner's Manufacturer. Names and institutions are not read: a subject is named by its folder, and its
centre by an option. DICOM does not mark ED and ES, so evenly spaced frames are taken, or all frames.
"""

from __future__ import annotations

from storage import fs
from storage.dicom.read import files_below
from storage.dicom.study import DicomStudy, dicom_folders, holds_dicom
from storage.errors import InputError
from storage.layouts.frames import cine_frames
from storage.layouts.options import LayoutOptions
from storage.layouts.read_each import read_each, shown
from storage.layouts.terms import terms_of
from storage.nifti.file import is_nifti_name
from storage.subjects import Skipped, Subject

TERMS = "not stated"
# word in a Manufacturer → the vendor's name
VENDORS = {
    "siemens": "Siemens",
    "philips": "Philips",
    "ge": "GE",
    "general": "GE",
    "canon": "Canon",
    "toshiba": "Canon",
    "uih": "United Imaging",
    "united": "United Imaging",
    "hitachi": "Hitachi",
    "fujifilm": "Fujifilm",
}


def matches(folder: str) -> bool:
    """Whether there are DICOM files in the folder or below it."""
    return fs.is_folder(folder) and holds_dicom(folder)


def read(folder: str, options: LayoutOptions) -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects, and list the studies that cannot be used and NIfTI files among the studies.

    A study cannot be used if it has no complete short-axis cine or no known vendor.
    """
    terms = terms_of(folder, TERMS)

    def subject(place: str) -> Subject:
        with DicomStudy(place) as study:
            vendor = options.dicom_vendor or vendor_of(study.manufacturer, study.name)
            frames = cine_frames(place, study.header.frames, {}, {}, options)
            left_out = study.left_out
        return Subject(
            *(_name(folder, place), "dicom", vendor, options.dicom_centre, frames, None, "", (), terms),
            left_out=left_out,
            orientation=options.orientation,
        )

    found, skipped = read_each(folder, subject, [(_name(folder, place), place) for place in dicom_folders(folder)])
    return found, skipped + _niftis(folder)


def _niftis(folder: str) -> list[Skipped]:
    """List NIfTI files among the studies, one entry for each folder directly in `folder`.

    This layout cannot pair them with the studies.
    """
    inside: dict[str, list[str]] = {}
    for path in files_below(folder):
        if is_nifti_name(path):
            first, _, below = path.removeprefix(folder).strip("/").partition("/")
            inside.setdefault(first if below else "", []).append(fs.base_name(path))
    remedy = "give their folder by itself, or a subjects.csv that pairs images with masks"
    return [
        Skipped(
            shown(first or fs.base_name(folder)),
            shown(names[0]),
            f"one of {len(names)} NIfTI files among DICOM files",
            remedy,
        )
        for first, names in inside.items()
    ]


def vendor_of(manufacturer: str, name: str) -> str:
    """The vendor that a Manufacturer tag such as `GE MEDICAL SYSTEMS` names.

    Raises InputError, naming `name`, if the vendor is not known.
    """
    words = manufacturer.lower().replace("_", " ").replace(".", " ").split()
    known = next((VENDORS[word] for word in words if word in VENDORS), None)
    if known is None:
        problem = (
            "has no Manufacturer that is known, so its vendor is not" if words else "does not say who made the scanner"
        )
        raise InputError(name, problem, "--set layouts.dicom_vendor=NAME")
    return known


def _name(folder: str, place: str) -> str:
    """The subject's name: the study's path below the data folder, with `_` in place of `/`.

    A study that is the data folder itself has the folder's name.
    """
    return place.removeprefix(folder).strip("/").replace("/", "_") or fs.base_name(folder)
