"""Finds which images of a study are its short-axis cine, and the slice and the phase of each of them.

The choice depends on an image's place in space, its time after the R wave and its series. Descriptions and names are
not used, since each scanner and hospital has its own. Images with the same direction, matrix, pixel size and kind of
sequence form a group, whatever their series. A cine is the images of one series at one place. A stack is the cines of
one group that lie at equal distances. Of the stacks across the heart's long axis, the one with the most slices is
taken.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.dicom.geometry import depth, directions, normal, position
from storage.dicom.read import Plane
from storage.errors import InputError
from storage.nifti.orientation import LONG_AXIS

Floats = npt.NDArray[np.float64]

FEWEST_SLICES, FEWEST_PHASES = 3, 5
BEAT_MS = 200.0  # a cine covers at least this much of a beat; perfusion and maps have one time of every beat
PARALLEL = 0.99999  # cosine of 0.26°; the directions of one stack's slices differ by rounding only
SAME_PLACE_MM = 1.0  # between a slice and its repeat
NEAREST_MM, FARTHEST_MM = 3.0, 25.0  # limits for the distance of neighbouring slices
MOST_MISSING = 3  # slices missing in a row; a slice farther away is not of the stack
UNEVEN = 0.15  # part of the slice distance by which a slice may be off its place
ASIDE_MM = 3.0  # farthest that a slice may lie beside the line of the others
# Least cosine between a slice's normal and the long axis: 46°. The plane of a two- or four-chamber view contains the
# long axis, so its normal is at right angles to that. The normal of a transverse, coronal or sagittal stack is 47° or
# more away.
SHORT_AXIS = 0.69
LOCALISER = "LOCALIZER"
NOT_MAGNITUDE = {
    *("P", "PHASE", "PHASE MAP", "P_FFE", "P_SE", "VELOCITY", "VELOCITY MAP", "PHASE_CONTRAST"),
    *("R", "REAL", "R_FFE", "R_IR", "I", "IMAGINARY", "I_FFE"),
}


@dataclass(frozen=True)
class Stack:
    """A short-axis cine. `planes[z][t]` is the image of slice z, counted along the slices' normal, and phase t.

    `left_out` describes the images that are not in it, one kind a line.
    """

    planes: tuple[tuple[Plane, ...], ...]
    left_out: tuple[str, ...]

    @property
    def affine(self) -> Floats:
        """(4, 4) float64: from (column, row, slice) to mm to the patient's right, front and head, as in NIfTI."""
        first, last = self.planes[0][0], self.planes[-1][0]
        along_row, along_column = directions(first)
        row_mm, col_mm = first.spacing or (1.0, 1.0)
        step = (position(last) - position(first)) / (len(self.planes) - 1)
        columns = np.column_stack([along_row * col_mm, along_column * row_mm, step, position(first)])
        affine: Floats = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.vstack([columns, [0, 0, 0, 1]])
        return affine

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of slices (along the normal), of rows and of columns, in mm."""
        first, last = self.planes[0][0], self.planes[-1][0]
        row_mm, col_mm = first.spacing or (1.0, 1.0)
        return (depth(last) - depth(first)) / (len(self.planes) - 1), row_mm, col_mm


@dataclass(frozen=True)
class _Cine:
    """The images of one series at one place, in order of time."""

    planes: tuple[Plane, ...]

    @property
    def depth(self) -> float:
        return depth(self.planes[0])

    @property
    def series(self) -> int:
        return self.planes[0].series_number

    @property
    def order(self) -> tuple[int, str, int, int, str]:
        """A sort key, larger for a later acquisition."""
        last = self.planes[-1]
        return last.series_number, last.acquired, last.acquisition, last.instance, last.uid


@dataclass(frozen=True)
class _Candidate:
    """Slices of one group at equal distances, None where one is missing. `usual` is their usual number of phases."""

    slices: tuple[_Cine | None, ...]
    usual: int

    @property
    def cines(self) -> list[_Cine]:
        return [cine for cine in self.slices if cine is not None]

    @property
    def folders(self) -> set[str]:
        """The folders of its files."""
        return {plane.path.rpartition("/")[0] for cine in self.cines for plane in cine.planes}

    @property
    def rank(self) -> tuple[int, int, tuple[int, str, int, int, str]]:
        return len(self.cines), self.usual, max(cine.order for cine in self.cines)


class _LeftOut:
    """Counts the images of each series that are not taken, by the reason."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, str]] = Counter()

    def add(self, planes: Iterable[Plane], reason: str) -> None:
        for plane in planes:
            self._counts[plane.series_number, reason] += 1

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"series {number}: {count} image{'s' * (count > 1)}, {reason}"
            for (number, reason), count in sorted(self._counts.items())
        )


