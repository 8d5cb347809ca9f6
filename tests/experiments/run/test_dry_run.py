"""What `ablate --dry-run` says before anything is there, and what is refused for want of room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from actors.resources import Cluster, Node, plan
from experiments.cli.main import app
from experiments.config import demo, override, validated
from experiments.run.cost import START_S, Cost, cost, slow_precision
from experiments.run.dry_run import require_fits, show, storage_needed
from experiments.run.workload import require_none_skipped, workload
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.kernels import lacks_bf16
from pipeline.training.step_time import seconds_a_step
from storage.errors import InputError

TINY = ("preprocess.size=32", "unet.width=4", "train.epochs=3", "train.steps_per_epoch=7", "phantom.subjects=10")
PRECISION = "precision: this machine's processor has no bf16, so fp32 is faster (1.9 times where measured): --set train"
GROUP = {
    "A0A0A0": ("Training/Labeled", "A"),
    "A1A1A1": ("Training/Labeled", "A"),
    "C0C0C0": ("Training/Unlabeled", "C"),
    "D0D0D0": ("Testing", "D"),
}


@pytest.mark.parametrize("normalisation", ["zscore", "foreground"])
def test_a_dry_run_says_plan_stages_time_and_disk_and_writes_nothing(tmp_path: Path, normalisation: str) -> None:
    run = tmp_path / "runs" / "first"
    chosen = (*TINY, "phantom.subjects=30", f"preprocess.normalisation={normalisation}")
    sets = [part for assignment in chosen for part in ("--set", assignment)]
    said = CliRunner().invoke(app, ["ablate", "demo", "--run", str(run), "--arms", "unet_ra", "--dry-run", *sets])
    assert said.exit_code == 0, said.output
    for words in (
        "resources: 1 × ",
        "1 arm at a time, each 1 train worker",
        "ingest         to do: about ",
        "unet_ra/seed0  to do: 3 epochs of 7 steps",
        "time: about ",
        *([PRECISION] if lacks_bf16() else []),
        "power: one training: descriptive, no verdict; 3 seeds and 11 test subjects show a difference of 0.054 to ",
        "An estimate",
        "storage: ",
        " are free where first lies",
    ):
        assert words in said.output, said.output
    assert "pretrain" not in said.output  # no arm of this one needs it
    assert list(tmp_path.iterdir()) == []


def test_precision_is_spoken_of_only_where_bf16_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, both = demo(), ["pretrain", "train"]
    budget = plan(settings.resources, Cluster((Node(2),)), 1)
    monkeypatch.setattr("pipeline.training.kernels.lacks_bf16", lambda: True)  # no machine has both processors
    said = slow_precision(settings, budget, both)
    assert said is not None and "--set pretrain.precision=fp32 --set train.precision=fp32" in said
    said = slow_precision(override(settings, ["train.precision=fp32"]), budget, both)
    assert said is not None and "--set pretrain.precision=fp32" in said and "--set train" not in said
    exact = override(settings, ["train.precision=fp32", "pretrain.precision=fp32"])
    assert slow_precision(exact, budget, both) is None
    assert slow_precision(settings, replace(budget, trainer_gpus=1), both) is None  # a GPU computes it
    monkeypatch.setattr("pipeline.training.kernels.lacks_bf16", lambda: False)
    assert slow_precision(settings, budget, both) is None


def test_slices_are_counted_from_headers_as_ingest_would_split_them(
    tmp_path: Path, mnms_folder: Callable[[dict[str, tuple[str, str]]], Path]
) -> None:
    from storage.layouts import LayoutOptions, collect, splits
    from storage.slices.store import SliceStore
    from storage.slices.writer import finalise, write_subject

    data, run = mnms_folder(GROUP), str(tmp_path / "run")
    settings = validated(demo().model_dump() | {"data": (str(data),)}, "test")
    work = workload(run, settings)
    assert ("ss_sdnet_ra_fa/seed0", "to do: 10 epochs of 60 steps") in work.stages
    assert not Path(run).exists()
    subjects = splits.assign(collect((str(data),), LayoutOptions())[0], LayoutOptions())
    finalise(run, {s.subject: write_subject(run, s) for s in subjects}, [], subjects)
    store = SliceStore.open(run)
    train = store.column("split") == "train"
    counted = work.contents
    assert (counted.slices, counted.train) == (len(store), int(train.sum()))
    assert counted.labelled == int((train & store.column("labelled").astype(bool)).sum())
    assert counted.pixels == (store.column("height").astype(float) * store.column("width")).sum()
    assert counted.unreadable == ()
    assert counted.tested == workload(run, settings).contents.tested == 1  # of headers, and of the slices themselves


def test_a_study_that_cannot_be_opened_is_told(
    tmp_path: Path, mnms_folder: Callable[[dict[str, tuple[str, str]]], Path]
) -> None:
    data = mnms_folder(GROUP)
    next(data.rglob("C0C0C0_sa.nii.gz")).write_bytes(b"nothing")
    settings = validated(demo().model_dump() | {"data": (str(data),)}, "test")
    work = workload(str(tmp_path / "run"), settings)
    assert "studies that would be skipped: 1" in dict(work.stages)["ingest"]
    for known in (False, True):
        with pytest.raises(InputError, match=r"^C0C0C0, C0C0C0_sa\.nii\.gz: .*; "):
            require_none_skipped(settings, replace(work.contents, known=known))
    command = ["ablate", "demo", "--data", str(data), "--run", str(tmp_path / "run"), "--arms", "unet_ra", "--dry-run"]
    said = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(said.exception, InputError) and said.exception.where == "C0C0C0, C0C0C0_sa.nii.gz"


def test_a_mask_that_cannot_enter_is_told_by_its_header(
    tmp_path: Path, mnms_folder: Callable[[dict[str, tuple[str, str]]], Path], write_nifti: Callable[..., Path]
) -> None:
    data, run = mnms_folder(GROUP), tmp_path / "run"
    mask = next(data.rglob("A1A1A1_sa_gt.nii.gz"))
    command = ["ablate", "demo", "--data", str(data), "--run", str(run), "--arms", "unet_ra", "--dry-run", "--strict"]
    for shape, zooms, words in (
        ((24, 20, 2, 4), (1.5, 1.5, 8.0), "the mask is 24 × 20 × 2 voxels, the image 24 × 20 × 3"),
        ((24, 20, 3, 4), (1.0, 1.0, 8.0), "voxels"),
        (None, (), "is not a NIfTI file"),
    ):
        if shape is None:
            mask.write_bytes(b"")
        else:
            write_nifti(mask, np.ones(shape, np.uint8), zooms)
        ended = CliRunner().invoke(app, command)
        assert isinstance(ended.exception, InputError), ended.output
        assert ended.exception.where == "A1A1A1, A1A1A1_sa_gt.nii.gz" and words in str(ended.exception)
    assert not run.exists()


def test_what_does_not_fit_the_disk_is_refused_before_work_with_the_shortfall(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wide = override(demo(), ["unet.width=30000"])  # terabytes of weights
    with pytest.raises(
        InputError, match=r"run: needs about [\d.]+ GB more and its disk has [\d.]+ GB free, .* too few"
    ):
        require_fits(str(run), wide)
    said = CliRunner().invoke(app, ["ablate", "demo", "--run", str(run), "--set", "unet.width=30000"])
    assert isinstance(said.exception, InputError) and "too few" in str(said.exception)
    assert list(tmp_path.iterdir()) == []
    require_fits(str(run), demo())
    require_fits("memory://somewhere/run", wide)  # an object store has no end that could be asked for


def test_the_room_asked_for_grows_with_slices_seeds_and_width(tmp_path: Path) -> None:
    def needed(*assignments: str) -> dict[str, float]:
        settings = override(demo(), list(assignments))
        return storage_needed(settings, workload(str(tmp_path / "run"), settings))

    base = needed()
    assert all(size > 0 for size in base.values())
    assert needed("phantom.slices=[14,18]")["slices"] == 2 * base["slices"]
    assert needed("phantom.slices=[14,18]")["bank"] == 2 * base["bank"]
    assert needed("seeds=3")["networks"] > 2.5 * base["networks"]
    assert needed("unet.width=32")["networks"] > base["networks"]


def test_the_cost_counts_gpus_seeds_and_what_stands_on_a_node(tmp_path: Path) -> None:
    def of(node: Node, *assignments: str) -> Cost:
        settings = override(demo(), [*TINY, "arms=[unet_ra]", *assignments])
        cluster, work = Cluster((node,)), workload(str(tmp_path / "run"), settings)
        return cost(work, settings, cluster, plan(settings.resources, cluster, len(work.arms)))

    alone, on_cards = of(Node(2)), of(Node(8, 2), "seeds=4")
    assert alone.gpu_seconds == alone.stages["pretrain"] == alone.stages["extract"] == alone.cache == 0
    assert on_cards.gpu_seconds == pytest.approx(2 * on_cards.stages["arms"])  # of four arms, two at a time
    assert on_cards.stages["arms"] > 2 * START_S
    assert on_cards.memory["samples"] == 2 * alone.memory["samples"]
    assert all(size > 0 for size in alone.memory.values())
    time, hours, memory = on_cards.lines()
    assert "GPU-hours" in hours and " GB a node while arms train" in memory and time.startswith("time: about ")


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(kl=0.05, balance=0.1, align=0.01)])
def test_a_step_is_timed_for_every_kind_of_network_and_threads_are_left_as_they_were(loss: LossConfig) -> None:
    sdnet = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
    before = torch.get_num_threads()
    for network in (UNetConfig(width=4), sdnet):
        assert seconds_a_step(network, loss, TrainConfig(batch_size=2), 2, 2, 32, threads=2) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "choice",
    [(), ("layouts.protocol=leave_one_vendor_out", "layouts.protocol_vendor=A"), ("layouts.label_fraction=0.2",)],
)
def test_a_phantom_that_is_not_drawn_is_counted_as_it_would_be_split(tmp_path: Path, choice: tuple[str, ...]) -> None:
    from pipeline.phantom import write_phantom
    from pipeline.phantom.plan import PhantomConfig
    from storage.layouts import LayoutOptions, collect, splits

    settings = override(demo(), ["phantom.subjects=12", "phantom.frames=2", "phantom.slices=[3,3]", *choice])
    planned = workload(str(tmp_path / "run"), settings).contents
    assert isinstance(settings.phantom, PhantomConfig)
    assert isinstance(settings.layouts, LayoutOptions)
    write_phantom(tmp_path / "drawn", settings.phantom)
    subjects, skipped = collect((str(tmp_path / "drawn"),), settings.layouts)
    assert not skipped
    trained = [s for s in splits.assign(subjects, settings.layouts) if s.split == "train"]
    assert planned.train == len(trained) * 2 * 3
    assert planned.labelled == sum(s.labelled for s in trained) * 2 * 3


def test_a_card_that_torch_cannot_use_is_refused_where_something_is_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.dry_run.local_cluster", lambda: Cluster((Node(8, 1),)))
    monkeypatch.setattr("experiments.run.dry_run.has_cuda", lambda: False)
    settings = override(demo(), [*TINY, "arms=[unet_ra]"])
    for refuse in (require_fits, lambda run, settings: show(run, settings, print)):
        with pytest.raises(InputError, match=r"torch: is a build without CUDA.*resources.gpus=false"):
            refuse(str(tmp_path / "run"), settings)
    require_fits(str(tmp_path / "run"), override(settings, ["resources.gpus=false"]))
    whole = workload(str(tmp_path / "run"), settings)
    done = replace(whole, pretrain=None, arms=[replace(arm, state="done", steps=0) for arm in whole.arms])
    monkeypatch.setattr("experiments.run.dry_run.workload", lambda run, settings: done)
    require_fits(str(tmp_path / "run"), settings)
