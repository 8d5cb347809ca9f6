from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.streaming import StreamStats, batches
from actors.waiting import Patience
from pipeline.phantom import PhantomConfig, write_phantom
from pipeline.samples import appearance
from pipeline.samples.maker import MADE_AT, MADE_S, REJECTED, SampleMaker
from pipeline.samples.plan import PlanConfig
from pipeline.samples.preprocess import PreprocessConfig
from pipeline.samples.rescale import resample_crop
from pipeline.samples.stream_config import StreamConfig, open_bank, step_plan
from storage.bank.bank import FactorBank
from storage.bank.styles import export_styles, import_styles
from storage.errors import FinalError, InputError
from storage.layouts import LayoutOptions
from storage.node_folder import FOLDER
from storage.slices.store import SliceStore
from storage.slices.writer import LAYOUTS_KEY
from tests.actors.tiny_runs import write_lender

PREPROCESS = PreprocessConfig(size=64)
NNUNET = pytest.mark.skipif(find_spec("batchgeneratorsv2") is None, reason="pip install 'cardiomix[nnunet]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """A small ingested phantom with a bank of an untrained SDNet."""
    import torch

    from actors.extraction import ExtractionActors, extract
    from actors.extractor import ExtractionSpec
    from actors.ingest import ingest
    from pipeline.networks.config import SDNetConfig
    from pipeline.networks.files import save_model
    from pipeline.networks.sdnet import SDNet

    folder = tmp_path_factory.mktemp("stream")
    small = PhantomConfig(labelled_a=2, labelled_b=2, unlabelled_c=2, testing=1, frames=3, slices=(3, 3))
    write_phantom(folder / "data", small)
    ingest([str(folder / "data")], str(folder / "run"), num_cpus=0.5)
    torch.manual_seed(0)
    network = SDNetConfig(anatomy_width=4, modality_width=4, segmentor_width=4, decoder_width=4)
    model = SDNet(network)
    with torch.no_grad():  # an untrained softmax over eight channels seldom passes one half
        for parameter in (*model.anatomy_encoder.parameters(), *model.modality_encoder.parameters()):
            parameter.mul_(3.0)
    save_model(str(folder / "run" / "sdnet"), model, network, PREPROCESS.model_dump(), [])
    run, sdnet, bank = (str(folder / "run" / name) for name in (".", "sdnet", "bank.zarr"))
    extract(ExtractionSpec(run, sdnet, bank, PREPROCESS, shard_slices=8), ExtractionActors(cpus=0.5))
    return str(folder / "run")


def stream_config(run: str, **changes: Any) -> StreamConfig:
    values: dict[str, Any] = {
        "run": run,
        "bank": f"{run}/bank.zarr",
        "preprocess": PREPROCESS,
        "plan": PlanConfig(),
        "seed": 0,
        "semi_supervised": True,
        "ra": True,
        "fa": True,
        "batch_size": 4,
    }
    return StreamConfig(**values | changes)


Stream = list[dict[str, Any]]


def streamed(config: StreamConfig, steps: range, actors: int = 1) -> Stream:
    """The batches of these steps, copied out."""
    names = ("image", "mask", "labelled", "slice_id")
    return [{n: batch[n].numpy().copy() for n in names} for batch in batches(config, steps, actors=actors, cpus=0.5)]


def assert_same(found: Stream, expected: Stream) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def whole(run: str) -> Stream:
    """The stream's first steps as two actors make them."""
    return streamed(stream_config(run), range(24), actors=2)


def test_the_stream_is_the_same_bytes_for_any_number_of_actors(run: str, whole: Stream) -> None:
    made = SampleMaker(stream_config(run))({"step": np.arange(24)})  # by none
    for name in ("image", "mask", "labelled", "slice_id"):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in whole]), made[name])


def test_a_stream_that_starts_later_gives_the_later_samples(run: str, whole: Stream) -> None:
    assert_same(streamed(stream_config(run), range(13, 21)), whole[13:21])


def test_a_step_holds_labelled_then_unlabelled_samples_of_training_subjects_alone(run: str, whole: Stream) -> None:
    store = SliceStore.open(run)
    for batch in whole:
        assert batch["labelled"].tolist() == [True] * 4 + [False] * 4
        assert batch["image"].shape == (8, 1, 64, 64)
        assert np.abs(batch["image"]).max() <= 1 + 1e-6  # interpolation rounds
        ids = batch["slice_id"]
        assert set(store.column("split")[ids]) == {"train"}
        assert store.column("labelled")[ids].tolist() == batch["labelled"].tolist()
        assert batch["mask"][4:].max() == 0


