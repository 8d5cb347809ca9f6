"""The command line's verbs for data sets. Imports stay inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storage.errors import InputError
from storage.places import require_writable, require_writable_file

if TYPE_CHECKING:
    from storage.layouts import LayoutOptions


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write, in M&Ms' own layout; empty or an earlier phantom.")],
    subjects: Annotated[
        int | None,
        typer.Option(
            help="Subjects in all, shared out as the counts are to each other, at least 1 of each vendor and split "
            "(7 with the default counts). Default: 36, of which A 10 and B 10 labelled, C 4 unlabelled, A to D 3 each "
            "for testing."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Time points of a cine, 2 to 100. Default: 8.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="A whole number, 0 or more; equal seeds give equal bytes. Default: 0.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any field of the phantom; repeatable: labelled_a, labelled_b, unlabelled_c, testing, validation "
            "(subjects; the last two of each vendor), slices (fewest and most, such as [7,9]), field_scale (share of "
            "the field of view, 0.55 to 1.3).",
        ),
    ] = None,
) -> None:
    """Write a small multi-vendor cine data set: synthetic, with masks, four vendors."""
    from experiments import config
    from experiments.progress import Progress
    from pipeline.phantom import write_phantom

    given = {"subjects": subjects, "frames": frames, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    document = config.override(config.demo(), [f"phantom.{a}" for a in assignments or []]).model_dump()
    where = " ".join(f"--{name} {value}" for name, value in given.items())
    settings = config.validated(document | {"phantom": document["phantom"] | given}, where)
    require_writable(str(out), str(out))
    progress = Progress()
    with progress.stage("phantom") as step:
        written = write_phantom(out, settings.phantom, lambda done, total: step.update("", done, total))
    progress.say(f"{len(written)} subjects in {out}")


def inspect_data(
    data: Annotated[
        list[str], typer.Argument(help="Folders of studies: M&Ms, ACDC, DICOM or a table of files, in any mix.")
    ],
    out: Annotated[str, typer.Option(help="Page to write; replaced if there.")] = "inspect.html",
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Whether the page shows a few of the data set's images.")
    ] = True,
    layout: Annotated[str, typer.Option(help="auto, mnms, acdc, table or dicom.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 2 if a subject would be skipped.")] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="As for ingest: layouts.frames=all and the like; repeatable.")
    ] = None,
) -> None:
    """What is there, before ingesting: subjects, resolutions, intensities, what would be skipped, what looks odd.

    Prints tables and writes an HTML page, inspect.html in the current folder unless --out says otherwise.
    """
    from experiments.inspection.page import show, write_page
    from experiments.progress import Progress
    from storage.survey.survey import survey

    require_writable_file(out, f"--out {out}")
    options = _layout_options(assignments)
    with Progress().stage("inspect") as step:
        found = survey(data, options, layout, lambda done, total: step.update("", done, total))
    write_page(out, found, data, images)
    show(found)
    for line in found.left_out:
        typer.echo(line)
    typer.echo(f"\npage: {out}")
    if found.skipped and (strict or not found.subjects):
        raise found.skipped[0].as_error("" if found.subjects else " (no subject can come in)")


def _layout_options(assignments: list[str] | None) -> LayoutOptions:
    """The layout options that `--set layouts.…` gives. Raises InputError for any other field."""
    from storage.layouts import LayoutOptions

    if not assignments:
        return LayoutOptions()
    for assignment in assignments:
        if not assignment.startswith("layouts."):
            raise InputError(f"--set {assignment}", "is not about reading data", "write --set layouts.FIELD=VALUE")
    from experiments import config  # this import takes longer than reading thirty subjects

    return config.override(config.cpu(), assignments).layouts
