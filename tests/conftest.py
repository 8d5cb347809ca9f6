"""Fixtures that several tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

# No time is asserted in a test: Hypothesis is not to fail one because the machine was busy.
settings.register_profile("untimed", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("untimed")

REALDATA = Path(__file__).resolve().parents[2] / "shared" / "realdata"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray on loopback that books four CPUs, whatever the machine has; started once, ended with the session."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 1024**2,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def real_acdc() -> Path:
    """The real ACDC training folder; the test is skipped where it is absent."""
    folder = REALDATA / "acdc" / "training"
    if not folder.is_dir():
        pytest.skip("no real ACDC data beside the project")
    return folder


@pytest.fixture(scope="session")
def real_sunnybrook() -> Path:
    """The real Sunnybrook table folder; the test is skipped where it is absent."""
    folder = REALDATA / "sunnybrook_ge"
    if not folder.is_dir():
        pytest.skip("no real Sunnybrook data beside the project")
    return folder


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    """A function that writes data in file order (x, y, z[, t]) with the given voxel size (x, y, z), by nibabel."""

    def write(path: Path, data_xyz: npt.NDArray[Any], zooms: tuple[float, ...] = (1.5, 1.5, 8.0)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(data_xyz, np.diag([*zooms[:3], 1.0]))
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def study() -> Callable[..., tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]]:
    """A function that makes a cine (x, y, z, t) int16 and its mask, labelled at the frames given: a ring in noise."""

    def make(
        seed: int, labelled: Sequence[int] = (0, 2), shape: tuple[int, int, int, int] = (24, 20, 3, 4)
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 900, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        for frame in labelled:
            mask[6:16, 6:16, :, frame] = 2
            mask[8:14, 8:14, :, frame] = 1
            mask[2:6, 6:14, :, frame] = 3
        return image, mask

    return make


@pytest.fixture
def mnms_folder(
    tmp_path: Path, write_nifti: Callable[..., Path], study: Callable[..., Any]
) -> Callable[[dict[str, tuple[str, str]]], Path]:
    """A function that writes a M&Ms folder of {code: (part, vendor)}; ED 0, ES 2, unlabelled ones as in the release."""

    def build(subjects: dict[str, tuple[str, str]]) -> Path:
        lines = [",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"]
        for seed, (code, (part, vendor)) in enumerate(subjects.items()):
            image, mask = study(seed)
            folder = tmp_path / "mnms" / "OpenDataset" / part / code
            write_nifti(folder / f"{code}_sa.nii.gz", image)
            write_nifti(folder / f"{code}_sa_gt.nii.gz", mask)
            phases = "0,0" if part.endswith("Unlabeled") else "0,2"
            lines.append(f"{seed},{code},some,{vendor},1,{phases},50,NOR,F,170,70")
        table = tmp_path / "mnms" / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
        table.write_text("\n".join(lines) + "\n")
        return tmp_path / "mnms"

    return build
