"""From files and folders to studies: which images belong together, and where their results go."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage import fs
from storage.dicom.read import is_dicom
from storage.dicom.study import dicom_folders
from storage.errors import InputError
from storage.layouts.read_each import ILLEGIBLE_NAME, legible, shown
from storage.nifti.file import ENDINGS, is_nifti_name, read_header

OTHER_ENDINGS = (
    *(".hdr", ".img", ".hdr.gz", ".img.gz", ".dcm", ".ima", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgh", ".mgz"),
    *(".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"),
)  # of image formats that cardiomix does not read
# Names that end in a word for masks, perhaps followed by a version, are masks: p9-seg, SEG, p9_gt_corrected.
MASK_NAME = re.compile(
    r"(^|[_. -])(gt|ground_?truth|masks?|segs?|segmentations?|labels?|labelmap|preds?|predictions?)"
    r"([_. -](corrected|edited|final|fixed|manual|auto|new|old|copy|ed|es|frame\d+|v?\d+))*$",
    re.IGNORECASE,
)
REPORT_ENDING = "_pred.json"
ANY_SPACING = (1.0, 1.0, 1.0)  # replaces a header's voxel size where it does not matter
NNUNET_MASKS = re.compile(r"labels(Tr|Ts|Val)", re.IGNORECASE)  # nnU-Net's folders of masks
MASK_FOLDER = re.compile(r"masks?|segs?|segmentations?|labels?|ground_?truth", re.IGNORECASE)
FRAME_NAME = re.compile(r"(.+)_frame(\d+)$", re.IGNORECASE)  # ACDC's: one 3D file a frame


@dataclass(frozen=True)
class Study:
    """One examination.

    images: a file, the files of its frames in order, or a DICOM study's folder, as full paths or URIs. out: the path of
    its results, without an ending. name: for reports.
    """

    name: str
    images: tuple[str, ...]
    out: str

    def mask(self, image: str) -> str:
        """The path of the mask of one of its images."""
        return fs.join(self.out.rpartition("/")[0], f"{stem(image)}_pred.nii.gz")

    @property
    def report(self) -> str:
        """The path of its report, which has its volumes."""
        return f"{self.out}{REPORT_ENDING}"

    @property
    def picture(self) -> str:
        """The path of its overlay picture."""
        return f"{self.out}_pred.png"


@dataclass(frozen=True)
class LeftOut:
    """Names of files in the given folders that are not segmented.

    masks: files that are named like masks. others: images that are neither NIfTI nor DICOM.
    """

    masks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line for the user about each kind; empty if nothing was left out."""
        told = []
        if self.masks:
            told.append(f"{_files(self.masks)} left out, named like masks: {_first(self.masks)}")
        if self.others:
            what = f"{_files(self.others)} left out, images of other formats: {_first(self.others)}"
            told.append(f"{what}; to segment them, convert them to .nii.gz")
        return told


