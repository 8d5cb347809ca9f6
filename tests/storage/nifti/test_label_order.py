"""Which label lies inside which: masks whose values are called in another order than they are."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from storage.errors import InputError
from storage.nifti.label_order import check_coding, enclosure
from storage.subjects import LV, MYO, RV

Mask = npt.NDArray[np.uint8]

OURS = {1: LV, 2: MYO, 3: RV}
ORDERS = list(permutations((LV, MYO, RV)))
WRONG = [order for order in ORDERS if order != (LV, MYO, RV)]


def recoded(mask: Mask, order: tuple[int, ...]) -> Mask:
    """LV, MYO and RV called by the labels in `order`."""
    return np.array([0, *order], np.uint8)[mask]


def heart(size: int = 96, wall: int = 8, slices: int = 5) -> Mask:
    """Discs (Z, H, W): LV in a ring of MYO, RV a crescent around its left side; smaller towards the last slice."""
    y, x = np.mgrid[:size, :size] - size / 2
    mask = np.zeros((slices, size, size), np.uint8)
    for z in range(slices):
        radius = 14 - 2 * z
        from_lv, from_rv = np.hypot(y, x), np.hypot(y, x + 12)
        mask[z][from_rv < radius + wall + 4] = RV
        mask[z][from_lv < radius + wall] = MYO
        mask[z][from_lv < radius] = LV
    return mask


def test_enclosure_is_the_share_of_a_border_with_each_neighbour() -> None:
    mask = np.zeros((1, 9, 9), np.uint8)
    mask[0, 2:7, 2:7] = MYO
    mask[0, 3:6, 3:6] = LV
    mask[0, 3:6, 0:2] = RV  # at the edge of the image, which is no border
    share = enclosure(mask)
    assert share[LV].tolist() == [0, 0, 1, 0]
    # The ring: 12 pixel sides inwards, 20 outwards, 3 of these to RV.
    assert share[MYO] == pytest.approx(np.array([17, 12, 0, 3]) / 32)
    assert share[RV] == pytest.approx(np.array([4, 0, 3, 0]) / 7)
    assert share.diagonal().tolist() == [0, 0, 0, 0]


def test_a_disc_in_a_ring_is_enclosed_however_it_is_called() -> None:
    mask = heart()
    for order in ORDERS:
        share = enclosure(recoded(mask, order))
        inner, outer = order[0], order[1]
        assert share[inner, outer] == 1.0
        others = [share[pair] for pair in permutations((LV, MYO, RV), 2) if pair != (inner, outer)]
        assert max(others) < 0.6


def test_enclosure_looks_within_slices_only() -> None:
    mask = np.zeros((2, 8, 8), np.uint8)
    mask[0, 2:6, 2:6], mask[1, 2:6, 2:6] = LV, MYO
    share = enclosure(mask)
    assert share[LV, MYO] == share[MYO, LV] == 0.0 and share[LV, 0] == 1.0


def test_the_right_order_passes() -> None:
    check_coding(heart(), OURS, "m.nii")
    check_coding(heart(wall=2), OURS, "m.nii")


@pytest.mark.parametrize("order", WRONG)
def test_every_wrong_order_is_refused_with_the_right_one(order: tuple[int, ...]) -> None:
    """The file's value k was meant as structure k and is read as `order[k - 1]`."""
    coding = {value: label for value, label in zip((1, 2, 3), order, strict=True)}
    with pytest.raises(InputError) as caught:
        check_coding(recoded(heart(), order), coding, "m.nii")
    assert caught.value.where == "m.nii"
    assert caught.value.problem.startswith("the labels look like LV 1, MYO 2, RV 3 but are read as ")
    assert (
        "'LV 1, MYO 2, RV 3'" in caught.value.remedy
        and """--set 'layouts.trust_label_order=["SUBJECT"]'""" in caught.value.remedy
    )
    names = {LV: "LV", MYO: "MYO", RV: "RV"}
    assert ", ".join(f"{names[label]} {value}" for value, label in coding.items()) in caught.value.problem


