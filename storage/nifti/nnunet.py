"""Writes a raw data set of nnU-Net v2 (its `documentation/dataset_format.md`): `imagesTr`, `labelsTr`, `dataset.json`.

A case is one slice: a NIfTI file of one plane with its pixel size. nnU-Net trains on such cases in 2D.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.errors import InputError
from storage.nifti.write import write_volume
from storage.subjects import STRUCTURES

IMAGES, LABELS, DATASET, SPLITS = "imagesTr", "labelsTr", "dataset.json", "splits_final.json"
ENDING = ".nii.gz"
FOLDS = 5
_NAME = re.compile(r"Dataset\d{3}_\w+")


def check_name(folder: str) -> None:
    """Raises InputError unless the folder's name is one that nnU-Net finds, such as `Dataset501_Heart`."""
    if not _NAME.fullmatch(fs.base_name(folder)):
        raise InputError(fs.base_name(folder), "is no name of an nnU-Net data set", "name it such as Dataset501_Heart")


def write_case(
    folder: str,
    case: str,
    image: npt.NDArray[np.float32],
    mask: npt.NDArray[np.uint8],
    spacing: tuple[float, float, float],
) -> None:
    """Write image and mask (H, W) of one case, each atomically; `spacing` is (slice, row, column) in mm."""
    write_volume(fs.join(folder, IMAGES, f"{case}_0000{ENDING}"), image[None], spacing, np.float32)
    write_volume(fs.join(folder, LABELS, f"{case}{ENDING}"), mask[None], spacing, np.uint8)


def cases(folder: str) -> set[str]:
    """The cases that have both an image and a mask file."""
    images = {name.removesuffix(f"_0000{ENDING}") for name in fs.list_names(fs.join(folder, IMAGES))}
    return images & {name.removesuffix(ENDING) for name in fs.list_names(fs.join(folder, LABELS))}


def write_dataset(folder: str, groups: Sequence[tuple[str, str]], description: str, licence: str) -> None:
    """Write `splits_final.json`, then `dataset.json`, which marks the data set as complete.

    `groups` are (case, group) pairs. All cases of a group, such as a subject, are in one fold; nnU-Net's own random
    folds would put one anatomy into training and validation. To use these folds, copy `splits_final.json` to the data
    set's folder in `nnUNet_preprocessed`.
    """
    order = sorted({group for _, group in groups})
    fold_of = {group: i % FOLDS for i, group in enumerate(order)}
    folds = [
        {
            "train": [case for case, group in groups if fold_of[group] != fold],
            "val": [case for case, group in groups if fold_of[group] == fold],
        }
        for fold in range(min(FOLDS, len(order)))
    ]
    document = {
        "name": fs.base_name(folder),
        "description": description,
        "licence": licence,
        "channel_names": {"0": "cine MR"},
        "labels": {"background": 0, **STRUCTURES},
        "numTraining": len(groups),
        "file_ending": ENDING,
    }
    fs.write_text(fs.join(folder, SPLITS), json.dumps(folds, indent=1))
    fs.write_text(fs.join(folder, DATASET), json.dumps(document, indent=1))
