"""The slice store keeps what it was given, survives a kill and refuses what it does not know."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from storage.errors import InputError, StageError
from storage.layouts import LayoutOptions, read, splits
from storage.parquet import with_repeated
from storage.slices.foreground import foreground_statistics
from storage.slices.intensities import quantise
from storage.slices.store import LAYOUTS_KEY, SliceStore
from storage.slices.writer import finalise, source_hash, write_subject
from storage.subjects import SLICE_SCHEMA, FrameSource, Skipped, Subject

Write = Callable[..., Path]
Study = Callable[..., Any]
Build = Callable[[dict[str, tuple[str, str]]], Path]


@pytest.fixture
def subject(tmp_path: Path, write_nifti: Write, study: Study) -> Subject:
    """Subject `p 1/ä`: a cine with masks at frames 0 and 2, x spacing 1.25 mm, y 2.5 mm, z 8 mm."""
    image, mask = study(0)
    write_nifti(tmp_path / "i.nii.gz", image, (1.25, 2.5, 8.0))
    write_nifti(tmp_path / "m.nii.gz", mask, (1.25, 2.5, 8.0))
    frames = tuple(
        FrameSource(phase, frame, str(tmp_path / "i.nii.gz"), frame, str(tmp_path / "m.nii.gz"), frame)
        for phase, frame in (("ED", 0), ("ES", 2))
    )
    labels = ((1, 1), (2, 2), (3, 3))
    return Subject("p 1/ä", "table", "X", "here", frames, "test", "because", labels, "CC0")


def stored(run: Path, *subjects: Subject) -> SliceStore:
    rows = {s.subject: write_subject(str(run), s) for s in subjects}
    finalise(str(run), rows, [], subjects)
    return SliceStore.open(str(run))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_where_the_heart_is_follows_from_the_masks_of_its_volume(tmp_path: Path, subject: Subject) -> None:
    unlabelled = replace(subject, subject="u", frames=tuple(replace(f, mask=None) for f in subject.frames[:1]))
    store = stored(tmp_path / "run", subject, unlabelled)
    ring = np.stack([store.mask(i) for i in range(3)])  # of three slices
    rows, columns = (at.mean() - (n - 1) / 2 for at, n in zip(np.nonzero(ring)[1:], ring.shape[1:], strict=True))
    assert [store.heart(i) for i in range(9)] == [(round(rows), round(columns))] * 6 + [(0, 0)] * 3 != [(0, 0)] * 9


def test_images_and_masks_come_back_bit_for_bit(tmp_path: Path, subject: Subject, study: Study) -> None:
    image, mask = study(0)
    store = stored(tmp_path / "run", subject)
    assert len(store) == 6
    for i in range(6):
        frame, z = (0, 2)[i // 3], i % 3
        assert np.array_equal(store.image(i), image[:, :, z, frame].T) and store.image(i).dtype == np.float32
        assert np.array_equal(store.mask(i), mask[:, :, z, frame].T) and store.mask(i).dtype == np.uint8
    assert store.table.schema.equals(with_repeated(SLICE_SCHEMA), check_metadata=True)
    row = {name: store.column(name)[4].item() for name in store.table.column_names}
    values = image[..., 2].astype(np.float64)
    expected = {
        "slice_id": 4,
        "subject": "p 1/ä",
        "phase": "ES",
        "frame": 2,
        "slice": 1,
        "row": 4,
        "height": 20,
        "width": 24,
        "slice_mm": 8.0,
        "row_mm": 2.5,
        "col_mm": 1.25,
        "pixel_area_mm2": 3.125,
        "labelled": True,
        "split": "test",
        "scale": 1.0,
        "offset": 0.0,
        "terms": "CC0",
        "volume_mean": values.mean(),
        "volume_std": values.std(),
        "volume_min": values.min(),
        "volume_max": values.max(),
        "volume_p005": np.percentile(values, 0.5),
        "volume_p995": np.percentile(values, 99.5),
    }
    assert {k: row[k] for k in expected} == pytest.approx(expected)


def test_a_volume_is_its_slices_in_order(tmp_path: Path, subject: Subject, study: Study) -> None:
    image, mask = study(0)
    store = stored(tmp_path / "run", subject)
    ed, es = store.volumes()
    assert (ed.phase, ed.rows, ed.spacing, ed.labelled) == ("ED", (0, 1, 2), (8.0, 2.5, 1.25), True)
    assert store.volumes("test") == [ed, es] and store.volumes("train") == []
    images, masks = store.volume(es.rows)
    assert np.array_equal(images, image[..., 2].T) and np.array_equal(masks, mask[..., 2].T)
    images, _ = store.volume([5, 3])
    assert np.array_equal(images, image[:, :, [2, 0], 2].T)
    with pytest.raises(ValueError, match="2 volumes"):
        store.volume([0, 3])


def test_a_store_has_the_foreground_s_statistics_of_each_frame_though_its_index_does_not(
    tmp_path: Path, subject: Subject, study: Study
) -> None:
    """So that stores that were written before there were such statistics have them."""
    image, _ = study(0)
    store = stored(tmp_path / "run", subject)
    assert not [name for name in store.table.column_names if "foreground" in name]
    for i in (4, 0, 2, 5):
        volume = image[..., (0, 2)[i // 3]].transpose(2, 1, 0)
        assert store.foreground(i) == foreground_statistics(volume, (8.0, 2.5, 1.25))


def test_the_view_feeds_torchs_data_loader_in_processes(tmp_path: Path, subject: Subject) -> None:
    from torch.utils.data import DataLoader

    store = stored(tmp_path / "run", subject)
    batches = list(DataLoader(store, batch_size=4, num_workers=2))  # type: ignore[arg-type]
    assert [tuple(b["image"].shape) for b in batches] == [(4, 20, 24), (2, 20, 24)]
    assert batches[0]["phase"] == ["ED"] * 3 + ["ES"]
    assert np.array_equal(batches[1]["mask"][1].numpy(), store.mask(5))
    assert store[-1]["slice_id"] == 5
    with pytest.raises(IndexError):
        store[6]
    assert np.array_equal(pickle.loads(pickle.dumps(store)).image(3), store.image(3))


@pytest.mark.parametrize(
    ("values", "exact", "offset"),
    [
        ([-32768, 0, 32767], True, 0.0),
        ([0, 5, 65535], True, 32768.0),
        ([40000, 40001, 60000], True, 72768.0),
        ([0.0, 0.25, 299.9], False, None),
        ([0, 5, 100000], False, None),
        ([-1e-6, 0, 1e-6], False, None),
    ],
)
def test_whole_numbers_are_exact_and_the_rest_within_half_a_step(
    values: list[float], exact: bool, offset: float | None
) -> None:
    image = np.array(values, np.float32).reshape(1, 1, 3)
    kept = quantise(image)
    assert kept.stored.dtype == np.int16
    back = kept.stored * kept.scale + kept.offset
    if exact:
        assert kept.scale == 1.0 and kept.offset == offset
        assert np.array_equal(back, image)
    else:
        assert np.abs(back - image).max() <= (image.max() - image.min()) / 65535 * 0.5001


def test_float_images_keep_their_statistics_and_their_masks(tmp_path: Path, write_nifti: Write) -> None:
    rng = np.random.default_rng(0)
    image = rng.gamma(2.0, 40.0, (9, 8, 2)).astype(np.float32)
    path = str(write_nifti(tmp_path / "f.nii", image))
    subject = Subject("f", "table", "X", "c", (FrameSource("-", 0, path, None, None, None),), None, "", ((1, 1),), "")
    store = stored(tmp_path / "run", subject)
    assert np.abs(store.image(1) - image[..., 1].T).max() <= np.ptp(image) / 65535
    assert store.column("volume_mean")[0] == pytest.approx(image.astype(np.float64).mean())
    assert not store.column("labelled").any() and not store.mask(0).any()
    assert store.column("split").tolist() == ["train", "train"]


def test_a_finished_subject_is_not_read_again_and_a_changed_one_is(tmp_path: Path, subject: Subject) -> None:
    run = tmp_path / "run"
    first = write_subject(str(run), subject)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert write_subject(str(run), subject) == first
    relabelled = replace(subject, vendor="Y", split="train")
    assert write_subject(str(run), relabelled) == first
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    swapped = replace(subject, labels=((1, 3), (2, 2), (3, 1)), check_masks=False)
    write_subject(str(run), swapped)
    assert (stored(run, swapped).mask(0) == 3).sum() == (stored(tmp_path / "other", subject).mask(0) == 1).sum()
    assert source_hash(replace(subject, spacing=(8.0, 1.0, 1.0))) != source_hash(subject)


def test_a_mended_file_is_read_again(tmp_path: Path, subject: Subject, write_nifti: Write, study: Study) -> None:
    store = stored(tmp_path / "run", subject)
    image, _ = study(7)
    assert not np.array_equal(store.image(0), image[:, :, 0, 0].T)
    write_nifti(tmp_path / "i.nii.gz", image, (1.25, 2.5, 8.0))
    assert np.array_equal(stored(tmp_path / "run", subject).image(0), image[:, :, 0, 0].T)


def test_an_interrupted_subject_is_written_anew_to_the_same_bytes(tmp_path: Path, subject: Subject) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stored(whole, subject)
    write_subject(str(broken), subject)
    (marker,) = broken.rglob("frames.json")
    marker.unlink()
    (chunk,) = (p for p in broken.glob("slices.zarr/*/mask/c/**/*") if p.is_file())
    chunk.write_bytes(b"half")
    (chunk.parent / "rubbish").write_bytes(b"x")
    stored(broken, subject)
    assert contents(broken) == contents(whole)


def test_one_shard_holds_an_array_and_one_chunk_a_slice(tmp_path: Path, subject: Subject) -> None:
    stored(tmp_path / "run", subject)
    for kind, dtype in (("image", "int16"), ("mask", "uint8")):
        (folder,) = (tmp_path / "run").glob(f"slices.zarr/*/{kind}")
        meta = json.loads((folder / "zarr.json").read_text())
        assert (meta["zarr_format"], meta["shape"], meta["data_type"]) == (3, [6, 20, 24], dtype)
        assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [6, 20, 24]
        (sharding,) = meta["codecs"]
        assert sharding["configuration"]["chunk_shape"] == [1, 20, 24]
        assert len([p for p in folder.rglob("*") if p.is_file()]) == 2  # the description and one shard


def test_no_folder_of_the_source_is_stored(tmp_path: Path, subject: Subject) -> None:
    stored(tmp_path / "run", subject)
    names = (str(tmp_path).encode(), b"i.nii", b"m.nii")
    for path, content in contents(tmp_path / "run").items():
        assert not any(name in content for name in names), path


def test_a_store_in_an_object_store_is_the_same(tmp_path: Path, subject: Subject) -> None:
    run = "memory://slice-store-test/run"
    rows = {subject.subject: write_subject(run, subject)}
    finalise(run, rows, [], [subject])
    remote, local = SliceStore.open(run), stored(tmp_path / "run", subject)
    assert remote.table.equals(local.table)
    assert np.array_equal(remote.volume(range(3))[0], local.volume(range(3))[0])
    for i in range(6):
        assert np.array_equal(remote.image(i), local.image(i)) and np.array_equal(remote.mask(i), local.mask(i))
    assert write_subject(run, subject) == rows[subject.subject]


def test_the_index_is_sorted_and_the_reasons_stand_beside_it(mnms_folder: Build, tmp_path: Path) -> None:
    people = {"Z": ("Training/Labeled", "A"), "B": ("Testing", "D"), "K": ("Validation", "D")}
    subjects = splits.assign(read(str(mnms_folder(people)))[0], LayoutOptions())
    run = tmp_path / "run"
    rows = {s.subject: write_subject(str(run), s) for s in reversed(subjects)}
    skipped = [Skipped("q", "q.nii", "is broken, badly", "mend it"), Skipped("a", "a.nii", "is gone", "find it")]
    finalise(str(run), rows, skipped, subjects)
    store = SliceStore.open(str(run))
    assert store.column("subject").tolist() == ["B"] * 6 + ["K"] * 6 + ["Z"] * 6
    assert store.column("slice_id").tolist() == list(range(18))
    assert (run / "skipped.csv").read_text().splitlines() == [
        "subject,file,reason,remedy",
        "a,a.nii,is gone,find it",
        'q,q.nii,"is broken, badly",mend it',
    ]
    lines = (run / "splits.csv").read_text().splitlines()
    assert lines[0] == "subject,vendor,centre,split,reason" and lines[2].startswith('K,D,1,excluded,"M&Ms Validation')
    assert [v.subject for v in store.volumes("test")] == ["B", "B"]


def test_stores_that_are_absent_damaged_or_of_another_version_say_so(tmp_path: Path, subject: Subject) -> None:
    with pytest.raises(InputError, match="has no slices; run `cardiomix ingest"):
        SliceStore.open(str(tmp_path / "run"))
    store = stored(tmp_path / "run", subject)
    index = tmp_path / "run" / "slices.parquet"
    later = store.table.replace_schema_metadata({"cardiomix_slices": "2"})
    pq.write_table(later, index)
    with pytest.raises(InputError, match="its version is 2, this cardiomix reads 1"):
        SliceStore.open(str(tmp_path / "run"))
    pq.write_table(store.table.replace_schema_metadata({}), index)
    with pytest.raises(InputError, match="its version is none"):
        SliceStore.open(str(tmp_path / "run"))
    pq.write_table(pa.table({"x": [1]}, metadata={"cardiomix_slices": "1"}), index)
    with pytest.raises(InputError, match="its columns are not those"):
        SliceStore.open(str(tmp_path / "run"))
    index.write_bytes(b"no table")
    with pytest.raises(InputError, match="is damaged"):
        SliceStore.open(str(tmp_path / "run"))


SHARD = ("c", "0", "0", "0")
ARRAY_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda array: (array / "zarr.json").unlink(), "its zarr.json is missing"),
    "no shard": (lambda array: array.joinpath(*SHARD).unlink(), "its c/0/0/0 is missing"),
    "no array": (shutil.rmtree, "its zarr.json is missing"),
    "half a shard": (lambda array: os.truncate(array.joinpath(*SHARD), 150), "its shard's index is damaged"),
    "other metadata": (
        lambda array: (array / "zarr.json").write_text((array / "zarr.json").read_text().replace("zstd", "lz4")),
        "its zarr.json is not as cardiomix writes it",
    ),
}


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize(("damage", "problem"), ARRAY_DAMAGE.values(), ids=ARRAY_DAMAGE)
def test_a_damaged_array_is_one_line_whose_remedy_helps(
    tmp_path: Path, subject: Subject, kind: str, damage: Callable[[Path], object], problem: str
) -> None:
    run = tmp_path / "run"
    before = stored(run, subject, replace(subject, subject="other"))
    at = int(np.flatnonzero(before.column("subject") == "p 1/ä")[0])
    folder = run / "slices.zarr" / "p 1%2F%C3%A4"
    damage(folder / kind)
    store = SliceStore.open(str(run))
    remedy = "remove slices.zarr/p 1%2F%C3%A4 and ingest (or export) again: the others are kept"
    for reading in (getattr(store, kind), store.__getitem__, lambda i: store.volume([i])):
        with pytest.raises(InputError) as caught:
            reading(at)
        assert str(caught.value) == f"p 1/ä, {kind}: {problem}; {remedy}"
    assert store.image(0).any() and store.volume([0])[0].any()  # the other subject's
    shutil.rmtree(folder)
    mended = stored(run, subject, replace(subject, subject="other"))
    assert np.array_equal(mended.image(at), before.image(at)) and np.array_equal(mended.mask(at), before.mask(at))


def test_an_array_that_the_disk_does_not_give_is_not_called_damaged(tmp_path: Path, subject: Subject) -> None:
    store = stored(tmp_path / "run", subject)
    shard = tmp_path.joinpath("run", "slices.zarr", "p 1%2F%C3%A4", "image", *SHARD)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StageError, match=r"^p 1/ä, image: cannot be read \(Is a directory\); check the disk"):
        store.image(0)


def test_a_slice_whose_server_goes_away_is_not_called_damaged(
    subject: Subject, s3_proxy: Any, s3_impatient: dict[str, Any]
) -> None:
    run = "s3://bucket/slices"
    finalise(run, {subject.subject: write_subject(run, subject)}, [], [subject])
    store = SliceStore.open(run)
    s3_proxy.fault = lambda number, method: "503"
    for reading in (store.image, store.mask):
        with pytest.raises(StageError, match="the object store failed"):
            reading(0)
    s3_proxy.mend()
    assert store.mask(0).shape == (20, 24)


def test_threads_read_at_once_and_no_file_stays_open(tmp_path: Path, subject: Subject, study: Study) -> None:
    image, mask = study(0)
    stored(tmp_path / "run", subject)
    files_open = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        store = SliceStore.open(str(tmp_path / "run"))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(store.__getitem__, [i % 6 for i in range(48)]))
        for at, row in enumerate(found):
            frame, z = (0, 2)[at % 6 // 3], at % 3
            assert np.array_equal(row["image"], image[:, :, z, frame].T)
            assert np.array_equal(row["mask"], mask[:, :, z, frame].T)
    assert len(os.listdir("/proc/self/fd")) == files_open


def test_masks_that_do_not_fit_their_image_are_refused(
    tmp_path: Path, subject: Subject, write_nifti: Write, study: Study
) -> None:
    _, mask = study(0)
    coarse, strange = mask[::2], mask.copy()
    strange[0, 0, 0, 2] = 9
    cases: dict[str, tuple[Any, tuple[float, ...], str]] = {
        "matrix": (coarse, (1.25, 2.5, 8.0), "the mask is 12 × 20 × 3 voxels, the image 24 × 20 × 3"),
        "voxels": (mask, (1.25, 1.25, 8.0), "the mask's voxels are 1.25 × 1.25 × 8 mm, the image's 1.25 × 2.5 × 8 mm"),
        "coding": (strange, (1.25, 2.5, 8.0), r"values outside the coding: 9 in frame 2 \(from 0\); write 0"),
        "frames": (
            mask[..., :2],
            (1.25, 2.5, 8.0),
            "the mask has 2 frames, the image 4, and frame 2 .* is wanted; give",
        ),
        "frame": (np.roll(mask, 1, axis=3), (1.25, 2.5, 8.0), "the mask is empty at ED, frame 0"),
    }
    for name, (data, zooms, reason) in cases.items():
        write_nifti(tmp_path / "m.nii.gz", data, zooms)
        with pytest.raises(InputError, match=reason):
            write_subject(str(tmp_path / name), subject)
        assert not list((tmp_path / name).rglob("frames.json"))


def test_frames_of_different_matrices_are_refused(tmp_path: Path, write_nifti: Write) -> None:
    rng = np.random.default_rng(0)
    paths = [str(write_nifti(tmp_path / f"{n}.nii", rng.integers(0, 9, (n, 8, 2)).astype(np.int16))) for n in (8, 9)]
    frames = tuple(FrameSource("-", k, path, None, None, None) for k, path in enumerate(paths))
    subject = Subject("s", "table", "X", "c", frames, None, "", ((1, 1),), "")
    with pytest.raises(InputError, match="its slices are 8 × 9, another frame's 8 × 8"):
        write_subject(str(tmp_path / "run"), subject)


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", ".hidden"])
def test_a_subjects_name_never_leaves_its_folder(tmp_path: Path, subject: Subject, name: str) -> None:
    stored(tmp_path / "run", replace(subject, subject=name))
    inside = [p.parent for p in (tmp_path / "run").rglob("frames.json")]
    assert [p.parent for p in inside] == [tmp_path / "run" / "slices.zarr"]
    assert np.array_equal(SliceStore.open(str(tmp_path / "run")).mask(0).shape, (20, 24))


def test_a_replaced_subject_takes_the_index_with_it_until_ingest_ends(tmp_path: Path, subject: Subject) -> None:
    run = tmp_path / "run"
    stored(run, subject)
    write_subject(str(run), replace(subject, frames=subject.frames[1:]))  # and a kill before the index is written
    with pytest.raises(InputError, match="has no slices"):
        SliceStore.open(str(run))
    assert len(stored(run, replace(subject, frames=subject.frames[1:]))) == 3


def test_a_subject_that_is_withdrawn_loses_its_arrays(tmp_path: Path, subject: Subject) -> None:
    run = tmp_path / "run"
    stored(run, subject, replace(subject, subject="other"))
    store = stored(run, subject)
    assert sorted(p.name for p in (run / "slices.zarr").iterdir()) == ["p 1%2F%C3%A4", "zarr.json"]
    assert store.image(0).shape == (20, 24)


def test_masks_let_in_unchecked_are_checked_when_the_checks_are_on_again(tmp_path: Path, subject: Subject) -> None:
    swapped = replace(subject, labels=((1, 3), (2, 2), (3, 1)))
    write_subject(str(tmp_path), replace(swapped, check_masks=False))
    with pytest.raises(InputError, match="the labels look like"):
        write_subject(str(tmp_path), swapped)


def test_a_subject_named_like_the_groups_metadata_is_only_a_subject(tmp_path: Path, subject: Subject) -> None:
    stored(tmp_path / "run", replace(subject, subject="zarr.json"))
    assert (tmp_path / "run" / "slices.zarr" / "zarr.json").is_file()


def test_another_file_of_the_same_name_size_and_time_is_read(tmp_path: Path, subject: Subject) -> None:
    before = source_hash(subject)
    path = tmp_path / "i.nii.gz"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source_hash(subject) != before


def test_one_subjects_mask_header_is_trusted_without_trusting_labels_or_other_subjects(
    tmp_path: Path, subject: Subject, study: Study
) -> None:
    """F3: `--set layouts.check_masks=false`, which the error line recommended, let in any label order of anyone."""
    mirrored = nib.Nifti1Image(study(0)[1], np.diag([-1.25, 2.5, 8.0, 1.0]))
    nib.save(mirrored, tmp_path / "m.nii.gz")
    with pytest.raises(InputError, match="columns run the other way") as caught:
        write_subject(str(tmp_path / "run"), subject)
    name, value = shlex.split(caught.value.remedy)[-1].split("=")
    assert (name, yaml.safe_load(value)) == ("layouts.trust_mask_place", [subject.subject])
    swapped = replace(subject, labels=((1, 3), (2, 2), (3, 1)), trust_mask_place=True)
    with pytest.raises(InputError, match="the labels look like") as caught:
        write_subject(str(tmp_path / "run"), swapped)
    assert "check_masks" not in str(caught.value) and "layouts.trust_label_order=" in caught.value.remedy
    with pytest.raises(InputError, match="columns run the other way"):
        write_subject(str(tmp_path / "run"), replace(swapped, trust_mask_place=False, trust_label_order=True))
    write_subject(str(tmp_path / "run"), replace(swapped, trust_label_order=True))
    assert (stored(tmp_path / "run", replace(subject, trust_mask_place=True)).mask(0) == 1).sum() == 36


def test_trust_counts_in_a_subjects_hash_and_in_the_index_only_where_it_is_given(
    tmp_path: Path, subject: Subject
) -> None:
    assert source_hash(replace(subject, trust_mask_place=True)) != source_hash(subject)
    assert source_hash(replace(subject, trust_label_order=True)) != source_hash(subject)
    rows = {subject.subject: write_subject(str(tmp_path), subject)}
    for names in ((), ("p*",)):
        options = LayoutOptions(trust_mask_place=names)
        finalise(str(tmp_path), rows, [], [subject], options)
        store = SliceStore.open(str(tmp_path))
        about = json.loads((store.table.schema.metadata or {})[LAYOUTS_KEY])
        assert store.layouts == options and about.get("trust_mask_place", []) == list(names)
        assert ("trust_mask_place" in about, "trust_label_order" in about) == (bool(names), False)


@pytest.mark.parametrize(("value", "problem"), [(7, "every voxel is 7"), (np.nan, "1440 voxels are NaN or infinite")])
def test_an_image_s_bad_frame_is_named(
    tmp_path: Path, subject: Subject, write_nifti: Write, study: Study, value: float, problem: str
) -> None:
    image = study(0)[0].astype(np.float32)
    image[..., 2] = value
    write_nifti(tmp_path / "i.nii.gz", image, (1.25, 2.5, 8.0))
    with pytest.raises(InputError, match=rf"^i\.nii\.gz: .*{problem} in frame 2 \(from 0\); export"):
        write_subject(str(tmp_path / "run"), subject)
