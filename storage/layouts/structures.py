"""Which structures a study's masks hold: what nobody drew is not taught as background and not scored.

A data set may have the left ventricle alone, or the myocardium at ED alone (Sunnybrook's experts drew no RV). Nothing
in a mask tells what was not drawn from what is not there, so that the user says it, and is told where it looks so.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.errors import InputError
from storage.subjects import PHASES, STRUCTURES, Subject

EVERY_PHASE = ""
FORM = "write those that are drawn: 'LV MYO', or by phase 'ED: LV MYO RV; ES: LV'"


def parsed_structures(text: str) -> dict[str, tuple[str, ...]]:
    """Phase → its structures, in our order, from text such as `LV MYO` or `ED: LV MYO; ES: LV`.

    Without phases the only key is `EVERY_PHASE`. A phase that is not named has no structure. Raises ValueError with
    what is wrong.
    """
    out: dict[str, tuple[str, ...]] = {}
    parts = [part for part in text.split(";") if part.strip()]
    for part in parts:
        before, colon, after = part.rpartition(":")
        phase, names = before.strip().upper(), re.split(r"[\s,+]+", after.strip(" ,+").upper())
        if phase not in (PHASES if colon else (EVERY_PHASE,)):
            raise ValueError(f"'{before.strip()}' is none of the phases {', '.join(PHASES)}")
        wrong = [name for name in names if name not in STRUCTURES]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is none of {', '.join(STRUCTURES)}")
        if phase in out:
            raise ValueError(f"{phase or 'what is drawn'} is told twice")
        out[phase] = tuple(name for name in STRUCTURES if name in names)
    if not out:
        raise ValueError("it names no structure")
    if EVERY_PHASE in out and len(out) > 1:
        raise ValueError("some structures have a phase and some have none")
    return out


def with_structures(subject: Subject, text: str, where: str) -> Subject:
    """The subject with what is drawn in its masks as `text` says; a mask of which it says nothing is not read.

    Raises InputError, with `where` as its place, for text that cannot be read, or that leaves a subject that has masks
    without any, or names a structure that the coding of its masks lacks.
    """
    try:
        told = parsed_structures(text)
    except ValueError as error:
        raise InputError(where, f"structures is '{text}': {error}", FORM) from error
    lacking = sorted({name for names in told.values() for name in names} - set(coded(subject.labels)))
    if lacking:
        remedy = "add its value to labels, or leave it out of structures"
        raise InputError(where, f"structures names {lacking[0]}, of which labels tells no value", remedy)
    frames = []
    for frame in subject.frames:
        names = told.get(EVERY_PHASE) or told.get(frame.phase, ())
        if frame.mask is not None and names:
            frames.append(replace(frame, structures=names))
        else:
            frames.append(replace(frame, mask=None, mask_index=None))
    if subject.labelled and all(frame.mask is None for frame in frames):
        phases = ", ".join(dict.fromkeys(f.phase for f in subject.frames if f.mask is not None))
        problem = f"structures is '{text}', but the masks are at {phases}"
        raise InputError(where, problem, "name this phase, or leave the mask out")
    return replace(subject, frames=tuple(frames))


def coded(labels: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """The structures that a coding has values for: no other one can be in its masks."""
    ours = {label for _, label in labels}
    return tuple(name for name, label in STRUCTURES.items() if label in ours)


@dataclass(frozen=True)
class MaskContents:
    """One mask: whose it is, which structures are said to be drawn in it, and which of these it does not have."""

    subject: str
    vendor: str
    centre: str
    phase: str
    structures: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class NeverDrawn:
    """Structures that no mask of a vendor and centre has at a phase, though none of its subjects is said to lack them.

    `absent`: (phase, structure) pairs; `present`: text for `with_structures` that says what there is.
    """

    vendor: str
    centre: str
    subjects: tuple[str, ...]
    absent: tuple[tuple[str, str], ...]
    present: str

    @property
    def finding(self) -> str:
        """Such as `RV in no mask at ED or ES, MYO in no mask at ES`."""
        phases: dict[str, list[str]] = {}
        for phase, name in self.absent:
            phases.setdefault(name, []).append(phase)
        return ", ".join(f"{name} in no mask at {' or '.join(found)}" for name, found in phases.items())


def never_drawn(masks: Sequence[MaskContents]) -> list[NeverDrawn]:
    """What looks as if nobody drew it, by vendor and centre: absent from every mask of a phase."""
    groups: dict[tuple[str, str], list[MaskContents]] = {}
    for mask in masks:
        groups.setdefault((mask.vendor, mask.centre), []).append(mask)
    found = []
    for (vendor, centre), own in sorted(groups.items()):
        absent: list[tuple[str, str]] = []
        there: dict[str, list[str]] = {}
        for phase in sorted({mask.phase for mask in own}, key=PHASES.index):
            at_phase = [mask for mask in own if mask.phase == phase]
            told = [name for name in STRUCTURES if any(name in mask.structures for mask in at_phase)]
            lacking = [n for n in told if all(n in mask.absent for mask in at_phase if n in mask.structures)]
            absent += [(phase, name) for name in lacking]
            there[phase] = [name for name in told if name not in lacking]
        if absent:
            names = tuple(sorted({mask.subject for mask in own}))
            found.append(NeverDrawn(vendor, centre, names, tuple(absent), described(there)))
    return found


def declaring(found: NeverDrawn, everyone: Iterable[str]) -> str:
    """The option, ready for a shell, that says so of these subjects; `everyone`: all subjects' names."""
    first, last = found.subjects[0], found.subjects[-1]  # sorted: what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    others = set(everyone) - set(found.subjects)
    if len(found.subjects) > 1 and not any(name.startswith(first[:shared]) for name in others):
        patterns = [f"{first[:shared]}*"]
    else:
        patterns = list(found.subjects)
    told = json.dumps(dict.fromkeys(patterns, found.present), ensure_ascii=False)
    return f"--set {shlex.quote(f'layouts.structures={told}')}"


def described(there: Mapping[str, Sequence[str]]) -> str:
    """Phase to structures as text for `with_structures`."""
    if len({tuple(names) for names in there.values()}) == 1:
        return " ".join(next(iter(there.values())))
    ordered = sorted(there.items(), key=lambda item: PHASES.index(item[0]))
    return "; ".join(f"{phase}: {' '.join(names)}" for phase, names in ordered if names)
