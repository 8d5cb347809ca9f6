"""Are LV, MYO and RV what a mask calls them? Data sets code them in different orders, and nothing in a file says which.

In short axis the myocardium goes round the left ventricle, and nothing goes round anything else like that. So the
structure that is enclosed is LV and the one around it MYO, whatever the values say. The RV lies beside the MYO: what
touches the LV, or is bordered by the wall alone, is a part of the wall.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import numpy.typing as npt

from storage.errors import InputError
from storage.nifti.checks import trusting
from storage.subjects import LV, MYO, RV, STRUCTURES

# Shares of a border. In 58 ACDC volumes LV in MYO is .99 or more and any other pair .46 or less.
ENCLOSED, MARGIN = 0.6, 0.3
# In 278 volumes of ACDC and M&Ms the RV's border is with LV to .009 at most and with LV and MYO together to .43.
TOUCHES_LV, IN_WALL = 0.1, 0.65


def enclosure(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Share (4, 4) of label a's in-plane border that is with label b; mask (Z, H, W) with labels 0 to 3.

    The diagonal is 0, and so is the row of a label that is absent.
    """
    counts = np.zeros((4, 4), dtype=np.int64)
    rows, cols = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    if len(rows):
        inside = mask[:, max(rows[0] - 1, 0) : rows[-1] + 2, max(cols[0] - 1, 0) : cols[-1] + 2]
        for a, b in ((inside[:, 1:], inside[:, :-1]), (inside[:, :, 1:], inside[:, :, :-1])):
            pairs = np.bincount((a * 4 + b).ravel(), minlength=16).reshape(4, 4)
            counts += pairs + pairs.T
    np.fill_diagonal(counts, 0)
    share: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return share


def check_coding(mask: npt.NDArray[np.uint8], coding: dict[int, int], name: str, subject: str = "SUBJECT") -> None:
    """Raise InputError if another structure than LV is the enclosed one, or if RV lies in the wall as a scar does.

    Masks without all three structures pass.

    `mask` (Z, H, W) is in our labels, `coding` what the file's values were taken for. `subject` is named in the remedy.
    """
    share = enclosure(mask)
    if not all(share[label].any() for label in (LV, MYO, RV)):
        return
    inner, outer = max(permutations((LV, MYO, RV), 2), key=lambda pair: float(share[pair]))
    if (inner, outer) == (LV, MYO) or share[inner, outer] < max(ENCLOSED, share[LV, MYO] + MARGIN):
        _check_scar(share, coding, name, subject)
        return
    names = {inner: "LV", outer: "MYO", ({LV, MYO, RV} - {inner, outer}).pop(): "RV"}
    looks = ", ".join(f"{names[ours]} {theirs}" for theirs, ours in sorted(coding.items()) if ours in names)
    raise InputError(
        name,
        f"the labels look like {looks} but are read as {_in_words(coding)}",
        f"give a column labels, '{looks}', in a table of files; if they are right: "
        f"{trusting('trust_label_order', subject)}",
    )


def _check_scar(share: npt.NDArray[np.float64], coding: dict[int, int], name: str, subject: str) -> None:
    """Raise InputError if what is read as RV lies in the LV's wall: data sets code a scar 3 that have no RV."""
    in_wall = share[RV, LV] + share[RV, MYO]
    if share[RV, LV] < TOUCHES_LV and in_wall < IN_WALL:
        return
    value = next(theirs for theirs, ours in sorted(coding.items()) if ours == RV)
    scar = _in_words({theirs: MYO if ours == RV else ours for theirs, ours in coding.items()})
    raise InputError(
        name,
        f"what is read as RV, {value}, lies in the wall of the LV as a scar does: {100 * share[RV, LV]:.0f} % of its "
        f"border is with LV, {100 * share[RV, MYO]:.0f} % with MYO",
        f"if it is a scar, give a column labels, '{scar}', in a table of files; if it is the RV: "
        f"{trusting('trust_label_order', subject)}",
    )


def _in_words(coding: dict[int, int]) -> str:
    names = {label: name for name, label in STRUCTURES.items()}
    return ", ".join(f"{names[ours]} {theirs}" for theirs, ours in sorted(coding.items()) if ours in names)
