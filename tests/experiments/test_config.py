from __future__ import annotations

from pathlib import Path

import pytest

from experiments import config
from experiments.arms import ARMS, PRETRAIN
from experiments.run.jobs import require_plan_fits_arms
from pipeline.samples.plan import PlanConfig
from storage.bank.spec import code_version
from storage.errors import InputError


@pytest.mark.parametrize("name", list(config.PRESETS))
def test_a_saved_configuration_gives_the_same_settings_back(tmp_path: Path, name: str) -> None:
    settings = config.preset(name)
    config.save(settings, str(tmp_path))
    assert config.load(str(tmp_path)) == settings
    assert config.load(str(tmp_path / "config.yaml")).config_hash == settings.config_hash


def test_the_paper_preset_holds_the_papers_numbers() -> None:
    paper = config.preset("paper")
    assert (paper.preprocess.size, paper.preprocess.factor) == (224, 1.0)
    assert (paper.train.batch_size, paper.train.epochs, paper.train.learning_rate) == (4, 50, 1e-3)
    assert (paper.train.plateau_factor, paper.train.plateau_patience) == (0.1, 1)
    assert paper.plan.area_range_mm2 == (0.954, 2.692)
    weights = paper.loss
    assert (weights.reconstruction, weights.latent, weights.dice, weights.focal) == (1, 1, 1, 1)
    assert (paper.sdnet.anatomy_channels, paper.sdnet.modality_size) == (8, 8)


def test_fields_are_set_by_dotted_path() -> None:
    changed = config.override(config.preset("cpu"), ["train.epochs=3", "plan.pairs=cross_vendor", "resources.lanes=1"])
    assert (changed.train.epochs, changed.plan.pairs, changed.resources.lanes) == (3, "cross_vendor", 1)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs", "is not an assignment"),
        ("train.epoch=3", "no field train.epoch"),
        ("nothing.at.all=3", "no field"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("arms=[unet]", "unknown arms"),
        ("plan.area_range_mm2=[3, 1]", "area_range_mm2"),
        ("preprocess.size=100", "preprocess.size"),
        ("train.epochs={", "not YAML"),
        ("layouts.protocol=source_only", "layouts.protocol_vendor: protocol=source_only needs a vendor's name"),
        ("layouts.protocol_vendor=A", "layouts.protocol_vendor: protocol=paper takes none"),
        ("loss.consistency_by=teacher", "needs a running average: set train.ema, such as .99; change it where it is"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config.override(config.preset("demo"), [assignment])
    assert "\n" not in str(caught.value)


def test_a_protocol_is_set_by_its_fields_and_is_another_configuration() -> None:
    plain = config.preset("demo")
    changed = config.override(plain, ["layouts.protocol=leave_one_vendor_out", "layouts.protocol_vendor=A"])
    assert changed.layouts.protocol_label == "leave_one_vendor_out A"
    fewer = config.override(plain, ["layouts.label_fraction=0.05"])
    assert len({plain.config_hash, changed.config_hash, fewer.config_hash}) == 3


def test_an_unknown_preset_or_damaged_configuration_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose from demo, cpu, robust, paper"):
        config.preset("fast")
    (tmp_path / "config.yaml").write_text("preset: [")
    with pytest.raises(InputError, match="not YAML"):
        config.load(str(tmp_path))
    with pytest.raises(InputError, match="no such run"):
        config.load(str(tmp_path / "absent"))


def test_a_configuration_of_another_version_is_named_as_such(tmp_path: Path) -> None:
    path, ours = tmp_path / "config.yaml", code_version()
    config.save(config.preset("demo"), str(tmp_path))
    text = path.read_text()
    assert text.startswith(f"# made by cardiomix {ours}\npreset: demo\n")
    with_field = text.replace("\ntrain:\n", "\ntrain:\n  warmth: 3\n")

    path.write_text(with_field)
    with pytest.raises(InputError, match=r"config.yaml: train.warmth: there is no such field; given: 3$"):
        config.load(str(tmp_path))
    path.write_text(with_field.replace(f"cardiomix {ours}", "cardiomix 9.1", 1))
    expected = f"made by cardiomix 9.1, this is {ours}: train.warmth: there is no such field; use cardiomix 9.1"
    with pytest.raises(InputError, match=expected) as caught:
        config.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    # What is understood is read, whoever wrote it; files of before the comment have none.
    for header in ("# made by cardiomix 9.1\n", ""):
        path.write_text(header + text.partition("\n")[2])
        assert config.load(str(tmp_path)) == config.preset("demo")


def test_a_plan_moves_every_arm_but_the_network_that_fills_the_bank() -> None:
    plan = PlanConfig(turn_degrees=10, zoom=(0.9, 1.1), elastic=0.2)
    assert ARMS["unet_ra"].augmentation(plan) == ARMS["unet_ra_bigaug"].augmentation(plan) == plan
    assert PRETRAIN.augmentation(plan) == PlanConfig()
    moved = ARMS["unet_ra_moved"].augmentation(plan)
    assert (moved.turn_degrees, moved.zoom, moved.elastic) == (34, (0.85, 1.18), 0.2)
    with pytest.raises(InputError, match="leave fa_order at fa_first"):
        config.override(config.preset("cpu"), ["plan.elastic=0.2", "plan.fa_order=ra_first"])


@pytest.mark.parametrize(
    ("arm", "assignment", "why"),
    [
        ("unet_ra_fa_residual_moved_bigaug", "plan.fa_order=ra_first", "moves its samples before RA"),
        ("ss_sdnet_ra_fa_bigaug", "plan.fa_order=ra_first", "has looks, which images decoded after RA would cover"),
        ("ss_unet_ra_regions_consistency", "plan.fa_anatomy=labelled", "compares unlabelled samples with their twins"),
    ],
)
def test_an_arm_whose_samples_the_plan_would_spoil_is_refused_by_name(arm: str, assignment: str, why: str) -> None:
    settings = config.override(config.preset("cpu"), [f"arms=[{arm}]", assignment])  # what an earlier run may hold
    with pytest.raises(InputError, match=f"arm {arm}: {why}"):
        require_plan_fits_arms(settings)
    require_plan_fits_arms(
        config.override(config.preset("cpu"), ["plan.fa_order=ra_first", "plan.fa_anatomy=labelled"])
    )
