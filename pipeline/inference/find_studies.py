"""From files and folders to studies: which images belong together, and where what is found of them goes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage import fs
from storage.errors import InputError
from storage.nifti.file import read_header

ENDINGS = (".nii.gz", ".nii")
MASK_NAME = re.compile(r"[_-](gt|mask|masks|seg|label|labels|pred)$", re.IGNORECASE)
FRAME_NAME = re.compile(r"(.+)_frame(\d+)$", re.IGNORECASE)  # ACDC's: one 3D file a frame


@dataclass(frozen=True)
class Study:
    """One examination: a file, or the files of its frames, in order. `out` is where its results go, without ending.

    Paths are full paths or URIs; `name` and `images` are for `Study.mask` and for what is told.
    """

    name: str
    images: tuple[str, ...]
    out: str

    def mask(self, image: str) -> str:
        """Where the mask of one of its images goes."""
        return fs.join(self.out.rpartition("/")[0], f"{stem(image)}_pred.nii.gz")

    @property
    def report(self) -> str:
        """Where its volumes go."""
        return f"{self.out}_pred.json"

    @property
    def picture(self) -> str:
        """Where its overlay goes."""
        return f"{self.out}_pred.png"


def stem(path: str) -> str:
    """A NIfTI file's name without its folder and ending."""
    name = fs.base_name(path)
    return next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)


def find_studies(places: Sequence[str], out: str) -> tuple[list[Study], list[str]]:
    """Studies in files and folders (all below them), and the names of files left out for being named like masks.

    Results of a folder's files lie in `out` as the files lie in the folder; those of a file directly in `out`. 3D files
    of one folder whose names differ in `_frameNN` alone are one study; a 4D file is one by itself. Raises InputError
    for a place that is absent or no NIfTI file, if there is no image at all, or if two images would give one mask.
    """
    found: dict[str, list[str]] = {}  # folder under `out` → images
    left_out = []
    for place in map(fs.absolute, places):
        if not fs.exists(place):
            raise InputError(fs.base_name(place), "no such file or folder", "check the path")
        if not fs.is_folder(place):
            if not place.lower().endswith(ENDINGS):
                raise InputError(fs.base_name(place), "is not named .nii or .nii.gz", "convert it to NIfTI")
            found.setdefault("", []).append(place)
            continue
        for folder, image in _images(place):
            if MASK_NAME.search(stem(image)):
                left_out.append(fs.base_name(image))
            else:
                found.setdefault(folder, []).append(image)
    if not found:
        masks = f"; {len(left_out)} are named like masks" if left_out else ""
        raise InputError(fs.base_name(places[0]), f"holds no image ending in .nii or .nii.gz{masks}", "name images")
    out = fs.absolute(out)
    studies = [study for folder, images in sorted(found.items()) for study in _grouped(images, fs.join(out, folder))]
    check_targets(studies)
    return studies, left_out


def _images(place: str, below: str = "", above: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(folder under `place`, file) of every NIfTI file, in order of their names. `above`: real folders on the way, to
    which a link does not lead back."""
    here = fs.join(place, below)
    above |= {os.path.realpath(fs.local_path(here)) if fs.is_local(here) else here}
    names = [name for name in fs.list_names(here) if not name.startswith(".")]
    for name in names:
        if name.lower().endswith(ENDINGS):
            yield below, fs.join(here, name)
    for name in names:
        inside = fs.join(here, name)
        if name.lower().endswith(ENDINGS) or not fs.is_folder(inside):
            continue
        if not fs.is_local(inside) or os.path.realpath(fs.local_path(inside)) not in above:
            yield from _images(place, f"{below}/{name}" if below else name, above)


def _grouped(images: Sequence[str], out: str) -> Iterator[Study]:
    groups: dict[tuple[str, str, bool], list[tuple[int, str]]] = {}
    for image in dict.fromkeys(images):
        match, folder = FRAME_NAME.match(stem(image)), image.rpartition("/")[0]
        key, frame = ((folder, match[1], True), int(match[2])) if match else ((folder, stem(image), False), 0)
        groups.setdefault(key, []).append((frame, image))
    for (_, name, _), members in groups.items():
        ordered = [image for _, image in sorted(members)]
        cines = _cines(ordered) if len(ordered) > 1 else set()
        for image in (image for image in ordered if image in cines):
            yield Study(stem(image), (image,), fs.join(out, stem(image)))
        frames = tuple(image for image in ordered if image not in cines)
        if frames:
            name = name if len(frames) > 1 else stem(frames[0])
            yield Study(name, frames, fs.join(out, name))


def _cines(images: Sequence[str]) -> set[str]:
    """Those of the images that hold several frames. A file that cannot be read is none: its study tells of it."""

    def several_frames(image: str) -> bool:
        try:
            return read_header(image).frames > 1
        except InputError:
            return False

    several = fs.map_concurrently(images[0], several_frames, images)
    return {image for image, is_cine in zip(images, several, strict=True) if is_cine}


def check_targets(studies: Sequence[Study]) -> None:
    """Raise InputError if two images would give the same file, or a result would overwrite an image."""
    targets = [target for study in studies for target in (*map(study.mask, study.images), study.report)]
    images = {image for study in studies for image in study.images}
    for target, count in Counter(targets).items():
        if count > 1:
            raise InputError(fs.base_name(target), "two images would give this file", "predict into different folders")
        if target in images:
            raise InputError(fs.base_name(target), "is an image and would be overwritten", "use another --out")