def find_stack(planes: Sequence[Plane], name: str) -> Stack:
    """Find the short-axis cine among a study's images; their order does not matter.

    Raises InputError, naming `name`, if there is none, or if it lacks a slice or a phase.
    """
    left_out = _LeftOut()
    candidates: list[_Candidate] = []
    groups = _groups(_usable(planes, left_out), left_out)
    for group in groups:
        found = _lattice(group, left_out)
        if found is not None:
            candidates.append(found)
    if not candidates:
        why = left_out.lines()
        told = "; ".join(why[:4]) + (f"; and {len(why) - 4} more" if len(why) > 4 else "")
        raise InputError(
            name,
            f"has no short-axis cine ({told or 'no MR images'})",
            "name the folder of a study that has one, or convert its series to NIfTI",
        )
    best = max(candidates, key=lambda candidate: candidate.rank)
    for other in candidates:
        if other is not best:
            apart = not best.folders & other.folders
            if apart and not best.cines[0].planes[0].study:
                problem = "several folders hold a short-axis stack, and no StudyInstanceUID says whether of one patient"
                raise InputError(name, problem, "name each study's folder by itself")
            where = f" in {fs.base_name(min(other.folders))}" if apart else ""
            reason = f"another short-axis stack, of {len(other.cines)} slices{where}"
            left_out.add((plane for cine in other.cines for plane in cine.planes), reason)
    _check_whole(best, [cine for group in groups for cine in group], name)
    return Stack(tuple(cine.planes for cine in best.cines), left_out.lines())


def _usable(planes: Sequence[Plane], left_out: _LeftOut) -> list[Plane]:
    """The magnitude images that have a place in space, without copies."""
    usable: dict[tuple[object, ...], Plane] = {}
    for plane in planes:
        reason = _unusable(plane)
        if reason is not None:
            left_out.add([plane], reason)
            continue
        # The UID alone does not suffice: some anonymisers give the same UID to all images.
        image = (plane.uid, plane.index, plane.instance, plane.trigger_ms, plane.position, plane.orientation)
        if plane.uid and image in usable:
            left_out.add([plane], "copies of the same image")
        else:
            usable[image if plane.uid else (plane.path, plane.index)] = plane
    return list(usable.values())


def _unusable(plane: Plane) -> str | None:
    if not plane.grey:
        return "no grey values"
    if LOCALISER in plane.kind:
        return "localisers"
    if NOT_MAGNITUDE & set(plane.kind[2:]):  # the first two say only whether it is original and primary
        return "not magnitude"
    if plane.position is None or plane.orientation is None or plane.spacing is None:
        return "without position, direction or pixel size"
    return None


def _groups(planes: Sequence[Plane], left_out: _LeftOut) -> list[list[_Cine]]:
    """The cines across the long axis, grouped by direction, matrix, pixel size and kind of sequence."""
    known: list[Floats] = []
    members: dict[tuple[object, ...], list[Plane]] = defaultdict(list)
    for plane in sorted(planes, key=lambda p: (p.series_number, p.series, p.instance, p.uid, p.index or 0)):
        own = directions(plane)
        at = next((i for i, other in enumerate(known) if ((own * other).sum(axis=1) > PARALLEL).all()), None)
        if at is None:
            at = len(known)
            known.append(own)
        spacing = tuple(round(mm, 3) for mm in plane.spacing or ())
        members[at, plane.size, spacing, plane.sequence].append(plane)
    groups = []
    for group in members.values():
        cines = _cines(group, left_out)
        if cines and abs(float(normal(group[0]) @ LONG_AXIS)) / np.linalg.norm(LONG_AXIS) < SHORT_AXIS:
            left_out.add(
                (plane for cine in cines for plane in cine.planes), "cines along the long axis or oblique to it"
            )
        elif cines:
            groups.append(cines)
    return groups


