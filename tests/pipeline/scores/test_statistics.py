"""Intervals, tests and their correction against scipy, closed forms and published examples; arms compared by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, wilcoxon

from pipeline.scores.compare_arms import ALL, across_vendors, compare_arms
from pipeline.scores.statistics import bootstrap_interval, crossed_interval, holm, paired_test
from pipeline.scores.tables import summarise
from storage.subjects import STRUCTURES


def test_the_interval_is_the_same_each_time_and_that_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.05, 40)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low < values.mean() < high
    # For a mean of 40 the bootstrap agrees with ± 1.96 standard errors to a few parts in a thousand.
    error = values.std() / np.sqrt(40)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.004)
    assert np.isnan(bootstrap_interval(values[:1])).all()


def test_the_paired_test_is_scipys_exact_one_and_needs_six_subjects() -> None:
    one_sided = np.arange(1, 9) / 100
    assert paired_test(one_sided) == pytest.approx(2 / 2**8)
    mixed = np.array([0.03, -0.01, 0.05, 0.02, 0.07, -0.04, 0.06, 0.08])
    assert paired_test(mixed) == pytest.approx(wilcoxon(mixed, method="exact").pvalue)
    assert np.isnan(paired_test(one_sided[:5]))
    assert paired_test(np.zeros(8)) == 1.0


def test_holm_gives_the_values_worked_out_by_hand() -> None:
    # .01 × 4, .02 × 3, .03 × 2 and .04 × 1, no smaller than the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    for raw, new in zip(p, adjusted, strict=True):
        assert raw <= new + 1e-12 and new <= min(1.0, raw * len(p)) + 1e-12
    by_raw = [new for _, new in sorted(zip(p, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)


def _cases(arm: str, lift: dict[str, float], n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Vendors A and D, `n` subjects each; `lift` by vendor."""
    noise = np.random.default_rng(0)
    return [
        {"arm": arm, "seed": seed, "subject": f"{i}", "vendor": vendor, "phase": phase, "structure": structure}
        | {"dice": 0.7 + 0.02 * i + lift[vendor] * (1 + 0.1 * i) + seed / 100, "missed": False, "hd95_mm": 1.0}
        | {"hd_mm": 1.0, "assd_mm": 1.0, "dice_slices": 0.5 + noise.uniform()}
        for vendor in lift
        for i in range(n)
        for phase in ("ED", "ES")
        for structure in STRUCTURES
    ]


def _of(rows: list[dict[str, Any]], vendor: str, structure: str = ALL) -> dict[str, Any]:
    (row,) = [r for r in rows if (r["vendor"], r["structure"]) == (vendor, structure)]
    return row


def test_an_arm_that_gains_everywhere_is_better_and_its_mirror_worse() -> None:
    cases = [*_cases("with", {"A": 0.05, "D": 0.1}), *_cases("without", {"A": 0.0, "D": 0.0})]
    rows = compare_arms(cases, [("with", "without")])
    d = _of(rows, "D")
    assert d["n"] == 8 and d["difference"] == pytest.approx(0.1 * (1 + 0.35))
    assert d["low"] <= d["difference"] <= d["high"] and d["p"] == pytest.approx(2 / 2**8)
    assert d["p_holm"] == d["p"]  # one pair: nothing to correct for, however many vendors
    assert {row["verdict"] for row in rows} == {"better"}
    # The same codes at two vendors are two subjects.
    assert _of(rows, ALL)["n"] == 16
    assert {row["verdict"] for row in compare_arms(cases, [("without", "with")])} == {"worse"}


def test_differences_that_cancel_are_no_evidence_and_few_subjects_no_test() -> None:
    up, down = _cases("with", {"A": 0.0}), _cases("without", {"A": 0.0})
    for case in up:
        case["dice"] += 0.03 if int(case["subject"]) % 2 else -0.03
    row = _of(compare_arms([*up, *down], [("with", "without")]), "A")
    assert row["verdict"] == "no evidence" and row["low"] < 0 < row["high"]
    few = [case for case in [*_cases("with", {"A": 0.1}), *down] if int(case["subject"]) < 5]
    row = _of(compare_arms(few, [("with", "without")]), "A")
    assert row["verdict"] == "untested" and np.isnan(row["p"]) and row["low"] > 0


