"""What cannot be is refused at once: by its flag and full path, before Ray starts and before anything is written; by
`--dry-run` in the same words."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.scale import draw_up
from experiments import version
from experiments.cli.main import app
from experiments.config import demo, override
from experiments.tracking.store import require_answer
from pipeline.networks.config import SDNetConfig, UNetConfig
from pipeline.networks.files import build, save_model
from pipeline.networks.sdnet import SDNet
from pipeline.phantom.plan import codes, orders
from storage.bank import spec
from storage.bank.bank import FactorBank
from storage.errors import InputError
from storage.identity import identity
from storage.lock import LOCK, require_free
from tests.storage.banks import DECODER, DECODER_CONFIG, factors, index, made, write
from tests.storage.banks import spec as bank_spec
from tests.storage.test_lock import holder

TINY = ("preprocess.size=32", "unet.width=4", "train.epochs=3", "train.steps_per_epoch=7", "phantom.subjects=10")
SMALL = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)


def refused(*arguments: str) -> str:
    """The line with which `ablate` refuses, the same from `--dry-run`."""
    told = []
    for more in ((), ("--dry-run",)):
        ended = CliRunner().invoke(app, ["ablate", *arguments, *more])
        assert isinstance(ended.exception, InputError), ended.output
        assert ended.output == ""  # not a line of any stage
        told.append(str(ended.exception))
    assert told[0] == told[1]
    return told[0]


def test_places_that_are_not_there_are_named_by_flag_and_full_path(tmp_path: Path) -> None:
    run, absent = str(tmp_path / "run"), str(tmp_path / "far" / "bank.zarr")
    assert refused("demo", "--run", run, "--bank", absent).startswith(f"--bank {absent}: no factor bank here; ")
    assert refused("demo", "--run", run, "--sdnet", absent).startswith(f"--sdnet {absent}: no trained network here; ")
    assert refused("demo", "--run", run, "--data", absent).startswith(f"--data {absent}: no such folder; ")
    assert refused("demo", "--run", run, "--layout", "bids").startswith("--layout bids: there is no such layout; ")
    assert list(tmp_path.iterdir()) == []


def test_a_bank_or_a_network_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run, bank, sdnet, unet = (str(tmp_path / name) for name in ("run", "bank.zarr", "sdnet", "unet"))
    made(bank)
    assert "was made with another preprocessing" in refused("demo", "--run", run, "--bank", bank)
    Path(bank, "index.parquet").unlink()
    assert refused("demo", "--run", run, "--bank", bank).startswith(f"--bank {bank}: index.parquet: is missing; ")
    save_model(sdnet, SDNet(SMALL), SMALL, identity(demo().preprocess), ["phantom"])
    assert "is another SDNet than" in refused("demo", "--run", run, "--sdnet", sdnet, "--set", "train.start=pretrained")
    Path(sdnet, "model.safetensors").unlink()
    assert refused("demo", "--run", run, "--sdnet", sdnet).startswith(f"--sdnet {sdnet}: has no model.safetensors; ")
    save_model(unet, build(UNetConfig(width=4)), UNetConfig(width=4), identity(demo().preprocess), ["phantom"])
    assert refused("demo", "--run", run, "--sdnet", unet).startswith(f"--sdnet {unet}: is a unet, not an SDNet; ")
    assert not Path(run).exists()


def test_a_network_that_did_not_fill_the_bank_is_refused(tmp_path: Path) -> None:
    run, bank, sdnet = (str(tmp_path / name) for name in ("run", "bank.zarr", "sdnet"))
    preprocess = identity(demo().preprocess)
    made(bank, preprocess=preprocess)
    save_model(sdnet, SDNet(SMALL), SMALL, preprocess, ["phantom"])
    line = refused("demo", "--run", run, "--bank", bank, "--sdnet", sdnet)
    assert line.startswith(
        f"--sdnet {sdnet}: is not the SDNet that filled --bank {bank}; give the one with fingerprint "
    )


def test_sdnets_of_an_earlier_transfer_that_are_not_there_are_refused(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    words = ["--data", str(tmp_path), "--vendors", "A", "--arms", "unet_ra", "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, ["transfer", "cpu", *words, "--sdnets", absent])
    assert str(ended.exception).startswith(f"--sdnets {absent}: no such folder; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("http://me:secret@127.0.0.1:9", "the MLflow server does not answer (connection refused)"),
        ("postgresql://me:secret@127.0.0.1:9/mlflow", "cannot open the MLflow store ("),
        ("sqlite:////proc/absent/mlflow.db", "cannot open the MLflow store here"),
        ("sqlite:///{file}", "cannot open the MLflow store (file is not a database)"),
    ],
)
def test_an_mlflow_that_does_not_answer_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: str
) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    uri = place.format(file=tmp_path / "text.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sets = [part for each in TINY for part in ("--set", each)]
    line = refused("demo", "--run", str(tmp_path / "run"), "--arms", "unet_ra", *sets)
    assert line.startswith(f"MLFLOW_TRACKING_URI={uri.replace('me:secret', '***')}: {problem}")
    assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_a_look_at_a_database_that_is_to_be_made_does_not_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_answer(str(tmp_path / "run"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    require_answer(str(tmp_path / "run"))
    require_answer("memory://run")
    for elsewhere in (f"sqlite:///{tmp_path}/runs/all.db", "a-plugin://somewhere"):  # the run makes the folder `runs`
        monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
        require_answer(str(tmp_path / "runs" / "first"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_driver_holds_is_refused_and_a_dead_ones_lock_is_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(str(run)) as process:
        before = (run / LOCK).read_bytes()
        line = refused("demo", "--run", str(run))
        assert line.startswith(f"run: is being worked on by process {process.pid} on ")
        assert [path.name for path in run.iterdir()] == [LOCK] and (run / LOCK).read_bytes() == before
    require_free(str(run))  # its process is dead
    assert (run / LOCK).read_bytes() == before


def test_the_phantom_of_a_run_in_a_bucket_is_drawn_by_hand() -> None:
    line = refused("demo", "--run", "s3://bucket/runs/first")
    assert line.startswith("--run s3://bucket/runs/first: the demo draws its phantom into the run, ")
    for command in ("cardiomix phantom DIR", "cardiomix ablate demo --data DIR --run s3://bucket/runs/first"):
        assert f"`{command}`" in line


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("layouts.label_fraction=0", "label_fraction"),
        ("resources.train_workers=3", "3 workers cannot share"),
        (
            "phantom.unlabelled_c=0",
            "needs unlabelled training slices; add unlabelled subjects, or leave it out: --arms unet_ra",
        ),
        ("resources.gpus=true", "GPUs asked for"),
    ],
)
@pytest.mark.parametrize("how", [("--dry-run",), ()])
def test_what_the_slices_would_show_is_refused_before_anything_starts(
    tmp_path: Path, assignment: str, words: str, how: tuple[str, ...]
) -> None:
    arguments = ["ablate", "demo", "--run", str(tmp_path / "run"), *how, "--arms", "unet_ra,ss_sdnet_ra"]
    for each in (*TINY[:-1], assignment):
        arguments += ["--set", each]
    ended = CliRunner().invoke(app, arguments)
    assert isinstance(ended.exception, InputError) and words in str(ended.exception), ended.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_a_bank_that_holds_a_test_subject_and_a_network_that_saw_one(tmp_path: Path) -> None:
    settings = override(demo(), [*TINY, "preprocess.field=32"])
    wanted = orders(settings.phantom)
    names = zip(codes(wanted, settings.phantom.seed), wanted, strict=True)
    tested = next(name for name, order in names if order.split == "Testing")
    bank = FactorBank.create(
        str(tmp_path / "bank.zarr"),
        bank_spec(preprocess=identity(settings.preprocess)),
        index(("s0",), subject=tested),
        DECODER,
        DECODER_CONFIG,
    )
    for shard in range(bank.shards()):
        write(bank, shard, factors(("s0",)))
    sdnet = str(tmp_path / "sdnet")
    save_model(sdnet, SDNet(SMALL), SMALL, identity(settings.preprocess), ["phantom"], [tested])
    for flag, words in (
        (("--bank", bank.uri), f"holds {tested}, which this run validates or tests on, or excludes"),
        (("--sdnet", sdnet), f"was trained on {tested}, which this run tests on or excludes"),
    ):
        sets = [part for each in (*TINY, "preprocess.field=32") for part in ("--set", each)]
        arguments = ["ablate", "demo", "--run", str(tmp_path / "run"), "--dry-run", *flag, *sets]
        ended = CliRunner().invoke(app, arguments)
        assert isinstance(ended.exception, InputError) and words in str(ended.exception), ended.output


def test_a_dry_run_of_a_run_with_a_bank_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    draw_up(str(run), 2500)
    monkeypatch.setenv("CARDIOMIX_CACHE", str(cache))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    chosen = ["--arms", "unet_ra,ss_sdnet_ra_fa", "--sdnet", str(run / "sdnet")]
    sets = [part for name in ("unet.width=4", "train.epochs=3") for part in ("--set", name)]
    document = tmp_path / "small.yaml"
    document.write_text((run / "config.yaml").read_text())
    ended = CliRunner().invoke(app, ["ablate", str(document), "--run", str(run), "--dry-run", *chosen, *sets])
    assert ended.exit_code == 0, ended.output
    assert "extract" in ended.output and "done: 2000 slices" in ended.output
    for words in ("time: about ", "cost: about ", " GPU-hours", "memory: about ", "storage: "):
        assert words in ended.output, ended.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not cache.exists()


def test_without_the_packages_metadata_the_version_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for module in (version, spec):
        monkeypatch.setattr(module, "version", absent)
    spec.code_version.cache_clear()
    try:
        assert version.provenance()["cardiomix"] == spec.code_version() == "unknown"
    finally:
        spec.code_version.cache_clear()
