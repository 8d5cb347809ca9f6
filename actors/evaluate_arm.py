"""Score a trained network on the test subjects' native grids."""

from __future__ import annotations

import json
import time
from typing import Any

from storage import fs
from storage.slices.store import SliceStore

CASES, SLICES, EXAMPLES = "cases.csv", "slices.csv", "examples.npz"
SCORING = "scoring.json"  # how many volumes are scored, while it goes on
TELL_S = 2.0


def scored_so_far(out: str) -> tuple[int, int] | None:
    """(volumes scored, volumes) of an evaluation that goes on in `out`, or None."""
    path = fs.join(out, SCORING)
    try:
        done, total = json.loads(fs.read_text(path)) if fs.exists(path) else (0, 0)
    except (OSError, ValueError):  # it ended meanwhile
        return None
    return (done, total) if total else None


def evaluate_job(run: str, out: str, arm: str, seed: int, threads: int, precision: str) -> int:
    """Predict every labelled test volume with the network in `out`; returns the volumes scored. What nobody drew in a
    volume is not scored.

    Writes `slices.csv` and `examples.npz` there, then `cases.csv`, which says that the evaluation is whole.
    """
    import torch

    from pipeline.inference.model_card import add_test_scores
    from pipeline.inference.predictor import predict_volume
    from pipeline.networks.files import default_device, load_model
    from pipeline.samples.preprocess import PreprocessConfig, stored_statistics
    from pipeline.scores.examples import choose, example, mean_dice, pack
    from pipeline.scores.metrics import score_slices, score_volume
    from pipeline.scores.tables import case_rows, slice_rows, summarise, write_cases, write_slices
    from pipeline.scores.volumes import share_outside

    torch.set_num_threads(threads)
    store = SliceStore.open(run)
    model, document = load_model(out)
    model.to(default_device())
    preprocess = PreprocessConfig(**document["preprocess"])
    cases: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    shown, dice = [], []
    volumes = [v for v in store.volumes("test") if v.labelled]
    told = time.monotonic()
    for done, volume in enumerate(volumes):
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            fs.write_text(fs.join(out, SCORING), json.dumps([done, len(volumes)]))
        images, mask = store.volume(volume.rows)
        stats = stored_statistics(store, volume.rows[0], preprocess)
        found = predict_volume(model, images, stats, volume.spacing, preprocess, precision)
        scores = score_volume(found, mask, volume.spacing, volume.structures)
        whose = {"arm": arm, "seed": seed, "subject": volume.subject, "vendor": volume.vendor}
        whose |= {"centre": volume.centre, "phase": volume.phase}
        cases += case_rows(scores, share_outside(mask, volume.spacing, preprocess), whose)
        slices += slice_rows(score_slices(found, mask, volume.structures), whose)
        shown.append(example(volume.subject, volume.vendor, volume.phase, volume.spacing, images, mask, found))
        dice.append(mean_dice(scores))
    write_slices(fs.join(out, SLICES), slices)
    fs.write_bytes(fs.join(out, EXAMPLES), pack({kind: shown[i] for kind, i in choose(dice).items()}))
    add_test_scores(out, summarise(cases))
    write_cases(fs.join(out, CASES), cases)
    fs.remove(fs.join(out, SCORING))
    return len(volumes)