def test_a_real_sample_without_augmentation_is_the_working_slice_itself(run: str) -> None:
    from pipeline.samples.preprocess import centre_crop, working_slice

    maker = SampleMaker(stream_config(run, fa=False, ra=False))
    sample = maker.plan.labelled(0)
    image, mask = maker.make(sample)
    expected = working_slice(maker.store, sample.slice_id, PREPROCESS)
    np.testing.assert_allclose(image, centre_crop(expected.image, 64, float(expected.image.min())), atol=1e-6)
    np.testing.assert_array_equal(mask, centre_crop(expected.mask, 64, 0))


def test_a_synthesized_sample_keeps_the_mask_of_its_anatomy_and_takes_another_image(run: str) -> None:
    fa, real = SampleMaker(stream_config(run)), SampleMaker(stream_config(run, fa=False))
    index = next(i for i in range(10) if fa.plan.labelled(i).donor_id is not None)
    drawn, drawn_mask = fa.make(fa.plan.labelled(index))
    image, mask = real.make(real.plan.labelled(index))
    np.testing.assert_array_equal(drawn_mask, mask)
    assert np.abs(drawn - image).mean() > 0.01


def test_rescaling_before_drawing_makes_another_image_of_the_same_heart(run: str) -> None:
    makers = [SampleMaker(stream_config(run, plan=PlanConfig(fa_order=o))) for o in ("fa_first", "ra_first")]
    index = next(i for i in range(10) if makers[0].plan.labelled(i).donor_id is not None)
    samples = [m.plan.labelled(index) for m in makers]
    assert samples[0] == samples[1]
    (drawn, mask), (redrawn, other_mask) = (m.make(s) for m, s in zip(makers, samples, strict=True))
    np.testing.assert_array_equal(mask, other_mask)
    assert np.abs(drawn - redrawn).mean() > 1e-3  # AdaIN averages over another field
    assert np.corrcoef(drawn.ravel(), redrawn.ravel())[0, 1] > 0.5  # yet it is the same heart


def test_augmentation_of_unlabelled_samples_is_a_choice(run: str) -> None:
    plan = PlanConfig(ra_unlabelled=False, fa_anatomy="labelled")
    steps = SampleMaker(stream_config(run, plan=plan)).plan
    assert steps.unlabelled is not None
    rest = [steps.unlabelled(i) for i in range(20)]
    assert all(s.donor_id is None and s.area is None for s in rest)
    labelled = [steps.labelled(i) for i in range(20)]
    assert sum(s.donor_id is not None for s in labelled) == 10 and all(s.area is not None for s in labelled)


def test_the_fa_arm_refuses_a_bank_that_does_not_fit(run: str) -> None:
    store = SliceStore.open(run)
    with pytest.raises(InputError, match="needs a factor bank"):
        SampleMaker(stream_config(run, bank=None))
    with pytest.raises(InputError, match="another preprocessing"):
        SampleMaker(stream_config(run, preprocess=PreprocessConfig(size=96)))
    with pytest.raises(InputError, match="another bank now than when the arm began; give the same command again"):
        SampleMaker(stream_config(run, bank_name="that of another content"))
    assert step_plan(stream_config(run, fa=False), store).labelled.fa_share == 0


@pytest.mark.parametrize("column", ["width", "row_mm"])
def test_a_bank_with_another_patients_slices_of_the_same_names_lacks_the_runs(run: str, column: str) -> None:
    store = SliceStore.open(run)
    field = store.table.schema.field(column)
    larger = pa.array(store.table[column].to_numpy() * 2, field.type)
    other = store.table.set_column(store.table.schema.get_field_index(column), field, larger)
    trained = int((store.column("split") == "train").sum())
    with pytest.raises(InputError, match=f"lacks {trained} of the run's training slices, or has others of the same"):
        open_bank(stream_config(run), SliceStore(run, other))


def test_every_arm_has_a_plan_before_there_is_a_bank(run: str) -> None:
    """It is what a run is checked by before its SDNet is trained."""
    for policy in ("mix", "own", "styles"):
        config = stream_config(run, twins=True, plan=PlanConfig(fa_policy=policy))
        assert step_plan(config, SliceStore.open(run)).labelled.fa_share == 0


