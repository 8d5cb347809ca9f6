"""The command line's verb that tests vendor to vendor. Imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from experiments.cli.run import Layout, Set, absolute, driving, interruptible
from storage import fs
from storage.errors import InputError
from storage.places import require_writable


def transfer(
    preset: Annotated[str, typer.Argument(help="demo, cpu, robust, paper, or a config.yaml.")],
    out: Annotated[str, typer.Option("--out", callback=absolute, help="Folder of the directions' runs and the table.")],
    data: Annotated[list[str], typer.Option("--data", help="Folder of studies; repeatable.")],
    vendors: Annotated[str, typer.Option("--vendors", help="Train on each of these in turn, separated by commas.")],
    arms: Annotated[str, typer.Option("--arms", help="These, separated by commas.")],
    seeds: Annotated[int, typer.Option(min=1, help="Replicates of each arm.")] = 1,
    half: Annotated[
        Literal["all", "choose", "confirm"],
        typer.Option(
            "--half", help="The half of the test subjects that is scored: choose with one, confirm on the other."
        ),
    ] = "choose",
    baselines: Annotated[
        str, typer.Option(help="Arms to compare with, separated by commas.")
    ] = "unet_ra,unet_ra_bigaug",
    sdnets: Annotated[
        str | None,
        typer.Option("--sdnets", callback=absolute, help="Reuse the SDNets of this folder of an earlier transfer."),
    ] = None,
    layout: Layout = None,
    table_only: Annotated[bool, typer.Option("--table", help="Train nothing: the table of what is there.")] = False,
    assignments: Set = None,
) -> None:
    """Train on one vendor, test on the others, in every direction; goes on where it stopped, and ends with a table.

    Choose arms and strengths with `--half choose`; then confirm a few of them, named beforehand, with
    `--half confirm --seeds 3` in another folder.
    """
    from experiments import config
    from experiments.progress import Progress
    from experiments.run import transfer as directions
    from experiments.run.driver import ablate
    from experiments.run.dry_run import require_fits
    from experiments.run.refusals import require_usable
    from storage.lock import require_free

    settings = config.load(preset) if preset.endswith((".yaml", ".yml")) else config.preset(preset)
    sources, beside = _names(vendors), _names(baselines)
    settings = directions.direction_settings(settings, sources[0], None)  # `--set` may then use what needs a vendor
    document = config.override(settings, assignments or []).model_dump()
    document |= {"data": tuple(map(fs.absolute, data)), "arms": config.named_arms(arms), "seeds": seeds}
    document |= {"layout": layout} if layout else {}
    document["layouts"]["test_half"] = half
    settings = config.validated(document, "transfer")
    if sdnets is not None and not fs.exists(sdnets):
        raise InputError(f"--sdnets {fs.redacted(sdnets)}", "no such folder", "check the path")
    require_writable(out, f"--out {out}")
    failed: dict[str, str] = {}
    todo = {} if table_only else {v: directions.direction_settings(settings, v, sdnets) for v in sources}
    with interruptible(Progress().say):
        for vendor, own in todo.items():
            require_usable(directions.direction_run(out, vendor), own)
            require_free(directions.direction_run(out, vendor), Progress().say)
            require_fits(directions.direction_run(out, vendor), own)
    for vendor, own in todo.items():
        with driving(directions.direction_run(out, vendor), own) as driver:
            driver.progress.say(f"from {vendor}")
            failed |= {f"from {vendor}, {label}": why for label, why in ablate(driver)[1].items()}
    typer.echo(directions.write_table(out, settings, sources, beside))
    for label, reason in failed.items():
        typer.echo(f"failed {label}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"'{text}'", "names nothing", "separate names by commas")
    return names
