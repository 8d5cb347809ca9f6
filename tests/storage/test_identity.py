"""A field that is added later changes no hash, no bank's identity and no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from actors.train_job import TrainJob
from experiments.arms import PAPER
from experiments.config import PRESETS, Settings
from storage.identity import added, identity, is_added

FIELDS = Path(__file__).parents[1] / "data" / "fields_0_1_0.json"


class Inner(BaseModel):
    kept: int = 1
    later: float = added(0.5, ge=0)


class Outer(BaseModel):
    name: str = "a"
    inner: Inner = Inner()
    several: tuple[int, ...] = added((1, 2))


def test_added_fields_count_only_where_they_differ_from_their_default() -> None:
    assert identity(Outer()) == {"name": "a", "inner": {"kept": 1}}
    assert identity(Outer(inner=Inner(later=2), several=(3,))) == {
        "name": "a",
        "inner": {"kept": 1, "later": 2},
        "several": [3],
    }
    assert identity(Outer(), exclude={"inner": {"kept"}}) == {"name": "a", "inner": {}}


def fields(model: type[BaseModel]) -> dict[str, Any]:
    """Names of a model's fields; of a field that is a model, its own. Those `added` are left out."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if is_added(model, name):
            continue
        kinds = [k for k in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(k, type)]
        found[name] = {k.__name__: fields(k) for k in kinds if issubclass(k, BaseModel)}
    return found


@pytest.mark.parametrize("model", [Settings, TrainJob])
def test_every_field_since_version_0_1_0_is_declared_as_added(model: type[BaseModel]) -> None:
    assert fields(model) == json.loads(FIELDS.read_text())[model.__name__]


@pytest.mark.parametrize("name", ["demo", "cpu", "paper"])
def test_presets_have_the_hash_that_version_0_1_0_gave_them(name: str) -> None:
    settings = PRESETS[name]()
    # changed on purpose since: an arm more, another normalisation and an average in `cpu`, residual images in `demo`
    plan = settings.plan.model_copy(update={"fa_render": "decode"})
    preprocess = settings.preprocess.model_copy(update={"normalisation": "zscore"})
    train = settings.train.model_copy(update={"ema": None})
    changes = {"arms": tuple(PAPER), "plan": plan, "preprocess": preprocess, "train": train}
    settings = settings.model_copy(update=changes)
    assert settings.config_hash == json.loads(FIELDS.read_text())["hashes"][name]
