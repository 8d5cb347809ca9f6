"""The command line's verbs for banks. Imports stay inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from storage import fs
from storage.errors import InputError
from storage.places import require_writable, require_writable_file

if TYPE_CHECKING:
    from storage.bank.bank import FactorBank

FAILED = 1

bank_app = typer.Typer(
    name="bank", help="Look at factor banks, check and join them, share styles.", no_args_is_help=True
)

Bank = Annotated[str, typer.Argument(help="Folder or URI of a bank.")]


@bank_app.command("info", epilog="Example:  cardiomix bank info runs/first/bank.zarr")
def info(bank: Bank) -> None:
    """What a bank holds, of which network, under which terms, and whether it is complete."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from storage.bank.bank import FactorBank

    opened = FactorBank.open(bank, partial=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts(opened):
        table.add_row(name, Text(value))  # terms may hold brackets, which are no markup
    Console(soft_wrap=True).print(table)


def facts(bank: FactorBank) -> list[tuple[str, str]]:
    """The lines of `bank info`, as (name, value)."""
    from collections import Counter

    from storage.bank.styles import read_styles

    index, spec = bank.index, bank.spec
    done, size = len(bank.committed()), uri_size(bank.uri)
    held = f"{len(bank)} slices of {len(set(index['subject'].to_pylist()))} subjects"
    complete = "complete" if done == bank.shards() else f"not complete: {done} of {bank.shards()} shards"
    found = [("holds", f"{held}, {complete}")]
    rows = zip(*(index[name].to_pylist() for name in ("vendor", "labelled", "phase")), strict=True)
    for (vendor, labelled, phase), count in sorted(Counter(rows).items()):
        found.append((f"  {vendor}", f"{count} slices, {phase}, {'labelled' if labelled else 'not labelled'}"))
    for name in fs.list_names(fs.join(bank.uri, "styles")):
        styles = read_styles(bank, name)
        vendors = ", ".join(sorted(set(styles["vendor"].to_pylist())))
        found.append(("  imported styles", f"{styles.num_rows} vectors of {vendors}, {name}"))
    return [
        *found,
        ("size", f"{size / 1e6:.2f} MB, {size / len(bank):,.0f} bytes a slice"),
        ("canvas", f"{spec.canvas[0]} × {spec.canvas[1]}, {spec.channels} channels, {spec.modality_size} numbers"),
        ("shards", f"{bank.shards()} of {spec.shard_slices} slices"),
        ("fingerprint", bank.fingerprint),
        ("SDNet", spec.sdnet_fingerprint),
        ("preprocess", ", ".join(f"{key} {value}" for key, value in spec.preprocess.items())),
        ("made by", f"cardiomix {spec.code_version}"),
        *(("terms", terms) for terms in spec.terms),
    ]


def uri_size(place: str) -> int:
    """Size in bytes of all files below a folder or a prefix in an object store."""
    files, folders = [], [place]
    while folders:
        below = [fs.join(folder, name) for folder in folders for name in fs.list_names(folder)]
        is_folder = fs.map_concurrently(place, fs.is_folder, below)
        folders = [path for path, yes in zip(below, is_folder, strict=True) if yes]
        files += [path for path, yes in zip(below, is_folder, strict=True) if not yes]
    return sum(fs.map_concurrently(place, fs.size, files))


@bank_app.command(
    "verify",
    epilog="Example:  cardiomix bank verify runs/first/bank.zarr --run runs/first --sdnet runs/first/sdnet",
)
def verify(
    bank: Bank,
    run: Annotated[
        str | None, typer.Option("--run", help="Run with the bank's slices; with --sdnet, a shard is extracted again.")
    ] = None,
    sdnet: Annotated[str | None, typer.Option("--sdnet", help="Folder of the network that made the bank.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which shard is extracted again. Default: any.")] = None,
) -> None:
    """Hold every file against the ledger, and the ledger against the data; exit status 1 if something is wrong."""
    from experiments.progress import Progress
    from storage.bank import verify as checks
    from storage.bank.bank import FactorBank

    if (run is None) != (sdnet is None):
        raise InputError("verify", "--run and --sdnet go together", "give both, or none")
    opened, progress = FactorBank.open(bank, partial=True), Progress()
    with progress.stage("verify") as step:
        problems = checks.verify(opened, lambda done, total: step.update("shards", done, total))
    if not problems and run is not None and sdnet is not None:
        from experiments.run.reextract import reextract

        with progress.stage("extract one shard again") as step:
            told, problems = reextract(opened, run, sdnet, seed)
        progress.say(told)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(FAILED)
    typer.echo("clean")


@bank_app.command("quality", epilog="Example:  cardiomix bank quality runs/first/bank.zarr --run runs/first")
def quality(
    bank: Bank,
    run: Annotated[str, typer.Option("--run", help="Run with the bank's slices.")],
) -> None:
    """What the factors keep: contrasts of reconstructions to the myocardium, and what a swap of codes moves."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.factors.quality import quality as measure
    from storage.bank.bank import FactorBank

    kept, moved = measure(run, FactorBank.open(bank))
    console, table = Console(soft_wrap=True), Table(box=None, pad_edge=False)
    for name in ("vendor", "slices", "error", "LV-MYO kept", "RV-MYO kept", "thin walls"):
        table.add_column(name, justify="left" if name == "vendor" else "right")
    for k in kept:
        table.add_row(k.vendor, str(k.slices), *(f"{v:.3f}" for v in (k.error, k.lv_myo, k.rv_myo, k.thin)))
    console.print(table)
    if moved:
        table = Table(box=None, pad_edge=False)
        for name in ("drawn as", "region", "real difference", "moved by the code"):
            table.add_column(name, justify="left" if name in ("drawn as", "region") else "right")
        for m in moved:
            table.add_row(f"{m.source} → {m.target}", m.region, f"{m.real:+.3f}", f"{m.moved:+.3f}")
        console.print(table)


@bank_app.command("merge", epilog="Example:  cardiomix bank merge site1/bank.zarr site2/bank.zarr both.zarr")
def merge(
    banks: Annotated[list[str], typer.Argument(help="Two or more banks of one SDNet, and last the new bank.")],
) -> None:
    """Join banks of the same SDNet and preprocessing, but of other subjects, into a new one."""
    from experiments.progress import Progress
    from storage.bank.merge import merge as join

    *sources, out = banks
    require_writable(out, out)
    with Progress().stage("merge") as step:
        made = join(sources, out, lambda done, total: step.update("shards", done, total))
    typer.echo(f"{len(made)} slices in {out}, fingerprint {made.fingerprint}")


@bank_app.command("export-styles", epilog="Example:  cardiomix bank export-styles runs/first/bank.zarr styles.parquet")
def export_styles(
    bank: Bank,
    out: Annotated[str, typer.Argument(help="File to write; it is not to be there yet.")],
    keep_subjects: Annotated[
        bool, typer.Option("--keep-subjects", help="Write the subjects' own names instead of pseudonyms.")
    ] = False,
    vendor: Annotated[
        list[str] | None, typer.Option("--vendor", help="Styles of this vendor alone; repeatable.")
    ] = None,
) -> None:
    """How this bank's scanners draw: its modality vectors and facts about the slices, without a pixel.

    With pseudonyms nobody can see whether a subject is also one of another run's test subjects.
    """
    from storage.bank.bank import FactorBank
    from storage.bank.styles import export_styles as export

    require_writable_file(out, out)
    typer.echo(f"{export(FactorBank.open(bank), out, keep_subjects, vendor or ())} vectors in {out}")


@bank_app.command("import-styles", epilog="Example:  cardiomix bank import-styles styles.parquet runs/first/bank.zarr")
def import_styles(
    styles: Annotated[str, typer.Argument(help="File from `cardiomix bank export-styles`.")],
    banks: Annotated[list[str], typer.Argument(help="Banks of the same SDNet; not while a run trains on them.")],
) -> None:
    """Add another site's styles to banks, as further donors for factor-based augmentation."""
    from storage.bank.bank import FactorBank
    from storage.bank.styles import import_styles as add

    for bank in banks:
        count = add(styles, FactorBank.open(bank))
        typer.echo(f"{count} vectors in {bank}, which is {FactorBank.open(bank).fingerprint} now")