@pytest.mark.parametrize("split", ["validation", "test", "excluded"])
def test_the_fa_arm_refuses_a_bank_with_a_subject_that_this_run_does_not_train_on(run: str, split: str) -> None:
    store = SliceStore.open(run)
    in_bank = store.column("subject")[store.column("split") == "train"]
    subject = str(in_bank[0])
    splits = pa.array(np.where(store.column("subject") == subject, split, store.column("split")).tolist())
    column = store.table.schema.get_field_index("split")
    moved = SliceStore(run, store.table.set_column(column, "split", splits))
    with pytest.raises(InputError, match=f"holds {subject}, which this run validates or tests on, or excludes"):
        open_bank(stream_config(run), moved)


def split_by(run: str, **options: Any) -> SliceStore:
    """The run's slices, as if these options had split them."""
    table = SliceStore.open(run).table
    about = {**table.schema.metadata, LAYOUTS_KEY: LayoutOptions(**options).model_dump_json()}
    return SliceStore(run, table.replace_schema_metadata(about))


@pytest.mark.parametrize(
    ("protocol", "vendor", "refused"),
    [
        ("leave_one_vendor_out", "C", "C"),
        ("leave_one_vendor_out", "siemens", "A"),
        ("source_only", "B", "A"),
        ("leave_one_vendor_out", "D", None),
    ],
)
def test_the_fa_arm_refuses_a_bank_with_a_vendor_that_the_protocol_keeps_out(
    run: str, protocol: str, vendor: str, refused: str | None
) -> None:
    store = split_by(run, protocol=protocol, protocol_vendor=vendor)
    if refused is None:
        assert open_bank(stream_config(run), store) is not None
        return
    line = f"holds vendor {refused}, which may not train under {protocol} {vendor}; use a bank, and styles, without"
    for policy in ("mix", "styles"):
        with pytest.raises(InputError, match=line):
            open_bank(stream_config(run, plan=PlanConfig(fa_policy=policy)), store)


def with_styles(run: str, folder: Path, vendor: str = "Z") -> str:
    """A copy of the run's bank that has its own codes, each number one higher, as imported styles of another vendor."""
    bank, out = shutil.copytree(Path(run) / "bank.zarr", folder / "bank.zarr"), folder / "styles.parquet"
    export_styles(FactorBank.open(str(bank)), str(out))
    styles = pq.read_table(out)
    others = pa.array([[v + 1 for v in row] for row in styles["modality"].to_pylist()], styles["modality"].type)
    styles = styles.set_column(styles.column_names.index("modality"), styles.schema.field("modality"), others)
    vendors = pa.array([vendor] * styles.num_rows)
    pq.write_table(styles.set_column(styles.column_names.index("vendor"), styles.schema.field("vendor"), vendors), out)
    import_styles(str(out), FactorBank.open(str(bank)))
    return str(bank)


def test_imported_styles_of_a_vendor_that_is_left_out_are_for_the_arm_that_is_named_after_them(
    run: str, tmp_path: Path
) -> None:
    bank = with_styles(run, tmp_path)
    store = split_by(run, protocol="leave_one_vendor_out", protocol_vendor="Z")
    with pytest.raises(InputError, match="holds vendor Z, which may not train under leave_one_vendor_out Z"):
        open_bank(stream_config(run, bank=bank), store)
    for allowed, config in ((store, PlanConfig(fa_policy="styles")), (split_by(run), PlanConfig())):
        assert open_bank(stream_config(run, bank=bank, plan=config), allowed) is not None


