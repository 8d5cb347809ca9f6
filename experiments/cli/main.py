"""The command line. Imports stay inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from experiments.cli.bank import bank_app
from experiments.cli.compare import compare
from experiments.cli.data import inspect_data, phantom
from experiments.cli.predict import export_model, predict
from experiments.cli.run import (
    Data,
    Layout,
    Preset,
    Run,
    Set,
    absolute,
    driving,
    interruptible,
    require_place_for,
    settings_of,
    stage,
)
from experiments.cli.transfer import transfer
from storage import fs
from storage.errors import InputError, StageError
from storage.places import require_writable, require_writable_file

if TYPE_CHECKING:
    from experiments.run.driver import Ablation

FAILED, BAD_INPUT = 1, 2
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
FIRST_SCREEN = """\
cardiomix: cardiac MR segmentation for scanners never seen. Start with these:

  cardiomix phantom data/phantom                                       draw a synthetic data set of four vendors
  cardiomix ablate demo --data data/phantom --run runs/first           train the paper's arms and compare them
  cardiomix status --run runs/first                                    see what is done and what is missing
  cardiomix report --run runs/first                                    write the tables, the figures and the page
  cardiomix predict runs/first/arms/unet_ra/seed0 STUDIES --out masks  segment new studies

All commands: cardiomix --help. One of them: cardiomix ablate --help."""

app = typer.Typer(
    name="cardiomix",
    help="Cardiac MR segmentation for scanners never seen: training samples mixed from anatomy and modality.",
    context_settings={"help_option_names": ["-h", "--help"]},  # the verbs inherit it
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bank_app)
app.command(epilog="Example:  cardiomix predict runs/first/arms/fs_sdnet_ra/seed0 patient_sa.nii.gz --out masks")(
    predict
)
app.command("export-model", epilog="Example:  cardiomix export-model runs/first/arms/unet_ra/seed0 --onnx unet.onnx")(
    export_model
)
app.command(epilog="Example:  cardiomix compare runs/first runs/second --csv both.csv")(compare)
app.command(epilog="Example:  cardiomix phantom data/phantom --subjects 12 --frames 10 --seed 1 --set validation=1")(
    phantom
)
app.command(
    epilog="Example:  cardiomix transfer cpu --data data/mnms --vendors A,B --arms unet_ra,unet_ra_bigaug --out runs/ab"
)(transfer)
app.command("inspect", epilog="Example:  cardiomix inspect data/mnms data/acdc --out inspect.html")(inspect_data)


def _show_version(asked: bool) -> None:
    if asked:
        from storage.bank.spec import code_version

        typer.echo(f"cardiomix {code_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The first screen, for `cardiomix` alone."""
    if context.invoked_subcommand is None:
        typer.echo(FIRST_SCREEN)


@app.command(epilog="Example:  cardiomix ingest data/mnms --run runs/first --preset paper")
def ingest(
    data: Data,
    run: Run,
    preset: Preset = "cpu",
    layout: Layout = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on the first subject that cannot be used.")] = False,
    assignments: Set = None,
) -> None:
    """Read studies of any layout into the run's slice store; says what came in and what was skipped, and why."""
    from experiments import config
    from experiments.run.refusals import require_usable

    document = settings_of(run, preset, assignments).model_dump()
    document |= {"data": tuple(map(fs.absolute, data))} if data else {}
    document |= {"layout": layout} if layout else {}
    settings = config.validated(document, "ingest")
    require_usable(run, settings)
    require_place_for(run)
    with driving(run, settings) as driver:
        driver.ingest(strict)


@app.command(epilog="Example:  cardiomix pretrain --run runs/first")
def pretrain(run: Run, assignments: Set = None) -> None:
    """Train the SDNet that fills the factor bank; continues where it stopped."""
    with stage(run, assignments) as driver:
        driver.pretrain()


@app.command(epilog="Example:  cardiomix extract --run runs/first")
def extract(run: Run, assignments: Set = None) -> None:
    """Write the factor bank with the frozen SDNet; continues where it stopped."""
    with stage(run, assignments) as driver:
        driver.extract()


