"""Score a trained network on the test subjects' native grids."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from storage import fs
from storage.slices.store import SliceStore, Volume

if TYPE_CHECKING:
    from pipeline.inference.predictor import Predictor
    from pipeline.networks.config import Precision
    from pipeline.scores.examples import Example

CASES, SLICES, EXAMPLES, TRUST = "cases.csv", "slices.csv", "examples.npz", "trust.csv"
SCORING = "scoring.json"  # (volumes scored, volumes in all); exists only while an evaluation runs
TELL_S = 2.0  # seconds between two writes of `SCORING`
AHEAD = 8  # most volumes that are read ahead, and most that wait to be scored, while the network segments
_T = TypeVar("_T")
_R = TypeVar("_R")


def scored_so_far(out: str) -> tuple[int, int] | None:
    """(volumes scored, volumes in all) of the evaluation that runs in `out`; None if none runs."""
    path = fs.join(out, SCORING)
    try:
        done, total = json.loads(fs.read_text(path)) if fs.exists(path) else (0, 0)
    except (OSError, ValueError):  # the evaluation has ended meanwhile
        return None
    return (done, total) if total else None


def evaluate_job(run: str, out: str, arm: str, seed: int, threads: int, precision: Precision) -> int:
    """Predict every labelled test volume with the network in `out`. Returns the number of volumes scored.

    First the validation volumes calibrate the network (see `pipeline.inference.trust`). A structure that nobody drew in
    a volume is not scored. Volumes are read ahead on one thread and scored on another, while the network segments; on a
    GPU several volumes share a batch. Writes `slices.csv`, `trust.csv` (if the network could be calibrated) and
    `examples.npz` to `out`, adds the scores to the model's card, and writes `cases.csv` last: if it is there, the
    evaluation is complete.
    """
    import torch

    from pipeline.inference.config import InferenceConfig
    from pipeline.inference.model_card import add_test_scores
    from pipeline.inference.predictor import BATCH, Predictor
    from pipeline.networks.files import default_device, load_model
    from pipeline.samples.preprocess import PreprocessConfig
    from pipeline.scores.examples import choose, pack
    from pipeline.scores.tables import summarise, write_cases, write_slices, write_trust

    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    store = SliceStore.open(run)
    model, document = load_model(out)
    plain = InferenceConfig(precision=precision, keep_largest=False)  # the network's own mask, not cleaned up
    predictor = Predictor([model.to(default_device())], PreprocessConfig(**document["preprocess"]), plain)
    # On a CPU one volume at a time: its bits may depend on what shares its batch, and a larger batch is no faster.
    at_once = 1 if predictor.device.type == "cpu" else 2 * BATCH
    volumes = [v for v in store.volumes("test") if v.labelled]
    scored: list[_Scored] = []
    told = time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            fs.write_text(fs.join(out, SCORING), json.dumps([len(scored), len(volumes)]))

    tell()
    predictor.trust, temperature = _calibration(predictor, store, at_once)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        inputs = _ahead(reader, partial(_read, store, predictor), volumes)
        score = partial(_score, predictor, temperature, {"arm": arm, "seed": seed})
        for result in _ahead(scorer, score, _segmented(predictor, inputs, at_once)):
            scored.append(result)
            tell()
    write_slices(fs.join(out, SLICES), [row for one in scored for row in one.slices])
    if predictor.trust:
        write_trust(fs.join(out, TRUST), [one.trust for one in scored])
    else:
        fs.remove(fs.join(out, TRUST))  # of an earlier evaluation
    chosen = choose([one.dice for one in scored])
    fs.write_bytes(fs.join(out, EXAMPLES), pack({kind: scored[i].shown for kind, i in chosen.items()}))
    cases = [row for one in scored for row in one.cases]
    add_test_scores(out, summarise(cases), predictor.trust, temperature)
    write_cases(fs.join(out, CASES), cases)
    fs.remove(fs.join(out, SCORING))
    return len(volumes)


def _calibration(predictor: Predictor, store: SliceStore, at_once: int) -> tuple[dict[str, float], float | None]:
    """Calibrate the network by the labelled validation volumes: (its number for each structure, as `calibrated` gives
    them, and its temperature). ({}, None) if there are no such volumes."""
    from pipeline.inference.calibration import best_temperature
    from pipeline.inference.trust import calibrated, sureness
    from pipeline.scores.metrics import volume_dice

    volumes = [volume for volume in store.volumes("validation") if volume.labelled]
    known, near = [], []
    for one, shares in _segmented(predictor, (_read(store, predictor, volume) for volume in volumes), at_once):
        found = predictor.on_grid(shares, one.image.shape, one.volume.spacing).mask
        known.append((sureness(shares), volume_dice(found, one.mask, one.volume.structures)))
        near.append(_near_heart(predictor, one, shares))
    return calibrated(known), best_temperature(near)


def _near_heart(
    predictor: Predictor, one: _Input, shares: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Shares (N, classes) and labels (N,) of the pixels near the heart; N is 0 if a structure is not drawn in them."""
    from pipeline.inference.calibration import near_heart
    from pipeline.inference.predictor import network_labels
    from storage.subjects import STRUCTURES

    if set(one.volume.structures) != set(STRUCTURES):
        return near_heart(shares[:0], one.mask[:0])
    return near_heart(shares, network_labels(one.mask, one.volume.spacing, predictor.preprocess))


