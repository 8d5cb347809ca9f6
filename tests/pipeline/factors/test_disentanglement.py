"""What is watched while an SDNet trains: each number on cases where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.factors.disentanglement import (
    WatchedSlices,
    distance_correlation,
    information_over_bias,
    vendor_probe,
    warnings,
    watch,
)
from pipeline.networks.config import SDNetConfig
from pipeline.networks.sdnet import SDNet

SMALL = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)


def test_distance_correlation_is_one_for_a_linear_map_and_small_for_independent_samples() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert distance_correlation(x, 2.5 * x @ rotation + 1) == pytest.approx(1.0)
    assert distance_correlation(x, rng.normal(size=(400, 3))) < 0.2
    assert distance_correlation(x[:, :1], x[:, :1] ** 2) > 0.4  # no linear correlation, and yet
    assert distance_correlation(x, np.ones((400, 2))) == 0.0


def test_distance_correlation_is_the_textbook_sum() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=(30, 4)) ** 2

    def centred(v: np.ndarray) -> np.ndarray:
        d = np.array([[np.linalg.norm(p - q) for q in v] for p in v])
        return d - d.mean(0, keepdims=True) - d.mean(1, keepdims=True) + d.mean()

    a, b = centred(x), centred(y)
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert distance_correlation(x, y) == pytest.approx(float(expected), abs=1e-9)


def test_information_over_bias_is_one_for_noise_and_large_for_a_code_that_holds_the_image() -> None:
    rng = np.random.default_rng(2)
    subject = np.repeat([f"s{k}" for k in range(20)], 10)
    code = rng.normal(size=(200, 4))
    image = code @ rng.normal(size=(4, 64)) + 3.0
    assert information_over_bias(code, image, subject) > 100
    assert information_over_bias(rng.normal(size=(200, 4)), image, subject) == pytest.approx(1.0, abs=0.1)


def test_the_vendor_probe_reads_what_is_linear_and_never_knows_its_test_subjects() -> None:
    rng = np.random.default_rng(3)
    subject = np.repeat([f"s{k}" for k in range(20)], 8)
    vendor = np.repeat(["A", "B"], 80)
    shift = np.where(vendor == "A", -2.0, 2.0)[:, None]
    assert vendor_probe(rng.normal(size=(160, 3)) + shift, vendor, subject) == pytest.approx(1.0, abs=0.05)
    # features that name the subject alone say nothing of a subject that was not seen
    own = rng.normal(size=(20, 12)).repeat(8, axis=0)
    found = vendor_probe(own, vendor, subject)
    assert found is not None and found < 0.8
    assert vendor_probe(own, np.full(160, "A"), subject) is None


def watched(count: int = 12) -> WatchedSlices:
    image = torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = [f"s{k // 2}" for k in range(count)]
    return WatchedSlices(image, np.array(["A", "B", "C"]).repeat(count // 3), np.array(names))


def test_watching_changes_neither_weights_nor_mode_nor_randomness() -> None:
    torch.manual_seed(0)
    model = SDNet(SMALL).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = watch(model, watched()), watch(model, watched(), chunk=5)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert first == pytest.approx(second, abs=1e-4)
    assert 0 <= first["distance_correlation"] <= 1 and 0 <= first["vendor_modality"] <= 1


def test_collapsed_factors_are_warned_of_with_what_to_try() -> None:
    model = SDNet(SMALL)
    with torch.no_grad():
        model.anatomy_encoder.head.weight.zero_()
        model.anatomy_encoder.head.bias.zero_()  # type: ignore[union-attr]
        model.modality_encoder[-1].weight.zero_()
    numbers = watch(model, watched())
    assert numbers["dead_channels"] == 8 and numbers["code_spread"] < 1e-6
    lines = " ".join(warnings(numbers, 8))
    assert "all zero" in lines and "anatomy_gain" in lines and "loss.kl" in lines
    with torch.no_grad():
        model.anatomy_encoder.head.bias[0] = 100.0  # type: ignore[index]
    assert "one channel everywhere" in " ".join(warnings(watch(model, watched()), 8))
    assert warnings({"dead_channels": 2, "anatomy_share": 0.9, "code_spread": 0.8, "swap_change": 0.1}, 8) == []
