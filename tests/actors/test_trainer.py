"""Training through Ray Train on a few small slices: deaths, several workers, what fails and how it says so."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from actors import stages
from actors.resources import ResourcePlan
from actors.train_job import DONE, HISTORY, LAST, TrainJob, WorkerBudget, read_history
from actors.train_slices import some_slices, validation_volumes
from actors.train_worker import _objective, finish_job, first_state, run_epochs
from actors.trainer import run_job
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.description import read_config, subject_key, vendors_seen
from pipeline.networks.files import load_model, save_model
from pipeline.networks.sdnet import SDNet
from pipeline.samples.maker import SampleMaker
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.stream_config import StreamConfig
from pipeline.training.config import LossConfig, TrainConfig
from pipeline.training.kernels import Compiled
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState, network_seed
from pipeline.training.validation import mean_scores, volume_scores
from storage import fs
from storage.errors import InputError, StageError
from storage.nifti.write import write_volume
from storage.slices.store import SliceStore
from storage.slices.writer import finalise, write_subject
from storage.subjects import FrameSource, Subject
from tests.actors.tiny_runs import filled_bank
from tests.integration.processes import CLOCK, train_workers

PLAN = ResourcePlan(
    lanes=1,
    train_workers=1,
    threads=1,
    trainer_cpus=0.5,
    trainer_gpus=0.0,
    data_actors=1,
    data_cpus=0.25,
    stream_mb=256,
    extract_actors=1,
    extract_cpus=0.5,
    extract_gpus=0.0,
)
# name, split, labelled
SUBJECTS = (
    ("a1", "train", True),
    ("a2", "train", True),
    ("c1", "train", False),
    *((f"v{k}", "validation", True) for k in (1, 2, 3)),
)
ONE_SLICE = (("a1", "train", True), ("v1", "validation", True))


def write_run(folder: Path, named: tuple[tuple[str, str, bool], ...] = SUBJECTS, slices: int = 4) -> str:
    """A slice store of noise with a square heart."""
    subjects, rows = [], {}
    for number, (name, split, labelled) in enumerate(named):
        rng = np.random.default_rng(number)
        mask = np.zeros((slices, 40, 40), np.uint8)
        mask[:, 12:28, 12:28], mask[:, 16:24, 16:24], mask[:, 4:12, 12:28] = 2, 1, 3
        image = (rng.normal(100, 20, mask.shape) + 60 * mask).round()
        write_volume(str(folder / f"{name}.nii.gz"), image, (8.0, 1.4, 1.4), np.int16)
        gt = str(folder / f"{name}_gt.nii.gz") if labelled else None
        if gt:
            write_volume(gt, mask, (8.0, 1.4, 1.4), np.uint8)
        source = FrameSource("ED", 0, str(folder / f"{name}.nii.gz"), None, gt, None)
        subjects.append(Subject(name, "table", "A", "X", (source,), split, "given", ((1, 1), (2, 2), (3, 3)), "terms"))
        rows[name] = write_subject(str(folder / "run"), subjects[-1])
    finalise(str(folder / "run"), rows, [], subjects)
    return str(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("train"))


def training(run: str, out: Path, sdnet: bool = True, ra: bool = True, workers: int = 1, **train: Any) -> TrainJob:
    """A job of three epochs of six steps, semi-supervised with an SDNet, in fp32."""
    small = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
    config = TrainConfig(**{"batch_size": 2, "epochs": 3, "steps_per_epoch": 6, "precision": "fp32"} | train)
    stream = StreamConfig(
        run=run,
        bank=None,
        preprocess=PreprocessConfig(size=32, field=48),
        plan=PlanConfig(),
        seed=0,
        semi_supervised=sdnet,
        ra=ra,
        fa=False,
        batch_size=config.batch_size,
    )
    return TrainJob(
        name="tiny",
        out=str(out),
        network=small if sdnet else UNetConfig(width=4),
        stream=stream,
        loss=LossConfig(),
        train=config,
        workers=workers,
        data_fingerprint="",
    )


@pytest.fixture(scope="module")
def undisturbed(run: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    """Folder of a job that nothing befell."""
    out = tmp_path_factory.mktemp("undisturbed")
    stages.pretrain(training(run, out), PLAN, lambda _: None)
    return out


def epochs(out: Path) -> list[dict[str, Any]]:
    """Records of the history without what a clock measured."""
    records = [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in records]


@pytest.mark.slow
def test_a_killed_worker_leaves_the_weights_and_the_history_of_a_run_that_nothing_befell(
    run: str, undisturbed: Path, tmp_path: Path
) -> None:
    job = training(run, tmp_path)
    killed: list[int] = []

    def kill(_: list[str]) -> None:
        if not killed and len(read_history(job)) == 1:
            killed.extend(train_workers(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    stages.pretrain(job, PLAN, kill, tick_s=0.05)
    assert len(killed) == 1
    for name in ("model.safetensors", f"{LAST}/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
    assert epochs(tmp_path) == epochs(undisturbed)
    assert [r["epoch"] for r in epochs(tmp_path)] == [1, 2, 3]
    for record in read_history(job):
        assert set(record) >= CLOCK and all(record[name] >= 0 for name in CLOCK)
        assert record["data_wait_fraction"] <= 1


@pytest.mark.slow
def test_one_of_two_workers_killed_leaves_the_weights_of_a_run_that_nothing_befell(
    run: str, tmp_path: Path, ray_local: None
) -> None:
    two, killed = replace(PLAN, train_workers=2, trainer_cpus=0.25), []
    jobs = [training(run, tmp_path / name, workers=2, batch_size=4) for name in ("undisturbed", "shaken")]
    stages.pretrain(jobs[0], two, lambda _: None)

    def kill(_: list[str]) -> None:
        if not killed and len(read_history(jobs[1])) == 1:
            killed.append(max(train_workers(os.getpid())))
            os.kill(killed[0], signal.SIGKILL)

    stages.pretrain(jobs[1], two, kill, tick_s=0.05)
    assert len(killed) == 1
    for name in ("model.safetensors", f"{LAST}/model.safetensors"):
        one, other = ((Path(job.out) / name).read_bytes() for job in jobs)
        assert one == other
    assert epochs(Path(jobs[0].out)) == epochs(Path(jobs[1].out))


@pytest.mark.slow
def test_two_workers_share_the_validation_and_agree_on_its_scores_and_on_the_rate(
    run: str, tmp_path: Path, ray_local: None
) -> None:
    changes: dict[str, Any] = {"epochs": 5, "steps_per_epoch": 2, "plateau_patience": 0, "plateau_factor": 0.1}
    job = training(run, tmp_path / "out", sdnet=False, workers=2, batch_size=4, learning_rate=0.05, **changes)
    first, second = both_workers(job, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = read_history(job)
    assert len({record["lr"] for record in records}) > 1  # so another rate of one worker would have parted them
    state = TrainState.create(job.network, job.train, job.stream.seed)
    state.restore(fs.read_bytes(job.checkpoint))
    volumes = validation_volumes(job, SliceStore.open(run))
    assert len(volumes) == 3
    alone = mean_scores(volume_scores(state.candidate, volumes, "fp32"))
    assert {name: records[-1][f"val/{name}"] for name in alone} == pytest.approx(alone, abs=1e-6)


def test_a_finished_job_holds_its_best_and_its_last_network(run: str, undisturbed: Path) -> None:
    best, last = (load_model(str(undisturbed / part))[1] for part in ("", LAST))
    assert best["network"] == last["network"]
    checkpoint = torch.load(training(run, undisturbed).checkpoint, weights_only=True)
    for weights, (model, _) in (("best", load_model(str(undisturbed))), ("model", load_model(str(undisturbed / LAST)))):
        assert all(torch.equal(checkpoint[weights][name], value) for name, value in model.state_dict().items())
    scores = [r["val/dice"] for r in epochs(undisturbed)]
    assert json.loads((undisturbed / DONE).read_text())["best_val_dice"] == max(scores)


def finished_by_hand(run: str, out: Path, **changes: Any) -> TrainJob:
    """A job's folder as the end of training leaves it."""
    job = training(run, out, **changes)
    state = TrainState.create(job.network, job.train, 0)
    state.end_epoch(0.5)
    finish_job(job, SliceStore.open(run), state)
    return job


