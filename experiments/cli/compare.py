"""The command line's verb that compares runs. Imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run folders; or, with a tracking server, names of experiments or ids of parent runs."),
    ],
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="Where MLflow is, if not in the run folder's mlflow.db or at MLFLOW_TRACKING_URI."),
    ] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="Also write the table here; replaced if there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Runs side by side, from MLflow: Dice by arm, vendor and structure, and what was configured differently.

    A run folder that MLflow does not know is logged there first.
    """
    import json
    import sys

    from rich.console import Console

    from experiments.run.driver import log_from_folder
    from experiments.tracking import compare as comparison
    from storage import fs
    from storage.places import require_writable_file

    def log(run: str) -> None:
        log_from_folder(run, lambda line: typer.echo(line, err=True), tracking_uri)

    if csv:
        require_writable_file(csv, f"--csv {csv}")
    found = comparison.find(runs, tracking_uri, log)
    table = comparison.rows(found)
    if csv:
        from storage.csv_table import csv_text

        fs.write_text(csv, csv_text(comparison.FIELDS, table))
    if as_json:
        typer.echo(json.dumps({"dice": table, "differences": comparison.differences(found)}, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 60 + 30 * len(found))  # a pipe has no width
    console.print("[bold]Dice[/bold], mean ± sd over seeds" + (" (difference to the first run)" if found[1:] else ""))
    console.print(comparison.dice_table(found))
    console.print(comparison.weight(found))
    if len(found) > 1:
        console.print("\n[bold]What differs[/bold]")
        differs = comparison.differences(found)
        console.print(comparison.difference_table(found) if differs else "Nothing in settings, data, bank or code.")
