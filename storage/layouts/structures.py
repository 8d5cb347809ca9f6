"""Which structures were drawn in a study's masks. What nobody drew is neither taught as background nor scored.

In some data sets, experts drew only the left ventricle, or the myocardium only at ED (Sunnybrook has no RV). A mask
does not show whether a missing structure was not drawn or is not in the image. So the user has to say which structures
were drawn. `never_drawn` finds masks for which the user should.
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
    """Parse text such as `LV MYO` or `ED: LV MYO; ES: LV` into phase → structures, in the order LV, MYO, RV.

    If the text has no phases, the only key is `EVERY_PHASE`. A phase that is not named has no structures. Raises
    ValueError, which says what is wrong.
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
    """The subject with the structures that were drawn in its masks, as `text` says.

    Masks at phases that `text` does not name are dropped. Raises InputError, with `where` as its place, if `text`
    cannot be parsed, if it names a structure without a value in `labels`, or if a labelled subject would have no mask
    left.
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
    """The structures for which a coding has values. No other structure can be in its masks."""
    ours = {label for _, label in labels}
    return tuple(name for name, label in STRUCTURES.items() if label in ours)


@dataclass(frozen=True)
class MaskContents:
    """One mask: its subject, the structures that were drawn in it, and which of these are not in it (`absent`)."""

    subject: str
    vendor: str
    centre: str
    phase: str
    structures: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class NeverDrawn:
    """Structures that are in no mask of a vendor and centre at some phase, although they are said to be drawn.

    `absent` holds (phase, structure) pairs. `present` is text for `with_structures` that names the structures in the
    masks.
    """

    vendor: str
    centre: str
    subjects: tuple[str, ...]
    absent: tuple[tuple[str, str], ...]
    present: str

    @property
    def finding(self) -> str:
        """`absent` in words, such as `RV in no mask at ED or ES, MYO in no mask at ES`."""
        phases: dict[str, list[str]] = {}
        for phase, name in self.absent:
            phases.setdefault(name, []).append(phase)
        return ", ".join(f"{name} in no mask at {' or '.join(found)}" for name, found in phases.items())


def never_drawn(masks: Sequence[MaskContents]) -> list[NeverDrawn]:
    """Find structures that probably nobody drew: they are in no mask of a vendor and centre at some phase."""
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
    """The option, quoted for a shell, that declares for these subjects which structures were drawn.

    `everyone` holds the names of all subjects. The option uses a pattern only if the pattern matches no other subject.
    """
    first, last = found.subjects[0], found.subjects[-1]  # sorted: a beginning that these two share is shared by all
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    others = set(everyone) - set(found.subjects)
    if len(found.subjects) > 1 and not any(name.startswith(first[:shared]) for name in others):
        patterns = [f"{first[:shared]}*"]
    else:
        patterns = list(found.subjects)
    told = json.dumps(dict.fromkeys(patterns, found.present), ensure_ascii=False)
    return f"--set {shlex.quote(f'layouts.structures={told}')}"


def described(there: Mapping[str, Sequence[str]]) -> str:
    """Write phase → structures as text for `with_structures`."""
    if len({tuple(names) for names in there.values()}) == 1:
        return " ".join(next(iter(there.values())))
    ordered = sorted(there.items(), key=lambda item: PHASES.index(item[0]))
    return "; ".join(f"{phase}: {' '.join(names)}" for phase, names in ordered if names)
