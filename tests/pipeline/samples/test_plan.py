from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.plan import StepPlan, Stream, StreamSpec
from storage.errors import InputError

POOL = np.arange(100, 137)
DONORS = np.arange(50)
VENDORS = np.array(["A"] * 40 + ["B"] * 8 + ["C"] * 2)


def stream(seed: int = 0, **options: object) -> Stream:
    return Stream(StreamSpec(seed, "labelled", POOL, donors=DONORS, donor_vendors=VENDORS, **options))  # type: ignore[arg-type]


@given(st.integers(0, 50))
def test_every_slice_is_seen_exactly_once_an_epoch(epoch: int) -> None:
    s = stream()
    seen = [s(i).slice_id for i in range(epoch * len(POOL), (epoch + 1) * len(POOL))]
    assert sorted(seen) == POOL.tolist()


def test_a_sample_depends_on_seed_stream_and_index_alone() -> None:
    s = stream(seed=3, fa_share=0.5, ra_range=(0.9, 2.7))
    forward = [s(i) for i in range(200)]
    fresh = stream(seed=3, fa_share=0.5, ra_range=(0.9, 2.7))
    assert [fresh(i) for i in reversed(range(200))] == forward[::-1]
    assert [stream(seed=4, fa_share=0.5, ra_range=(0.9, 2.7))(i) for i in range(200)] != forward


def test_epochs_come_in_different_orders() -> None:
    s = stream()
    assert [s(i).slice_id for i in range(37)] != [s(i + 37).slice_id for i in range(37)]


@given(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 1000))
def test_the_synthesized_share_holds_in_every_batch(share: float, start: int) -> None:
    s = stream(fa_share=share)
    assert sum(s(i).donor_id is not None for i in range(4 * start, 4 * start + 4)) == 4 * share


def test_target_areas_are_uniform_in_the_range_and_untouched_by_fa() -> None:
    with_fa, without = stream(fa_share=0.5, ra_range=(1.0, 3.0)), stream(ra_range=(1.0, 3.0))
    areas = np.array([with_fa(i).area for i in range(2000)])
    assert areas.min() >= 1.0
    assert areas.max() < 3.0
    assert np.histogram(areas, bins=4, range=(1, 3))[0].min() > 420
    assert [without(i).area for i in range(50)] == areas[:50].tolist()
    assert stream()(0).area is None


def test_vendor_balanced_donors_ignore_how_many_slices_a_vendor_has() -> None:
    s = stream(fa_share=1.0, pairs="vendor_balanced")
    counts = Counter(str(VENDORS[s(i).donor_id]) for i in range(1500))
    assert min(counts.values()) > 430


def test_cross_vendor_donors_come_from_another_vendor() -> None:
    own = np.array(["A"] * 20 + ["B"] * 17)
    s = stream(fa_share=1.0, pairs="cross_vendor", pool_vendors=own)
    for i in range(300):
        sample = s(i)
        assert VENDORS[sample.donor_id] != own[sample.slice_id - 100]


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 12), st.integers(0, 12))
def test_workers_share_a_step_evenly_or_are_refused(step: int, world: int, labelled: int, unlabelled: int) -> None:
    second = Stream(StreamSpec(0, "unlabelled", np.arange(11)))
    plan = StepPlan(stream(ra_range=(1.0, 2.0)), second, labelled, unlabelled)
    if labelled % world or unlabelled % world:
        for refused in (plan.samples, lambda *_: plan.rows(0, world)):
            with pytest.raises(InputError, match=f"{world} workers cannot share {labelled} labelled and {unlabelled}"):
                refused(step, 0, world)
        plan = replace(plan, labelled_per_step=labelled * world, unlabelled_per_step=unlabelled * world)
    parts = [plan.samples(step, rank, world) for rank in range(world)]
    for kind in (True, False):
        split = [[s for s, is_labelled in part if is_labelled is kind] for part in parts]
        assert [s for part in split for s in part] == [s for s, k in plan.samples(step) if k is kind]
        assert len(set(map(len, split))) == 1
    assert [len(p) for p in parts] == [plan.rows(rank, world) for rank in range(world)]


