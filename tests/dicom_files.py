"""DICOM files as scanners write them, from a phantom's volumes; every one names a person, to be found nowhere else."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

PERSON = {
    "PatientName": "Nobody^Special",
    "PatientID": "ID-of-a-person-4711",
    "PatientBirthDate": "19010203",
    "InstitutionName": "Hospital of nowhere",
    "ReferringPhysicianName": "Doctor^Unheard",
    "StudyDescription": "heart of Nobody",
    "SeriesDescription": "cine of Nobody",
    "StudyDate": "19991231",
    "AccessionNumber": "ACC-0815",
}
STUDY = generate_uid(entropy_srcs=["a study"])
# Short axis: along a row and along a column of the image, in the patient's left, back and head.
SHORT_AXIS = ((0.7071, 0.7071, 0.0), (-0.25, 0.25, -0.9354))
LONG_AXIS = ((-0.25, 0.25, -0.9354), (0.6614, -0.6614, -0.3536))
TRANSVERSE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
BEAT_MS = 900.0


@dataclass(frozen=True)
class Place:
    """Where a stack lies: directions along row and column, first pixel, distance of slices, (row, column) distance."""

    directions: tuple[Sequence[float], Sequence[float]] = SHORT_AXIS
    origin: tuple[float, float, float] = (-90.0, -110.0, 120.0)
    step: float = 8.0
    pixel: tuple[float, float] = (1.5, 1.25)

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        return np.cross(*map(np.asarray, self.directions))

    def position(self, z: int) -> list[float]:
        return [round(float(v), 4) for v in np.asarray(self.origin) + z * self.step * self.normal]


@dataclass
class Writer:
    """Writes images of one study into a folder, each under a new name."""

    folder: Path
    names: Sequence[str] | None = None
    study: str = STUDY
    written: list[Path] = field(default_factory=list)

    def name(self) -> Path:
        return self.folder / (f"IM{len(self.written):04d}" if self.names is None else self.names[len(self.written)])

    def cine(
        self,
        volume_TZHW: npt.NDArray[Any],
        place: Place = Place(),
        number: int = 5,
        slices: Iterable[int] | None = None,
        **tags: Any,
    ) -> None:
        """One series with the images of some or all slices."""
        series = generate_uid()
        instance = 0
        for z in range(volume_TZHW.shape[1]) if slices is None else slices:
            for t in range(len(volume_TZHW)):
                instance += 1
                given = {"SeriesInstanceUID": series, "TriggerTime": trigger(t, len(volume_TZHW)), **tags}
                self.image(volume_TZHW[t, z], place, z, SeriesNumber=number, InstanceNumber=instance, **given)

    def image(self, pixels_HW: npt.NDArray[Any], place: Place = Place(), z: int = 0, **tags: Any) -> Path:
        path = self.name()
        syntax = tags.pop("syntax", ExplicitVRLittleEndian)
        dataset = self._new(path, MRImageStorage)
        dataset.ImagePositionPatient = place.position(z)
        dataset.ImageOrientationPatient = [v for direction in place.directions for v in direction]
        dataset.PixelSpacing = list(place.pixel)
        _set_pixels(dataset, pixels_HW)
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        self._save(dataset, path, syntax)
        return path

    def enhanced(self, volume_TZHW: npt.NDArray[Any], place: Place = Place(), number: int = 5) -> None:
        """One file with all frames, slices running faster than phases."""
        path = self.name()
        phases, slices, rows, columns = volume_TZHW.shape
        dataset = self._new(path, EnhancedMRImageStorage)
        dataset.SeriesNumber, dataset.InstanceNumber = number, 1
        _set_pixels(dataset, volume_TZHW.reshape(-1, rows, columns))
        dataset.NumberOfFrames = phases * slices
        shared, frames = Dataset(), []
        shared.PlaneOrientationSequence = Items(
            [_item(ImageOrientationPatient=[v for d in place.directions for v in d])]
        )
        shared.PixelMeasuresSequence = Items([_item(PixelSpacing=list(place.pixel), SliceThickness=8.0)])
        for t in range(phases):
            for z in range(slices):
                frame = Dataset()
                frame.PlanePositionSequence = Items([_item(ImagePositionPatient=place.position(z))])
                frame.CardiacSynchronizationSequence = Items([_item(NominalCardiacTriggerDelayTime=trigger(t, phases))])
                frame.FrameContentSequence = Items([_item(TemporalPositionIndex=t + 1)])
                frame.MRImageFrameTypeSequence = Items(
                    [_item(FrameType=["ORIGINAL", "PRIMARY", "CARDIAC", "NONE"], ComplexImageComponent="MAGNITUDE")]
                )
                frames.append(frame)
        dataset.SharedFunctionalGroupsSequence = Items([shared])
        dataset.PerFrameFunctionalGroupsSequence = Items(frames)
        self._save(dataset, path, ExplicitVRLittleEndian)

    def _new(self, path: Path, kind: str) -> FileDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = self.study, generate_uid()
        dataset.Modality, dataset.Manufacturer = "MR", "GE MEDICAL SYSTEMS"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        dataset.ScanningSequence, dataset.SequenceVariant = "GR", "SS"
        for tag, value in PERSON.items():
            setattr(dataset, tag, value)
        return dataset

    def _save(self, dataset: FileDataset, path: Path, syntax: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if syntax == RLELossless:
            dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path, enforce_file_format=True)
        if syntax in (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless):
            compress(path, syntax)
        self.written.append(path)


def trigger(phase: int, phases: int) -> float:
    """ms after the R wave."""
    return round(10 + phase * BEAT_MS / phases, 1)


def compress(path: Path, syntax: str) -> None:
    """Write a file anew, compressed by GDCM."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    kind = {
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
        JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    }[syntax]
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(kind))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == syntax


def _set_pixels(dataset: Dataset, pixels: npt.NDArray[Any]) -> None:
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return item


def everything_below(folder: Path) -> bytes:
    """All bytes of all files in a folder, and their names."""
    out = io.BytesIO()
    for path in sorted(folder.rglob("*")):
        out.write(str(path.relative_to(folder)).encode())
        if path.is_file():
            out.write(path.read_bytes())
    return out.getvalue()