@app.command(epilog="Example:  cardiomix train fs_sdnet_ra --run runs/first --seeds 2")
def train(
    arm: Annotated[str, typer.Argument(help="An arm: unet_ra, ss_sdnet_ra_fa, …; docs/experiments.md has them all.")],
    run: Run,
    seeds: Annotated[int | None, typer.Option(min=1, help="Replicates.")] = None,
    assignments: Set = None,
) -> None:
    """Train one arm and score it on the test subjects; continues where it stopped."""
    from experiments import config
    from experiments.run.driver import require_data

    document = settings_of(run, "cpu", assignments).model_dump()
    only = config.validated(document | {"arms": (arm,), "seeds": seeds or document["seeds"]}, f"arm {arm}")
    whole = config.validated(document | {"seeds": max(only.seeds, document["seeds"])}, "train")
    require_data(run, whole)
    with driving(run, whole) as driver:
        driver.settings = only
        failed = driver.train()
    _finish(failed)


@app.command(epilog="Example:  cardiomix evaluate --run runs/first")
def evaluate(run: Run) -> None:
    """Score every trained arm on the test subjects again, on their native grids."""
    with stage(run) as driver:
        for label, volumes in driver.evaluate().items():
            driver.progress.say(f"{label}: {volumes} volumes")


@app.command(epilog="Example:  cardiomix report --run runs/first")
def report(run: Run) -> None:
    """Write the tables, figures and the page from what the run holds."""
    from experiments.run.driver import require_data

    require_data(run)
    with driving(run, settings_of(run, "cpu", None)) as driver:
        _show(driver.report().html, run, driver)


@app.command(
    epilog="Example:  cardiomix ablate cpu --data data/acdc --data data/ge --run runs/real --set train.epochs=20"
)
def ablate(
    preset: Annotated[str, typer.Argument(help="demo, cpu, robust, paper, or a config.yaml to repeat.")],
    run: Run,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Folder of studies; repeatable. None: the phantom.")
    ] = None,
    arms: Annotated[str | None, typer.Option("--arms", help="Only these, separated by commas.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Replicates of each arm.")] = None,
    bank: Annotated[
        str | None, typer.Option("--bank", callback=absolute, help="Reuse a factor bank from elsewhere.")
    ] = None,
    sdnet: Annotated[
        str | None, typer.Option("--sdnet", callback=absolute, help="Reuse a pretrained SDNet: its folder.")
    ] = None,
    layout: Layout = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on the first subject that cannot be used.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, on what, how long.")] = False,
    assignments: Set = None,
) -> None:
    """The whole ablation, from studies to the report; stages already done are reused."""
    from experiments import config
    from experiments.run import dry_run
    from experiments.run.driver import ablate as run_ablation
    from experiments.run.refusals import require_usable

    settings = config.load(preset) if preset.endswith((".yaml", ".yml")) else config.preset(preset)
    document = config.override(settings, assignments or []).model_dump()
    if data:
        document["data"] = tuple(map(fs.absolute, data))
    elif settings.preset != "demo" and not settings.data:
        raise InputError(f"preset {preset}", "needs data", "name folders of studies with --data")
    if arms is not None:
        document["arms"] = config.named_arms(arms)
    given = {"layout": layout, "seeds": seeds, "bank": bank, "pretrained": sdnet}
    document |= {name: value for name, value in given.items() if value is not None}
    settings = config.validated(document, "ablate")
    require_usable(run, settings)
    require_place_for(run)
    if dry:
        return dry_run.show(run, settings, typer.echo, strict)
    dry_run.require_fits(run, settings)
    with driving(run, settings) as driver:
        paths, failed = run_ablation(driver, strict)
        _show(paths.html, run, driver)
    _finish(failed)