@given(st.integers(1, 12), st.integers(0, 12))
def test_steps_follow_one_another_without_gap_or_overlap(labelled: int, unlabelled: int) -> None:
    pool = np.arange(200, 211)
    plan = StepPlan(stream(), Stream(StreamSpec(0, "unlabelled", pool)), labelled, unlabelled)
    taken = [s for step in range(12) for s in plan.samples(step)]
    assert [s for s, k in taken if k] == [plan.labelled(i) for i in range(12 * labelled)]
    assert plan.unlabelled is not None
    assert [s for s, k in taken if not k] == [plan.unlabelled(i) for i in range(12 * unlabelled)]


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({}, "faa2ce0c65c142c7"),
        ({"pairs": "vendor_balanced"}, "11f8cdca2794ec92"),
        ({"pairs": "cross_vendor"}, "85c018a049753436"),
        ({"policy": "interpolate"}, "9d3454732a9722f2"),
    ],
    ids=["mix", "vendor_balanced", "cross_vendor", "interpolate"],
)
def test_the_papers_plan_is_the_one_that_was_recorded(options: dict[str, object], digest: str) -> None:
    """Recorded by commit fe846f6, before there were residual images, steps and regions."""
    pool_vendors = np.array(["A", "B"])[POOL % 2]
    planned = stream(seed=7, fa_share=0.5, ra_range=(0.954, 2.692), pool_vendors=pool_vendors, **options)
    lines = []
    for sample in map(planned, range(400)):
        assert sample.area is not None
        numbers = (sample.slice_id, sample.donor_id, sample.area.hex(), sample.other_id, float(sample.weight).hex())
        lines.append(" ".join(map(str, numbers)))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def test_uniform_donors_come_as_often_as_their_vendor_has_rows() -> None:
    s = stream(fa_share=1.0)
    counts = Counter(s(i).donor_id for i in range(5000))
    assert set(counts) == set(DONORS.tolist())
    assert max(counts.values()) < 150


def test_nothing_is_flipped_unless_asked() -> None:
    assert all(stream(ra_range=(1.0, 2.0))(i).flip == (False, False) for i in range(50))


@pytest.mark.parametrize(("flips", "axes"), [("rows", (1, 0)), ("columns", (0, 1)), ("both", (1, 1))])
def test_flips_turn_half_of_the_samples_and_change_nothing_else(flips: str, axes: tuple[int, int]) -> None:
    options = {"fa_share": 0.5, "ra_range": (1.0, 2.0)}
    with_flips, without = stream(flips=flips, **options), stream(**options)
    samples = [with_flips(i) for i in range(1000)]
    assert [replace(s, flip=(False, False)) for s in samples] == [without(i) for i in range(1000)]
    turned = np.mean([s.flip for s in samples], axis=0)
    np.testing.assert_allclose(turned, np.array(axes) / 2, atol=0.06)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Stream(StreamSpec(0, "labelled", np.array([], dtype=np.int64)))


def test_a_borrowed_look_is_another_vendors_where_that_is_asked_for_and_there_is_one() -> None:
    ids, vendors = np.arange(6), np.array(list("AABBCC"))
    spec = StreamSpec(1, "labelled", ids, pool_vendors=vendors, style_sources=ids, style_vendors=vendors)
    stream, anyone = Stream(spec), Stream(replace(spec, style_vendors=None))
    made = [stream(i) for i in range(200)]
    assert all(vendors[s.slice_id] != vendors[s.style_id] for s in made)
    assert {s.style_id for s in made} == set(range(6))
    assert any(vendors[s.slice_id] == vendors[s.style_id] for s in map(anyone, range(50)))
    alone = Stream(replace(spec, pool_vendors=np.full(6, "A"), style_vendors=np.full(6, "A")))
    assert {alone(i).style_id for i in range(100)} == set(range(6))
