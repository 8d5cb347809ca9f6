"""Predict one study: from its images to masks, volumes and a picture.

`NAME_pred.nii.gz` is the mask on its image's own grid. `NAME_pred.json` holds the volumes, and `NAME_pred.png` shows
the frames that they come from. The files are written after the whole study is segmented, each whole or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.centre import Shift, around, heart_shift, is_better
from pipeline.inference.config import InferenceConfig
from pipeline.inference.find_studies import Study
from pipeline.inference.other_ways import other_way_warnings
from pipeline.inference.overlay import Row, study_png
from pipeline.inference.plausible import doubtful_warnings, header_warnings, padding_warnings, volume_warnings
from pipeline.inference.predictor import Floats, Predictor, Segmented
from pipeline.inference.trust import DOUBTFUL, in_words, mean_dice
from pipeline.samples.preprocess import volume_statistics
from pipeline.scores.volumes import MYOCARDIUM_G_PER_ML, ejection_fraction, volumes_ml
from storage import fs
from storage.bank.spec import code_version
from storage.errors import InputError, StageError, one_line
from storage.identity import identity
from storage.images import Image, left_out_of, open_image, write_mask_of
from storage.nifti.checks import GRID_TOLERANCE, TimeAxis, checked_image
from storage.nifti.header import Header, Spacing
from storage.nifti.orientation import HEADER, Orientation
from storage.slices.intensities import Statistics
from storage.subjects import STRUCTURES

USE = "Research software, not a medical device."


@dataclass(frozen=True)
class Outcome:
    """The result of a study: its report (the content of its JSON), or None and one line that says why it failed."""

    study: Study
    report: dict[str, Any] | None
    failure: str = ""


@dataclass(frozen=True)
class _Frame:
    """One segmented frame.

    index: its number along the file's fourth axis, or None for a 3D file. spacing: (slice, row, column) in mm.
    unusable: why the frame could not be segmented; its mask is then empty. shift: rows and columns from the image's
    centre to the centre of the second look, or None without one. doubts: warnings about its file's intensities.
    """

    image: str
    index: int | None
    spacing: Spacing
    found: Segmented
    unusable: InputError | None = None
    shift: Shift | None = None
    doubts: tuple[str, ...] = ()

    @property
    def ml(self) -> dict[str, float]:
        """Volume of each structure in ml."""
        return {name: round(ml, 3) for name, ml in volumes_ml(self.found.mask, self.spacing).items()}

    @property
    def name(self) -> str:
        """The file's name and, in a cine, the frame's number."""
        file = fs.base_name(self.image)
        return file if self.index is None else f"{file} frame {self.index}"


def attempt(predictor: Predictor, study: Study, models: Sequence[str]) -> Outcome:
    """Run `segment_study`, and return a failure instead of raising it, so that other studies go on."""
    try:
        return Outcome(study, segment_study(predictor, study, models))
    except InputError as error:
        told = str(error)
    except StageError as error:
        told = f"{study.name}: {error}"
    except OSError as error:  # its text may name folders
        told = f"{study.name}: {one_line(error, trusted=False)}"
    except (MemoryError, RuntimeError) as error:  # on a CPU, torch raises a RuntimeError if memory runs out
        told = f"{study.name}: {one_line(error)}"
    except Exception as error:  # an error of ours, whose text may name folders; the other studies go on
        told = f"{study.name}: {type(error).__name__}, a fault of cardiomix; report it, and what is special here"
    return Outcome(study, None, told)


def segment_study(predictor: Predictor, study: Study, models: Sequence[str]) -> dict[str, Any]:
    """Segment every frame of a study, write its files, and return its report, in which `models` names the networks.

    Each frame is normalised by its own intensities, as in training. A frame that is blank or has NaN gets an empty mask
    and a warning. Raises InputError if an image, or every frame, cannot be used; nothing is written then.
    """
    spacing, wanted = predictor.config.spacing, predictor.config.orientation
    headers, orientations = [], []
    for image in study.images:
        with open_image(image, spacing, wanted) as file:
            headers.append(file.header)
            orientations.append(file.orientation)
    _check_frame_files(headers)
    frames = [frame for image in study.images for frame in _segmented(predictor, image)]
    unusable = [frame.unusable for frame in frames if frame.unusable is not None]
    if len(unusable) == len(frames):
        raise unusable[0]
    ml = [frame.ml for frame in frames]
    phases = guess_phases([volumes["LV"] for volumes in ml])
    shown = _shown(frames, phases)
    report: dict[str, Any] = {
        "study": study.name,
        "images": [fs.base_name(image) for image in study.images],
        "masks": [fs.base_name(study.mask(image)) for image in study.images],
        "frames": [
            {
                "image": fs.base_name(f.image),
                "frame": f.index or 0,
                "ml": v if f.unusable is None else None,
                "expected_dice": dict(f.found.expected) or None,
            }
            for f, v in zip(frames, ml, strict=True)
        ],
        **_recentred(frames),
        **_function(ml, phases),
        "expected_dice": {phase: dict(frame.found.expected) or None for phase, frame in shown.items()},
        "orientation": [
            {"turn": found.turn.words, "why": found.why, "known": found.known, "doubt": found.doubt}
            for found in dict.fromkeys(orientations)
        ],
        "warnings": [],
        "models": list(models),
        "inference": identity(predictor.config),
        "made_by": f"cardiomix {code_version()}",
        "use": USE,
    }
    doubts = (
        [] if spacing else next(filter(None, map(header_warnings, headers)), [])
    )  # files of one study share a grid, so one file's warnings are enough
    report["warnings"] = [
        *_warnings(frames, ml),
        *_doubtful(predictor, shown),
        *_orientation_warnings(headers, orientations),
        *next((frame.doubts for frame in frames if frame.doubts), ()),
        *doubts,
        *volume_warnings(report),
    ]
    left_out = [line for image in study.images for line in left_out_of(image)]
    if left_out:
        report["left_out"] = left_out
    picture = _picture(shown, report, predictor.config)
    for image in study.images:
        own = [frame for frame in frames if frame.image == image]
        mask = own[0].found.mask if own[0].index is None else np.stack([frame.found.mask for frame in own])
        write_mask_of(study.mask(image), mask, image, spacing, wanted)
    fs.write_bytes(study.picture, picture)
    fs.write_text(study.report, json.dumps(report, indent=1, ensure_ascii=False))
    return report


def _recentred(frames: Sequence[_Frame]) -> dict[str, Any]:
    """For each image with a second look, the rows and columns from its centre to the heart."""
    shifts = {fs.base_name(f.image): dict(zip(("rows", "columns"), f.shift, strict=True)) for f in frames if f.shift}
    return {"recentred": shifts} if shifts else {}


def _check_frame_files(headers: Sequence[Header]) -> None:
    """Raise InputError if a study's files differ in matrix or voxel size. They then belong to several studies."""
    first, *others = headers
    remedy = "predict each in a command of its own, or rename the file that belongs to another study"
    for header in others:
        names = fs.base_name(header.path), fs.base_name(first.path)
        if header.shape[:3] != first.shape[:3]:
            theirs, ours = (" × ".join(map(str, h.shape[:3])) for h in (header, first))
            raise InputError(names[0], f"is {theirs} voxels, but {names[1]} of the same study {ours}", remedy)
        if not np.allclose(header.spacing_mm, first.spacing_mm, rtol=GRID_TOLERANCE):
            theirs, ours = (" × ".join(f"{mm:g}" for mm in h.spacing_mm[::-1]) for h in (header, first))
            raise InputError(names[0], f"has voxels of {theirs} mm, but {names[1]} of the same study {ours} mm", remedy)