def _cines(planes: Sequence[Plane], left_out: _LeftOut) -> list[_Cine]:
    """The cines of one group of images."""
    places: list[list[Plane]] = []
    for plane in sorted(planes, key=lambda p: (p.series, depth(p), p.uid, p.index or 0)):
        last = places[-1][-1] if places else None
        if last is not None and last.series == plane.series and depth(plane) - depth(last) <= SAME_PLACE_MM:
            places[-1].append(plane)
        else:
            places.append([plane])
    cines = []
    for place in places:
        for run in _runs(place):
            if not _is_cine(run):
                few = len(run) < FEWEST_PHASES
                left_out.add(run, f"fewer than {FEWEST_PHASES} phases" if few else "one time of the beat, no cine")
                continue
            phases: dict[float, Plane] = {}
            for plane in sorted(run, key=lambda p: (p.acquired, p.acquisition, p.instance, p.uid, p.index or 0)):
                if _time(plane) in phases:
                    left_out.add([phases[_time(plane)]], "repeated later in the series")
                phases[_time(plane)] = plane
            cines.append(_Cine(tuple(phases[time] for time in sorted(phases))))
    return cines


def _runs(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Split the images of one series at one place by acquisition; else all of them are one list.

    They are split if some times occur twice and the images of each acquisition are a cine.
    """
    times = {_time(plane) for plane in planes}
    by_acquisition: dict[int, list[Plane]] = defaultdict(list)
    for plane in planes:
        by_acquisition[plane.acquisition].append(plane)
    several = len(by_acquisition) > 1 and all(map(_is_cine, by_acquisition.values()))
    return list(by_acquisition.values()) if several and len(times) < len(planes) else [list(planes)]


def _time(plane: Plane) -> float:
    """The sort key of a slice's images: ms after the R wave if known, else from the images' numbers."""
    if plane.trigger_ms is not None:
        return plane.trigger_ms
    return 1e6 * plane.temporal + plane.instance + (plane.index or 0)


def _is_cine(planes: Sequence[Plane]) -> bool:
    times = {_time(plane) for plane in planes}
    timed = all(plane.trigger_ms is not None for plane in planes)
    return len(times) >= FEWEST_PHASES and (not timed or max(times) - min(times) >= BEAT_MS)


def _lattice(cines: Sequence[_Cine], left_out: _LeftOut) -> _Candidate | None:
    """Choose the slices of a group that lie at equal distances. None if they are too few; `left_out` says so.

    Of several cines at one place, the latest one with the usual number of phases is taken.
    """
    usual = _usual(len(cine.planes) for cine in cines)
    places: list[list[_Cine]] = []
    for cine in sorted(cines, key=lambda c: (c.depth, c.order)):
        if places and cine.depth - places[-1][0].depth <= SAME_PLACE_MM:
            places[-1].append(cine)
        else:
            places.append([cine])
    chosen = [max(place, key=lambda c: (len(c.planes) == usual, len(c.planes), c.order)) for place in places]
    best = max(_lattices(chosen), key=_covered, default=())
    taken = [cine for cine in best if cine is not None]
    if len(taken) < FEWEST_SLICES:
        reason = f"{len(chosen)} slice{'s' * (len(chosen) > 1)} across the long axis, fewer than {FEWEST_SLICES}"
        left_out.add((plane for cine in cines for plane in cine.planes), reason)
        return None
    for place, cine in zip(places, chosen, strict=True):
        for other in place:
            if other is not cine:
                left_out.add(other.planes, f"a slice that series {cine.series} has too, later or with more phases")
        if cine not in taken:
            left_out.add(cine.planes, "not at the distances of the stack's slices")
    return _Candidate(best, _usual(len(cine.planes) for cine in taken))


def _usual(counts: Iterable[int]) -> int:
    seen = Counter(counts)
    return max(seen, key=lambda count: (seen[count], count))


def _covered(slices: Sequence[_Cine | None]) -> tuple[int, tuple[int, str, int, int, str]]:
    """A sort key: more slices are better, each gap costs one, and of equals the later acquisition is better."""
    cines = [cine for cine in slices if cine is not None]
    return 2 * len(cines) - len(slices), max(cine.order for cine in cines)


def _lattices(cines: Sequence[_Cine]) -> Iterable[tuple[_Cine | None, ...]]:
    """Yield every choice of slices at equal distances, None for a gap. `cines` are in the order of their depth."""
    for i, first in enumerate(cines):
        for second in cines[i + 1 :]:
            step = second.depth - first.depth
            if NEAREST_MM <= step <= FARTHEST_MM:
                yield _slices_at(cines, first.depth, step)


def _slices_at(cines: Sequence[_Cine], origin: float, step: float) -> tuple[_Cine | None, ...]:
    nearest: dict[int, _Cine] = {}
    for cine in cines:
        place = (cine.depth - origin) / step
        at = round(place)
        if abs(place - at) <= UNEVEN:
            known = nearest.get(at)
            if known is None or abs(place - at) < abs((known.depth - origin) / step - at):
                nearest[at] = cine
    run = [0]
    for at in sorted(k for k in nearest if k > 0):
        if at - run[-1] > MOST_MISSING + 1:
            break
        run.append(at)
    for at in sorted((k for k in nearest if k < 0), reverse=True):
        if run[0] - at > MOST_MISSING + 1:
            break
        run.insert(0, at)
    return tuple(nearest.get(at) for at in range(run[0], run[-1] + 1))


def _check_whole(stack: _Candidate, known: Sequence[_Cine], name: str) -> None:
    """Raise InputError if a slice or a phase is missing, or if a slice lies beside the line of the others."""
    cines, count = stack.cines, len(stack.cines)
    step = (cines[-1].depth - cines[0].depth) / (len(stack.slices) - 1)
    again = "export the study again, with all images of its short-axis cine"
    _check_other_matrix(stack, known, step, name)
    for number, (one, following) in enumerate(pairwise(cines), start=1):
        apart = following.depth - one.depth
        if apart > 1.5 * step:
            problem = f"slices {number} and {number + 1} of {count} lie {apart:.3g} mm apart, others {step:.3g}"
            missing = "a slice is missing" if apart < 2.5 * step else "slices are missing"
            raise InputError(name, f"{problem}: {missing}", again)
    for number, cine in enumerate(cines, start=1):
        phases = len(cine.planes)
        if phases != stack.usual:
            problem = f"slice {number} of {count} (series {cine.series}) has {phases} phases, others {stack.usual}"
            raise InputError(name, problem, again)
    ends = position(cines[0].planes[0]), position(cines[-1].planes[0])
    for number, cine in enumerate(cines, start=1):
        on_line = ends[0] + (ends[1] - ends[0]) * (number - 1) / (count - 1)
        aside = float(np.linalg.norm(position(cine.planes[0]) - on_line))
        if aside > ASIDE_MM:
            problem = (
                f"slice {number} of {count} (series {cine.series}) lies {aside:.0f} mm beside the line of the others"
            )
            raise InputError(name, problem, "convert the study to NIfTI with one grid for all slices")


def _check_other_matrix(stack: _Candidate, known: Sequence[_Cine], step: float, name: str) -> None:
    """Raise InputError if a slice that the stack lacks was taken with another matrix or pixel size."""
    cines = stack.cines
    first, last = cines[0], cines[-1]
    for other in known:
        same = (directions(other.planes[0]) * directions(first.planes[0])).sum(axis=1) > PARALLEL
        alike = other.planes[0].sequence == first.planes[0].sequence
        theirs, ours = (_grid(cine.planes[0]) for cine in (other, first))
        near = first.depth - 1.5 * step < other.depth < last.depth + 1.5 * step
        apart = min(abs(other.depth - cine.depth) for cine in cines)
        if theirs != ours and same.all() and alike and near and apart > (1 - UNEVEN) * step:
            problem = f"series {other.series} has a slice of the stack with {theirs}, the other slices have {ours}"
            raise InputError(name, problem, "convert the study to NIfTI with one grid for all slices")


def _grid(plane: Plane) -> str:
    rows, columns = plane.size
    row_mm, col_mm = plane.spacing or (1.0, 1.0)
    return f"{columns} × {rows} pixels of {col_mm:.4g} × {row_mm:.4g} mm"