@dataclass(frozen=True)
class _Input:
    """A volume to score: image (Z, H, W) float32 and mask (Z, H, W) uint8 on its own grid, and what the network sees of
    it, `seen` (Z, S, S) float32 in [-1, 1]."""

    volume: Volume
    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Scored:
    """A scored volume: its rows of `cases.csv`, `slices.csv` and `trust.csv`, the example that the report may show of
    it, and its mean Dice (0 to 1)."""

    cases: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    trust: dict[str, Any]
    shown: Example
    dice: float


def _ahead(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Results in the order of the items. The pool gets `AHEAD` items before the first result is waited for."""
    under_way: deque[Future[_R]] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _read(store: SliceStore, predictor: Predictor, volume: Volume) -> _Input:
    from pipeline.inference.predictor import network_input
    from pipeline.samples.preprocess import stored_statistics

    image, mask = store.volume(volume.rows)
    stats = stored_statistics(store, volume.rows[0], predictor.preprocess)
    return _Input(volume, image, mask, network_input(image, stats, volume.spacing, predictor.preprocess))


def _segmented(
    predictor: Predictor, inputs: Iterable[_Input], at_once: int
) -> Iterator[tuple[_Input, npt.NDArray[np.float32]]]:
    """Every volume with its class shares (Z, classes, S, S). Volumes go together until they have `at_once` slices."""
    group: list[_Input] = []

    def together() -> Iterator[tuple[_Input, npt.NDArray[np.float32]]]:
        shares = predictor.shares(np.concatenate([one.seen for one in group]))
        return zip(group, np.split(shares, np.cumsum([len(one.seen) for one in group])[:-1]), strict=True)

    for one in inputs:
        group.append(one)
        if sum(len(each.seen) for each in group) >= at_once:
            yield from together()
            group = []
    if group:
        yield from together()


def _score(
    predictor: Predictor,
    temperature: float | None,
    whose: Mapping[str, Any],
    of: tuple[_Input, npt.NDArray[np.float32]],
) -> _Scored:
    from pipeline.inference.calibration import calibration_error, tempered
    from pipeline.scores.examples import example, mean_dice
    from pipeline.scores.metrics import score_slices, score_volume
    from pipeline.scores.tables import case_rows, slice_rows
    from pipeline.scores.volumes import share_outside

    (one, shares), volume = of, of[0].volume
    segmented = predictor.on_grid(shares, one.image.shape, volume.spacing)
    found = segmented.mask
    scores = score_volume(found, one.mask, volume.spacing, volume.structures)
    row = {**whose, "subject": volume.subject, "vendor": volume.vendor, "centre": volume.centre, "phase": volume.phase}
    dice = mean_dice(scores)
    expected = segmented.expected
    there = [expected[s.structure] for s in scores if s.structure in expected and not np.isnan(s.dice)]
    near, labels = _near_heart(predictor, one, shares)
    trust = {
        "dice": dice,
        "expected_dice": float(np.mean(there)) if there else np.nan,
        "ece": calibration_error(near, labels),
        "ece_tempered": np.nan if temperature is None else calibration_error(tempered(near, temperature), labels),
    }
    return _Scored(
        case_rows(scores, share_outside(one.mask, volume.spacing, predictor.preprocess), row),
        slice_rows(score_slices(found, one.mask, volume.structures), row),
        row | trust,
        example(volume.subject, volume.vendor, volume.phase, volume.spacing, one.image, one.mask, found),
        dice,
    )