def test_many_comparisons_make_one_of_them_weaker() -> None:
    cases = _cases("b", {"A": 0.0})
    for k in range(7):
        cases += _cases(f"a{k}", {"A": 0.05})
    alone = _of(compare_arms(cases, [("a0", "b")]), "A")
    among = [r for r in compare_arms(cases, [(f"a{k}", "b") for k in range(7)]) if r["structure"] == ALL]
    assert alone["verdict"] == "better"
    assert {row["verdict"] for row in among} == {"hint"}  # 7 × .0078 is more than .05
    assert [row["p_holm"] for row in among] == pytest.approx([7 * 2 / 2**8] * 7)


def test_only_subjects_of_both_arms_are_compared() -> None:
    some = [case for case in _cases("with", {"A": 0.1}) if case["subject"] != "0"]
    assert _of(compare_arms([*some, *_cases("without", {"A": 0.0})], [("with", "without")]), "A")["n"] == 7
    assert compare_arms(some, [("with", "without")]) == []


def test_a_structure_without_a_score_is_left_out_of_a_subjects_mean() -> None:
    cases = [*_cases("with", {"A": 0.1}), *_cases("without", {"A": 0.0})]
    for case in cases:
        if case["structure"] == "RV" and case["subject"] == "0":
            case["dice"] = np.nan
    rows = compare_arms(cases, [("with", "without")])
    assert _of(rows, "A", "RV")["n"] == 7 and _of(rows, "A")["n"] == 8


def test_the_worst_vendor_and_the_spread_are_those_of_the_means() -> None:
    (row,) = across_vendors(summarise(_cases("x", {"A": 0.1, "D": 0.0})))
    assert (row["worst"], row["best"]) == ("D", "A")
    assert row["worst_dice"] == pytest.approx(0.77) and row["spread"] == pytest.approx(0.1 * 1.35)
    (one,) = across_vendors(summarise(_cases("x", {"A": 0.1})))
    assert np.isnan(one["spread"]) and one["worst"] == "A"


def test_seeds_are_told_as_their_spread_and_subjects_stay_the_unit() -> None:
    cases = [*_cases("x", {"A": 0.0}), *_cases("x", {"A": 0.0}, seed=1), *_cases("x", {"A": 0.0}, seed=2)]
    row = summarise(cases)[0]
    assert (row["n"], row["seeds"]) == (8, 3)
    assert row["dice_mean"] == pytest.approx(0.78) and row["dice_seed_sd"] == pytest.approx(0.01)
    assert np.isnan(summarise(_cases("x", {"A": 0.0}))[0]["dice_seed_sd"])


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_arms_without_a_difference_are_told_apart_no_more_often_than_promised(spread: float, seeds: int) -> None:
    """Seeds move an arm by `spread` of what subjects do; 17 subjects; two directions in half of the draws."""
    rng, draws, outside = np.random.default_rng(seeds), 1000, 0
    for k in range(draws):
        experiments = [
            spread * rng.standard_normal((seeds, 1)) + rng.standard_normal((1, 17)) + rng.standard_normal((seeds, 17))
            for _ in range(1 + k % 2)
        ]
        _, low, high = crossed_interval(experiments)
        outside += not low <= 0 <= high
    assert outside / draws <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / draws)


def test_one_seed_gives_students_interval_over_subjects() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, (1, 12))
    expected = ttest_1samp(values[0], 0).confidence_interval(0.95)
    found = crossed_interval([values])
    np.testing.assert_allclose(found, (values.mean(), expected.low, expected.high))


def test_an_interval_of_several_directions_is_of_their_mean() -> None:
    one, other = np.full((3, 5), 0.2), np.full((3, 9), -0.1)
    assert crossed_interval([one, other]) == pytest.approx((0.05, 0.05, 0.05))
    assert np.isnan(crossed_interval([np.ones((3, 1))])[1])