def test_both_networks_of_a_job_have_codes_of_the_prior_s_spread_if_it_is_told_so(run: str, tmp_path: Path) -> None:
    job, store = finished_by_hand(run, tmp_path, standardise_codes=True, ema=0.9), SliceStore.open(run)
    done = (tmp_path / DONE).read_bytes()
    finished_by_hand(run, tmp_path, standardise_codes=True, ema=0.9)  # as after a kill in between
    assert (tmp_path / DONE).read_bytes() == done
    seen = some_slices(job, store, 256).image
    for folder in (tmp_path, tmp_path / LAST):
        model, _ = load_model(str(folder))
        assert isinstance(model, SDNet)
        with torch.inference_mode():
            codes = model.encode_modality(seen)
        assert codes.mean(0).abs().max() < 0.01 and (codes.std(0) - 1).abs().max() < 0.05


def test_a_folder_that_is_not_whole_is_not_a_finished_job(run: str, tmp_path: Path) -> None:
    job = finished_by_hand(run, tmp_path)
    assert job.finished()
    assert not training(run, tmp_path, epochs=4).finished()
    for name, damage in (
        (DONE, lambda data: data[:20]),
        (DONE, lambda data: b"[]"),
        ("model.json", lambda data: data[:20]),
        ("model.json", lambda data: data.replace(b'"fingerprint": "', b'"fingerprint": "0')),
        ("model.safetensors", lambda data: data[:-1]),
    ):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert not job.finished(), name
        path.unlink()
        assert not job.finished(), name
        path.write_bytes(whole)
    assert job.finished()