def _files(names: Sequence[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def _first(names: Sequence[str]) -> str:
    return names[0] + (", …" if len(names) > 1 else "")


def stem(path: str) -> str:
    """A NIfTI file's name without folder and ending."""
    name = fs.base_name(path)
    return next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)


def find_studies(places: Sequence[str], out: str) -> tuple[list[Study], LeftOut]:
    """Find the studies in files and in folders with all their subfolders, and the files there that are left out.

    Results of a folder's files keep their subfolders below `out`; those of a single file lie directly in `out`. 3D
    files of one folder whose names differ only in `_frameNN` are one study. Each 4D file is a study. DICOM files are
    grouped into studies by their headers, and a study is named after its folder.

    Raises InputError if a place is absent, is a file but no NIfTI file, if there is no image at all, if two images
    would give the same file, or if a result would overwrite an image.
    """
    out = fs.absolute(out)
    found: dict[str, list[str]] = {}  # folder under `out` → images
    dicom: list[Study] = []
    masks, others = [], []
    for place in map(fs.absolute, places):
        if not fs.exists(place):
            raise InputError(fs.base_name(place), "no such file or folder", "check the path")
        if not fs.is_folder(place):
            if is_dicom(place):
                raise InputError(fs.base_name(place), "is one image of a DICOM study", "name the study's folder")
            if not is_nifti_name(place):
                raise InputError(fs.base_name(place), "is not named .nii or .nii.gz", "convert it to NIfTI")
            found.setdefault("", []).append(place)
            continue
        dicom += [_dicom_study(place, folder, out) for folder in dicom_folders(place)]
        for folder, image in _images(place):
            if not is_nifti_name(image):
                others.append(fs.base_name(image))
            elif MASK_NAME.search(stem(image)) or _in_mask_folder(fs.base_name(place), folder):
                masks.append(fs.base_name(image))
            else:
                found.setdefault(folder, []).append(image)
    left_out = LeftOut(tuple(masks), tuple(others))
    if not found and not dicom:
        raise _no_image(fs.base_name(places[0]), left_out)
    studies = [study for folder, images in sorted(found.items()) for study in _grouped(images, fs.join(out, folder))]
    studies += dicom
    check_targets(studies)
    return studies, left_out


def _dicom_study(place: str, folder: str, out: str) -> Study:
    """The DICOM study of a folder that is `place` or lies below it."""
    name = fs.base_name(folder)
    return Study(name, (folder,), fs.join(out, folder.removeprefix(place).strip("/") or name))


def _in_mask_folder(place: str, below: str) -> bool:
    """Whether folder names say that a file is a mask. `place` names the given folder, `below` the path from there."""
    folders = below.split("/")
    named = any(MASK_FOLDER.fullmatch(folder) or NNUNET_MASKS.fullmatch(folder) for folder in folders)
    return named or NNUNET_MASKS.fullmatch(place) is not None


def _no_image(place: str, left_out: LeftOut) -> InputError:
    problem, remedy = "holds no image ending in .nii or .nii.gz, and no MR study in DICOM", "name images"
    if left_out.masks:
        problem += f"; {len(left_out.masks)} are named like masks"
    if left_out.others:
        problem += f"; {len(left_out.others)} are of other formats, such as {left_out.others[0]}"
        remedy = "convert them to .nii.gz"
    return InputError(place, problem, remedy)


def _images(place: str, below: str = "", above: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield (folder below `place`, file) of every image, in order of names, NIfTI files of a folder first.

    `above` holds the real paths of the folders on the way. A link back to one of them is not followed.
    """
    here = fs.join(place, below)
    above |= {os.path.realpath(fs.local_path(here)) if fs.is_local(here) else here}
    names = [name for name in fs.list_names(here) if not name.startswith(".")]
    for name in names:
        if is_nifti_name(name):
            yield below, fs.join(here, name)
    for name in names:
        inside = fs.join(here, name)
        if is_nifti_name(name):
            continue
        if not fs.is_folder(inside):
            if name.lower().endswith(OTHER_ENDINGS) and not is_dicom(inside):
                yield below, inside
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
    """The images that hold several frames. An unreadable file is left out here, and reported when it is segmented."""

    def several_frames(image: str) -> bool:
        try:
            return read_header(image, ANY_SPACING).frames > 1
        except InputError:
            return False

    several = fs.map_concurrently(images[0], several_frames, images)
    return {image for image, is_cine in zip(images, several, strict=True) if is_cine}


def check_targets(studies: Sequence[Study]) -> None:
    """Raise InputError if two images would give the same file, or a result would overwrite an image.

    Also if a name is illegible: neither JSON nor `volumes.csv` can hold it.
    """
    for name in (part for study in studies for part in (study.out, *study.images)):
        if not legible(name):
            raise InputError(shown(fs.base_name(name)), ILLEGIBLE_NAME, "rename it")
    targets = [target for study in studies for target in (*map(study.mask, study.images), study.report)]
    images = {image for study in studies for image in study.images}
    for target, count in Counter(targets).items():
        if count > 1:
            raise InputError(fs.base_name(target), "two images would give this file", "predict into different folders")
        if target in images:
            raise InputError(fs.base_name(target), "is an image and would be overwritten", "use another --out")
