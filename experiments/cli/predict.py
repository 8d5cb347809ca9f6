"""The command line's verbs for trained networks. Imports stay inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.cli.run import interruptible
from storage.errors import InputError
from storage.places import require_writable, require_writable_file

if TYPE_CHECKING:
    from pipeline.inference.study import Outcome

FAILED = 1
FOLDER_HELP = "Folder of a trained network: model.safetensors and model.json."
MODEL_HELP = "Folder of a trained network (model.safetensors, model.json), or of an arm, whose seeds are averaged."


def predict(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    images: Annotated[
        list[str],
        typer.Argument(help="NIfTI files, 3D or 4D, and folders: all images and DICOM studies below, but not masks."),
    ],
    out: Annotated[str, typer.Option(help="Folder for the masks, volumes and pictures; a folder's order is kept.")],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A further model, for an ensemble; repeatable.")
    ] = None,
    pixel_area: Annotated[
        float | None,
        typer.Option(help="mm²: rescale so that the network sees pixels of this area, such as 1.8."),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Slice, row and column distance in mm, such as '8 1.4 1.4', in place of the headers'."),
    ] = None,
    orientation: Annotated[
        str,
        typer.Option(
            help="How arrays lie: header, stored, or the file's axes as columns, rows and slices, such as 'x -y z'."
        ),
    ] = "header",
    flips: Annotated[bool, typer.Option("--flips", help="Average over the image and its mirror images.")] = False,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Keep every part of a structure, not only the largest connected one.")
    ] = False,
    no_recentre: Annotated[
        bool, typer.Option("--no-recentre", help="Do not look again, centred on it, at a heart found off-centre.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Faster where the processor has bf16; other rounding.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Studies at a time, over Ray; 1: in this process.")] = 1,
) -> None:
    """Segment studies: NIfTI masks on the images' own grids (LV 1, MYO 2, RV 3), volumes and EF as JSON, a PNG overlay.

    volumes.csv lists all studies of the folder. A study that fails is one line; the others are written, and the exit
    status is 1.
    """
    from experiments.predict import model_folders, segmented
    from experiments.progress import Progress
    from pipeline.inference.config import InferenceConfig
    from pipeline.inference.find_studies import find_studies
    from pipeline.inference.volumes_table import write_table
    from storage.nifti.header import parsed_spacing, stated_spacing
    from storage.nifti.orientation import parsed_orientation

    if pixel_area is not None and not 0.05 <= pixel_area <= 100:
        raise InputError(f"--pixel-area {pixel_area:g}", "is no area of a pixel", "give mm², such as 1.8")
    config = InferenceConfig(
        pixel_area=pixel_area,
        flips=flips,
        keep_largest=not keep_all,
        recentre=not no_recentre,
        precision="bf16" if bf16 else "fp32",
        spacing=None if spacing is None else stated_spacing(parsed_spacing(spacing, "--spacing"), "--spacing"),
        orientation=parsed_orientation(orientation, "--orientation"),
    )
    require_writable(out, f"--out {out}")
    progress, folders = Progress(), model_folders([model, *(models or [])])
    studies, left_out = find_studies(images, out)
    for line in left_out.lines():
        progress.say(line)
    outcomes = segmented(folders, studies, config, workers, progress)
    failed, done, unknown = [], 0, 0
    with interruptible(progress.say, "stopped; the masks that are written are whole, and volumes.csv lists them"):
        try:
            for outcome in outcomes:
                done += 1
                with suppress(OSError):  # a full or closed output ends no loop; the last line will meet it too
                    _print_outcome(outcome)
                if outcome.report is None:
                    failed.append((outcome.study, outcome.failure))
                elif any(not found["known"] for found in outcome.report["orientation"]):
                    unknown += 1
        finally:
            if done:
                write_table(out, failed)
    if unknown:
        progress.say(
            f"{unknown} read as stored, since no header says how they lie; if they lie otherwise: --orientation"
        )
    typer.echo(f"{len(studies) - len(failed)} of {len(studies)} studies in {out}")
    if failed:
        raise typer.Exit(FAILED)


def _print_outcome(outcome: Outcome) -> None:
    """Print what became of a study."""
    from pipeline.inference.study import headline
    from storage.nifti.orientation import AS_STORED

    if outcome.report is None:
        typer.echo(f"failed {outcome.failure}", err=True)
        return
    typer.echo(headline(outcome.report))
    for found in outcome.report["orientation"]:
        if found["turn"] != AS_STORED.words and not found["doubt"]:  # a doubt is printed as a warning
            typer.echo(f"  {outcome.study.name}: turned to {found['turn']}: {found['why']}", err=True)
    for line in outcome.report.get("left_out", ()):
        typer.echo(f"  {outcome.study.name}: left out: {line}", err=True)
    for warning in outcome.report["warnings"]:
        typer.echo(f"  {outcome.study.name}: {warning}", err=True)


def export_model(
    model: Annotated[str, typer.Argument(help=FOLDER_HELP)],
    onnx: Annotated[str, typer.Option("--onnx", help="File to write.")],
) -> None:
    """Write a network's segmentation path as ONNX, once ONNX Runtime agrees with torch; needs the extra `onnx`."""
    from pipeline.inference.onnx import export_onnx

    require_writable_file(onnx, f"--onnx {onnx}")
    check = export_onnx(model, onnx)
    turned = f"; {check.turned} of {check.pixels} pixels rounded to another side" if check.turned else ""
    typer.echo(f"{onnx}: logits within {check.largest_difference:.1g} of torch's{turned}")
