"""Intervals, tests and their correction against scipy, closed forms and published examples; arms compared by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from pipeline.scores.compare_arms import ALL, ALPHA, WHOLE_SHARE, across_vendors, compare_arms, rank_arms
from pipeline.scores.power import detectable, usually_detectable
from pipeline.scores.statistics import bootstrap_interval, crossed_interval, holm
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


def test_holm_gives_the_values_worked_out_by_hand() -> None:
    # .01 × 4, .02 × 3, .03 × 2 and .04 × 1, no smaller than the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert holm([]).size == 0
    both = holm([[0.03, 0.01, 0.04, 0.02], [np.nan, 0.01, np.nan, 0.04]])  # rows are families of their own
    assert both.ravel() == pytest.approx([0.06, 0.04, 0.06, 0.06, np.nan, 0.02, np.nan, 0.04], nan_ok=True)


def test_holm_gives_a_heavier_hypothesis_more_of_the_level() -> None:
    # .03 / .8 is the smallest; then .02 and .01 share what is left
    assert holm([0.03, 0.01, 0.02], [0.8, 0.1, 0.1]) == pytest.approx([0.0375, 0.0375, 0.0375])
    assert holm([0.03, 0.001, 0.5], [0.8, 0.1, 0.1]) == pytest.approx([0.03 * 9 / 8, 0.01, 0.5])


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


def _seeds(arm: str, lift: dict[str, float], n: int = 8, spread: float = 0.002, seeds: int = 3) -> list[dict[str, Any]]:
    """`_cases` of so many seeds, whose lifts lie `spread` apart."""
    middle = (seeds - 1) / 2
    moved = [{vendor: value + spread * (k - middle) for vendor, value in lift.items()} for k in range(seeds)]
    return [case for k in range(seeds) for case in _cases(arm, moved[k], n, k)]


def _of(rows: list[dict[str, Any]], vendor: str, structure: str = ALL) -> dict[str, Any]:
    (row,) = [r for r in rows if (r["vendor"], r["structure"]) == (vendor, structure)]
    return row


def test_an_arm_that_gains_everywhere_is_better_and_its_mirror_worse() -> None:
    cases = [*_seeds("with", {"A": 0.09, "D": 0.1}), *_seeds("without", {"A": 0.0, "D": 0.0}, spread=0)]
    rows = compare_arms(cases, [("with", "without")])
    d = _of(rows, "D")
    assert (d["n"], d["seeds"]) == (8, 3) and d["difference"] == pytest.approx(0.1 * (1 + 0.35))
    assert d["low"] < d["difference"] < d["high"]
    # The same codes at two vendors are two subjects; the mean of all has most of the level.
    whole = _of(rows, ALL)
    assert whole["n"] == 16 and whole["p_holm"] == pytest.approx(whole["p"] / WHOLE_SHARE)
    assert whole["verdict"] == "better" and d["p_holm"] > d["p"]
    assert whole["seed_sd"] == pytest.approx(0.002 * 1.35) and 0 < whole["detectable"] < whole["difference"]
    assert {row["verdict"] for row in compare_arms(cases, [("without", "with")])} <= {"worse", "hint"}
    assert _of(compare_arms(cases, [("without", "with")]), ALL)["verdict"] == "worse"


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_described_and_never_judged(seeds: int) -> None:
    cases = [*_seeds("with", {"A": 0.2, "D": 0.2}, seeds=seeds), *_seeds("without", {"A": 0.0, "D": 0.0}, seeds=seeds)]
    rows = compare_arms(cases, [("with", "without")])
    assert {row["verdict"] for row in rows} == {"descriptive"} == {rank_arms(cases, "without")[0]["verdict"]}
    assert np.isnan([row["p"] for row in rows]).all() and np.isnan([row["p_holm"] for row in rows]).all()
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


def test_differences_that_cancel_are_no_evidence_and_few_subjects_no_test() -> None:
    up, down = _seeds("with", {"A": 0.0}), _seeds("without", {"A": 0.0})
    for case in up:
        case["dice"] += 0.03 if int(case["subject"]) % 2 else -0.03
    row = _of(compare_arms([*up, *down], [("with", "without")]), "A")
    assert row["verdict"] == "no evidence" and row["low"] < 0 < row["high"]
    few = [case for case in [*_seeds("with", {"A": 0.1}), *down] if int(case["subject"]) < 5]
    row = _of(compare_arms(few, [("with", "without")]), "A")
    assert row["verdict"] == "untested" and np.isnan(row["p"]) and row["low"] > 0


def test_the_same_numbers_are_no_difference() -> None:
    rows = compare_arms([*_seeds("with", {"A": 0.1}), *_seeds("without", {"A": 0.1})], [("with", "without")])
    assert {row["verdict"] for row in rows} == {"no evidence"} and {row["p"] for row in rows} == {1.0}


def test_the_best_of_many_arms_is_corrected_for_how_many_they_are() -> None:
    cases = _seeds("b", {"A": 0.0}, spread=0)
    for k in range(7):
        cases += _seeds(f"a{k}", {"A": 0.05 + 0.001 * k}, spread=0.02)
    ranking = rank_arms(cases, "b")
    assert [row["arm"] for row in ranking] == [*(f"a{k}" for k in reversed(range(7))), "b"]
    assert "difference" not in ranking[-1] and ranking[0]["compared"] == 7
    planned = _of(compare_arms(cases, [("a6", "b")]), "A")
    assert ranking[0]["difference"] == planned["difference"] and ranking[0]["p"] == planned["p"]
    assert planned["p"] < ALPHA and ranking[0]["p_holm"] == pytest.approx(7 * planned["p"])
    assert ranking[0]["verdict"] == "hint"


def test_seeds_that_both_arms_have_are_compared() -> None:
    cases = [*_seeds("with", {"A": 0.1}, seeds=5), *_seeds("without", {"A": 0.0})]
    assert _of(compare_arms(cases, [("with", "without")]), "A")["seeds"] == 3
    others = [case | {"seed": 7} for case in _cases("without", {"A": 0.0})]
    assert compare_arms([*_seeds("with", {"A": 0.1}), *others], [("with", "without")]) == []


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


def test_a_structure_that_one_seed_invents_counts_as_in_the_table() -> None:
    cases = [*_seeds("with", {"A": 0.1}), *_seeds("without", {"A": 0.0})]
    for case in cases:
        if (case["structure"], case["subject"], case["phase"]) == ("RV", "0", "ES"):
            case["dice"] = 0.0 if (case["arm"], case["seed"]) == ("with", 1) else np.nan
    mean = {(row["arm"], row["structure"]): row["dice_mean"] for row in summarise(cases)}
    row = _of(compare_arms(cases, [("with", "without")]), "A", "RV")
    assert row["n"] == 8 and row["difference"] == pytest.approx(mean["with", "RV"] - mean["without", "RV"])


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


DRAWS = 1000
MONTE_CARLO = 2 * np.sqrt(ALPHA * (1 - ALPHA) / DRAWS)


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_arms_without_a_difference_are_told_apart_no_more_often_than_promised(spread: float, seeds: int) -> None:
    """Seeds move an arm by `spread` of what subjects do: all vendors and structures alike, and each by itself. Four
    vendors of 8 subjects; an experiment errs if any of its vendors and structures is said to help or to harm."""
    normal = np.random.default_rng(seeds).standard_normal
    shape = (DRAWS, 4, len(STRUCTURES), seeds, 8)  # draw, vendor, structure, seed, subject
    common, own = normal((DRAWS, 1, 1, seeds, 1)), normal((*shape[:4], 1))
    subjects = normal((DRAWS, 4, 1, 1, 8)) + normal((*shape[:3], 1, 8))
    differences = (spread * (common + own) + subjects) / np.sqrt(2) + normal(shape) / 2
    differences = np.concatenate([differences, differences.mean(axis=2, keepdims=True)], axis=2)
    vendors = crossed_interval([differences]).p  # (draws, vendors, structures and their mean)
    together = crossed_interval([np.concatenate(np.moveaxis(differences, 1, 0), axis=-1)]).p
    p = np.concatenate([vendors, together[:, None]], axis=1).reshape(DRAWS, -1)
    weights = np.full(p.shape[1], (1 - WHOLE_SHARE) / (p.shape[1] - 1))
    weights[-1] = WHOLE_SHARE
    said = (holm(p, weights) < ALPHA).any(axis=1)
    assert said.mean() <= ALPHA + MONTE_CARLO
    assert (p[:, -1] < ALPHA).mean() <= ALPHA + MONTE_CARLO  # and one comparison alone


@pytest.mark.parametrize(("seeds", "spread", "axis"), [(5, 0.2, "subjects"), (3, 1.0, "seeds")])
def test_either_alone_would_promise_too_much(seeds: int, spread: float, axis: str) -> None:
    """Student's t of the seeds' means alone forgets the subjects, that of the subjects' means alone the seeds."""
    normal = np.random.default_rng(seeds).standard_normal
    differences = spread * normal((DRAWS, seeds, 1)) + normal((DRAWS, 1, 32)) + normal((DRAWS, seeds, 32)) / 2
    means = differences.mean(axis=2 if axis == "subjects" else 1)  # what is forgotten is averaged away first
    alone = ttest_1samp(means, 0, axis=1).pvalue
    assert (alone < ALPHA).mean() > 0.2
    assert (crossed_interval([differences]).p < ALPHA).mean() <= ALPHA + MONTE_CARLO