def test_drawing_in_bfloat16_is_a_choice_and_stays_near(run: str) -> None:
    makers = [SampleMaker(stream_config(run, plan=PlanConfig(fa_precision=p))) for p in ("fp32", "bf16")]
    index = next(i for i in range(10) if makers[0].plan.labelled(i).donor_id is not None)
    (drawn, _), (near, _) = (m.make(m.plan.labelled(index)) for m in makers)
    assert 0 < np.abs(drawn - near).max() < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": PlanConfig(fa_policy="own")},
        {"plan": PlanConfig(fa_policy="interpolate", fa_guard="intensities")},
        {"plan": PlanConfig(fa_policy="extrapolate")},
        {"plan": PlanConfig(fa_policy="gaussian")},
        {"appearance": "bigaug"},
        {"appearance": "fourier", "fa": False},
        {"appearance": "histogram", "fa": False},
        {"appearance": "mixstyle"},
        {"appearance": "gin", "fa": False, "bank": None},
        pytest.param({"appearance": "nnunet_mirrors", "fa": False}, marks=NNUNET),
        {"plan": PlanConfig(turn_degrees=30, zoom=(0.8, 1.2), elastic=0.3)},
        {"twins": True},
        {"plan": PlanConfig(fa_render="residual")},
        {"plan": PlanConfig(fa_render="residual", fa_order="ra_first")},
        {"plan": PlanConfig(fa_step=(0.5, 2.0), fa_guard="none")},
        {"plan": PlanConfig(fa_render="residual", fa_step=(0.5, 2.0))},
        {"plan": PlanConfig(fa_regions="anatomy"), "fa": False},
        {"plan": PlanConfig(fa_regions="labels"), "fa": False, "bank": None},
        {"plan": PlanConfig(fa_regions="grey"), "appearance": "bigaug"},
        {"plan": PlanConfig(fa_regions="anatomy"), "fa": False, "twins": True},
        {"plan": PlanConfig(turn_degrees=30), "appearance": "bigaug", "fa": False, "bank": None, "twins": True},
    ],
    ids=lambda changes: "-".join(
        str(value)
        for name, field in changes.items()
        for value in ([name] if name != "plan" else field.model_dump(exclude_defaults=True).values())
    ),
)
def test_what_goes_beyond_the_paper_is_a_function_of_the_index_too_and_leaves_the_masks(
    run: str, changes: dict[str, Any]
) -> None:
    config = stream_config(run, sdnet=f"{run}/sdnet", **changes)
    paper = SampleMaker(stream_config(run, fa=config.fa))({"step": np.arange(4)})
    made, later = SampleMaker(config)({"step": np.arange(4)}), SampleMaker(config)({"step": np.array([3])})
    for name in set(made) & {"image", "mask", "twin"}:
        np.testing.assert_array_equal(made[name][-8:], later[name])
    moves = config.plan.moves or config.appearance in appearance.NNUNET
    assert np.array_equal(made["mask"], paper["mask"]) != moves
    assert np.abs(made["image"]).max() <= 1 + 1e-6 and 0 <= made["rejected"].mean() <= 1
    differ = np.abs(made["image"] - paper["image"]).mean(axis=(1, 2, 3)) > 1e-4
    if config.twins:
        assert config.plan.fa_regions != "none" or config.appearance != "none" or not differ.any()
        twins = np.abs(made["twin"] - made["image"]).mean(axis=(1, 2, 3)) > 1e-4
        assert not twins[made["labelled"]].any() and twins[~made["labelled"]].mean() > 0.5
    else:
        assert differ.mean() > 0.1


def test_a_bank_from_elsewhere_gives_the_modalities_to_the_runs_own_anatomies(run: str, tmp_path: Path) -> None:
    lender = write_lender(f"{run}/bank.zarr", tmp_path / "lender.zarr", vendor="far")
    steps = {"step": np.arange(4)}
    own, borrowed = (SampleMaker(stream_config(run, donors=donors)) for donors in (None, lender))
    assert borrowed.drawing is not None and own.drawing is not None
    np.testing.assert_array_equal(borrowed.drawing.donors.modality, own.drawing.donors.modality + 1.0)
    one, other = own(steps), borrowed(steps)
    np.testing.assert_array_equal(one["mask"], other["mask"])
    sample = next(s for i in range(9) if (s := borrowed.plan.labelled(i)).donor_id is not None)
    expected = borrowed.drawing.decoded(
        own.anatomy(sample.slice_id), own.drawing.donors.modality[sample.donor_id] + 1.0
    )
    source = own.working(sample.slice_id)
    crop, _ = resample_crop(
        expected, source.mask, own.scale(sample, source.area), PREPROCESS.size, float(expected.min())
    )
    np.testing.assert_array_equal(borrowed.make(sample)[0], crop)


def test_an_arm_that_draws_with_each_slices_own_code_takes_none_from_a_lent_bank(run: str, tmp_path: Path) -> None:
    from experiments.config import demo
    from experiments.run.jobs import arm_stream

    lender = write_lender(f"{run}/bank.zarr", tmp_path / "lender.zarr", vendor="far")
    settings = demo().model_copy(update={"bank": lender, "pretrained": f"{run}/sdnet"})
    assert arm_stream(run, settings, "ss_sdnet_ra_fa").donors == lender
    assert arm_stream(run, settings, "ss_sdnet_ra_rec").donors is None