def test_on_a_cpu_steps_are_compiled_only_where_that_is_asked_for(run: str, tmp_path: Path) -> None:
    job = training(run, tmp_path)
    state = TrainState.create(job.network, job.train, seed=0)
    budget = WorkerBudget(threads=1, data_actors=1, data_cpus=0.25, stream_mb=1, gpus=0)
    for asked in (None, False, True):
        objective = _objective(job, budget.model_copy(update={"compile": asked}), state, steps=10**6, world=1)
        assert isinstance(objective.run, Compiled) == (asked is True)


def test_a_worker_that_draws_nnunets_looks_itself_compiles_nothing(run: str, tmp_path: Path) -> None:
    """Compiling sets torch's global generator back while the looks draw from it in another thread."""
    job = training(run, tmp_path)
    looks = job.model_copy(update={"stream": job.stream.model_copy(update={"appearance": "nnunet"})})
    state = TrainState.create(job.network, job.train, seed=0)
    budget = WorkerBudget(threads=1, data_actors=0, data_cpus=0.0, stream_mb=1, gpus=0, compile=True)
    found = [_objective(each, budget, state, steps=10**6, world=1).run for each in (looks, job)]
    assert [isinstance(run, Compiled) for run in found] == [False, True]


def shares(job: TrainJob) -> list[tuple[dict[str, float], list[torch.Tensor]]]:
    """Losses and gradients of the first step, of each worker's samples by themselves."""
    found = []
    for rank in range(job.workers):
        state = TrainState.create(job.network, job.train, job.stream.seed, rank)
        state.latent.manual_seed(network_seed(job.stream.seed, f"latent/{rank}", 0))
        rows = SampleMaker(job.stream, rank, job.workers)({"step": np.array([0])})
        image, mask, labelled = (torch.from_numpy(rows[name]) for name in ("image", "mask", "labelled"))
        terms = Objective(state.model, job.loss, state.latent)(image, mask.long(), int(labelled.sum()))
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        found.append(({**{k: v.item() for k, v in terms.items()}, "total": total.item()}, gradients))
    return found