def guess_phases(lv_ml: Sequence[float]) -> tuple[int, int] | None:
    """The numbers of the frames with the largest and the smallest LV, taken as ED and ES.

    Frames without an LV do not count. None if fewer than two frames have one.
    """
    candidates = [i for i, volume in enumerate(lv_ml) if volume > 0]
    if len(candidates) < 2:
        return None
    return max(candidates, key=lambda i: lv_ml[i]), min(candidates, key=lambda i: lv_ml[i])


def _function(ml: Sequence[dict[str, float]], phases: tuple[int, int] | None) -> dict[str, Any]:
    """Both ventricles' volumes (ml) and ejection fraction (%), and the LV's mass (g). All None if `phases` is None."""
    if phases is None:
        return {"ed": None, "es": None, "lv": None, "rv": None, "lv_mass_g": None}
    ed, es = phases
    mass = round(ml[ed]["MYO"] * MYOCARDIUM_G_PER_ML, 3)
    sides = {side.lower(): _ventricle(ml[ed][side], ml[es][side]) for side in ("LV", "RV")}
    return {"ed": ed, "es": es, **sides, "lv_mass_g": mass}


def _ventricle(edv: float, esv: float) -> dict[str, float | None]:
    ef = ejection_fraction(edv, esv)
    return {
        "edv_ml": edv,
        "esv_ml": esv,
        "sv_ml": round(edv - esv, 3),
        "ef_percent": round(ef, 2) if math.isfinite(ef) else None,
    }