@app.command(epilog="Example:  cardiomix status --run runs/first")
def status(run: Run) -> None:
    """Which stages and arms are done, under way, failed or missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from experiments.run.status import status as states

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, state in states(run):
        table.add_row(name, Text(state))  # a reason may hold brackets, which are no markup
    Console().print(table)


@app.command(epilog="Example:  cardiomix preview --run runs/first --out mosaic.png")
def preview(
    run: Run,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
    show: Annotated[
        str,
        typer.Option(
            help="factors: anatomies × modalities from the bank; resolutions: slices over RA's range of pixel areas; "
            "batch: the first step of an arm's stream."
        ),
    ] = "factors",
    per_vendor: Annotated[int, typer.Option(min=1, help="Subjects of each vendor, but for a batch.")] = 1,
    arm: Annotated[str, typer.Option(help="Whose batch.")] = "ss_sdnet_ra_fa",
    anatomy: Annotated[
        str | None,
        typer.Option(help="factors: anatomies of this vendor alone, and no image of another: fit to show to others."),
    ] = None,
) -> None:
    """A picture of what arms train on: mixed factors, rescaled slices or a whole batch, masks outlined."""
    from experiments.config import load
    from experiments.run.preview import batch_png, ladder_png, mosaic_png

    pictures = {
        "factors": lambda: mosaic_png(run, load(run), per_vendor, anatomy),
        "resolutions": lambda: ladder_png(run, load(run), per_vendor),
        "batch": lambda: batch_png(run, load(run), arm),
    }
    if show not in pictures:
        raise InputError(f"--show {show}", "there is no such picture", f"choose from {', '.join(pictures)}")
    require_writable_file(str(out), f"--out {out}")
    fs.write_bytes(str(out), pictures[show]())
    typer.echo(str(out))


@app.command(epilog="Example:  cardiomix export data/Dataset501_Heart --run runs/first --format nnunet --samples 5000")
def export(
    out: Annotated[str, typer.Argument(help="Folder to write; for nnunet, named as nnU-Net wants it.")],
    run: Run,
    kind: Annotated[
        str,
        typer.Option("--format", help="nnunet: a raw data set of nnU-Net v2, labelled samples; slices: a slice store."),
    ] = "nnunet",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 5000,
    arm: Annotated[str, typer.Option(help="Whose stream: what is augmented, and how.")] = "ss_sdnet_ra_fa",
    assignments: Set = None,
) -> None:
    """Write augmented samples (FA and RA) for those who train elsewhere; goes on where it stopped."""
    from experiments.progress import Progress
    from experiments.run.driver import require_data
    from experiments.run.export import write_samples

    require_writable(out, out)
    settings = settings_of(run, "cpu", assignments)
    require_data(run, settings)
    with interruptible(Progress().say):
        typer.echo(write_samples(run, settings, out, kind, samples, arm))


def _show(html: str, run: str, driver: Ablation) -> None:
    """Print the last screen: the table, the place of the report, and how to open MLflow."""
    from rich.console import Console

    from experiments.report.tables import render_terminal_table
    from experiments.tracking.store import ui_address, ui_command
    from pipeline.scores.tables import read_cases, summarise

    Console().print(render_terminal_table(summarise(read_cases(fs.join(run, "report", "cases.csv")))))
    typer.echo(f"report: {html}")
    typer.echo(f"table:  {fs.join(run, 'report', 'table.md')}")
    typer.echo(f"MLflow: {ui_command(driver.run, driver.log.tracking_uri)}")
    page = driver.log.page()
    if page:
        typer.echo(f"        arms by Dice: {ui_address(driver.log.tracking_uri)}/{page}")


def _finish(failed: dict[str, str]) -> None:
    for label, reason in failed.items():
        typer.echo(f"failed {label}: {reason}", err=True)
    if failed:
        raise typer.Exit(FAILED)


def main() -> None:
    """The console script. Exit status: 0 for success, 1 if something failed, 2 for bad usage or input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the command
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(BAD_INPUT)
    except StageError as error:
        typer.echo(f"failed: {error}", err=True)
        sys.exit(FAILED)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        _end_with(
            f"failed: {error.filename or 'output'}: {error.strerror}; mend that, then give the same command again"
        )


def _end_with(line: str) -> NoReturn:
    """Say on standard error why the command ends. Standard output may be on the full disk."""
    typer.echo(line, err=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python's last flush would fail again
    sys.exit(FAILED)