@pytest.mark.parametrize("order", ["fa_first", "ra_first"])
def test_residual_images_with_their_own_codes_are_the_real_ones(run: str, order: Any) -> None:
    plan = PlanConfig(fa_policy="own", fa_render="residual", fa_order=order, fa_share=1.0)
    steps = {"step": np.arange(6)}
    drawn, real = (SampleMaker(stream_config(run, plan=plan, fa=fa))(steps)["image"] for fa in (True, False))
    np.testing.assert_allclose(drawn, real, rtol=0, atol=1e-6)


def test_a_step_of_one_is_the_donors_code_to_the_bit_and_of_none_the_slices_own(run: str) -> None:
    steps = {"step": np.arange(4)}

    def images(**plan: Any) -> Any:
        return SampleMaker(stream_config(run, plan=PlanConfig(fa_guard="none", **plan)))(steps)["image"]

    np.testing.assert_array_equal(images(fa_step=(1.0, 1.0)), images())
    np.testing.assert_allclose(images(fa_step=(0.0, 0.0)), images(fa_policy="own"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["mix", "styles"])
def test_a_residual_image_differs_from_the_real_one_by_what_the_code_changes(
    run: str, tmp_path: Path, policy: Any
) -> None:
    bank = with_styles(run, tmp_path) if policy == "styles" else f"{run}/bank.zarr"
    plan = PlanConfig(fa_render="residual", fa_share=1.0, fa_policy=policy)
    maker = SampleMaker(stream_config(run, plan=plan, ra=False, bank=bank))
    sample = maker.plan.labelled(0)
    assert maker.drawing is not None and sample.donor_id is not None
    assert policy == "mix" or sample.donor_id >= len(FactorBank.open(bank).index)  # styles come after the slices
    draw = maker.drawing.decoded
    own = maker.drawing.donors.modality[maker._row_of[sample.slice_id]]
    anatomy, real = maker.anatomy(sample.slice_id), maker.working(sample.slice_id).image
    change = draw(anatomy, maker.drawing.donors.modality[sample.donor_id]) - draw(anatomy, own)
    drawn = (real + change).clip(-1, 1)
    mask = maker.working(sample.slice_id).mask
    expected, _ = resample_crop(drawn, mask, 1.0, PREPROCESS.size, float(drawn.min()))
    image, _ = maker.make(sample)
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-5)


def test_regions_of_labels_leave_unlabelled_slices_alone_and_change_half_of_the_others(run: str) -> None:
    steps = {"step": np.arange(20)}
    plain = SampleMaker(stream_config(run, fa=False))(steps)
    looks = SampleMaker(stream_config(run, fa=False, plan=PlanConfig(fa_regions="labels")))(steps)
    differ = np.abs(looks["image"] - plain["image"]).max(axis=(1, 2, 3)) > 1e-4
    assert not differ[~plain["labelled"]].any()
    assert 0.3 < differ[plain["labelled"]].mean() < 0.7


def test_a_policy_that_cannot_be_had_is_refused(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "batchgeneratorsv2", None)
    with pytest.raises(InputError, match=r"pip install 'cardiomix\[nnunet\]'"):
        SampleMaker(stream_config(run, fa=False, appearance="nnunet"))
    with pytest.raises(InputError, match="no imported styles"):
        SampleMaker(stream_config(run, plan=PlanConfig(fa_policy="styles")))
    with pytest.raises(InputError, match="needs the SDNet that made the bank"):
        SampleMaker(stream_config(run, plan=PlanConfig(fa_policy="gaussian")))


def test_workers_that_cannot_share_a_step_evenly_are_refused(run: str) -> None:
    with pytest.raises(InputError, match="5 workers cannot share 4 labelled"):
        next(batches(stream_config(run, semi_supervised=False), range(4), rank=0, world=5))


def dying(at: int, times: int, marks: Path) -> type:
    """A maker whose process ends at a sample of slice `at`, the first `times` times that any maker gets there."""

    class Dying(SampleMaker):
        def make(self, sample: Any) -> Any:
            if sample.slice_id == at:
                already = len(list(marks.iterdir()))
                if already < times:
                    (marks / str(already)).touch()
                    os._exit(1)
            return super().make(sample)

    return Dying