def _segmented(predictor: Predictor, image: str) -> Iterator[_Frame]:
    config = predictor.config
    with open_image(image, config.spacing, config.orientation) as file:
        header = file.header
        frames: list[int | None] = list(range(header.frames)) if len(header.shape) == 4 else [None]
        unusable: dict[int | None, InputError] = {}
        doubts: list[str] = []
        found = list(_looked_at(predictor, file, frames, unusable, (0, 0), doubts))
        shift = heart_shift(found, predictor.preprocess) if config.recentre else None
        if shift is not None:
            again = list(_looked_at(predictor, file, frames, {}, shift, []))
            found, shift = (again, shift) if is_better(again, found) else (found, None)
        masks, empty = iter(found), Segmented(np.zeros(header.volume_shape, np.uint8), (), {})
        for index in frames:
            problem = unusable.get(index)
            mask = next(masks) if problem is None else empty
            yield _Frame(image, index, header.spacing_mm, mask, problem, shift, tuple(doubts))


def _looked_at(
    predictor: Predictor,
    file: Image,
    frames: Sequence[int | None],
    unusable: dict[int | None, InputError],
    shift: Shift,
    doubts: list[str],
) -> Iterator[Segmented]:
    """Segment the frames that can be used, centred `shift` from the image's centre.

    For each other frame, `unusable` gets the reason. `doubts` gets warnings about the file's intensities.
    """
    spacing, preprocess = file.header.spacing_mm, predictor.preprocess
    time = TimeAxis(file.name)

    def seen() -> Iterator[tuple[Floats, Statistics]]:
        for number, frame in enumerate(_usable_frames(file, frames, unusable)):
            if number == 0:
                doubts.extend(padding_warnings(file.name, frame, preprocess))
            time.add(frame)
            yield _as_float(frame), volume_statistics(around(frame, shift, preprocess), spacing, preprocess)

    yield from predictor.masks(seen(), spacing, shift)
    if predictor.config.orientation == HEADER:
        time.check()


def _usable_frames(
    file: Image, frames: Sequence[int | None], unusable: dict[int | None, InputError]
) -> Iterator[npt.NDArray[Any]]:
    """Yield the frames that can be segmented. For each other frame, `unusable` gets the reason."""
    for index in frames:
        data = file.frame(index)  # a damaged file affects all frames, so its error is not caught
        try:
            frame = checked_image(data, file.name, index)
        except InputError as error:
            unusable[index] = error
        else:
            yield frame


def _as_float(frame: npt.NDArray[Any]) -> Floats:
    return frame.astype(np.float32, copy=False)


