"""What the benchmarks read: the real sample beside the project where there is one, and phantoms in M&Ms' 4D layout."""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from pathlib import Path

import numpy as np
from isal import igzip

from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.phantom.write import COLUMNS, INFORMATION_CSV, PhantomSubject
from storage.layouts import LayoutOptions, collect
from storage.subjects import Subject

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata"
REAL_FOLDERS = ("acdc/training", "sunnybrook_ge")
DATA_OFFSET = 352  # of a NIfTI-1 file without extensions


def real_folders() -> list[str]:
    """Folders of the real ACDC and Sunnybrook samples; empty where they are absent."""
    found = [REALDATA / name for name in REAL_FOLDERS]
    return [str(path) for path in found] if all(path.is_dir() for path in found) else []


def subjects_of(folders: list[str], options: LayoutOptions | None = None) -> list[Subject]:
    """Subjects of data folders that can be read."""
    return collect(folders, options or LayoutOptions())[0]


def phantom(out: Path, subjects: int, frames: int) -> list[PhantomSubject]:
    """Draw labelled subjects of vendor A under `out`; about 0.1 s a frame and subject."""
    config = PhantomConfig(labelled_a=subjects, labelled_b=0, unlabelled_c=0, testing=0, frames=frames)
    return write_phantom(out, config)


def multiplied(source: Path, subjects: list[PhantomSubject], out: Path, times: int) -> int:
    """Write `times` variants of each subject of a phantom under `out`, and return the bytes of their images as read.

    Variant k differs in one voxel a frame, so that no image is there twice; masks are the same.
    """
    rows, size = [], 0
    for subject in subjects:
        stem = f"{subject.folder}/{subject.code}_sa"
        image = gzip.decompress((source / f"{stem}.nii.gz").read_bytes())
        header, data = image[:DATA_OFFSET], np.frombuffer(image, "<i2", offset=DATA_OFFSET).copy()
        first_voxels = data.reshape(subject.protocol.frames, -1)[:, 0]
        for k in range(times):
            code = f"{subject.code}{k}"
            folder = out / subject.folder.replace(subject.code, code)
            folder.mkdir(parents=True)
            first_voxels[:] = k
            packed = igzip.compress(header + data.tobytes(), compresslevel=1, mtime=0)
            (folder / f"{code}_sa.nii.gz").write_bytes(packed)
            shutil.copyfile(source / f"{stem}_gt.nii.gz", folder / f"{code}_sa_gt.nii.gz")
            rows.append((code, *subject.row[1:]))
            size += data.nbytes
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(rows)
    (out / INFORMATION_CSV).write_text(text.getvalue())
    return size
