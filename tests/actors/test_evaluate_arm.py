"""What the scoring of a trained network leaves in its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors import evaluate_arm
from actors.evaluate_arm import CASES, EXAMPLES, SCORING, SLICES, TRUST, _read, _segmented, evaluate_job, scored_so_far
from pipeline.inference.predictor import Predictor, load_predictor, predict_volume
from pipeline.networks.description import read_config
from pipeline.networks.files import load_model
from pipeline.scores.examples import unpack
from pipeline.scores.metrics import score_volume
from pipeline.scores.tables import read_cases, read_slices, read_trust
from storage import fs
from storage.slices.store import SliceStore
from tests.actors.tiny_runs import PREPROCESS, write_run, write_sdnet


def test_every_labelled_test_volume_and_no_other_is_scored_on_its_own_grid(tmp_path: Path) -> None:
    run, out = write_run(tmp_path), write_sdnet(tmp_path / "arm", seed=0)
    assert evaluate_job(run, out, "fs_sdnet", 3, threads=1, precision="fp32") == 1
    cases = read_cases(fs.join(out, CASES))
    assert {(c["arm"], c["seed"], c["subject"], c["vendor"], c["phase"]) for c in cases} == {
        ("fs_sdnet", 3, "d1", "D", "ED")
    }
    store, (network, _) = SliceStore.open(run), load_model(out)
    (volume,) = store.volumes("test")
    images, mask = store.volume(volume.rows)
    found = predict_volume(network, images, store.statistics(volume.rows[0]), volume.spacing, PREPROCESS)
    for case, score in zip(cases, score_volume(found, mask, volume.spacing), strict=True):
        assert {name: case[name] for name in vars(score)} == vars(score)
    # Stripes of 24 columns each across 96 rows and columns, of which the network sees the middle 48.
    assert {case["structure"]: case["outside"] for case in cases} == {"LV": 0.5, "MYO": 0.5, "RV": 1.0}
    slices = read_slices(fs.join(out, SLICES))
    assert {row["slice"] for row in slices} == {0, 1, 2} and {row["seed"] for row in slices} == {3}
    about = read_config(out)["about"]
    calibration = about["trust"]
    assert set(calibration) == {"LV", "MYO", "RV"} and all(map(np.isfinite, calibration.values()))
    predictor = load_predictor([out])
    assert predictor.trust == calibration and predictor.temperature == about["temperature"]
    (trust,) = read_trust(fs.join(out, TRUST))
    assert trust["subject"] == "d1" and 0 <= trust["expected_dice"] <= 1
    assert 0.25 <= about["temperature"] <= 8 and 0 <= trust["ece_tempered"] <= 1 and 0 <= trust["ece"] <= 1
    assert trust["dice"] == pytest.approx(np.nanmean([case["dice"] for case in cases]))
    shown = unpack((tmp_path / "arm" / EXAMPLES).read_bytes())
    assert set(shown) == {"best"}  # one volume is best, median and worst
    assert (shown["best"].subject, shown["best"].phase) == ("d1", "ED")
    assert np.array_equal(np.unique(shown["best"].reference), [0, 1, 2, 3])


def test_a_network_that_cannot_be_calibrated_expects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path), write_sdnet(tmp_path / "arm", seed=0)
    evaluate_job(run, out, "fs_sdnet", 0, threads=1, precision="fp32")
    assert load_predictor([out]).trust
    volumes = SliceStore.volumes
    monkeypatch.setattr(
        SliceStore, "volumes", lambda store, split=None: [] if split == "validation" else volumes(store, split)
    )
    evaluate_job(run, out, "fs_sdnet", 0, threads=1, precision="fp32")
    assert not fs.exists(fs.join(out, TRUST)) and load_predictor([out]).trust == {}
    assert read_config(out)["about"]["temperature"] is None


def test_volumes_that_are_segmented_together_get_their_own_shares_in_their_order(tmp_path: Path) -> None:
    store, (network, _) = SliceStore.open(write_run(tmp_path)), load_model(write_sdnet(tmp_path / "arm", seed=0))
    predictor = Predictor([network], PREPROCESS)
    volumes = store.volumes()
    alone, together = (
        list(_segmented(predictor, (_read(store, predictor, v) for v in volumes), slices)) for slices in (1, 7)
    )
    assert [one.volume for one, _ in together] == volumes and len(volumes) > 3
    for (_, expected), (_, shares) in zip(alone, together, strict=True):
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-5)


def test_how_far_it_is_is_told_while_it_goes_on_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path), write_sdnet(tmp_path / "arm", seed=0)
    told: list[tuple[int, int] | None] = []
    write = fs.write_text

    def watched(uri: str, text: str) -> None:
        write(uri, text)
        told.append(scored_so_far(out))

    monkeypatch.setattr(evaluate_arm, "TELL_S", -1.0)
    monkeypatch.setattr(fs, "write_text", watched)
    evaluate_job(run, out, "fs_sdnet", 0, threads=1, precision="fp32")
    assert told[0] == (0, 1) and scored_so_far(out) is None
    Path(out, SCORING).write_text("[1")  # cut off by a reader that came at the wrong moment
    assert scored_so_far(out) is None
