"""What Dice a mask can be expected to have: what is asked of the network, and what is told of it."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline.inference.config import InferenceConfig
from pipeline.inference.other_ways import WAYS, other_way_warnings
from pipeline.inference.overlay import DOUBT, Row, study_png
from pipeline.inference.plausible import doubtful_warnings
from pipeline.inference.predictor import Predictor
from pipeline.inference.trust import DOUBTFUL, calibrated, expected_dice, foretold, in_words, mean_dice, sureness
from pipeline.samples.preprocess import PreprocessConfig
from storage.nifti.orientation import Turn

STARTS = {"LV": -3.1, "MYO": -3.7, "RV": -2.7}  # of a network that was trained on real patients
LABELS = np.zeros((2, 32, 32), dtype=np.int64)
LABELS[:, 8:24, 8:24] = 2
LABELS[:, 12:20, 12:20] = 1
LABELS[:, 8:24, 2:8] = 3


def shares(labels: npt.NDArray[np.int64], sure: float) -> npt.NDArray[np.float32]:
    """Class shares that give the labels `sure` and the rest to the other three alike."""
    own = np.moveaxis(np.eye(4, dtype=np.float32)[labels], -1, 1)
    return own * sure + (1 - own) * (1 - sure) / 3


@given(st.floats(0.26, 1), st.floats(0.26, 1))
def test_a_surer_network_is_expected_to_be_better(one: float, other: float) -> None:
    less, more = (expected_dice(shares(LABELS, sure), STARTS) for sure in sorted((one, other)))
    for name in ("LV", "MYO", "RV"):
        assert 0 <= less[name] <= more[name] <= 1


def test_sure_and_unsure_networks_lie_on_either_side_of_doubt() -> None:
    sure, unsure = (mean_dice(expected_dice(shares(LABELS, share), STARTS)) for share in (0.99, 0.6))
    assert sure > 0.95 and unsure < DOUBTFUL


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_network_is_calibrated_by_what_it_reached_however_sure_it_is(share: float) -> None:
    """A network that trained briefly is less sure of masks that are as good."""
    reached = {"LV": 0.92, "MYO": 0.81, "RV": 0.87}
    known = [(sureness(shares(LABELS, share)), reached | {"RV": rv}) for rv in (0.87, float("nan"))]
    starts = calibrated(known)
    assert expected_dice(shares(LABELS, share), starts) == pytest.approx(reached, abs=2e-3)
    assert mean_dice(expected_dice(shares(LABELS, share - 0.15), starts)) < mean_dice(reached) - 0.1


def test_without_calibration_nothing_is_expected_and_a_structure_without_dice_is_left_out() -> None:
    sure = shares(LABELS, 0.9)
    assert expected_dice(sure, {}) == {} and calibrated([]) == {}
    only = calibrated([(sureness(sure), {"LV": 0.9, "RV": float("nan")})])
    assert set(only) == {"LV"} == set(expected_dice(sure, only))


def test_sureness_is_the_dice_of_mask_and_shares() -> None:
    own = LABELS == 1
    found = sureness(shares(LABELS, 0.7))["LV"]
    total = 0.7 * own.sum() + 0.1 * (~own).sum() + own.sum()
    assert found == pytest.approx(2 * 0.7 * own.sum() / total, rel=1e-5)


def test_what_is_not_found_is_expected_to_be_wrong() -> None:
    found = expected_dice(shares(np.where(LABELS == 3, 0, LABELS), 0.99), STARTS)
    assert found["RV"] == 0 and found["LV"] > 0.9


class Upright(torch.nn.Module):
    """Sure of an image that grows brighter upwards and, less so, to the right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        upwards = float(image[..., :16, :].mean() - image[..., 16:, :].mean())
        rightwards = float(image[..., 16:].mean() - image[..., :16].mean())
        logits = torch.from_numpy(shares(LABELS[:1], 0.99 if upwards > rightwards > 0 else 0.5)).log()
        return logits.repeat(len(image), 1, 1, 1)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.words)
def test_a_way_in_which_the_network_is_sure_is_proposed_for_a_doubtful_image_alone(way: Turn) -> None:
    y, x = np.mgrid[:32, :32]
    displayed = (1000 - 20 * y + 5 * x).astype(np.int16)[None].repeat(2, 0)
    predictor = Predictor([Upright()], PreprocessConfig(size=32, field=32), InferenceConfig(), trust=STARTS)
    stored = way.back(displayed)
    found = other_way_warnings(predictor, "a.nii.gz", stored, (8.0, 1.4, 1.4))
    assert way.volume(stored).shape == displayed.shape and np.array_equal(way.volume(stored), displayed)
    (line,) = found
    assert line.startswith(f"a.nii.gz may lie otherwise: as '{way.words}' its expected Dice is .9")
    assert other_way_warnings(predictor, "a.nii.gz", displayed, (8.0, 1.4, 1.4)) == []


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_what_was_foretold_is_counted_and_its_auroc_is_sklearns(pairs: list[tuple[float, float]]) -> None:
    rows = [
        {"arm": "a", "vendor": "V", "dice": dice, "expected_dice": expected, "ece": dice, "ece_tempered": float("nan")}
        for dice, expected in pairs
    ]
    lacking = [{"dice": float("nan"), "expected_dice": 0.5}, {"dice": 0.5, "expected_dice": float("nan")}]
    (found,) = foretold([*rows, *({"arm": "a", "vendor": "V", **row} for row in lacking)])
    dice, expected = np.array(pairs).T
    bad = dice < DOUBTFUL
    assert (found["volumes"], found["bad"], found["doubtful"]) == (len(pairs), bad.sum(), (expected < DOUBTFUL).sum())
    assert found["off"] == pytest.approx(np.abs(dice - expected).mean())
    assert found["ece"] == pytest.approx(dice.mean()) and np.isnan(found["ece_tempered"])
    if 0 < bad.sum() < len(bad):
        assert found["auroc"] == pytest.approx(roc_auc_score(bad, -expected))
    else:
        assert np.isnan(found["auroc"])


def test_a_doubtful_mask_is_told_with_its_structures() -> None:
    good, bad = {"LV": 0.95, "MYO": 0.85, "RV": 0.9}, {"LV": 0.81, "MYO": 0.4, "RV": 0.354}
    (line,) = doubtful_warnings({"ED (a.nii.gz)": good, "ES (a.nii.gz frame 9)": bad})
    start = "doubtful mask of ES (a.nii.gz frame 9): expected Dice .52 (LV .81, MYO .40, RV .35); "
    assert line.startswith(start) and in_words(1.0) == "1.00"


def test_a_doubtful_frame_is_framed_in_the_picture() -> None:
    image, mask = np.random.default_rng(0).random((3, 20, 20)).astype(np.float32), np.zeros((3, 20, 20), np.uint8)

    def red(*doubts: bool) -> int:
        png = study_png([Row("ED", image, mask, doubtful) for doubtful in doubts], ["a line"])
        return int((np.array(Image.open(io.BytesIO(png))) == DOUBT).all(-1).sum())

    assert red(False, False) == 0 < red(True, False) < red(True, True)
