"""Reads from DICOM files the attributes that stacking needs, and the pixels.

Only the tags in `TAGS` are read; none is about a person, an institution or a date, and pydicom passes over all others.
Messages of pydicom are never repeated, since they may quote a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.errors import InputError
from storage.nifti.file import not_opened

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array = npt.NDArray[Any]
Vector = tuple[float, ...]

PREAMBLE, MAGIC = 128, b"DICM"
OTHER_ENDINGS = (".nii", ".nii.gz", ".csv", ".json", ".txt", ".xml", ".html", ".pdf", ".png", ".jpg", ".zip")
MR_IMAGES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")
MOST_PIXELS = 2**22  # of an image: 2048 × 2048
MOST_FRAMES = 2**14  # of a file
TAGS = (
    *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SeriesNumber", "AcquisitionNumber", "AcquisitionTime", "InstanceNumber", "TemporalPositionIdentifier"),
    *("Modality", "Manufacturer", "ImageType", "ScanningSequence", "SequenceVariant", "TriggerTime"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)


@dataclass(frozen=True)
class Plane:
    """One image of a file. Positions are in mm, in the patient's coordinates: to the left, to the back, to the head.

    `index` is the image's place in a file of several frames, else None. `size` is (rows, columns). `spacing` is the
    distance of rows and of columns in mm. `orientation` is a unit vector along a row, then one along a column.
    `position`, `orientation`, `spacing` and `trigger_ms` are None if the file does not give them; other absent values
    are "" or 0. The intensity is slope * stored + intercept. If `mirror` is given (MONOCHROME1), `mirror` - stored
    replaces stored.
    """

    path: str
    index: int | None
    uid: str
    study: str
    series: str
    series_number: int
    acquisition: int
    acquired: str
    instance: int
    modality: str
    manufacturer: str
    kind: tuple[str, ...]
    sequence: str
    grey: bool
    size: tuple[int, int]
    position: Vector | None
    orientation: Vector | None
    spacing: Vector | None
    trigger_ms: float | None
    temporal: int
    slope: float
    intercept: float
    mirror: int | None
    signed: bool


@dataclass(frozen=True)
class Contents:
    """The images of a folder's DICOM files, in the order of the files' names, and the number of unreadable files."""

    planes: tuple[Plane, ...]
    unreadable: int


def is_dicom(path: str) -> bool:
    """Whether a file begins as a DICOM file does. False if it cannot be opened or is named as another format."""
    if path.lower().endswith(OTHER_ENDINGS):
        return False
    try:
        return fs.read_range(path, PREAMBLE, PREAMBLE + len(MAGIC)) == MAGIC
    except OSError:
        return False


def files_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield every file in a folder and below it, in the order of their names, except hidden ones.

    `above` holds the real paths of the folders on the way there. A link that leads back to one of them is not followed.
    """
    above |= {os.path.realpath(fs.local_path(folder)) if fs.is_local(folder) else folder}
    for name in fs.list_names(folder):
        path = fs.join(folder, name)
        if name.startswith("."):
            continue
        if not fs.is_folder(path):
            yield path
        elif not fs.is_local(path) or os.path.realpath(fs.local_path(path)) not in above:
            yield from files_below(path, above)


def read_contents(folder: str) -> Contents:
    """Read the attributes of all images in the DICOM files in a folder and below it; no pixels are read."""
    found = fs.map_concurrently(folder, _read_file, files_below(folder))
    planes = tuple(plane for of_file in found if of_file for plane in of_file)
    return Contents(planes, sum(of_file is None for of_file in found))


def read_pixels(plane: Plane, name: str) -> Array:
    """Read the intensities (rows, columns) of one image.

    They are integers as stored, or float32 if the slope is not 1 or the intercept not 0. Raises InputError, naming
    `name`, if the pixels cannot be decoded or the file cannot be opened.
    """
    from pydicom.pixels.utils import pixel_array

    problem = InputError(
        name,
        f"an image of series {plane.series_number} is damaged or compressed in a way that is not known",
        "export it again, uncompressed (explicit VR little endian)",
    )
    try:
        with fs.open_binary(plane.path) as file:
            stored = pixel_array(file, index=plane.index)
    except FileNotFoundError:
        raise InputError(name, "its files have changed while they were read", "give the command again") from None
    except OSError as error:
        raise not_opened(name, error) from None
    except Exception:  # errors of pydicom and its decoders have no other base; their texts may quote the file
        raise problem from None
    if stored.shape != plane.size or stored.dtype.kind not in "iu":
        raise problem
    if plane.mirror is not None:
        stored = (plane.mirror - stored.astype(np.int64)).astype(stored.dtype)
    if (plane.slope, plane.intercept) == (1, 0):
        return stored
    scaled: Array = (stored * plane.slope + plane.intercept).astype(np.float32)
    return scaled


def _read_file(path: str) -> list[Plane] | None:
    """The images of one file: an empty list if it is no DICOM file or has no image, None if it is damaged."""
    if not is_dicom(path):
        return []
    from pydicom import config, dcmread

    # pydicom would quote odd values in warnings; nothing of a file may get into a log.
    config.settings.reading_validation_mode = config.IGNORE
    try:
        with fs.open_binary(path) as file:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            if header.get("Rows") is None and header.file_meta.get("MediaStorageSOPClassUID") not in MR_IMAGES:
                return []
            return _planes(header, path)
    except Exception:  # errors of pydicom have no other common base
        return None