@pytest.mark.parametrize("absent", [(LV,), (MYO,), (RV,), (LV, MYO), (LV, MYO, RV)])
def test_masks_that_lack_a_structure_pass_in_any_order(absent: tuple[int, ...]) -> None:
    mask = np.where(np.isin(heart(), absent), 0, heart()).astype(np.uint8)
    for order in ORDERS:
        check_coding(recoded(mask, order), OURS, "m.nii")


def scarred(inner_mm: float, outer_mm: float) -> Mask:
    """A heart without an RV; the right half of its wall between these distances from the LV (0 to 8) is called 3."""
    mask = heart()
    mask[mask == RV] = 0
    y, x = np.mgrid[: mask.shape[1], : mask.shape[2]] - mask.shape[1] / 2
    for z, plane in enumerate(mask):
        from_lv = np.hypot(y, x) - (14 - 2 * z)
        plane[(plane == MYO) & (x > 0) & (from_lv >= inner_mm) & (from_lv < outer_mm)] = RV
    return mask


@pytest.mark.parametrize(
    ("inner_mm", "outer_mm"), [(0, 8), (0, 4), (2, 6)], ids=["transmural", "subendocardial", "mid-wall"]
)
def test_a_scar_read_as_the_right_ventricle_is_refused_with_the_labels_that_fit(
    inner_mm: float, outer_mm: float
) -> None:
    """F12: EMIDEC's infarct, 3, came in as an RV of 29 ml."""
    with pytest.raises(InputError, match=r"^m\.nii: what is read as RV, 3, lies in the wall of the LV") as caught:
        check_coding(scarred(inner_mm, outer_mm), OURS, "m.nii", "p1")
    assert caught.value.remedy == (
        "if it is a scar, give a column labels, 'LV 1, MYO 2, MYO 3', in a table of files; if it is the RV: "
        """--set 'layouts.trust_label_order=["p1"]'"""
    )


def test_a_scar_called_myocardium_passes() -> None:
    mask = scarred(0, 4)
    check_coding(np.where(mask == RV, MYO, mask).astype(np.uint8), {1: LV, 2: MYO, 3: MYO}, "m.nii")


def test_slices_beyond_the_ends_of_the_ventricle_do_not_matter() -> None:
    whole = heart()
    base, apex = np.zeros_like(whole[:2]), np.zeros_like(whole[:1])
    base[:, 30:60, 30:60] = RV
    apex[0, 44:52, 44:52] = MYO
    mask = np.concatenate([base, whole, apex])
    check_coding(mask, OURS, "m.nii")
    for order in WRONG:
        with pytest.raises(InputError, match="the labels look like"):
            check_coding(recoded(mask, order), OURS, "m.nii")


def test_a_ring_that_is_open_is_no_reason_to_refuse() -> None:
    mask = heart()
    mask[:, :, :40][mask[:, :, :40] == MYO] = 0  # LV lies open to its left
    check_coding(mask, OURS, "m.nii")


def real_masks(folder: Path) -> dict[str, Any]:
    """ACDC's masks (Z, H, W) in our labels, by file name."""
    paths = sorted(folder.glob("patient*/*_gt.nii.gz"))
    return {p.name: np.array([0, RV, MYO, LV], np.uint8)[np.asarray(nib.load(p).dataobj).T.astype(int)] for p in paths}


def test_of_real_masks_the_right_order_passes_and_every_wrong_one_is_refused(real_acdc: Path) -> None:
    masks = real_masks(real_acdc)
    assert len(masks) >= 58
    for name, mask in masks.items():
        check_coding(mask, OURS, name)
        for order in WRONG:
            with pytest.raises(InputError, match="the labels look like"):
                check_coding(recoded(mask, order), OURS, name)
