"""Pictures of what an arm trains on: factors mixed like the paper's Fig. 1(c), resolutions, a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from experiments.arms import ARMS
from experiments.config import Settings
from experiments.run.jobs import arm_stream, bank_uri
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import centre_crop, working_slice
from pipeline.samples.rescale import linear_scale, resample_crop
from storage import fs
from storage.bank.bank import FactorBank
from storage.bank.index import rows_of
from storage.errors import InputError
from storage.parquet import text_array
from storage.slices.store import SliceStore

LADDER = 5  # pixel areas of a ladder


def mosaic_png(run: str, settings: Settings, a_vendor: int = 1, anatomy_vendor: str | None = None) -> bytes:
    """PNG of FA samples, decoded and residual side by side: anatomies (rows) × modalities (columns).

    Each vendor has `a_vendor` slices, the middle ones of the first frames of its first subjects. With `anatomy_vendor`
    all rows are of this vendor, and no image of another vendor is shown: the columns give only their codes.
    Raises InputError if the bank has no slice of that vendor, or shares no subject with the run.
    """
    from experiments.report.figures import fa_mosaic
    from pipeline.samples.drawing import Drawing
    from storage.bank.styles import modality_donors

    bank, store = FactorBank.open(bank_uri(run, settings)), SliceStore.open(run)
    slice_of = rows_of(store.table, bank.index)
    rows, titles = _representatives(bank, slice_of >= 0, a_vendor)
    if not rows:
        raise InputError(fs.base_name(run), "shares no subject with the bank", "preview the run that the bank is of")
    shown = [k for k, vendor in enumerate(titles) if anatomy_vendor in (None, vendor)]
    if not shown:
        remedy = f"choose from {', '.join(sorted(set(titles)))}"
        raise InputError(f"--anatomy {anatomy_vendor}", "the bank has no such vendor's slice", remedy)
    factors = bank.read(rows)
    draw = Drawing(bank, modality_donors(bank), PlanConfig())
    index, size = bank.index, settings.preprocess.size
    originals: list[npt.NDArray[np.float32]] = []
    decoded: list[list[npt.NDArray[np.float32]]] = []
    residual: list[list[npt.NDArray[np.float32]]] = []
    for k in shown:
        row = rows[k]
        image = working_slice(store, int(slice_of[row]), settings.preprocess).image
        fill = float(image.min())
        originals.append(centre_crop(image, size, fill))
        top, left, height, width = (int(index[n][row].as_py()) for n in ("top", "left", "height", "width"))
        anatomy = factors.anatomy[k, top : top + height, left : left + width]
        drawn = [draw.decoded(anatomy, code) for code in factors.modality]
        texture = image - drawn[k]
        decoded.append([centre_crop(one, size, float(one.min())) for one in drawn])
        residual.append([centre_crop((one + texture).clip(-1, 1), size, fill) for one in drawn])
    images = np.stack(originals)
    ways = {"decoded, D(a, z')": np.array(decoded), "residual, x + D(a, z') - D(a, z)": np.array(residual)}
    heads = images if anatomy_vendor is None else None
    return fa_mosaic(images, heads, ways, [titles[k] for k in shown], titles)


def ladder_png(run: str, settings: Settings, a_vendor: int = 1) -> bytes:
    """PNG of RA: slices with their masks (rows), rescaled to `LADDER` pixel areas over RA's range (columns).

    The slices are the middle ones of each vendor's first `a_vendor` labelled training volumes. Raises InputError if
    there is no such volume.
    """
    from experiments.report.figures import labelled_grid

    store, plan, config = SliceStore.open(run), settings.plan, settings.preprocess
    volumes = [v for v in store.volumes("train") if v.labelled]
    chosen = [v for i, v in enumerate(volumes) if sum(w.vendor == v.vendor for w in volumes[:i]) < a_vendor]
    if not chosen:
        raise InputError(fs.base_name(run), "has no labelled training volume", "ingest labelled subjects")
    areas = np.linspace(*plan.area_range_mm2, LADDER)
    cells = []
    for volume in chosen:
        source = working_slice(store, volume.rows[len(volume.rows) // 2], config)
        for area in areas:
            scale = linear_scale(source.area, area / config.factor**2, plan.ra_measure)
            image, mask = resample_crop(source.image, source.mask, scale, config.size, float(source.image.min()))
            cells.append((image, mask, f"{volume.vendor}   {area:.2f} mm²"))
    return labelled_grid(cells, LADDER)


def batch_png(run: str, settings: Settings, arm: str) -> bytes:
    """PNG of the first step of an arm's stream, as its network gets it, with vendors, pixel areas (mm²) and masks.

    Raises InputError if the arm is unknown, or needs a bank that is not there.
    """
    from experiments.report.figures import labelled_grid
    from pipeline.samples.maker import SampleMaker

    if arm not in ARMS:
        raise InputError(f"--arm {arm}", "there is no such arm", f"choose from {', '.join(ARMS)}")
    maker = SampleMaker(arm_stream(run, settings, arm))
    cells = []
    for sample, labelled in maker.plan.samples(0):
        image, mask = maker.make(sample)
        title = str(maker.store.column("vendor")[sample.slice_id])
        if sample.donor_id is not None and maker.drawing is not None:
            title += f" drawn as {maker.drawing.donors.vendor[sample.donor_id]}"
        title += f"\n{maker.pixel_area(sample) * settings.preprocess.factor**2:.2f} mm²"
        cells.append((image, mask if labelled else None, title if labelled else f"{title}, unlabelled"))
    return labelled_grid(cells, 4)


def _representatives(bank: FactorBank, known: npt.NDArray[np.bool_], a_vendor: int) -> tuple[list[int], list[str]]:
    """(bank rows, their vendors): the middle slice of the first frame of each vendor's first `a_vendor` subjects.

    known (n,): which rows of the bank have an image in the run; only these are chosen.
    """
    vendors, subject_of = (text_array(bank.index[name]) for name in ("vendor", "subject"))
    rows, titles = [], []
    for vendor in np.unique(vendors[known]):
        subjects = np.unique(subject_of[known & (vendors == vendor)])[:a_vendor]
        for subject in subjects:
            own = np.flatnonzero(known & (subject_of == subject))
            frames, slices = (bank.index[name].to_numpy()[own] for name in ("frame", "slice"))
            volume = own[frames == frames.min()][np.argsort(slices[frames == frames.min()])]
            rows.append(int(volume[len(volume) // 2]))
            titles.append(f"{vendor}")
    return rows, titles