@pytest.mark.slow
def test_a_slice_that_ends_every_maker_is_given_up_by_name(run: str, tmp_path: Path) -> None:
    config = stream_config(run)
    maker = SampleMaker(config)
    at = maker.plan.labelled(14).slice_id
    names = [maker.store.column(name)[at] for name in ("slice", "frame", "subject")]
    told = "slice {} of frame {} of subject {} ended 3 makers of samples".format(*names)
    with pytest.raises(FinalError, match=told):  # final: another try of the arm would end as many makers again
        list(batches(config, range(40), actors=2, cpus=0.25, maker=dying(at, 10**6, tmp_path)))


@pytest.mark.slow
def test_makers_that_die_now_and_then_change_nothing(run: str, tmp_path: Path) -> None:
    config = stream_config(run)
    at = SampleMaker(config).plan.labelled(14).slice_id
    whole = [b["image"].numpy().copy() for b in batches(config, range(20), cpus=0.25)]
    # two deaths at one block, and a third that the samples one by one do not repeat
    torn = batches(config, range(20), actors=2, cpus=0.25, maker=dying(at, 3, tmp_path))
    np.testing.assert_array_equal(np.stack(whole), np.stack([b["image"].numpy().copy() for b in torn]))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_maker_without_a_place_holds_up_none_that_has_one(run: str, whole: Stream) -> None:
    told: list[str] = []
    config, patience = stream_config(run), Patience(0.1, told.append)
    made, found = batches(config, range(24), actors=2, cpus=3.0, stream_mb=1, patience=patience), []  # of four CPUs
    for batch in made:
        found.append({name: batch[name].numpy().copy() for name in whole[0]})
        if len(found) == 1:
            time.sleep(3)  # longer than the patience's look: by then both could have had a place
    assert_same(found, whole)
    assert any("the others make its share" in line for line in told)


def test_a_damaged_bank_and_a_maker_that_cannot_start_are_told_at_once(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(SampleMaker):
        def __init__(self, *_: Any) -> None:
            raise RuntimeError("no room for the factors")

    with pytest.raises(FinalError, match=r"a maker of samples cannot start: .*no room for the factors"):
        next(batches(stream_config(run), range(4), cpus=0.25, maker=Unable))
    bank = tmp_path / "bank.zarr"
    shutil.copytree(f"{run}/bank.zarr", bank)
    shard = next(path for path in (bank / "anatomy").rglob("*") if path.is_file() and path.name != "zarr.json")
    shard.write_bytes(shard.read_bytes()[:-9])
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))  # where the undamaged bank is not
    with pytest.raises(InputError, match="anatomy"):
        next(batches(stream_config(run, bank=str(bank)), range(4), cpus=0.25))


@pytest.mark.slow
def test_makers_that_no_node_has_room_for_are_given_up(run: str, no_room: None) -> None:
    lines: list[str] = []
    with pytest.raises(FinalError, match=r"samples: waited .* for 0.25 CPUs for a maker of samples"):
        next(batches(stream_config(run), range(4), cpus=0.25, patience=Patience(0.05, lines.append)))
    assert lines


def test_what_the_stream_did_is_told_from_its_batches() -> None:
    import torch

    flow = StreamStats(actors=2)
    for _ in range(3):
        made = {MADE_S: torch.full((4,), 0.05), MADE_AT: torch.full((4,), time.time() - 1.0, dtype=torch.float64)}
        made[REJECTED] = torch.full((4,), 0.25)
        flow.add(made, waited=0.0)
    seen = flow.numbers()
    assert seen["actor_utilisation"] * 2 * seen["train_seconds"] == pytest.approx(0.6)
    assert seen["queue_depth"] * seen["train_seconds"] == pytest.approx(3.0, rel=0.1)
    assert seen["data_wait_fraction"] == 0 and seen["fa_rejected"] == 0.25


def test_noise_in_place_of_every_test_image_changes_no_sample(run: str, whole: Stream) -> None:
    """The plan draws from training slices alone, so the stream's bytes cannot depend on a test image."""
    import zarr

    store = SliceStore.open(run)
    for subject in set(store.column("subject")[store.column("split") == "test"].tolist()):
        array = zarr.open_array(Path(run) / "slices.zarr" / subject / "image", mode="r+")
        array[:] = np.random.default_rng(0).integers(0, 999, array.shape).astype(np.int16)
    made = SampleMaker(stream_config(run))({"step": np.arange(10)})
    for name in ("image", "mask", "labelled", "slice_id"):
        np.testing.assert_array_equal(made[name], np.concatenate([batch[name] for batch in whole[:10]]))
