"""The ACDC data set as its organisers publish it (Bernard et al., IEEE TMI 2018): one folder `patientNNN` a patient.

`Info.cfg` holds the 1-based frames of ED and ES. Images are 3D files of single frames, `patientNNN_frameFF.nii.gz`,
each with its mask (`_gt`). The full release also has the cine, `patientNNN_4d.nii.gz`. Masks are RV 1, MYO 2, LV 3: the
reverse of ours.
"""

from __future__ import annotations

import re

from storage import fs
from storage.errors import InputError
from storage.images import read_image_header
from storage.layouts.frames import cine_frames, nifti_name
from storage.layouts.options import LayoutOptions
from storage.layouts.read_each import read_each
from storage.layouts.terms import terms_of
from storage.subjects import LV, MYO, RV, FrameSource, Skipped, Subject

LABELS = ((1, RV), (2, MYO), (3, LV))
TERMS = "ACDC: CC BY-NC-SA 4.0; cite Bernard et al. 2018, doi 10.1109/TMI.2018.2837502"
PATIENT = re.compile(r"patient\d+", re.IGNORECASE)
PARENT = "database"  # the folder around `training` and `testing` in releases since 2022
PARTS = ("training", "testing")
LONGEST_NUMBER = 9  # digits


def matches(folder: str) -> bool:
    """Whether the folder (or its `training` or `testing`) holds folders named patientNNN."""
    return bool(_patients(folder))


def read(folder: str, options: LayoutOptions) -> tuple[list[Subject], list[Skipped]]:
    """Find the subjects and list the patients that are skipped.

    Frames are ED and ES, or the whole cine if the option `frames` is `all` and the 4D file is there.
    """
    terms = terms_of(folder, TERMS)

    def subject(found: tuple[str, str]) -> Subject:
        part, path = found
        name = fs.base_name(path)
        split, reason = _split(name, part, options)
        frames = _frames(path, options)
        place = options.acdc_vendor, options.acdc_centre
        return Subject(name, "acdc", *place, frames, split, reason, LABELS, terms, orientation=options.orientation)

    return read_each(folder, subject, [(fs.base_name(path), (part, path)) for part, path in _patients(folder)])


def _patients(folder: str) -> list[tuple[str, str]]:
    """(part, folder) of every patient; part is "", "training" or "testing"."""
    names = fs.list_names(folder)
    if PARENT in names and not any(name.lower() in PARTS for name in names):
        folder = fs.join(folder, PARENT)
        names = fs.list_names(folder)
    own = fs.base_name(folder).lower()
    here = [(own if own in PARTS else "", folder)] + [
        (name.lower(), fs.join(folder, name)) for name in names if name.lower() in PARTS
    ]
    named = [(p, fs.join(base, n)) for p, base in here for n in fs.list_names(base) if PATIENT.fullmatch(n)]
    folders = fs.map_concurrently(folder, fs.is_folder, [path for _, path in named])
    return [found for found, is_folder in zip(named, folders, strict=True) if is_folder]


def _split(name: str, part: str, options: LayoutOptions) -> tuple[str, str]:
    if part == "testing":
        return "test", "ACDC's testing folder"
    if name in options.acdc_test:
        return "test", "listed in layouts.acdc_test"
    if name in options.acdc_validation:
        return "validation", "listed in layouts.acdc_validation"
    return "train", "neither in layouts.acdc_test nor in layouts.acdc_validation"


def _frames(path: str, options: LayoutOptions) -> tuple[FrameSource, ...]:
    frames = _found(path, options)
    for lacking in (f for f in frames if f.phase != "-" and f.mask is None):
        if any(f.mask for f in frames):
            mask = f"{fs.base_name(path)}_frame{lacking.frame + 1:02d}_gt.nii.gz"
            raise InputError(mask, f"no mask of {lacking.phase}, though the other phase has one", "copy it")
    return frames


def _found(path: str, options: LayoutOptions) -> tuple[FrameSource, ...]:
    name, files = fs.base_name(path), set(fs.list_names(path))
    phases = _phases(path, files)
    masks = {
        frame: (fs.join(path, mask), None)
        for frame in phases.values()
        if (mask := nifti_name(files, f"{name}_frame{frame + 1:02d}_gt"))
    }
    cine = nifti_name(files, f"{name}_4d")
    single = {phase: nifti_name(files, f"{name}_frame{frame + 1:02d}") for phase, frame in phases.items()}
    if cine and (options.frames == "all" or not all(single.values())):
        image = fs.join(path, cine)
        return cine_frames(
            image, read_image_header(image, orientation=options.orientation).frames, phases, masks, options
        )
    for phase, file in single.items():
        if file is None:
            raise InputError(
                f"{name}_frame{phases[phase] + 1:02d}.nii.gz",
                f"no image of {phase}, neither this file nor {name}_4d.nii.gz",
                "copy it from the data set, or correct Info.cfg",
            )
    return tuple(
        FrameSource(phase, frame, fs.join(path, str(single[phase])), None, *masks.get(frame, (None, None)))
        for phase, frame in sorted(phases.items(), key=lambda item: item[1])
    )


def _phases(path: str, files: set[str]) -> dict[str, int]:
    """Read the 0-based frames of ED and ES from `Info.cfg`.

    Raises InputError if one is missing. It is never guessed, since a wrong guess would give a mask to another phase.
    """
    info = next((f for f in files if f.lower() == "info.cfg"), None)
    if info is None:
        problem = "is absent, so which frame is ED and which ES is unknown"
        raise InputError("Info.cfg", problem, "copy it from the data set")
    found: dict[str, int] = {}
    try:
        lines = fs.read_text(fs.join(path, info)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("Info.cfg", "cannot be read", "copy it again from the data set") from error
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.upper() in ("ED", "ES"):
            if not value.isdecimal() or len(value) > LONGEST_NUMBER or int(value) < 1:
                raise InputError("Info.cfg", f"{key} is '{value}'", "write a frame number: 1, 2, 3, …")
            found[key.upper()] = int(value) - 1
    missing = [phase for phase in ("ED", "ES") if phase not in found]
    if missing:
        raise InputError("Info.cfg", f"has no line {' and '.join(missing)}", "add it: the 1-based number of the frame")
    if found["ED"] == found["ES"]:
        raise InputError("Info.cfg", "ED and ES are the same frame", "correct one of them")
    return found
