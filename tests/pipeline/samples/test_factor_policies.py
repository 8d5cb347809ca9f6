from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.samples.factor_policies import Modalities
from pipeline.samples.plan import FaPolicy, Sample, Stream, StreamSpec

VENDORS = np.array(["A"] * 40 + ["B"] * 30 + ["C"] * 20)
RNG = np.random.default_rng(0)
CODES = (RNG.normal(size=(90, 8)) + 5.0 * np.array(["ABC".index(v) for v in VENDORS])[:, None]).astype(np.float32)
POOL = np.arange(100, 160)


def stream(policy: FaPolicy, **changes: Any) -> Stream:
    chosen: dict[str, Any] = {
        "fa_share": 1.0,
        "donors": np.arange(90),
        "donor_vendors": VENDORS,
        "policy": policy,
        "own_bank_rows": np.arange(60),
    }
    return Stream(StreamSpec(0, "labelled", POOL, **chosen | changes))


def drawn(policy: FaPolicy, count: int = 300, reach: float = 1.0) -> list[tuple[Sample, np.ndarray]]:
    plan, codes = stream(policy), Modalities(CODES, VENDORS, policy, reach)
    return [(s, codes(s)) for s in map(plan, range(count))]


def test_mixing_takes_the_donors_code_and_own_the_slices() -> None:
    for sample, code in drawn("mix"):
        np.testing.assert_array_equal(code, CODES[sample.donor_id])
    for sample, code in drawn("own"):
        assert sample.donor_id == sample.slice_id - 100
        np.testing.assert_array_equal(code, CODES[sample.donor_id])


def test_a_policy_leaves_the_order_the_areas_and_the_donors_of_the_plan_as_they_were() -> None:
    mix = stream("mix", ra_range=(1.0, 2.0))
    for policy in ("interpolate", "extrapolate", "gaussian"):
        other = stream(policy, ra_range=(1.0, 2.0))
        for k in range(50):
            a, b = mix(k), other(k)
            assert (a.slice_id, a.donor_id, a.area) == (b.slice_id, b.donor_id, b.area)
            assert other(k) == stream(policy, ra_range=(1.0, 2.0))(k)  # by index alone


def test_between_lies_on_the_line_of_two_vendors_codes() -> None:
    for sample, code in drawn("interpolate"):
        assert sample.donor_id is not None and sample.other_id is not None
        assert VENDORS[sample.donor_id] != VENDORS[sample.other_id]
        first, second = CODES[sample.donor_id], CODES[sample.other_id]
        np.testing.assert_allclose(code, first + sample.weight * (second - first), atol=1e-5)
        assert 0 <= sample.weight < 1


def test_beyond_moves_away_from_the_other_vendor_by_up_to_the_reach() -> None:
    means = {v: CODES[v == VENDORS].mean(axis=0) for v in "ABC"}
    steps = []
    for sample, code in drawn("extrapolate", reach=2.0):
        assert sample.donor_id is not None and sample.other_id is not None
        away = means[VENDORS[sample.donor_id]] - means[VENDORS[sample.other_id]]
        moved = code - CODES[sample.donor_id]
        steps.append(float(moved @ away / (away @ away)))
        np.testing.assert_allclose(moved, steps[-1] * away, atol=1e-4)
    assert 0 <= min(steps) < 0.1 and 1.8 < max(steps) <= 2.0


def test_gaussian_codes_have_their_vendors_mean_and_covariance_and_differ_by_sample() -> None:
    found = drawn("gaussian", 9000)
    codes = np.array([code for sample, code in found if VENDORS[sample.donor_id] == "A"])
    own = CODES[VENDORS == "A"]
    np.testing.assert_allclose(codes.mean(axis=0), own.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(np.cov(codes, rowvar=False), np.cov(own, rowvar=False), atol=0.2)
    assert len({code.tobytes() for _, code in found}) == len(found)
    again = drawn("gaussian", 20)
    for (_, a), (_, b) in zip(found, again, strict=False):
        np.testing.assert_array_equal(a, b)


def test_a_vendor_with_a_single_donor_has_a_density_all_the_same() -> None:
    codes = Modalities(CODES[:1], VENDORS[:1], "gaussian", 1.0)
    np.testing.assert_allclose(codes(Sample(0, 0, None, seed=7)), CODES[0], atol=0.02)


def test_a_twin_is_the_same_anatomy_at_the_same_place_with_another_donor() -> None:
    plan = stream("mix", fa_share=0.5, ra_range=(1.0, 2.0), twins=True)
    for sample in map(plan, range(40)):
        twin = sample.twin()
        assert (twin.slice_id, twin.area, twin.flip) == (sample.slice_id, sample.area, sample.flip)
        assert twin.donor_id is not None
    assert len({plan(k).twin_id for k in range(40)}) > 10
    with pytest.raises(ValueError, match="needs modality donors"):
        Stream(StreamSpec(0, "unlabelled", POOL, twins=True))