def _orientation_warnings(headers: Sequence[Header], orientations: Sequence[Orientation]) -> list[str]:
    """Warnings about doubtful orientations. Of all files with one orientation, the first is named."""
    lines = {}
    for header, found in zip(headers[::-1], orientations[::-1], strict=True):
        if found.doubt:
            but = "" if found.doubt == found.why else f", but {found.doubt}"
            lines[found] = f"{fs.base_name(header.path)}: {found.line}{but}: look at the picture, or use --orientation"
    return list(lines.values())


def _warnings(frames: Sequence[_Frame], ml: Sequence[dict[str, float]]) -> list[str]:
    out = []
    unusable = [f.unusable for f in frames if f.unusable is not None]
    if unusable:
        more = f", and {len(unusable) - 1} more frames like it" if len(unusable) > 1 else ""
        out.append(f"{unusable[0].where}: {unusable[0].problem}{more}: not segmented")
    for name in STRUCTURES:
        lacking = [f.name for f, v in zip(frames, ml, strict=True) if v[name] == 0 and f.unusable is None]
        if lacking:
            out.append(f"no {name} found in {_names_in_words(lacking)}")
        cut = [f.name for f in frames if name in f.found.cut]
        if cut:
            out.append(f"{name} reaches the edge of the network's field of view in {_names_in_words(cut)}")
    return out


def _names_in_words(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shown(frames: Sequence[_Frame], phases: tuple[int, int] | None) -> dict[str, _Frame]:
    """The frames for a study's numbers and picture: ED and ES, or the first segmented frame if these are unknown."""
    if phases is None:
        return {"first frame": next(frame for frame in frames if frame.unusable is None)}
    return {"ED": frames[phases[0]], "ES": frames[phases[1]]}


def _doubtful(predictor: Predictor, shown: Mapping[str, _Frame]) -> list[str]:
    """Warnings about doubtful masks. If the image's orientation is unknown, also another one that would fit better."""
    out = doubtful_warnings({f"{phase} ({frame.name})": frame.found.expected for phase, frame in shown.items()})
    if out and predictor.config.orientation == HEADER:
        worst = min(shown.values(), key=lambda frame: mean_dice(frame.found.expected))
        with open_image(worst.image, predictor.config.spacing) as file:
            if not file.orientation.known:  # the array was then read as stored
                (stored,) = _usable_frames(file, [worst.index], {})
                out += other_way_warnings(predictor, worst.name, stored, worst.spacing)
    return out


def _picture(shown: Mapping[str, _Frame], report: dict[str, Any], config: InferenceConfig) -> bytes:
    rows = []
    for phase, frame in shown.items():
        with open_image(frame.image, config.spacing, config.orientation) as file:
            (image,) = _usable_frames(file, [frame.index], {})
        volumes = ", ".join(f"{name} {value:.1f} ml" for name, value in frame.ml.items())
        title, expected = f"{phase}: {frame.name}  {volumes}", frame.found.expected
        if expected:
            title += f"  expected Dice {in_words(mean_dice(expected))}"
        doubtful = bool(expected) and mean_dice(expected) < DOUBTFUL
        rows.append(Row(title, _as_float(image), frame.found.mask, doubtful))
    return study_png(rows, [headline(report), *report["warnings"]])


def headline(report: dict[str, Any]) -> str:
    """A study's main numbers in one line."""
    if report["lv"] is None:
        (first, *others) = (frame["ml"] for frame in report["frames"] if frame["ml"] is not None)
        more = f" ({len(others)} more frames)" if others else ""
        return f"{report['study']}: " + ", ".join(f"{name} {ml:.1f} ml" for name, ml in first.items()) + more
    parts = [f"LV mass {report['lv_mass_g']:.0f} g"]
    for side in ("rv", "lv"):
        values = report[side]
        ef = "unknown" if values["ef_percent"] is None else f"{values['ef_percent']:.0f} %"
        parts.insert(0, f"{side.upper()} EF {ef} (EDV {values['edv_ml']:.0f}, ESV {values['esv_ml']:.0f} ml)")
    return f"{report['study']}: " + ", ".join(parts)