def test_an_interval_of_two_directions_leaves_out_no_difference_as_seldom() -> None:
    normal = np.random.default_rng(0).standard_normal
    directions = [
        0.5 * normal((DRAWS, 3, 1)) + normal((DRAWS, 1, n)) + normal((DRAWS, 3, n)) for n in (17, 38)
    ]  # (draw, seed, subject)
    found = crossed_interval(directions)
    assert ((found.low > 0) | (found.high < 0)).mean() <= ALPHA + MONTE_CARLO
    # The interval leaves out zero where p is below its level, and there alone.
    np.testing.assert_array_equal((found.low > 0) | (found.high < 0), found.p < ALPHA)


def test_an_interval_of_two_directions_holds_where_one_direction_varies_more() -> None:
    normal = np.random.default_rng(0).standard_normal
    directions = [
        seed * normal((DRAWS, 3, 1)) + 0.01 * normal((DRAWS, 1, n)) + 0.01 * normal((DRAWS, 3, n))
        for seed, n in ((0.02, 18), (0.002, 38))
    ]
    found = crossed_interval(directions)
    assert ((found.low > 0) | (found.high < 0)).mean() <= ALPHA + 2 * MONTE_CARLO


@pytest.mark.parametrize(("seed_sd", "subject_sd"), [(0.014, 0.03), (0.035, 0.1), (0.004, 0.09)])
def test_what_is_called_detectable_is_told_in_about_four_of_five_experiments(seed_sd: float, subject_sd: float) -> None:
    normal = np.random.default_rng(1).standard_normal
    there = detectable(3, seed_sd, 56, subject_sd, ALPHA)
    differences = there + seed_sd * normal((DRAWS, 3, 1)) + subject_sd * normal((DRAWS, 1, 56))
    assert 0.72 < (crossed_interval([differences]).p < ALPHA).mean() < 0.86


def test_more_seeds_and_more_subjects_show_smaller_differences() -> None:
    assert usually_detectable(5, 56, ALPHA) < usually_detectable(3, 56, ALPHA) < usually_detectable(3, 12, ALPHA)
    assert np.isnan(usually_detectable(1, 56, ALPHA)).all()


def test_one_seed_gives_students_interval_over_subjects() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, (1, 12))
    expected = ttest_1samp(values[0], 0).confidence_interval(0.95)
    found = crossed_interval([values])
    np.testing.assert_allclose(
        found, (values.mean(), expected.low, expected.high, ttest_1samp(values[0], 0).pvalue), atol=1e-12
    )


def test_an_interval_of_several_directions_is_of_their_mean() -> None:
    one, other = np.full((3, 5), 0.2), np.full((3, 9), -0.1)
    assert crossed_interval([one, other]) == pytest.approx((0.05, 0.05, 0.05, 0.0))
    assert np.isnan(crossed_interval([np.ones((3, 1))])[1:]).all()
