"""What is drawn in a study's masks: as it is written, where it is stored, and what is said where nobody wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.errors import InputError
from storage.images import image_stamp
from storage.layouts import LayoutOptions, collect, read
from storage.layouts.structures import MaskContents, declaring, never_drawn, parsed_structures
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, mask_contents, source_hash, write_subject
from storage.subjects import ALL_STRUCTURES, LV, MYO, RV, SLICE_SCHEMA, Subject

Write = Callable[..., Path]
Study = Callable[..., Any]
SUNNYBROOK = "ED: LV MYO; ES: LV"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LV MYO", {"": ("LV", "MYO")}),
        ("myo,lv", {"": ("LV", "MYO")}),
        ("ED: LV MYO RV; ES: LV", {"ED": ("LV", "MYO", "RV"), "ES": ("LV",)}),
        ("ed:RV;", {"ED": ("RV",)}),
        ("-: LV", {"-": ("LV",)}),
    ],
)
def test_structures_are_read_with_and_without_phases(text: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert parsed_structures(text) == expected


@pytest.mark.parametrize("text", ["", ";", "LV atrium", "ED LV", "late: LV", "ED:", "ED: LV; ED: RV", "LV; ES: LV"])
def test_structures_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed_structures(text)
    with pytest.raises(ValueError, match="write those that are drawn"):
        LayoutOptions(structures={"p*": text})


def folder_of(path: Path, write_nifti: Write, study: Study, rows: dict[str, str], drop: tuple[int, ...] = ()) -> Path:
    """A table of subjects with masks at frames 0 and 2, without the labels `drop`, nor MYO at ES if it drops RV."""
    lines = ["subject,image,mask,vendor,centre,ed,es,split,labels,structures"]
    for n, (name, told) in enumerate(rows.items()):
        image, mask = study(n)
        mask = np.where(np.isin(mask, drop), 0, mask)
        if RV in drop:
            mask[..., 2][mask[..., 2] == MYO] = 0
        write_nifti(path / f"{name}.nii.gz", image)
        write_nifti(path / f"{name}_gt.nii.gz", mask)
        lines.append(f"{name},{name}.nii.gz,{name}_gt.nii.gz,GE,here,0,2,train,{told}")
    (path / "subjects.csv").write_text("\n".join(lines) + "\n")
    return path


def stored(run: Path, subjects: list[Subject]) -> SliceStore:
    rows = {s.subject: write_subject(str(run), s) for s in subjects}
    finalise(str(run), rows, [], subjects)
    return SliceStore.open(str(run))


def test_what_is_drawn_comes_from_the_table_its_coding_or_an_option(
    tmp_path: Path, write_nifti: Write, study: Study
) -> None:
    told = {
        "full": ",",
        "column": f",{SUNNYBROOK}",
        "coding": '"LV 1, MYO 2, background 3",',
        "once": ",ED: LV MYO RV",
        "wrong": ",-: LV",
        "beyond": '"LV 1, MYO 2",LV RV',
    }
    folder = folder_of(tmp_path, write_nifti, study, told)
    subjects, skipped = collect([str(folder)], LayoutOptions())
    found = {s.subject: [(f.phase, f.mask is not None, f.structures) for f in s.frames] for s in subjects}
    assert found == {
        "full": [("ED", True, ALL_STRUCTURES), ("ES", True, ALL_STRUCTURES)],
        "column": [("ED", True, ("LV", "MYO")), ("ES", True, ("LV",))],
        "coding": [("ED", True, ("LV", "MYO")), ("ES", True, ("LV", "MYO"))],
        "once": [("ED", True, ALL_STRUCTURES), ("ES", False, ALL_STRUCTURES)],
    }
    assert [(s.subject, s.reason) for s in skipped] == [
        ("beyond", "structures names RV, of which labels tells no value"),
        ("wrong", "structures is '-: LV', but the masks are at ED, ES"),
    ]
    (chosen,) = (s for s in read(str(folder), options=LayoutOptions(structures={"f*": "LV"}))[0] if s.subject == "full")
    assert [f.structures for f in chosen.frames] == [("LV",), ("LV",)]


def test_the_index_says_what_is_drawn_only_where_something_is_not(
    tmp_path: Path, write_nifti: Write, study: Study
) -> None:
    full = collect([str(folder_of(tmp_path / "full", write_nifti, study, {"a": ",", "b": ","}))], LayoutOptions())[0]
    part = collect(
        [str(folder_of(tmp_path / "part", write_nifti, study, {"c": f",{SUNNYBROOK}"}, (RV,)))], LayoutOptions()
    )[0]
    part = [replace(s, split="test") for s in part]
    store = stored(tmp_path / "one", full)
    assert store.table.schema.names == SLICE_SCHEMA.names and not store.partly_labelled
    assert store.drawn.all() and {v.structures for v in store.volumes()} == {ALL_STRUCTURES}
    unlabelled = [replace(full[0], frames=tuple(replace(f, mask=None, mask_index=None) for f in full[0].frames))]
    both = stored(tmp_path / "both", unlabelled + full[1:] + part)
    assert both.column("structures").tolist() == [""] * 6 + ["LV MYO RV"] * 6 + ["LV MYO"] * 3 + ["LV"] * 3
    assert both.drawn.sum(axis=0).tolist() == [12, 9, 6]
    assert [v.structures for v in both.volumes("test")] == [("LV", "MYO"), ("LV",)]
    assert both[17]["structures"] == "LV"
    other = both.table.rename_columns([*SLICE_SCHEMA.names, "else"]).replace_schema_metadata(both.table.schema.metadata)
    pq.write_table(other, tmp_path / "both" / "slices.parquet")
    with pytest.raises(InputError, match="its columns are not those of its version"):
        SliceStore.open(str(tmp_path / "both"))


def test_a_mask_that_holds_more_than_is_said_is_refused(tmp_path: Path, write_nifti: Write, study: Study) -> None:
    folder = folder_of(tmp_path / "data", write_nifti, study, {"a": ",LV MYO"})
    (subject,), _ = collect([str(folder)], LayoutOptions())
    with pytest.raises(InputError, match="the mask has RV at ED, but structures says 'LV MYO'; name RV"):
        write_subject(str(tmp_path / "run"), subject)


def test_a_subject_in_whose_masks_all_is_drawn_has_the_hash_that_version_0_1_0_gave_it(
    tmp_path: Path, write_nifti: Write, study: Study
) -> None:
    folder = folder_of(tmp_path, write_nifti, study, {"a": ","})
    (subject,), _ = collect([str(folder)], LayoutOptions())
    files = [str(folder / "a.nii.gz"), str(folder / "a_gt.nii.gz")]
    frames = [
        {"phase": p, "frame": f, "image": "a.nii.gz", "image_index": f, "mask": "a_gt.nii.gz", "mask_index": f}
        for p, f in (("ED", 0), ("ES", 2))
    ]
    definition = {
        "version": "1",
        "frames": frames,
        "files": [[Path(file).name, image_stamp(file)] for file in files],
        "labels": ((1, LV), (2, MYO), (3, RV)),
        "spacing": None,
        "check_masks": True,
    }
    assert source_hash(subject) == hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
    part = replace(subject, frames=tuple(replace(f, structures=("LV",)) for f in subject.frames))
    assert source_hash(part) != source_hash(subject)


def test_what_no_mask_of_a_vendor_has_is_found_with_the_option_that_says_so(
    tmp_path: Path, write_nifti: Write, study: Study
) -> None:
    folder = folder_of(tmp_path / "data", write_nifti, study, {"SC-1": ",", "SC-2": ","}, (RV,))
    subjects, _ = collect([str(folder)], LayoutOptions())
    rows = {s.subject: write_subject(str(tmp_path / "run"), s) for s in subjects}
    masks = [mask for s in subjects for mask in mask_contents(s, rows[s.subject])]
    whole = MaskContents("p1", "GE", "elsewhere", "ED", ALL_STRUCTURES, ())
    lone = MaskContents("p2", "GE", "elsewhere", "ED", ALL_STRUCTURES, ("RV",))  # one heart without RV says nothing
    (found,) = never_drawn([*masks, whole, lone])
    assert (found.vendor, found.centre, found.subjects) == ("GE", "here", ("SC-1", "SC-2"))
    assert found.finding == "RV in no mask at ED or ES, MYO in no mask at ES"
    option = declaring(found, ["SC-1", "SC-2", "p1", "p2"])
    assert option == """--set 'layouts.structures={"SC-*": "ED: LV MYO; ES: LV"}'"""
    assert '{"SC-1": ' in declaring(found, ["SC-1", "SC-2", "SC-3"])
    said, _ = collect([str(folder)], LayoutOptions(structures={"SC-*": found.present}))
    masks = [mask for s in said for mask in mask_contents(s, write_subject(str(tmp_path / "run"), s))]
    assert never_drawn(masks) == []
