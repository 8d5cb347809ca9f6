"""Checks that LV, MYO and RV are what a mask calls them. Data sets code them in different orders.

In a short-axis slice the myocardium goes round the left ventricle, and no other structure goes round another like that.
So the structure that is enclosed is the LV and the one around it the MYO, whatever the values say. The RV lies beside
the MYO. A structure that touches the LV, or that the wall alone borders, is a part of the wall, such as a scar.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import numpy.typing as npt

from storage.errors import InputError
from storage.nifti.checks import trusting
from storage.subjects import LV, MYO, RV, STRUCTURES

# Shares of a border. In 58 ACDC volumes, .99 or more of the LV's border is with MYO; other pairs have .46 or less.
ENCLOSED, MARGIN = 0.6, 0.3
# In 278 volumes of ACDC and M&Ms, at most .009 of the RV's border is with LV, and at most .43 with LV and MYO together.
TOUCHES_LV, IN_WALL = 0.1, 0.65


def enclosure(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """(4, 4) float64: the share, 0 to 1, of label a's in-plane border that is with label b.

    `mask` is (Z, H, W) with labels 0 to 3. The diagonal is 0, and so is the row of a label that is absent.
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

    Masks without all three structures pass. `mask` (Z, H, W) is in our labels; `coding` maps the file's values to them.
    The remedy in the error names `subject`.
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
    """Raise InputError if the structure that is read as RV lies in the LV's wall.

    Some data sets have no RV and code a scar as 3.
    """
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