def both_workers(job: TrainJob, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters of each of a job's two workers when it is done."""
    import ray.train
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        from actors.train_worker import run_epochs

        rank = ray.train.get_context().get_world_rank()
        job = TrainJob.model_validate(config["job"])
        state = TrainState.create(job.network, job.train, job.stream.seed, rank)
        budget = WorkerBudget(threads=1, data_actors=1, data_cpus=0.25, stream_mb=64, gpus=0)
        run_epochs(job, budget, SliceStore.open(job.stream.run), state, rank, 2)
        torch.save(dict(state.model.named_parameters()), f"{config['out']}/rank{rank}.pt")

    scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
    storage = ray.train.RunConfig(name="two", storage_path=str(folder))
    settings = {"job": job.model_dump(), "out": str(folder)}
    TorchTrainer(loop, train_loop_config=settings, scaling_config=scaling, run_config=storage).fit()
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.mark.slow
def test_two_workers_stay_equal_where_unlabelled_samples_have_updates_of_their_own(
    run: str, tmp_path: Path, ray_local: None
) -> None:
    job = training(run, tmp_path / "out", workers=2, batch_size=4, epochs=3, steps_per_epoch=2, update="separate")
    untrained = dict(TrainState.create(job.network, job.train, job.stream.seed).model.named_parameters())
    first, second = both_workers(job, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(not torch.equal(first[name].cpu(), value) for name, value in untrained.items()) > len(first) / 2


@pytest.mark.slow
def test_two_workers_step_by_the_mean_of_their_shares_and_stay_equal(run: str, tmp_path: Path, ray_local: None) -> None:
    job = training(run, tmp_path / "out", workers=2, batch_size=4, epochs=1, steps_per_epoch=1)
    first, second = both_workers(job, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (ours, one), (theirs, other) = shares(job)
    (record,) = read_history(job)
    for name, value in ours.items():
        assert record[f"loss/{name}"] == pytest.approx((value + theirs[name]) / 2, abs=1e-4)
    moments = torch.load(job.checkpoint, weights_only=True)["optimiser"]["state"]
    stepped = torch.cat([10 * moments[k]["exp_avg"].flatten() for k in range(len(one))])  # Adam's is a tenth at first
    mean = torch.cat([(a + b).flatten() / 2 for a, b in zip(one, other, strict=True)])
    assert (stepped - mean).norm() < 1e-3 * mean.norm()
    alone = torch.cat([a.flatten() for a in one])
    assert (alone - mean).norm() > 1e-2 * mean.norm()


@pytest.mark.slow
def test_two_workers_take_the_step_of_one_where_their_shares_are_alike(tmp_path: Path, ray_local: None) -> None:
    """One training slice, so that batch norm, which is over each share, sees the same."""
    alike = write_run(tmp_path, ONE_SLICE, slices=1)
    losses = []
    for workers in (1, 2):
        job = training(
            alike, tmp_path / str(workers), sdnet=False, ra=False, workers=workers, epochs=1, steps_per_epoch=1
        )
        run_job(job, replace(PLAN, train_workers=workers))
        losses.append(read_history(job)[0])
        assert job.finished()
    for name in ("dice", "focal", "total"):
        assert losses[1][f"loss/{name}"] == pytest.approx(losses[0][f"loss/{name}"], abs=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_its_arm_at_once_and_names_the_slices(
    run: str, tmp_path: Path, ray_local: None
) -> None:
    arm = stages.ArmRun("unet_ra", 0, training(run, tmp_path, sdnet=False, learning_rate=1e30))
    failed = stages.run_arms([arm], PLAN, lambda _: None)
    assert list(failed) == ["unet_ra/seed0"]
    reason = failed["unet_ra/seed0"]
    assert reason.startswith("step ") and "slices [" in reason and "lower train.learning_rate" in reason
    assert "died" not in reason and "\n" not in reason
    assert arm.failure() == reason


def by_hand(job: TrainJob, data_actors: int = PLAN.data_actors) -> TrainState:
    """The job's epochs in this process, from whatever it starts from."""
    store = SliceStore.open(job.stream.run)
    state = first_state(job, store, 0)
    budget = WorkerBudget(
        threads=PLAN.threads,
        data_actors=data_actors,
        data_cpus=PLAN.data_cpus,
        stream_mb=PLAN.stream_mb,
        gpus=PLAN.trainer_gpus,
    )
    run_epochs(job, budget, store, state, 0, 1)
    return state


def with_factors(folder: Path, out: Path, **train: Any) -> TrainJob:
    """A job on samples that are drawn from a bank in `folder`, which is made if it is not there."""
    if not (folder / "bank.zarr").exists():
        filled_bank(folder)
    job = training(str(folder / "run"), out, **train)
    stream = job.stream.model_copy(update={"bank": str(folder / "bank.zarr"), "fa": True})
    return job.model_copy(update={"stream": stream})


def test_a_worker_that_makes_its_samples_itself_has_the_losses_of_one_with_data_actors(
    tmp_path: Path, ray_local: None
) -> None:
    """Of a U-Net: an SDNet's anatomy is rounded, and makes steps of differences of rounding."""
    brief: dict[str, Any] = {"sdnet": False, "epochs": 2, "steps_per_epoch": 3}
    jobs = [with_factors(tmp_path / "made", tmp_path / name, **brief) for name in ("beside", "itself")]
    assert jobs[0].config_hash == jobs[1].config_hash
    lent = [jobs[0].stream.model_copy(update={"donors": place}) for place in ("here/bank.zarr", "there/bank.zarr")]
    assert len({jobs[0].model_copy(update={"stream": stream}).config_hash for stream in lent}) == 1
    by_hand(jobs[0])
    by_hand(jobs[1], data_actors=0)
    beside, itself = map(read_history, jobs)
    assert len(itself) == 2 and set(itself[0]) == set(beside[0])
    for ours, theirs in zip(itself, beside, strict=True):
        for name in (n for n in theirs if n.startswith("loss/")):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name
        assert ours["actor_utilisation"] > 0 and 0 <= ours["data_wait_fraction"] <= 1 and ours["fa_rejected"] == 0


@pytest.mark.slow
def test_a_killed_worker_that_made_its_samples_itself_leaves_the_weights_of_an_undisturbed_one(
    tmp_path: Path, ray_local: None
) -> None:
    itself, killed = replace(PLAN, data_actors=0, data_cpus=0.0), []
    jobs = [with_factors(tmp_path / "made", tmp_path / name) for name in ("undisturbed", "shaken")]
    stages.pretrain(jobs[0], itself, lambda _: None)

    def kill(_: list[str]) -> None:
        if not killed and len(read_history(jobs[1])) == 1:
            killed.extend(train_workers(os.getpid()))
            os.kill(killed[0], signal.SIGKILL)

    stages.pretrain(jobs[1], itself, kill, tick_s=0.05)
    assert len(killed) == 1
    one, other = ((Path(job.out) / "model.safetensors").read_bytes() for job in jobs)
    assert one == other
    assert epochs(Path(jobs[0].out)) == epochs(Path(jobs[1].out))


def test_noise_in_place_of_every_test_image_changes_no_weight(tmp_path: Path, ray_local: None) -> None:
    run = write_run(tmp_path, (*SUBJECTS, ("t1", "test", True)))
    before = by_hand(training(run, tmp_path / "before", epochs=2, steps_per_epoch=2))
    array = zarr.open_array(Path(run) / "slices.zarr" / "t1" / "image", mode="r+")
    array[:] = np.random.default_rng(9).integers(0, 999, array.shape).astype(array.dtype)
    after = by_hand(training(run, tmp_path / "after", epochs=2, steps_per_epoch=2))
    for ours, theirs in (
        (before.best_weights, after.best_weights),
        (before.model.state_dict(), after.model.state_dict()),
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert read_history(training(run, tmp_path / "before", epochs=2, steps_per_epoch=2))[-1]["val/dice"] >= 0


def test_an_arm_starts_from_the_pretrained_weights_where_asked_to(run: str, tmp_path: Path) -> None:
    job = finished_by_hand(run, tmp_path / "sdnet")
    pretrained, _ = load_model(job.out)
    started = job.model_copy(update={"start": job.out, "out": str(tmp_path / "arm")})
    store = SliceStore.open(run)
    state = first_state(started, store, 0)
    assert all(torch.equal(v, state.model.state_dict()[k]) for k, v in pretrained.state_dict().items())
    # and hands on what that network has seen, so that no later run tests on it
    save_model(job.out, pretrained, job.network, {}, ["theirs"], ["far"], {"data": {"train": {"Z": {}}}}, ["far"])
    state.end_epoch(0.5)
    finish_job(started, store, state)
    handed_on = read_config(started.out)
    assert all(
        subject_key("far") in handed_on[name] and len(handed_on[name]) > 1 for name in ("trained_on", "masks_of")
    )
    assert "theirs" in handed_on["terms"] and "Z" in vendors_seen(handed_on)
    other = started.model_copy(update={"network": SDNetConfig(anatomy_width=8)})
    with pytest.raises(InputError, match="another SDNet"):
        first_state(other, store, 0)


@pytest.mark.slow
def test_train_workers_that_no_node_has_room_for_are_given_up(no_room: None, tmp_path: Path) -> None:
    job = training(write_run(tmp_path), tmp_path / "out")
    lines: list[str] = []

    def tick(_: list[str]) -> None:
        lines.append(job.waiting() or "")

    with pytest.raises(StageError, match=r"train: waited .* for 0.5 CPUs for its train workers"):
        stages.pretrain(job, replace(PLAN, wait_minutes=1), tick)
    assert any(line.startswith("train: waiting ") for line in lines)
