"""Chooses the frames of a study, in the same way for every layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from storage.errors import InputError
from storage.layouts.options import LayoutOptions
from storage.nifti.file import ENDINGS
from storage.subjects import FrameSource

MOST_FRAMES = 2**31  # the slice store's index counts frames in 32 bits


def cine_frames(
    image: str,
    count: int | None,
    phases: Mapping[str, int],
    masks: Mapping[int, tuple[str, int | None]],
    options: LayoutOptions,
) -> tuple[FrameSource, ...]:
    """Choose frames of a 4D image, in order: all, or ED and ES, or evenly spaced ones if these are not known.

    `count` is the number of frames. If it is None (unknown), only ED and ES can be taken. `phases` maps "ED" and "ES"
    to 0-based frames. `masks` maps a frame to its mask file and the index inside it (None: a 3D mask). Raises
    InputError for a phase beyond the last frame.
    """
    if count is not None:
        for phase, frame in phases.items():
            check_frame(image, phase, frame, count)
    if count is not None and options.frames == "all":
        chosen = list(range(count))
    elif phases:
        chosen = sorted(set(phases.values()))
    else:
        chosen = evenly_spaced(count or 1, options.unlabelled_frames)
    names = {frame: phase for phase, frame in phases.items()}
    return tuple(
        FrameSource(names.get(frame, "-"), frame, image, frame, *masks.get(frame, (None, None))) for frame in chosen
    )


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Choose up to `wanted` evenly spaced frames of a heart beat of `count` frames, 0-based.

    The beat is a cycle: two frames of 24 are 0 and 12, not 0 and 23.
    """
    taken = min(wanted, count)
    return [i * count // taken for i in range(taken)]


def nifti_name(names: Collection[str], stem: str) -> str | None:
    """The name among `names` that is `stem`.nii.gz or, if that is absent, `stem`.nii; None if both are absent.

    The ending may be in capitals.
    """
    found = [name for name in names if name.startswith(stem) and name[len(stem) :].lower() in ENDINGS]
    return max(found, key=lambda name: (len(name), name), default=None)


def check_frame(image: str, phase: str, frame: int, count: int) -> None:
    """Raise InputError unless `frame` (0-based) is one of `count`."""
    if not 0 <= frame < count:
        raise InputError(
            image.rsplit("/", 1)[-1],
            f"{phase} is frame {frame}, but the image has frames 0 to {count - 1}",
            f"correct {phase} (0-based) in the data set's table",
        )


def frame_number(text: str, column: str, where: str) -> int | None:
    """A whole number from a table's cell ("7" or "7.0"); None for an empty one. Raises InputError."""
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < MOST_FRAMES or value != int(value):  # refuses NaN too
        raise InputError(where, f"{column} is '{text}'", f"{column} is a frame number: 0, 1, 2, …")
    return int(value)