def _planes(header: Dataset, path: str) -> list[Plane]:
    """The images of one file. Raises any kind of exception for values that are not what the standard asks for."""
    rows, columns, count = int(header.Rows), int(header.Columns), int(header.get("NumberOfFrames") or 1)
    if not (0 < rows * columns <= MOST_PIXELS and 0 < count <= MOST_FRAMES):
        raise ValueError
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    each = list(header.get("PerFrameFunctionalGroupsSequence") or [])
    several = count > 1 or any(len(item) for item in each)  # some files of a single image have an empty item
    planes = []
    for index in range(count):
        groups = [*each[index : index + 1], *shared] if several else []
        planes.append(_plane(header, _Groups(header, groups, several), path, index if several else None))
    return planes


@dataclass(frozen=True)
class _Groups:
    """Finds the values of one frame: in the functional groups of an enhanced object, else in the header."""

    header: Dataset
    groups: Sequence[Dataset]
    several: bool

    def value(self, tag: str, *groups: str) -> Any:
        """The value of a tag from the first of the named groups that has it, else from the header; None if absent."""
        for of_frame in self.groups:
            for group in groups:
                items = of_frame.get(group)
                if items and items[0].get(tag) is not None:
                    return items[0].get(tag)
        # The header of an enhanced object may hold the first frame's position, which is wrong for all others.
        return None if self.several and tag in ("ImagePositionPatient", "TriggerTime") else self.header.get(tag)


def _plane(header: Dataset, frame: _Groups, path: str, index: int | None) -> Plane:
    signed = bool(int(header.get("PixelRepresentation") or 0))
    photometric = str(header.get("PhotometricInterpretation") or "")
    inverted = -1 if signed else 2 ** int(header.get("BitsStored") or 16) - 1
    slope = frame.value("RescaleSlope", "PixelValueTransformationSequence")
    intercept = frame.value("RescaleIntercept", "PixelValueTransformationSequence")
    kinds = (
        header.get("ImageType"),
        frame.value("FrameType", "MRImageFrameTypeSequence"),
        frame.value("ComplexImageComponent", "MRImageFrameTypeSequence"),
    )
    temporal = frame.value("TemporalPositionIndex", "FrameContentSequence")
    return Plane(
        path=path,
        index=index,
        uid=str(header.get("SOPInstanceUID") or ""),
        study=str(header.get("StudyInstanceUID") or ""),
        series=str(header.get("SeriesInstanceUID") or ""),
        series_number=int(header.get("SeriesNumber") or 0),
        acquisition=int(header.get("AcquisitionNumber") or 0),
        acquired=str(header.get("AcquisitionTime") or ""),
        instance=int(header.get("InstanceNumber") or 0),
        modality=str(header.get("Modality") or ""),
        manufacturer=str(header.get("Manufacturer") or ""),
        kind=tuple(word.upper() for value in kinds for word in _words(value)),
        sequence="\\".join(word for tag in ("ScanningSequence", "SequenceVariant") for word in _words(header.get(tag))),
        grey=int(header.get("SamplesPerPixel") or 1) == 1 and photometric in ("MONOCHROME1", "MONOCHROME2"),
        size=(int(header.Rows), int(header.Columns)),
        position=_numbers(frame.value("ImagePositionPatient", "PlanePositionSequence"), 3),
        orientation=_orientation(frame.value("ImageOrientationPatient", "PlaneOrientationSequence")),
        spacing=_spacing(frame.value("PixelSpacing", "PixelMeasuresSequence")),
        trigger_ms=_trigger(frame),
        temporal=int(temporal if temporal is not None else header.get("TemporalPositionIdentifier") or 0),
        slope=1.0 if slope is None else _finite(slope),
        intercept=0.0 if intercept is None else _finite(intercept),
        mirror=inverted if photometric == "MONOCHROME1" else None,
        signed=signed,
    )


def _trigger(frame: _Groups) -> float | None:
    """Time since the R wave in ms; None if the file does not give it."""
    cardiac = ("CardiacSynchronizationSequence",)
    legacy = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
    for value in (
        frame.value("NominalCardiacTriggerDelayTime", *cardiac),
        frame.value("ActualCardiacTriggerDelayTime", *cardiac),
        frame.value("TriggerTime", *legacy),
    ):
        if value is not None:
            return _finite(value)
    return None


def _words(value: Any) -> list[str]:
    """The values of a text attribute, which may have none, one or several, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(word) for word in value]


def _numbers(value: Any, count: int) -> Vector | None:
    if value is None:
        return None
    numbers = tuple(_finite(v) for v in value)
    return numbers if len(numbers) == count else None


def _orientation(value: Any) -> Vector | None:
    """Two unit vectors, six numbers. None unless the file's have length 1 and are at right angles, within 0.01."""
    numbers = _numbers(value, 6)
    if numbers is None:
        return None
    axes = np.array(numbers).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if abs(float(axes[0] @ axes[1])) > 0.01 or not np.allclose(lengths, 1, atol=0.01):
        return None
    return tuple(float(v) for v in (axes / lengths[:, None]).ravel())


def _spacing(value: Any) -> Vector | None:
    numbers = _numbers(value, 2)
    return numbers if numbers is not None and min(numbers) > 0 else None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number
