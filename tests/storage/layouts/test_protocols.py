"""Protocols: who trains and who is tested when a vendor is left out or trains alone, and whose labels are withheld."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import InputError
from storage.layouts import LayoutOptions, splits
from storage.layouts.protocols import drawn, excludes_from_training, part
from storage.subjects import FrameSource, Skipped, Subject
from storage.survey.survey import survey

Build = Callable[[dict[str, tuple[str, str]]], Path]
Splits = dict[str, tuple[str | None, bool]]  # name -> split, labelled

# vendor -> labelled training, unlabelled training, validation, test: M&Ms' open release.
RELEASE = {"A": (75, 0, 4, 16), "B": (75, 0, 10, 40), "C": (0, 25, 10, 40), "D": (0, 0, 10, 40)}
PARTS = (("train", True), ("train", False), ("validation", True), ("test", True))


def person(name: str, vendor: str, split: str | None, labelled: bool = True) -> Subject:
    """A subject of two frames, ED and ES, without files."""
    mask = ("m.nii", 0) if labelled else (None, None)
    frames = tuple(FrameSource(phase, i, f"{name}.nii", i, *mask) for i, phase in enumerate(("ED", "ES")))
    return Subject(name, "table", vendor, "c", frames, split, "given" if split else "", ((1, 1),), "")


def release(vendors: str = "ABCD") -> list[Subject]:
    return [
        person(f"{vendor}{k}{split}{n}", vendor, split, labelled)
        for vendor in vendors
        for k, (split, labelled) in enumerate(PARTS)
        for n in range(RELEASE[vendor][k])
    ]


def assigned(subjects: Sequence[Subject], **options: Any) -> list[Subject]:
    return splits.assign(subjects, LayoutOptions(**options))


def without(vendor: str, **options: Any) -> dict[str, Any]:
    return {"protocol": "leave_one_vendor_out", "protocol_vendor": vendor, **options}


def only(vendor: str, **options: Any) -> dict[str, Any]:
    return {"protocol": "source_only", "protocol_vendor": vendor, **options}


def counted(subjects: Sequence[Subject]) -> dict[str, tuple[int, ...]]:
    """vendor -> labelled training, unlabelled training, validation, test, excluded."""
    kinds = [("train", True), ("train", False), ("validation", None), ("test", None), ("excluded", None)]
    found = Counter((s.vendor, s.split, s.labelled if s.split == "train" else None) for s in subjects)
    return {v: tuple(found[v, *kind] for kind in kinds) for v in sorted({s.vendor for s in subjects})}


# ---- the release


def test_paper_is_what_the_data_say() -> None:
    out = assigned(release())
    assert counted(out) == {
        "A": (75, 0, 4, 16, 0),
        "B": (75, 0, 10, 40, 0),
        "C": (0, 25, 0, 40, 10),
        "D": (0, 0, 0, 40, 10),
    }
    assert out == assigned(release(), protocol="paper", label_fraction=1)
    assert [s.split for s in out if s.vendor in "AB"] == [s.split for s in release("AB")]


LEFT_OUT = {
    "A": {"A": (0, 0, 0, 95, 0), "B": (75, 0, 10, 40, 0), "C": (30, 25, 5, 15, 0), "D": (30, 0, 5, 15, 0)},
    "B": {"A": (75, 0, 4, 16, 0), "B": (0, 0, 0, 125, 0), "C": (30, 25, 5, 15, 0), "D": (30, 0, 5, 15, 0)},
    "C": {"A": (75, 0, 4, 16, 0), "B": (75, 0, 10, 40, 0), "C": (0, 0, 0, 50, 25), "D": (30, 0, 5, 15, 0)},
    "D": {"A": (75, 0, 4, 16, 0), "B": (75, 0, 10, 40, 0), "C": (30, 25, 5, 15, 0), "D": (0, 0, 0, 50, 0)},
}


@pytest.mark.parametrize("vendor", LEFT_OUT)
def test_a_vendor_left_out_is_tested_whole_and_every_other_trains_and_is_tested(vendor: str) -> None:
    out = assigned(release(), **without(vendor))
    assert counted(out) == LEFT_OUT[vendor]
    before = {s.subject: s for s in release()}
    for s in out:
        told = "leave_one_vendor_out" in s.split_reason or "held out of its vendor's" in s.split_reason
        assert told or s == before[s.subject]


def test_one_source_trains_and_the_others_test_subjects_stay() -> None:
    out = assigned(release(), **only("A"))
    assert counted(out) == {
        "A": (75, 0, 4, 16, 0),
        "B": (0, 0, 0, 40, 85),
        "C": (0, 0, 0, 40, 35),
        "D": (0, 0, 0, 40, 10),
    }
    reasons = {s.split_reason for s in out if s.split == "excluded"}
    assert reasons == {"given; source_only trains on vendor A alone"}


def test_one_source_tests_on_all_that_is_labelled_where_the_data_test_on_no_other_vendor() -> None:
    people = [person(f"x{n}", "X", "train") for n in range(4)] + [
        person("y", "Y", "train"),
        person("z", "Y", "validation"),
    ]
    people += [person("u", "Y", None, labelled=False)]
    out = {s.subject: s for s in assigned(people, **only("X"))}
    assert (out["y"].split, out["z"].split, out["u"].split) == ("test", "test", "excluded")
    assert out["y"].split_reason == "given; source_only tests on it, for want of a test subject of a vendor but X"


def test_a_training_vendor_without_test_subjects_puts_some_aside_when_another_is_left_out() -> None:
    people = [person(f"{v}{n}", v, "train") for v in "XY" for n in range(10)]
    people += [person(f"v{n}", "X", "validation") for n in range(2)]
    out = assigned(people, **without("Y"))
    assert counted(out) == {"X": (7, 0, 2, 3, 0), "Y": (0, 0, 0, 10, 0)}
    assert counted(assigned(people, **without("Y", protocol_test_fraction=0.5)))["X"] == (5, 0, 2, 5, 0)
    aside = {s.split_reason for s in out if s.vendor == "X" and s.split == "test"}
    assert aside == {"given; leave_one_vendor_out puts it aside, to test on vendor X too (seed 0)"}


def test_what_the_data_exclude_stays_excluded() -> None:
    people = [person("x", "X", "train"), person("y", "Y", "test"), person("e", "Y", "excluded")]
    for options in (without("Y"), only("X")):
        assert {s.subject: s.split for s in assigned(people, **options)}["e"] == "excluded"


LABELS = {0.001: (1, 1), 0.02: (2, 2), 0.05: (4, 4), 0.2: (15, 15), 0.5: (38, 38), 1.0: (75, 75)}


@pytest.mark.parametrize("fraction", LABELS)
def test_a_label_fraction_keeps_masks_of_that_share_of_each_vendor(fraction: float) -> None:
    found = counted(assigned(release(), label_fraction=fraction))
    a, b = LABELS[fraction]
    assert found["A"] == (a, 75 - a, 4, 16, 0) and found["B"] == (b, 75 - b, 10, 40, 0)
    assert (found["C"], found["D"]) == ((0, 25, 0, 40, 10), (0, 0, 0, 40, 10))


def test_a_subject_without_its_labels_is_an_unlabelled_one_with_the_same_frames() -> None:
    people = [person(f"x{n}", "X", "train") for n in range(10)] + [person("v", "X", "validation")]
    out = assigned(people, label_fraction=0.2)
    withheld = [s for s in out if s.split == "train" and not s.labelled]
    assert len(withheld) == 8
    for s in withheld:
        assert s.frames == person(s.subject, "X", "train", labelled=False).frames
        assert s.split_reason == "given; its masks are not read, by label_fraction 0.2 (seed 0)"
    assert [s for s in out if s.labelled] == [p for p in people if p.subject not in {s.subject for s in withheld}]


def test_the_seed_chooses_whom() -> None:
    def tested(**options: Any) -> set[str]:
        return {s.subject for s in assigned(release(), **without("A", **options)) if s.split == "test"}

    def kept(**options: Any) -> set[str]:
        return {
            s.subject for s in assigned(release(), label_fraction=0.2, **options) if s.split == "train" and s.labelled
        }

    assert tested() == tested(split_seed=0) != tested(split_seed=1)
    assert kept() == kept(split_seed=0) != kept(split_seed=1)


# ---- any data


@st.composite
def populations(draw: st.DrawFn) -> list[Subject]:
    """Subjects of up to four vendors, in any splits; X has labelled subjects that train and that are tested."""
    kinds = st.tuples(
        st.sampled_from("XYZW"), st.sampled_from((None, "train", "validation", "test", "excluded")), st.booleans()
    )
    drawn_kinds = draw(st.lists(kinds, max_size=40))
    people = [
        person(f"{vendor}{n}", vendor, split, labelled) for n, (vendor, split, labelled) in enumerate(drawn_kinds)
    ]
    return people + [person(name, name[0], split) for name, split in (("Xa", "train"), ("Xb", "test"), ("Ya", "train"))]


OPTIONS = st.one_of(
    st.builds(lambda v: without(v), st.sampled_from("XY")),
    st.just(only("X")),
    st.just({"protocol": "paper"}),
).flatmap(
    lambda o: st.builds(lambda f, s: {**o, "label_fraction": f, "split_seed": s}, st.floats(0.01, 1), st.integers(0, 9))
)


def seen(subjects: Sequence[Subject]) -> Splits:
    return {s.subject: (s.split, s.labelled) for s in subjects}


@given(populations(), OPTIONS, st.randoms(use_true_random=False))
def test_every_subject_gets_one_split_and_a_reason_in_whatever_order(
    people: list[Subject], options: dict[str, Any], random: Any
) -> None:
    out = assigned(people, **options)
    assert [s.subject for s in out] == [p.subject for p in people]
    assert all(s.split in ("train", "validation", "test", "excluded") and s.split_reason for s in out)
    assert any(s.split == "train" and s.labelled for s in out) and any(s.split == "test" and s.labelled for s in out)
    shuffled = list(people)
    random.shuffle(shuffled)
    assert seen(assigned(shuffled, **options)) == seen(out)


@given(populations(), st.sampled_from("XY"), st.floats(0.01, 1))
def test_nothing_of_a_vendor_left_out_trains_or_validates(people: list[Subject], vendor: str, fraction: float) -> None:
    before = {p.subject: p for p in people}
    for s in assigned(people, **without(vendor, label_fraction=fraction)):
        if s.vendor == vendor:
            tested = s.labelled and before[s.subject].split != "excluded"
            assert s.split == ("test" if tested else "excluded")


@given(populations(), st.floats(0.01, 1))
def test_only_the_source_trains_or_validates(people: list[Subject], fraction: float) -> None:
    out = assigned(people, **only("X", label_fraction=fraction))
    assert {s.vendor for s in out if s.split in ("train", "validation")} == {"X"}


@given(populations(), st.sampled_from([{"protocol": "paper"}, only("X")]), st.floats(0.01, 1))
def test_a_test_subject_of_the_data_never_trains_with_one_source_or_fewer_labels(
    people: list[Subject], options: dict[str, Any], fraction: float
) -> None:
    tested = {p.subject: p for p in people if p.split == "test"}
    out = {s.subject: s for s in assigned(people, **options, label_fraction=fraction)}
    assert all(out[name] == p for name, p in tested.items())  # nor does it lose its masks


@given(populations(), OPTIONS, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_label_fraction_is_part_of_a_larger_one_and_moves_nobody(
    people: list[Subject], options: dict[str, Any], one: float, other: float
) -> None:
    small, large, whole = (
        seen(assigned(people, **{**options, "label_fraction": f})) for f in (*sorted((one, other)), 1)
    )
    assert {n for n, (_, labelled) in small.items() if labelled} <= {
        n for n, (_, labelled) in large.items() if labelled
    }
    assert {n: split for n, (split, _) in small.items()} == {n: split for n, (split, _) in whole.items()}
    lost = {n for n in whole if small[n] != whole[n]}
    assert all(whole[n] == ("train", True) for n in lost)


@given(
    st.sets(st.text(min_size=1, max_size=4), max_size=20), st.integers(0, 20), st.integers(0, 20), st.floats(0.01, 0.99)
)
def test_drawing_less_is_part_of_drawing_more(names: set[str], one: int, other: int, fraction: float) -> None:
    few, many = sorted((one, other))
    assert drawn(names, few, "k") <= drawn(sorted(names), many, "k") <= names
    assert len(drawn(names, few, "k")) == min(few, len(names))
    assert part(fraction, len(names)) in (range(1, len(names)) if len(names) > 1 else (0,))


# ---- what cannot be had


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (without("Canon"), "layouts.protocol_vendor=Canon: no subject is of this vendor; choose one of A, B, C"),
    (only("E"), "layouts.protocol_vendor=E: no subject is of this vendor; choose one of A, B"),
    (only("C"), "layouts.protocol_vendor=C: it has no labelled training subject; choose one of A, B"),
    (without("G"), "layouts.protocol_vendor=G: it has no labelled subject to test on; choose one of A, B, C"),
]


@pytest.mark.parametrize(("options", "line"), IMPOSSIBLE)
def test_what_the_data_do_not_allow_is_one_line_that_names_the_vendors(options: dict[str, Any], line: str) -> None:
    people = [*release("ABC"), person("g", "G", "train", labelled=False)]
    with pytest.raises(InputError) as caught:
        assigned(people, **options)
    assert str(caught.value) == line


def test_the_two_halves_of_the_test_subjects_share_nobody_and_change_nobody_else() -> None:
    whole, choose, confirm = (assigned(release(), **only("A"), test_half=h) for h in ("all", "choose", "confirm"))
    tested = [{s.subject for s in half if s.split == "test"} for half in (whole, choose, confirm)]
    assert tested[1] | tested[2] == tested[0] and not tested[1] & tested[2]
    for vendor in "ABCD":
        sizes = [sum(name.startswith(vendor) for name in half) for half in tested[1:]]
        assert sizes[0] == sizes[1] == sum(name.startswith(vendor) for name in tested[0]) / 2
    for half in (choose, confirm):
        for before, after in zip(whole, half, strict=True):
            assert after == before or (before.split, after.split) == ("test", "excluded")
            assert after == before or "half that" in after.split_reason


def test_adaptation_trains_on_a_fixed_share_of_the_others_without_masks_and_never_tests_on_it() -> None:
    subjects = [person(f"{v}{n}", v, "train") for v in "AB" for n in range(20)]
    out = assigned(subjects, **only("A"), adapt_fraction=0.5)
    assert counted(out)["B"] == (0, 10, 0, 10, 0)
    again = {
        s.subject: s.split for s in assigned([*subjects, person("B99", "B", "train")], **only("A"), adapt_fraction=0.5)
    }
    assert sum(again[s.subject] != s.split for s in out) <= 1
    adapted = [s for s in out if s.vendor == "B" and s.split == "train"]
    assert all(not s.labelled and "without masks" in s.split_reason for s in adapted)
    assert not excludes_from_training(LayoutOptions(**only("A"), adapt_fraction=0.5), "B")
    with pytest.raises(ValidationError, match="needs protocol=source_only"):
        LayoutOptions(adapt_fraction=0.5)


def test_so_many_labelled_subjects_keep_their_masks_and_the_rest_train_without() -> None:
    out = assigned(release(), **only("B"), labelled_subjects=6)
    labelled, unlabelled, *rest = counted(out)["B"]
    assert (labelled, unlabelled) == (6, 69) and rest == list(counted(assigned(release(), **only("B")))["B"][2:])


def test_only_a_vendor_with_which_the_protocol_can_be_had_is_offered() -> None:
    acdc = [person(f"p{n}", "Siemens", split) for n, split in enumerate(("train", "train", "validation", "test"))]
    for vendor in ("GE", "Siemens"):
        with pytest.raises(InputError, match=rf"^layouts.protocol_vendor={vendor}: .*; add labelled subjects$"):
            assigned([*acdc, person("g", "GE", None, labelled=False)], **without(vendor))


@pytest.mark.parametrize(
    ("one", "other"), [("Siemens", "SIEMENS"), ("GE Healthcare", " ge  healthcare"), ("C", "GE"), ("a", "Siemens")]
)
def test_a_vendor_under_two_names_is_refused_under_a_protocol_and_only_there(one: str, other: str) -> None:
    people = [person(f"{v}{split}", v, split) for v in (one, other, "Philips") for split in ("train", "test")]
    for options in (without("Philips"), without(one), only(other)):
        with pytest.raises(InputError, match=r"name the same vendor.*; write one name in the tables, or set layouts"):
            assigned(people, **options)
    assert len(assigned(people, label_fraction=0.5)) == 6


@pytest.mark.parametrize(
    ("options", "kept_out", "not_kept_out"),
    [
        ({}, (), ("A", "Siemens", "Z")),
        (without("A"), ("A", "a", "Siemens", "SIEMENS "), ("B", "Philips", "Z")),
        (only("Philips"), ("A", "Siemens", "Z"), ("B", "philips")),
    ],
)
def test_whom_a_protocol_keeps_out_is_told_by_any_spelling_of_the_vendor(
    options: dict[str, Any], kept_out: tuple[str, ...], not_kept_out: tuple[str, ...]
) -> None:
    chosen = LayoutOptions(**options)
    assert all(excludes_from_training(chosen, v) for v in kept_out) and not any(
        excludes_from_training(chosen, v) for v in not_kept_out
    )


@pytest.mark.parametrize("others", [(), ("validation", "validation", "validation")])
def test_a_vendors_only_test_subject_stays_one_when_another_is_left_out(others: tuple[str, ...]) -> None:
    people = [person("yt", "Y", "test"), *(person(f"y{n}", "Y", split) for n, split in enumerate(others))]
    people += [person(f"{v}{n}", v, split) for v in "XZ" for n, split in enumerate(("train", "train", "test"))]
    for seed in range(5):
        out = {s.subject: s for s in assigned(people, **without("X", split_seed=seed))}
        assert out["yt"] == people[0]
        assert "test" not in {out[f"y{n}"].split for n in range(len(others))}


def test_a_protocol_that_leaves_nothing_to_learn_or_to_test_is_refused() -> None:
    with pytest.raises(InputError, match="no other vendor has a labelled subject to train on; add labelled subjects"):
        assigned(release("A"), **without("A"))
    with pytest.raises(InputError, match="no labelled subject is left to test on; add labelled subjects"):
        assigned([person("x", "X", "train"), person("g", "G", "test", labelled=False)], **only("X"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "source_only"}, "protocol=source_only needs a vendor's name"),
        ({"protocol": "leave_one_vendor_out"}, "protocol=leave_one_vendor_out needs a vendor's name"),
        ({"protocol_vendor": "A"}, "protocol=paper takes none; set protocol too, or protocol_vendor=null"),
        (only(""), "at least 1 character"),
        ({"protocol": "all"}, "protocol"),
        ({"label_fraction": 0}, "label_fraction"),
        ({"label_fraction": 1.01}, "label_fraction"),
        (without("A", protocol_test_fraction=1), "protocol_test_fraction"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayoutOptions(**options)


def test_options_say_how_they_depart_from_the_data() -> None:
    assert LayoutOptions().protocol_label == ""
    assert LayoutOptions(**without("A")).protocol_label == "leave_one_vendor_out A"
    assert LayoutOptions(**only("B", label_fraction=0.05)).protocol_label == "source_only B, labels of 5 % of subjects"


# ---- settling


def test_subjects_that_cannot_be_read_are_replaced_among_those_that_keep_labels() -> None:
    people = [person(f"x{n}", "X", "train") for n in range(20)] + [person("v", "X", "validation")]
    options = LayoutOptions(label_fraction=0.2)
    bad = {s.subject for s in splits.assign(people, options) if s.split == "train" and s.labelled}
    assert len(bad) == 4
    given_to_read: list[dict[str, bool]] = []

    def read(wanted: Sequence[Subject]) -> list[Skipped]:
        given_to_read.append({s.subject: s.labelled for s in wanted})
        return [unread(s.subject) for s in wanted if s.subject in bad]

    skipped = [unread("earlier")]
    out = splits.assign_splits_and_read(people, options, read, skipped)
    assert {s.subject for s in skipped} == {"earlier", *bad}
    assert out == splits.assign([p for p in people if p.subject not in bad], options)
    first, second = given_to_read
    assert len(first) == len(people)
    assert set(second.values()) == {True} and len(second) == 3  # round(0.2 * 16): those that have labels in their stead


def test_readable_subjects_are_read_once_and_nobody_is_left_of_none() -> None:
    people = [person("a", "X", "train"), person("b", "X", None)]
    calls: list[list[str]] = []

    def read(wanted: Sequence[Subject]) -> list[Skipped]:
        calls.append([s.subject for s in wanted])
        return []

    assert splits.assign_splits_and_read(people, LayoutOptions(), read, []) == splits.assign(people, LayoutOptions())
    assert calls == [["a", "b"]]
    assert (
        splits.assign_splits_and_read(people, LayoutOptions(), lambda wanted: [unread(s.subject) for s in wanted], [])
        == []
    )
    assert splits.assign_splits_and_read([], LayoutOptions(**without("A")), read, []) == []


def test_a_vendor_of_whom_nobody_could_be_read_is_told_with_the_reason() -> None:
    people = [person(f"{v}{n}", v, split) for v in "XYZ" for n, split in enumerate(("train", "train", "test"))]

    def read(wanted: Sequence[Subject]) -> list[Skipped]:
        return [unread(s.subject) for s in wanted if s.vendor == "Y"]

    skipped = [Skipped("other", "other.nii", "is empty", "copy it")]
    line = "no subject is of this vendor (4 skipped, such as Y0, Y0.nii: is cut off); choose one of X, Z"
    with pytest.raises(InputError) as caught:
        splits.assign_splits_and_read(people, LayoutOptions(**without("Y")), read, skipped)
    assert str(caught.value) == f"layouts.protocol_vendor=Y: {line}"
    with pytest.raises(InputError, match=r"\(1 skipped, such as other, other\.nii: is empty\); choose one of X, Y"):
        splits.assign_splits_and_read(people, LayoutOptions(**without("W")), read, skipped[:1])


def unread(name: str) -> Skipped:
    return Skipped(name, f"{name}.nii", "is cut off", "copy the file again")


# ---- what is read and stored

PEOPLE = {f"A{n}": ("Training/Labeled", "A") for n in range(6)} | {
    "A6": ("Validation", "A"),
    "C0": ("Training/Unlabeled", "C"),
    "D0": ("Testing", "D"),
}


def test_ingest_stores_no_mask_of_a_subject_whose_labels_are_withheld(
    mnms_folder: Build, tmp_path: Path, ray_local: None
) -> None:
    import numpy as np

    from actors.ingest import ingest
    from storage.slices.store import SliceStore

    folder, run = mnms_folder(PEOPLE), tmp_path / "run"
    ingest([str(folder)], str(run))  # with all labels first: what it stored of them must go
    before = {(v.subject, v.frame): v for v in SliceStore.open(str(run)).volumes()}
    for file in folder.rglob("A*_sa_gt.nii.gz"):  # one that is not to be read need not be readable
        if file.parent.name in withheld_of(folder):
            file.write_bytes(b"nothing")
    report = ingest([str(folder)], str(run), LayoutOptions(label_fraction=0.3))
    assert report.skipped == []
    assert {v: c.labelled for v, c in report.by_vendor.items()} == {"A": 3 * 6, "C": 0, "D": 6}
    store = SliceStore.open(str(run))
    withheld = withheld_of(folder)
    assert len(withheld) == 4
    for volume in store.volumes():
        image, mask = store.volume(volume.rows)
        labelled = volume.subject not in withheld | {"C0"}
        was = before[volume.subject, volume.frame]
        assert (volume.labelled, bool(mask.any())) == (labelled, labelled)
        assert (volume.phase, volume.split, volume.rows) == (was.phase, was.split, was.rows)
        assert image.shape == mask.shape and np.isfinite(image).all()
    rows = {row["subject"]: row for row in csv.DictReader((run / "splits.csv").open())}
    assert {n for n, row in rows.items() if "its masks are not read" in row["reason"]} == withheld
    assert {s.subject for s in ingest([str(folder)], str(tmp_path / "whole")).skipped} == withheld


def withheld_of(folder: Path) -> set[str]:
    from storage.layouts import collect

    options = LayoutOptions(label_fraction=0.3)
    subjects, _ = collect([str(folder)], options)
    return {s.subject for s in splits.assign(subjects, options) if s.split == "train" and not s.labelled} - {"C0"}


def test_the_survey_counts_as_ingest_will_store(mnms_folder: Build) -> None:
    folder = mnms_folder(PEOPLE)
    found = survey([str(folder)], LayoutOptions(label_fraction=0.3))
    unlabelled = {s.subject for s in found.subjects if not s.labelled}
    assert unlabelled == withheld_of(folder) | {"C0"}
    assert not any(s.picture.mask.any() for s in found.subjects if s.subject in unlabelled)
    alone = survey([str(folder)], LayoutOptions(**only("A")))
    assert {s.subject: s.split for s in alone.subjects if s.vendor != "A"} == {"C0": "excluded", "D0": "test"}


def test_progress_counts_on_when_others_are_read_in_the_place_of_those_that_cannot_be(mnms_folder: Build) -> None:
    folder = mnms_folder(PEOPLE)
    kept = next(s for s in PEOPLE if s[0] == "A" and s != "A6" and s not in withheld_of(folder))
    next(folder.rglob(f"{kept}_sa_gt.nii.gz")).write_bytes(b"nothing")
    calls: list[tuple[int, int]] = []
    found = survey([str(folder)], LayoutOptions(label_fraction=0.3), progress=lambda *call: calls.append(call))
    assert [s.subject for s in found.skipped] == [kept]
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1)) and len(calls) > len(PEOPLE)


def test_the_phantom_serves_every_protocol() -> None:
    from pipeline.phantom.plan import UNLABELLED, PhantomConfig, codes, orders

    named = {"Training/Labeled": "train", "Training/Unlabeled": "train", "Testing": "test", "Validation": "validation"}
    wanted = orders(PhantomConfig())
    people = [
        person(code, order.vendor, named[order.split], order.split != UNLABELLED)
        for code, order in zip(codes(wanted, 0), wanted, strict=True)
    ]
    for vendor in "ABCD":
        out = counted(assigned(people, **without(vendor)))
        assert all(row[3] > 0 for row in out.values())
        assert {v: row[0] > 0 and row[2] > 0 for v, row in out.items()} == {v: v != vendor for v in "ABCD"}
    for vendor in "AB":
        assert {v: row[:3] != (0, 0, 0) for v, row in counted(assigned(people, **only(vendor))).items()} == {
            v: v == vendor for v in "ABCD"
        }
