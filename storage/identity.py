"""The identity of a configuration: what hashes cover and what is stored beside results.

A finished arm, a bank and a network are recognised by their configuration. If a later version adds a field, its default
must be the earlier behaviour, and the field is declared with `added`. As long as such a field has its default, it is
left out of the identity. So the results of an earlier version are still recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, Field

ADDED: Final = {"added_later": True}


def added(default: Any, **constraints: Any) -> Any:
    """A pydantic field that did not exist in version 0.1.0; `default` must do what that version did."""
    return Field(default, json_schema_extra=dict(ADDED), **constraints)


def is_added(model: type[BaseModel], name: str) -> bool:
    """Whether a field of a model is declared with `added`."""
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and extra.get("added_later") is True


def identity(model: BaseModel, exclude: Mapping[str, Any] | set[str] | None = None) -> dict[str, Any]:
    """The configuration as JSON values, without those fields added later that have their default.

    `exclude` is that of pydantic's `model_dump`: a set of names to leave out, or a dict for nested ones.
    """
    document = model.model_dump(mode="json", exclude=exclude)
    _leave_out_defaults(model, document)
    return document


def _leave_out_defaults(model: BaseModel, document: dict[str, Any]) -> None:
    for name, field in type(model).model_fields.items():
        if name not in document:
            continue
        value = getattr(model, name)
        if is_added(type(model), name) and value == field.get_default(call_default_factory=True):
            del document[name]
        elif isinstance(value, BaseModel):
            _leave_out_defaults(value, document[name])
