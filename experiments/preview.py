"""A picture like the paper's Fig. 1(c), from a run's bank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from experiments.config import Settings
from experiments.jobs import bank_uri
from pipeline.preprocess import centre_crop, working_slice
from storage import uri
from storage.errors import InputError
from storage.factor_bank import FactorBank
from storage.slice_store import SliceStore


def mosaic_png(run: str, settings: Settings, a_vendor: int = 1) -> bytes:
    """PNG of FA samples: anatomies (rows) × modalities (columns), `a_vendor` mid-ventricular ED slices of each
    vendor."""
    from experiments.figures import fa_mosaic
    from pipeline.networks.files import load_decoder
    from pipeline.synthesis import synthesize

    bank, store = FactorBank.open(bank_uri(run, settings)), SliceStore.open(run)
    by_key = {key: i for i, key in enumerate(_keys(store))}
    rows, titles = _representatives(bank, {subject for subject, _, _ in by_key}, a_vendor)
    if not rows:
        raise InputError(uri.base_name(run), "shares no subject with the bank", "preview the run that the bank is of")
    factors = bank.read(rows)
    weights, config = bank.decoder()
    decoder, channels = load_decoder(weights, config), int(config["anatomy_channels"])
    index, size = bank.index, settings.preprocess.size
    originals, drawn = [], []
    for k, row in enumerate(rows):
        slice_id = by_key[_key(bank, row)]
        image = working_slice(store, slice_id, settings.preprocess).image
        originals.append(centre_crop(image, size, float(image.min())))
        top, left, height, width = (int(index[n][row].as_py()) for n in ("top", "left", "height", "width"))
        anatomy = factors.anatomy[k : k + 1, top : top + height, left : left + width]
        line = []
        for donor in range(len(rows)):
            image = synthesize(decoder, channels, anatomy, factors.modality[donor : donor + 1])[0]
            line.append(centre_crop(image, size, float(image.min())))
        drawn.append(line)
    images: npt.NDArray[np.float32] = np.stack(originals)
    return fa_mosaic(images, images, np.array(drawn), titles, titles)


def _keys(store: SliceStore) -> list[tuple[str, int, int]]:
    return list(zip(*(store.column(n).tolist() for n in ("subject", "frame", "slice")), strict=True))


def _key(bank: FactorBank, row: int) -> tuple[str, int, int]:
    index = bank.index
    return index["subject"][row].as_py(), index["frame"][row].as_py(), index["slice"][row].as_py()


def _representatives(bank: FactorBank, known: set[str], a_vendor: int) -> tuple[list[int], list[str]]:
    """Rows of the middle slice of the first frame of each vendor's first subjects that the run has images of."""
    columns = bank.index.select(["row", "vendor", "subject", "frame", "slice"]).to_pylist()
    index = [row for row in columns if row["subject"] in known]
    rows, titles = [], []
    for vendor in sorted({r["vendor"] for r in index}):
        subjects = sorted({r["subject"] for r in index if r["vendor"] == vendor})[:a_vendor]
        for subject in subjects:
            own = [r for r in index if r["subject"] == subject]
            first = min(r["frame"] for r in own)
            volume = sorted((r for r in own if r["frame"] == first), key=lambda r: r["slice"])
            rows.append(int(volume[len(volume) // 2]["row"]))
            titles.append(f"{vendor}")
    return rows, titles
